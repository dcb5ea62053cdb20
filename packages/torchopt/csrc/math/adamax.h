// SPDX-License-Identifier: Apache-2.0
// Adamax, before it is multiplied by the step size.
//
// D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015, arXiv:1412.6980, Algorithm 2, with eps
// inside the maximum as in torch.optim.Adamax:
//
//   mu' = b1 mu + (1 - b1) g,   nu' = max(b2 nu, |g| + eps),   u = mu' / nu' / (1 - b1^k)
//
// The derivative of |g| at 0 is 0. If both arguments of the maximum are equal, its derivative is the mean of theirs.
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

    /// With u = mu' mu_scale / nu'. Written by hand so that an infinite nu' is not multiplied by a derivative of 0. If
    /// both arguments of the maximum are equal, each gets half of the cotangent.
    template <class T>
    TORCHOPT_HOST_DEVICE static void pull_back(const Coefficients<T>& c, const T& g, const T* state,
                                               const T& u, const T* next, T& g_out, T* state_out) {
        const T mu = state[0] * c.b1 + g * c.one_minus_b1;
        const T kept = state[1] * c.b2;
        const T fresh = absolute(g) + c.eps;
        const T nu = maximum<>(kept, fresh);
        const T direct = u * c.mu_scale / nu;
        const T mu_cotangent = next[0] + direct;
        const T whole = next[1] - direct * mu / nu;
        const T nu_cotangent = choose(kept == fresh, T(T(0.5) * whole), whole);
        g_out = mu_cotangent * c.one_minus_b1 + choose(kept > fresh, T(0), nu_cotangent) * sign(g);
        state_out[0] = mu_cotangent * c.b1;
        state_out[1] = choose(kept < fresh, T(0), nu_cotangent) * c.b2;
    }
};

}  // namespace torchopt
