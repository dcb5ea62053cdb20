// SPDX-License-Identifier: Apache-2.0
// AdaBelief, before it is multiplied by the step size.
//
// J. Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients", 2020,
// arXiv:2010.07468, Algorithm 2.
//
//   mu' = b1 mu + (1 - b1) g,   nu' = b2 nu + (1 - b2) (g - mu')^2 + eps
//   u = (mu' / (1 - b1^k)) / (sqrt(nu' / (1 - b2^k)) + eps)
//
// Where nu' is 0 the derivative of u is 0.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"
#include "math/root.h"

namespace torchopt {

/// State: mu, nu. Hyper-parameters: b1, b2, eps.
/// Example: g = 1, mu = nu = 0, b1 = b2 = 0.5, eps = 0, k = 1 gives mu' = 0.5, nu' = 0.125, u = 2.
struct AdaBelief {
    static constexpr int kStates = 2;
    static constexpr int kHypers = 3;
    static constexpr int kCoefficients = 7;
    template <class S>
    struct Coefficients {
        S b1, b2, one_minus_b1, one_minus_b2;
        S mu_scale, nu_scale;  // 1 / (1 - b1^k), 1 / (1 - b2^k)
        S eps;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double k) {
        return {h[0],
                h[1],
                1.0 - h[0],
                1.0 - h[1],
                1.0 / (1.0 - power(h[0], k)),
                1.0 / (1.0 - power(h[1], k)),
                h[2]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S mu = state[0] * c.b1 + g * c.one_minus_b1;
        const S surprise = g - mu;
        const S nu = state[1] * c.b2 + (surprise * surprise) * c.one_minus_b2 + c.eps;
        next[0] = mu;
        next[1] = nu;
        u = divide_by_root<S>(mu * c.mu_scale, nu * c.nu_scale, c.eps);
    }
};

}  // namespace torchopt
