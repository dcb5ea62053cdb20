// SPDX-License-Identifier: Apache-2.0
// Compares rules with numbers worked out by hand, and every derivative with central differences.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <type_traits>

#include "check.h"
#include "math/rules.h"

namespace {

using namespace torchopt;

/// Compares HyperVjp<Rule> with central differences of the decayed update: inputs, then hyper-parameters.
template <class Rule>
void check_vjp(const double (&h)[Chain<Rule>::kHypers], std::int64_t step) {
    using Primal = Forward<Rule, Form::kDecayedUpdate>;
    constexpr int kIn = Primal::kInputs;
    constexpr int kOut = Primal::kOutputs;
    double in[kIn + kOut];
    for (int j = 0; j < kIn; ++j) in[j] = 0.7 + 0.13 * j;
    for (int i = 0; i < kOut; ++i) in[kIn + i] = 1.3 - 0.8 * i;
    double got[kIn + HyperVjp<Rule>::kSums];
    HyperVjp<Rule>::apply(settings<double, Rule>(h, true, step), in, got);
    double hyper[Chain<Rule>::kHypers] = {};
    pull_back_coefficients<Rule>(h, step, got + kIn, hyper);
    double plain[kIn];
    Vjp<Rule, Form::kDecayedUpdate>::apply(settings<double, Rule>(h, true, step), in, plain);
    for (int j = 0; j < kIn; ++j) CHECK_NEAR(got[j], plain[j], 1e-13);

    for (int j = 0; j < kIn + Chain<Rule>::kHypers; ++j) {
        const double delta = 1e-6;
        double expected = 0.0;
        for (const double sign : {1.0, -1.0}) {
            double moved[kIn + kOut];
            double moved_h[Chain<Rule>::kHypers];
            double out[kOut];
            for (int k = 0; k < kIn; ++k) moved[k] = in[k];
            for (int k = 0; k < Chain<Rule>::kHypers; ++k) moved_h[k] = h[k];
            (j < kIn ? moved[j] : moved_h[j - kIn]) += sign * delta;
            Primal::apply(settings<double, Rule>(moved_h, true, step), moved, out);
            for (int i = 0; i < kOut; ++i) expected += sign * in[kIn + i] * out[i] / (2 * delta);
        }
        CHECK_NEAR(j < kIn ? got[j] : hyper[j - kIn], expected, 2e-6);
    }
}

/// Compares a hand-written derivative with that from dual numbers, over magnitudes, signs and zero radicands.
template <class Rule, Form kForm>
void check_by_hand(const double (&h)[Chain<Rule>::kHypers], double tolerance) {
    using Hand = HandVjp<Rule, kForm>;
    using ByDuals = DualVjp<Rule, kForm>;
    static_assert(std::is_same_v<Vjp<Rule, kForm>, Hand>);
    for (const std::int64_t step : {1, 2, 1000}) {
        for (const double size : {0.0, 1e-18, 1e-4, 1.0, 1e6}) {
            double in[Hand::kInputs];
            for (int j = 0; j < Hand::kInputs; ++j) in[j] = std::cos(1.0 + 2.3 * j);
            in[0] *= size;                           // the gradient
            in[1] *= size;                           // mu
            in[2] = std::fabs(in[2]) * size * size;  // nu
            const auto s = settings<double, Rule>(h, true, step);
            double got[Hand::kOutputs];
            double expected[Hand::kOutputs];
            Hand::apply(s, in, got);
            ByDuals::apply(s, in, expected);
            for (int j = 0; j < Hand::kOutputs; ++j)
                CHECK_NEAR(got[j], expected[j], tolerance * std::fmax(1.0, std::fabs(expected[j])));
        }
    }
}

void test_derivatives_by_hand() {
    check_by_hand<Adam, Form::kUpdate>({0.1, 0.0, 0.0, 0.9, 0.99, 1e-3, 1e-4}, 1e-13);
    check_by_hand<Adam, Form::kUpdate>({0.1, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0}, 1e-8);
    check_by_hand<Adam, Form::kUpdate>({0.1, 0.0, 0.0, 0.5, 0.6, 1e-8, 0.0}, 1e-8);
    check_by_hand<Adam, Form::kDecayedUpdate>({0.1, 0.05, 0.02, 0.9, 0.99, 1e-3, 1e-4}, 1e-13);
    check_by_hand<Adamax, Form::kUpdate>({0.1, 0.0, 0.0, 0.9, 0.99, 1e-3}, 1e-13);
    check_by_hand<Adamax, Form::kDecayedUpdate>({0.1, 0.05, -0.0, 0.9, 0.99, 1e-3}, 1e-13);
}

/// If both arguments of a maximum are equal, each gets half of the cotangent.
void test_equal_sides_of_a_maximum() {
    const auto s = settings<double, Adamax>({-1.0, 0.0, 0.0, 0.0, 0.5, 0.0}, false, 1);
    const double in[] = {0.5, 0.0, 1.0, 1.0, 0.0, 4.0};  // u = g / max(nu / 2, |g|)
    double by_hand[3];
    double by_duals[3];
    HandVjp<Adamax, Form::kUpdate>::apply(s, in, by_hand);
    DualVjp<Adamax, Form::kUpdate>::apply(s, in, by_duals);
    const double expected[] = {2.0 + 1.0, 0.0, 0.5};
    for (int j = 0; j < 3; ++j) {
        CHECK_NEAR(by_hand[j], expected[j], 1e-15);
        CHECK_NEAR(by_duals[j], expected[j], 1e-15);
    }
}

/// A decay of -0 means no decay: infinities and NaN stay in their elements.
void test_no_decay() {
    const auto s = settings<double, Adam>({0.1, -0.0, 0.5, 0.9, 0.99, 1e-3, 0.0}, false, 1);
    const double in[] = {std::nan(""), 0.0, 0.0, 0.3, 1.0, 0.0, 0.0};
    double out[4];
    Vjp<Adam, Form::kDecayedUpdate>::apply(s, in, out);
    CHECK_NEAR(out[3], -0.05, 1e-15);
    DualVjp<Adam, Form::kDecayedUpdate>::apply(s, in, out);
    CHECK_NEAR(out[3], -0.05, 1e-15);
    const auto none = settings<double, Adam>({0.1, 0.0, -0.0, 0.9, 0.99, 1e-3, 0.0}, false, 1);
    const double infinite[] = {1.0, 0.0, 0.0, -HUGE_VAL};
    Forward<Adam, Form::kDecayedUpdate>::apply(none, infinite, out);
    CHECK_TRUE(std::isnan(out[0]));  // 0 times the parameter
}

void test_adam_by_hand() {
    // g = 1 then 2: mu = .9*.1 + .1*2 = .29, nu = .999*.001 + .001*4 = .004999; divided by .19 and .001999.
    const double h[7] = {0.5, 0.0, 0.0, 0.9, 0.999, 1e-8, 1e-3};
    const double in[3] = {2.0, 0.1, 0.001};
    double out[3];
    Forward<Adam, Form::kUpdate>::apply(settings<double, Adam>(h, false, 2), in, out);
    CHECK_NEAR(out[1], 0.29, 1e-14);
    CHECK_NEAR(out[2], 0.004999, 1e-14);
    const double u = (0.29 / 0.19) / (std::sqrt(0.004999 / 0.001999 + 1e-3) + 1e-8);
    CHECK_NEAR(out[0], -0.5 * u, 1e-12);
}

void test_float_uses_an_accurate_bias_correction() {
    const double h[7] = {1.0, 0.0, 0.0, 0.9, 0.999, 0.0, 0.0};
    const auto s = settings<float, Adam>(h, false, 1);
    CHECK_NEAR(static_cast<double>(s.c.rule.nu_scale), 1000.0, 1e-7);
}

void test_decays() {
    const double h[3] = {0.1, 0.5, 0.25};
    const double in[2] = {2.0, 8.0};
    double out[1];
    Forward<Sgd, Form::kDecayedUpdate>::apply(settings<double, Sgd>(h, true, 1), in, out);
    CHECK_NEAR(out[0], -0.1 * (-2.0 + 4.0 + 2.0), 1e-15);
    Forward<Sgd, Form::kDecayedStep>::apply(settings<double, Sgd>(h, true, 1), in, out);
    CHECK_NEAR(out[0], 8.0 - 0.4, 1e-15);
}

void test_momentum_by_hand() {
    const double h[5] = {-1.0, 0.0, 0.0, 0.9, 0.5};
    const double in[2] = {1.0, 2.0};
    double out[2];
    Forward<Momentum<false>, Form::kUpdate>::apply(settings<double, Momentum<false>>(h, false, 2),
                                                   in, out);
    CHECK_NEAR(out[0], 2.3, 1e-15);
    Forward<Momentum<true>, Form::kUpdate>::apply(settings<double, Momentum<true>>(h, false, 2), in,
                                                  out);
    CHECK_NEAR(out[0], 3.07, 1e-15);
}

void test_rprop_by_hand() {
    const double h[7] = {1.0, 0.0, 0.0, 0.5, 1.2, 0.3, 0.55};
    const double gradients[4] = {2.0, -2.0, 2.0, 0.0};
    const double sizes[4] = {0.4, 0.5, 0.54, 0.2};
    // The step size grows; the sign changes, so there is no step and the size shrinks to the smallest; grows to the
    // largest; is raised to the smallest.
    const double expected[4][3] = {
        {-0.48, 2.0, 0.48}, {0.0, 0.0, 0.3}, {-0.55, 2.0, 0.55}, {0.0, 0.0, 0.3}};
    for (int i = 0; i < 4; ++i) {
        const double in[3] = {gradients[i], 1.0, sizes[i]};
        double out[3];
        Forward<Rprop, Form::kUpdate>::apply(settings<double, Rprop>(h, false, 1), in, out);
        for (int k = 0; k < 3; ++k) CHECK_NEAR(out[k], expected[i][k], 1e-15);
    }
}

void test_asgd_by_hand() {
    // The third step: eta = 0.5 / (1 + 0.1 * 0.5 * 2)^0.75; the average of iterates 2 and 3.
    const double h[7] = {1.0, 0.0, 0.0, 0.5, 0.1, 0.75, 0.0};
    const double in[3] = {2.0, 7.0, 4.0};
    double out[2];
    Forward<Asgd, Form::kDecayedUpdate>::apply(settings<double, Asgd>(h, false, 3), in, out);
    const double u = 0.5 / std::pow(1.1, 0.75) * 2.4;
    CHECK_NEAR(out[0], -u, 1e-15);
    CHECK_NEAR(out[1], 7.0 + (4.0 - u - 7.0) / 2.0, 1e-14);
    Forward<Asgd, Form::kStep>::apply(settings<double, Asgd>(h, false, 3), in, out);
    CHECK_NEAR(out[0], 4.0 - u, 1e-14);
}

void test_derivative_is_zero_where_the_root_is_zero() {
    const double h[7] = {-1.0, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0};
    const double in[6] = {0.0, 0.0, 0.0, 5.0, 2.0, 0.0};
    double out[3];
    Vjp<Adam, Form::kUpdate>::apply(settings<double, Adam>(h, false, 3), in, out);
    CHECK_NEAR(out[0], 0.2, 1e-15);
    CHECK_NEAR(out[1], 1.8, 1e-15);
    CHECK_NEAR(out[2], 0.0, 0.0);
}

}  // namespace

