// SPDX-License-Identifier: Apache-2.0
// Each rule against numbers worked out by hand, each derivative against central differences.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "check.h"
#include "math/adam.h"
#include "math/rule.h"
#include "math/sgd.h"

namespace {

using namespace torchopt;

/// Compares Vjp<Rule> with central differences of Rule at `in` for the cotangents `bar`.
template <class Rule>
void check_vjp(const typename Rule::Hyper& hyper, int step, const double (&in)[Rule::kInputs],
               const double (&bar)[Rule::kOutputs]) {
    const auto c = Rule::template coefficients<double>(hyper, step);
    double both[Vjp<Rule>::kInputs];
    for (int j = 0; j < Rule::kInputs; ++j) both[j] = in[j];
    for (int i = 0; i < Rule::kOutputs; ++i) both[Rule::kInputs + i] = bar[i];
    double got[Rule::kInputs];
    Vjp<Rule>::apply(c, both, got);
    for (int j = 0; j < Rule::kInputs; ++j) {
        const double h = 1e-6 * std::fmax(std::fabs(in[j]), 1e-2);
        double expected = 0.0;
        for (const double sign : {1.0, -1.0}) {
            double moved[Rule::kInputs];
            double out[Rule::kOutputs];
            for (int k = 0; k < Rule::kInputs; ++k) moved[k] = in[k];
            moved[j] += sign * h;
            Rule::apply(c, moved, out);
            for (int i = 0; i < Rule::kOutputs; ++i) expected += sign * bar[i] * out[i] / (2 * h);
        }
        CHECK_NEAR(got[j], expected, 2e-7);
    }
}

void test_adam_first_step_is_the_sign_of_the_gradient() {
    const auto c = Adam::coefficients<double>({0.9, 0.999, 0.0, 0.0}, 1);
    const double in[3] = {-3.0, 0.0, 0.0};
    double out[3];
    Adam::apply(c, in, out);
    CHECK_NEAR(out[0], -1.0, 1e-14);
    CHECK_NEAR(out[1], -0.3, 1e-14);
    CHECK_NEAR(out[2], 0.009, 1e-13);
}

void test_adam_second_step() {
    // g = 1 then 2: mu = .9*.1 + .1*2 = .29, nu = .999*.001 + .001*4 = .004999; divided by .19 and .001999.
    const auto c = Adam::coefficients<double>({0.9, 0.999, 1e-8, 1e-3}, 2);
    const double in[3] = {2.0, 0.1, 0.001};
    double out[3];
    Adam::apply(c, in, out);
    CHECK_NEAR(out[1], 0.29, 1e-14);
    CHECK_NEAR(out[2], 0.004999, 1e-14);
    CHECK_NEAR(out[0], (0.29 / 0.19) / (std::sqrt(0.004999 / 0.001999 + 1e-3) + 1e-8), 1e-12);
}

void test_adam_float_uses_an_accurate_bias_correction() {
    const auto c = Adam::coefficients<float>({0.9, 0.999, 0.0, 0.0}, 1);
    CHECK_NEAR(static_cast<double>(c.nu_scale), 1000.0, 1e-7);
}

void test_adam_derivative() {
    for (const double eps : {1e-8, 1e-2, 0.1})
        for (const double eps_root : {0.0, 1e-8, 1e-3})
            for (const int step : {1, 2, 10}) {
                check_vjp<Adam>({0.9, 0.999, eps, eps_root}, step, {0.7, -0.2, 0.05},
                                {1.3, -0.4, 0.9});
                check_vjp<Adam>({0.5, 0.9, eps, eps_root}, step, {-1.2, 0.3, 0.6},
                                {-0.2, 1.0, 0.3});
            }
}

void test_adam_derivative_of_the_update_is_zero_where_the_root_is_zero() {
    const auto c = Adam::coefficients<double>({0.9, 0.999, 1e-8, 0.0}, 3);
    const double in[6] = {0.0, 0.0, 0.0, 5.0, 0.0, 0.0};
    double out[3];
    Vjp<Adam>::apply(c, in, out);
    for (const double x : out) CHECK_NEAR(x, 0.0, 0.0);
    const double through_mu[6] = {0.0, 0.0, 0.0, 5.0, 2.0, 0.0};
    Vjp<Adam>::apply(c, through_mu, out);
    CHECK_NEAR(out[0], 0.2, 1e-15);
    CHECK_NEAR(out[1], 1.8, 1e-15);
}

void test_adam_derivative_is_finite_at_zero_with_eps_root() {
    check_vjp<Adam>({0.9, 0.999, 1e-8, 0.5}, 3, {0.0, 0.2, 0.0}, {1.0, 0.5, 0.25});
}

void test_adamw_adds_decay_after_scaling() {
    const auto c = AdamW::coefficients<double>({{0.9, 0.999, 0.0, 0.0}, 0.25}, 1);
    const double in[4] = {2.0, 0.0, 0.0, 8.0};
    double out[3];
    AdamW::apply(c, in, out);
    CHECK_NEAR(out[0], 1.0 + 2.0, 1e-13);
    check_vjp<AdamW>({{0.9, 0.999, 1e-2, 1e-3}, 0.25}, 4, {0.7, -0.2, 0.05, 1.1}, {1.3, -0.4, 0.9});
}

void test_momentum() {
    const MomentumHyper hyper{0.9, 0.5};
    const double in[2] = {1.0, 2.0};
    double out[2];
    Momentum<false>::apply(Momentum<false>::coefficients<double>(hyper, 2), in, out);
    CHECK_NEAR(out[1], 2.3, 1e-15);
    CHECK_NEAR(out[0], 2.3, 1e-15);
    Momentum<true>::apply(Momentum<true>::coefficients<double>({0.9, 0.0}, 2), in, out);
    CHECK_NEAR(out[0], 1.0 + 0.9 * 2.8, 1e-15);
    const double start[2] = {1.0, 0.0};
    Momentum<false>::apply(Momentum<false>::coefficients<double>(hyper, 1), start, out);
    CHECK_NEAR(out[0], 1.0, 0.0);
    check_vjp<Momentum<false>>(hyper, 2, {0.3, -0.7}, {1.5, 0.4});
    check_vjp<Momentum<true>>({0.9, 0.0}, 2, {0.3, -0.7}, {1.5, 0.4});
}

}  // namespace

int main() {
    test_adam_first_step_is_the_sign_of_the_gradient();
    test_adam_second_step();
    test_adam_float_uses_an_accurate_bias_correction();
    test_adam_derivative();
    test_adam_derivative_of_the_update_is_zero_where_the_root_is_zero();
    test_adam_derivative_is_finite_at_zero_with_eps_root();
    test_adamw_adds_decay_after_scaling();
    test_momentum();
    if (torchopt::test::failures == 0) std::puts("ok");
    return torchopt::test::failures == 0 ? 0 : 1;
}
