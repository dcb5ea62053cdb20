// SPDX-License-Identifier: Apache-2.0
// Adan, before it is multiplied by the step size. Its weight decay is the decoupled one (see rule.h).
//
// X. Xie, P. Zhou, H. Li, Z. Lin, S. Yan, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
// Models", 2022, arXiv:2208.06677, Algorithm 1, which writes 1 - b for each b. With g0 the previous gradient and d = 0
// in the first step, d = g - g0 later:
//
//   mu' = b1 mu + (1 - b1) g
//   delta' = b2 delta + (1 - b2) d
//   nu' = b3 nu + (1 - b3) (g + b2 d)^2
//   u = (mu' / (1 - b1^k) + b2 delta' / (1 - b2^k)) / (sqrt(nu' / (1 - b3^k)) + eps)
//
// Where nu' is exactly 0, the derivative of u is 0 (see root.h).
#pragma once

#include "math/dual.h"
#include "math/host_device.h"
#include "math/root.h"

namespace torchopt {

/// State: mu, delta, nu, previous (the gradient). Hyper-parameters: b1, b2, b3, eps.
/// Example: g = 1, states 0, eps = 0, k = 1 gives u = 1.
struct Adan {
    static constexpr int kStates = 4;
    static constexpr int kHypers = 4;
    static constexpr int kCoefficients = 11;
    template <class S>
    struct Coefficients {
        S b1, b2, b3, one_minus_b1, one_minus_b2, one_minus_b3;
        S mu_scale, delta_scale, nu_scale;  // 1 / (1 - b1^k), b2 / (1 - b2^k), 1 / (1 - b3^k)
        S later;                            // 0 in the first step, else 1
        S eps;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double k) {
        return {h[0],
                h[1],
                h[2],
                1.0 - h[0],
                1.0 - h[1],
                1.0 - h[2],
                1.0 / (1.0 - power(h[0], k)),
                h[1] / (1.0 - power(h[1], k)),
                1.0 / (1.0 - power(h[2], k)),
                (k > 1.0 ? 1.0 : 0.0) + h[0] * 0.0,
                h[3]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S change = (g - state[3]) * c.later;
        const S ahead = g + change * c.b2;
        const S mu = state[0] * c.b1 + g * c.one_minus_b1;
        const S delta = state[1] * c.b2 + change * c.one_minus_b2;
        const S nu = state[2] * c.b3 + (ahead * ahead) * c.one_minus_b3;
        next[0] = mu;
        next[1] = delta;
        next[2] = nu;
        next[3] = g;
        u = divide_by_root<S>(mu * c.mu_scale + delta * c.delta_scale, nu * c.nu_scale, c.eps);
    }
};

}  // namespace torchopt
