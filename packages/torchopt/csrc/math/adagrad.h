// SPDX-License-Identifier: Apache-2.0
// AdaGrad, before it is multiplied by the step size.
//
// J. Duchi, E. Hazan, Y. Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
// JMLR 12, 2011:
//
//   s' = s + g^2,   u = g / (sqrt(s') + eps)
//
// Where s' is exactly 0, u and its derivative are 0.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"
#include "math/root.h"

namespace torchopt {

/// State: s. Hyper-parameters: eps.
struct Adagrad {
    static constexpr int kStates = 1;
    static constexpr int kHypers = 1;
    static constexpr int kCoefficients = 1;
    template <class S>
    struct Coefficients {
        S eps;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double) {
        return {h[0]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S sum = state[0] + g * g;
        next[0] = sum;
        u = choose(value_of(sum) == 0, zero<S>(), divide_by_root<S>(g, sum, c.eps));
    }
};

}  // namespace torchopt
