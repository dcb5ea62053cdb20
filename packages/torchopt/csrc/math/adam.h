// SPDX-License-Identifier: Apache-2.0
// Adam and AdamW, before the multiplication with the step size.
//
// D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015, arXiv:1412.6980, Algorithm 1;
// I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019, arXiv:1711.05101, Algorithm 2.
//
//   mu' = b1 mu + (1 - b1) g
//   nu' = b2 nu + (1 - b2) g^2
//   u   = (mu' / (1 - b1^k)) / (sqrt(nu' / (1 - b2^k) + eps_root) + eps)   [+ weight_decay p  for AdamW]
//
// Convention at zero: where nu' / (1 - b2^k) + eps_root is exactly 0 the square root has no derivative
// (the one-sided slope of u is of the order 1 / eps). There the derivative of u is defined to be 0; its value is
// that of the formula.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/dual.h"
#include "math/host_device.h"

namespace torchopt {

struct AdamHyper {
    double b1, b2, eps, eps_root;
};

template <class T>
struct AdamCoefficients {
    T b1, b2, one_minus_b1, one_minus_b2;
    T mu_scale, nu_scale;  // 1 / (1 - b1^k), 1 / (1 - b2^k)
    T eps, eps_root;
};

/// In: g, mu, nu. Out: u, mu', nu'.
/// Example: g = 1, mu = nu = 0, b1 = 0.9, b2 = 0.999, eps = eps_root = 0, k = 1 gives u = 1, mu' = 0.1, nu' = 0.001.
struct Adam {
    static constexpr int kInputs = 3;
    static constexpr int kOutputs = 3;
    using Hyper = AdamHyper;
    template <class T>
    using Coefficients = AdamCoefficients<T>;

    template <class T>
    TORCHOPT_HOST_DEVICE static AdamCoefficients<T> coefficients(const AdamHyper& h,
                                                                 std::int64_t step) {
        // In double for every T: 1 - 0.999^k loses four digits in float.
        const double k = static_cast<double>(step);
        AdamCoefficients<T> c;
        c.b1 = static_cast<T>(h.b1);
        c.b2 = static_cast<T>(h.b2);
        c.one_minus_b1 = static_cast<T>(1.0 - h.b1);
        c.one_minus_b2 = static_cast<T>(1.0 - h.b2);
        c.mu_scale = static_cast<T>(1.0 / (1.0 - pow(h.b1, k)));
        c.nu_scale = static_cast<T>(1.0 / (1.0 - pow(h.b2, k)));
        c.eps = static_cast<T>(h.eps);
        c.eps_root = static_cast<T>(h.eps_root);
        return c;
    }

    template <class T, class S>
    TORCHOPT_HOST_DEVICE static void apply(const AdamCoefficients<T>& c, const S (&in)[3],
                                           S (&out)[3]) {
        const S& g = in[0];
        const S mu = in[1] * c.b1 + g * c.one_minus_b1;
        const S nu = in[2] * c.b2 + (g * g) * c.one_minus_b2;
        const S mu_hat = mu * c.mu_scale;
        const S radicand = nu * c.nu_scale + c.eps_root;
        out[1] = mu;
        out[2] = nu;
        if constexpr (is_dual<S>) {
            if (value_of(radicand) == T(0)) {
                out[0] = S::constant(value_of(mu_hat) / c.eps);
                return;
            }
        }
        out[0] = mu_hat / (square_root(radicand) + c.eps);
    }
};

struct AdamWHyper {
    AdamHyper adam;
    double weight_decay;
};

template <class T>
struct AdamWCoefficients {
    AdamCoefficients<T> adam;
    T weight_decay;
};

/// In: g, mu, nu, p. Out: u, mu', nu'. The decay is added after the scaling, hence decoupled from it.
struct AdamW {
    static constexpr int kInputs = 4;
    static constexpr int kOutputs = 3;
    using Hyper = AdamWHyper;
    template <class T>
    using Coefficients = AdamWCoefficients<T>;

    template <class T>
    TORCHOPT_HOST_DEVICE static AdamWCoefficients<T> coefficients(const AdamWHyper& h,
                                                                  std::int64_t step) {
        return {Adam::coefficients<T>(h.adam, step), static_cast<T>(h.weight_decay)};
    }

    template <class T, class S>
    TORCHOPT_HOST_DEVICE static void apply(const AdamWCoefficients<T>& c, const S (&in)[4],
                                           S (&out)[3]) {
        const S adam_in[3] = {in[0], in[1], in[2]};
        Adam::apply(c.adam, adam_in, out);
        out[0] = out[0] + in[3] * c.weight_decay;
    }
};

}  // namespace torchopt
