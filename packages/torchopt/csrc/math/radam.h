// SPDX-License-Identifier: Apache-2.0
// RAdam, before it is multiplied by the step size.
//
// L. Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, arXiv:1908.03265, Algorithm 2; the
// threshold 5 is that of torch.optim.RAdam. With rho_inf = 2 / (1 - b2) - 1, rho = rho_inf - 2 k b2^k / (1 - b2^k):
//
//   mu', nu' as in Adam
//   u = mu' / (1 - b1^k) * r sqrt(1 - b2^k) / (sqrt(nu') + eps)      where rho > 5, with
//   r = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
//   u = mu' / (1 - b1^k)                                             otherwise
//
// Where nu' is exactly 0, the derivative of the first form is 0.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"
#include "math/root.h"

namespace torchopt {

/// State: mu, nu. Hyper-parameters: b1, b2, eps.
struct RAdam {
    static constexpr int kStates = 2;
    static constexpr int kHypers = 3;
    static constexpr int kCoefficients = 7;
    template <class S>
    struct Coefficients {
        S b1, b2, one_minus_b1, one_minus_b2;
        S mu_scale;   // 1 / (1 - b1^k), times r sqrt(1 - b2^k) where rectified
        S rectified;  // 1 where rho > 5, else 0
        S eps;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double k) {
        const S power_b2 = power(h[1], k);
        const S nu_correction = 1.0 - power_b2;
        const S rho_inf = 2.0 / (1.0 - h[1]) - 1.0;
        const S rho = rho_inf - (2.0 * k) * power_b2 / nu_correction;
        const bool rectified = value_of(rho) > 5.0;
        S scale = 1.0 / (1.0 - power(h[0], k));
        if (rectified) {
            const S r2 =
                ((rho - 4.0) * (rho - 2.0) * rho_inf) / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho);
            scale = scale * square_root(r2) * square_root(nu_correction);
        }
        const S one = h[0] * 0.0 + 1.0;
        return {h[0], h[1], 1.0 - h[0], 1.0 - h[1], scale, one * (rectified ? 1.0 : 0.0), h[2]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S mu = state[0] * c.b1 + g * c.one_minus_b1;
        const S nu = state[1] * c.b2 + (g * g) * c.one_minus_b2;
        next[0] = mu;
        next[1] = nu;
        const S scaled = mu * c.mu_scale;
        u = choose(value_of(c.rectified) != 0, divide_by_root<S>(scaled, nu, c.eps), scaled);
    }
};

}  // namespace torchopt
