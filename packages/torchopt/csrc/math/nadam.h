// SPDX-License-Identifier: Apache-2.0
// NAdam, before it is multiplied by the step size.
//
// T. Dozat, "Incorporating Nesterov Momentum into Adam", 2016, Algorithm 8, with the momentum schedule of
// torch.optim.NAdam. With psi the momentum decay, m_k = b1 (1 - 0.96^(k psi) / 2) and P_k = m_1 ... m_k:
//
//   mu', nu' as in Adam
//   u = (g (1 - m_k) / (1 - P_k) + mu' m_(k+1) / (1 - P_k m_(k+1))) / (sqrt(nu' / (1 - b2^k) + eps_root) + eps)
//
// P_(k-1) is passed as a hyper-parameter, so that a step does not multiply k numbers. Where the radicand is 0, the
// derivative of u is 0.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"
#include "math/root.h"

namespace torchopt {

/// State: mu, nu. Hyper-parameters: b1, b2, eps, eps_root, momentum_decay, mu_product (P_(k-1), 1 in the first step).
struct NAdam {
    static constexpr int kStates = 2;
    static constexpr int kHypers = 6;
    static constexpr int kCoefficients = 9;
    template <class S>
    struct Coefficients {
        S b1, b2, one_minus_b1, one_minus_b2;
        S g_scale, mu_scale, nu_scale;
        S eps, eps_root;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double k) {
        const double log_base = -0.040821994520255166;  // ln 0.96
        const S now = h[0] * (1.0 - 0.5 * exponential(h[4] * (k * log_base)));
        const S following = h[0] * (1.0 - 0.5 * exponential(h[4] * ((k + 1.0) * log_base)));
        const S product = h[5] * now;
        return {h[0],
                h[1],
                1.0 - h[0],
                1.0 - h[1],
                (1.0 - now) / (1.0 - product),
                following / (1.0 - product * following),
                1.0 / (1.0 - power(h[1], k)),
                h[2],
                h[3]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S mu = state[0] * c.b1 + g * c.one_minus_b1;
        const S nu = state[1] * c.b2 + (g * g) * c.one_minus_b2;
        next[0] = mu;
        next[1] = nu;
        const S radicand = nu * c.nu_scale + c.eps_root;
        u = divide_by_root<S>(g * c.g_scale + mu * c.mu_scale, radicand, c.eps);
    }
};

}  // namespace torchopt
