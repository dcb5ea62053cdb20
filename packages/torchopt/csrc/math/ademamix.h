// SPDX-License-Identifier: Apache-2.0
// AdEMAMix, before it is multiplied by the step size.
//
// M. Pagliardini, P. Ablin, D. Grangier, "The AdEMAMix Optimizer: Better, Faster, Older", 2024, arXiv:2409.03137,
// Algorithm 1, with its schedules of alpha and b3 over a warm-up of w steps: with f = min(k / w, 1),
//
//   alpha_k = f alpha,   b3_k = min(exp(1 / ((1 - f) / ln b1 + f / ln b3)), b3)
//   mu' = b1 mu + (1 - b1) g,   slow' = b3_k slow + (1 - b3_k) g,   nu' = b2 nu + (1 - b2) g^2
//   u = (mu' / (1 - b1^k) + alpha_k slow') / (sqrt(nu' / (1 - b2^k)) + eps)
//
// Where nu' is 0 the derivative of u is 0.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"
#include "math/root.h"

namespace torchopt {

/// State: mu, slow, nu. Hyper-parameters: b1, b2, b3, alpha, eps, w (0 for no warm-up).
/// Example: g = 1, no state, b1 = 0.9, b2 = 0.99, b3 = 0.9, alpha = 5, eps = w = 0, k = 1 gives u = 1.5, slow' = 0.1.
struct AdEMAMix {
    static constexpr int kStates = 3;
    static constexpr int kHypers = 6;
    static constexpr int kCoefficients = 10;
    template <class S>
    struct Coefficients {
        S b1, b2, b3, one_minus_b1, one_minus_b2, one_minus_b3;
        S mu_scale, nu_scale;  // 1 / (1 - b1^k), 1 / (1 - b2^k)
        S alpha, eps;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double k) {
        S b3 = h[2], alpha = h[3];
        if (value_of(h[5]) > k) {
            const S done = k / h[5];
            // The half-life of the average grows linearly.
            const S rising =
                exponential(1.0 / ((1.0 - done) / logarithm(h[0]) + done / logarithm(h[2])));
            b3 = -maximum(-rising, -h[2]);
            alpha = done * h[3];
        }
        return {h[0],
                h[1],
                b3,
                1.0 - h[0],
                1.0 - h[1],
                1.0 - b3,
                1.0 / (1.0 - power(h[0], k)),
                1.0 / (1.0 - power(h[1], k)),
                alpha,
                h[4]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S mu = state[0] * c.b1 + g * c.one_minus_b1;
        const S slow = state[1] * c.b3 + g * c.one_minus_b3;
        const S nu = state[2] * c.b2 + (g * g) * c.one_minus_b2;
        next[0] = mu;
        next[1] = slow;
        next[2] = nu;
        u = divide_by_root<S>(mu * c.mu_scale + slow * c.alpha, nu * c.nu_scale, c.eps);
    }
};

}  // namespace torchopt
