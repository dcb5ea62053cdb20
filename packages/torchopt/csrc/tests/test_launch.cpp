// SPDX-License-Identifier: Apache-2.0
// Compares the launcher with a plain loop over the rule: sizes around the chunk, threads, in place, several tensors.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <vector>

#include "check.h"
#include "launch/openmp.h"
#include "math/rules.h"

namespace torchopt {
template <>
void run_on_cpu<Adam>(const CpuLaunch&);
}  // namespace torchopt

namespace {

using namespace torchopt;

template <class T>
std::uintptr_t address(std::vector<T>& v) {
    return reinterpret_cast<std::uintptr_t>(v.data());
}

template <class T>
void check_adam(const std::vector<std::int64_t>& sizes, int num_threads, bool in_place, Dtype dtype,
                double tolerance) {
    const double hypers[7] = {-1.0, 0.0, 0.0, 0.9, 0.999, 1e-8, 1e-4};
    const std::size_t n = sizes.size();
    std::vector<std::vector<T>> g(n), mu(n), nu(n), u(n), new_mu(n), new_nu(n);
    std::vector<std::vector<double>> expected(n);
    std::vector<std::int64_t> steps(n);
    Tensors tensors;
    tensors.dtype = dtype;
    tensors.sizes = sizes;
    tensors.inputs.resize(3);
    tensors.outputs.resize(3);
    for (std::size_t i = 0; i < n; ++i) {
        steps[i] = static_cast<std::int64_t>(i) + 1;
        const auto size = static_cast<std::size_t>(sizes[i]);
        for (std::size_t k = 0; k < size; ++k) {
            const double phase = 0.37 * static_cast<double>(k) + static_cast<double>(i);
            g[i].push_back(static_cast<T>(std::sin(phase)));
            mu[i].push_back(static_cast<T>(0.1 * std::cos(phase)));
            nu[i].push_back(static_cast<T>(0.01 * (1.5 + std::sin(3 * phase))));
            const auto s = settings<T, Adam>(hypers, false, steps[i]);
            const T in[3] = {g[i][k], mu[i][k], nu[i][k]};
            T out[3];
            Forward<Adam, Form::kUpdate>::apply(s, in, out);
            for (const T x : out) expected[i].push_back(static_cast<double>(x));
        }
        u[i].assign(size, T(-7));
        new_mu[i].assign(size, T(-7));
        new_nu[i].assign(size, T(-7));
        tensors.inputs[0].push_back(address(g[i]));
        tensors.inputs[1].push_back(address(mu[i]));
        tensors.inputs[2].push_back(address(nu[i]));
        tensors.outputs[0].push_back(address(in_place ? g[i] : u[i]));
        tensors.outputs[1].push_back(address(in_place ? mu[i] : new_mu[i]));
        tensors.outputs[2].push_back(address(in_place ? nu[i] : new_nu[i]));
        tensors.steps.push_back(reinterpret_cast<std::uintptr_t>(&steps[i]));
    }
    const std::vector<double> values(hypers, hypers + 7);
    run_on_cpu<Adam>({Kind::kUpdate, tensors, values, false, num_threads, nullptr});
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t k = 0; k < static_cast<std::size_t>(sizes[i]); ++k) {
            CHECK_NEAR(static_cast<double>((in_place ? g : u)[i][k]), expected[i][3 * k],
                       tolerance);
            CHECK_NEAR(static_cast<double>((in_place ? mu : new_mu)[i][k]), expected[i][3 * k + 1],
                       tolerance);
            CHECK_NEAR(static_cast<double>((in_place ? nu : new_nu)[i][k]), expected[i][3 * k + 2],
                       tolerance);
        }
    }
}

/// Absent cotangents read as zeros and absent outputs are not written, for plain and for widened elements.
template <class T>
void check_absent(std::size_t size, int num_threads, Dtype dtype) {
    const std::vector<double> hypers = {0.5, 0.0, 0.0, 0.9, 0.999, 1e-8, 1e-4};
    std::vector<std::vector<T>> in(6);
    for (std::size_t r = 0; r < in.size(); ++r) {
        for (std::size_t k = 0; k < size; ++k) {
            const double x = std::sin(0.1 + 0.37 * static_cast<double>(k + 7 * r));
            in[r].push_back(static_cast<T>(r == 2 ? 0.5 + 0.25 * x : x));
        }
    }
    const auto run = [&](bool skip) {
        std::vector<std::vector<T>> out(3, std::vector<T>(size, T(-7)));
        const std::vector<T> zeros(size, T(0));
        std::vector<T> zero = zeros;
        Tensors tensors;
        tensors.dtype = dtype;
        tensors.sizes = {static_cast<std::int64_t>(size)};
        tensors.step = 3;
        for (std::size_t r = 0; r < in.size(); ++r) {
            const bool is_zero = r >= 4;  // the cotangents of mu' and nu'
            tensors.inputs.push_back({!is_zero ? address(in[r]) : skip ? 0 : address(zero)});
        }
        for (std::size_t r = 0; r < out.size(); ++r)
            tensors.outputs.push_back({skip && r == 1 ? 0 : address(out[r])});
        run_on_cpu<Adam>({Kind::kUpdateVjp, tensors, hypers, false, num_threads, nullptr});
        return out;
    };
    const auto all = run(false);
    const auto some = run(true);
    for (std::size_t k = 0; k < size; ++k) {
        CHECK_NEAR(static_cast<double>(some[0][k]), static_cast<double>(all[0][k]), 0.0);
        CHECK_NEAR(static_cast<double>(some[1][k]), -7.0, 0.0);
        CHECK_NEAR(static_cast<double>(some[2][k]), static_cast<double>(all[2][k]), 0.0);
    }
}

}  // namespace

int main() {
    for (const std::size_t size : {1, 1023, 1025, 40000}) {
        for (const int threads : {1, 3}) {
            check_absent<float>(size, threads, Dtype::kFloat32);
            check_absent<double>(size, threads, Dtype::kFloat64);
        }
    }
    const std::vector<std::int64_t> sizes{0, 1, 7, kChunk - 1, kChunk, kChunk + 1, 3 * kChunk + 5,
                                          2};
    for (const int threads : {1, 2, 3})
        for (const bool in_place : {false, true}) {
            check_adam<float>(sizes, threads, in_place, torchopt::Dtype::kFloat32, 0.0);
            check_adam<double>(sizes, threads, in_place, torchopt::Dtype::kFloat64, 0.0);
        }
    check_adam<double>({}, 2, false, torchopt::Dtype::kFloat64, 0.0);
    if (torchopt::test::failures == 0) std::puts("ok");
    return torchopt::test::failures == 0 ? 0 : 1;
}
