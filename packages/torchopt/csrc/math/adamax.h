// SPDX-License-Identifier: Apache-2.0
// Adamax, before the multiplication with the step size.
//
// D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015, arXiv:1412.6980, Algorithm 2, with eps
// inside the maximum as in torch.optim.Adamax:
//
//   mu' = b1 mu + (1 - b1) g,   nu' = max(b2 nu, |g| + eps),   u = mu' / nu' / (1 - b1^k)
//
// |g| has the derivative 0 at 0; where both arguments of the maximum are equal, it has the mean of their derivatives.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"

namespace torchopt {

/// State: mu, nu. Hyper-parameters: b1, b2, eps.
struct Adamax {
    static constexpr int kStates = 2;
    static constexpr int kHypers = 3;
    static constexpr int kCoefficients = 5;
    template <class S>
    struct Coefficients {
        S b1, b2, one_minus_b1, mu_scale, eps;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double k) {
        return {h[0], h[1], 1.0 - h[0], 1.0 / (1.0 - power(h[0], k)), h[2]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S mu = state[0] * c.b1 + g * c.one_minus_b1;
        const S nu = maximum<>(S(state[1] * c.b2), S(absolute(g) + c.eps));
        next[0] = mu;
        next[1] = nu;
        u = mu / nu * c.mu_scale;
    }
};

}  // namespace torchopt