int main() {
    test_derivatives_by_hand();
    test_equal_sides_of_a_maximum();
    test_no_decay();
    test_adam_by_hand();
    test_float_uses_an_accurate_bias_correction();
    test_decays();
    test_momentum_by_hand();
    test_rprop_by_hand();
    test_asgd_by_hand();
    test_derivative_is_zero_where_the_root_is_zero();
    for (const std::int64_t step : {1, 4, 50}) {
        check_vjp<Sgd>({0.1, 0.05, 0.02}, step);
        check_vjp<Momentum<false>>({0.1, 0.05, 0.02, 0.9, 0.3}, step);
        check_vjp<Momentum<true>>({0.1, 0.05, 0.02, 0.9, 0.0}, step);
        check_vjp<Adam>({0.1, 0.05, 0.02, 0.9, 0.99, 1e-3, 1e-4}, step);
        check_vjp<AmsGrad>({0.1, 0.05, 0.02, 0.9, 0.99, 1e-3, 1e-4}, step);
        check_vjp<NAdam>({0.1, 0.05, 0.02, 0.9, 0.99, 1e-3, 1e-4, 0.004, 0.4}, step);
        check_vjp<RAdam>({0.1, 0.05, 0.02, 0.9, 0.99, 1e-3}, step);
        check_vjp<Adan>({0.1, 0.05, 0.02, 0.9, 0.95, 0.99, 1e-3}, step);
        check_vjp<AdEMAMix>({0.1, 0.05, 0.02, 0.9, 0.99, 0.999, 2.0, 1e-3, 0.0}, step);
        check_vjp<AdEMAMix>({0.1, 0.05, 0.02, 0.9, 0.99, 0.999, 2.0, 1e-3, 20.0}, step);
        check_vjp<AdaBelief>({0.1, 0.05, 0.02, 0.9, 0.99, 1e-3}, step);
        check_vjp<Adamax>({0.1, 0.05, 0.02, 0.9, 0.99, 1e-3}, step);
        check_vjp<RmsProp<false>>({0.1, 0.05, 0.02, 0.9, 1e-3}, step);
        check_vjp<rules::rmsprop_momentum>({0.1, 0.05, 0.02, 0.9, 1e-3, 0.9, 0.3}, step);
        check_vjp<Adagrad>({0.1, 0.05, 0.02, 1e-3}, step);
        check_vjp<Adadelta>({0.1, 0.05, 0.02, 0.9, 1e-3}, step);
        check_vjp<Lion>({0.1, 0.05, 0.02, 0.9, 0.99}, step);
        check_vjp<Rprop>({0.1, 0.05, 0.02, 0.5, 1.2, 1e-6, 50.0}, step);
        check_vjp<Rprop>({0.1, 0.05, 0.02, 0.5, 1.2, 1.5, 50.0}, step);
        check_vjp<Asgd>({0.1, 0.05, 0.02, 0.3, 0.1, 0.75, 6.5}, step);
    }
    if (torchopt::test::failures == 0) std::puts("ok");
    return torchopt::test::failures == 0 ? 0 : 1;
}
