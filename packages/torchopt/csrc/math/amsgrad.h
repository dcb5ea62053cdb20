// SPDX-License-Identifier: Apache-2.0
// AMSGrad, before it is multiplied by the step size.
//
// S. Reddi, S. Kale, S. Kumar, "On the Convergence of Adam and Beyond", 2018, arXiv:1904.09237, Algorithm 2, with the
// bias corrections of torch.optim.Adam(amsgrad=True): the maximum is taken before the correction.
//
//   mu', nu' as in Adam,   m' = max(m, nu')
//   u = (mu' / (1 - b1^k)) / (sqrt(m' / (1 - b2^k) + eps_root) + eps)
//
// Where m = nu', the derivative of the maximum is the mean of the two. Where the radicand is 0, the derivative of u is
// 0.
#pragma once

#include "math/adam.h"

namespace torchopt {

/// State: mu, nu, nu_max. Hyper-parameters: b1, b2, eps, eps_root.
struct AmsGrad {
    static constexpr int kStates = 3;
    static constexpr int kHypers = Adam::kHypers;
    static constexpr int kCoefficients = Adam::kCoefficients;
    template <class S>
    using Coefficients = Adam::Coefficients<S>;

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double k) {
        return Adam::coefficients<S>(h, k);
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S mu = state[0] * c.b1 + g * c.one_minus_b1;
        const S nu = state[1] * c.b2 + (g * g) * c.one_minus_b2;
        const S nu_max = maximum(state[2], nu);
        next[0] = mu;
        next[1] = nu;
        next[2] = nu_max;
        const S radicand = nu_max * c.nu_scale + c.eps_root;
        u = divide_by_root<S>(mu * c.mu_scale, radicand, c.eps);
    }
};

}  // namespace torchopt
