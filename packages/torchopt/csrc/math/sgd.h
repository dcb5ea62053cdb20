// SPDX-License-Identifier: Apache-2.0
// Stochastic gradient descent with momentum, before it is multiplied by the step size.
//
// I. Sutskever, J. Martens, G. Dahl, G. Hinton, "On the importance of initialization and momentum in deep learning",
// ICML 2013, in the form of torch.optim.SGD (the step size multiplies the trace, not the gradient):
//
//   t' = g                                     in the first step (k = 1; t is 0 there)
//   t' = momentum t + (1 - dampening) g        later
//   u  = g + momentum t'   (nesterov),   u = t'   otherwise
#pragma once

#include "math/dual.h"
#include "math/host_device.h"

namespace torchopt {

/// u = g.
struct Sgd {
    static constexpr int kStates = 0;
    static constexpr int kHypers = 0;
    static constexpr int kCoefficients = 0;
    template <class S>
    struct Coefficients {};

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S*, double) {
        return {};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>&, const S& g, const S*, S& u, S*) {
        u = g;
    }
};

/// State: t. Hyper-parameters: momentum, dampening.
/// Example: momentum 0.9, dampening 0.5, t = 2, g = 1, k = 2 gives t' = 0.9 * 2 + 0.5 = 2.3 and u = 2.3
/// (u = 1 + 0.9 * 2.3 = 3.07 with Nesterov's correction).
template <bool kNesterov>
struct Momentum {
    static constexpr int kStates = 1;
    static constexpr int kHypers = 2;
    static constexpr int kCoefficients = 2;
    template <class S>
    struct Coefficients {
        S momentum, gradient_weight;  // gradient_weight = 1 in the first step, 1 - dampening later
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double k) {
        return {h[0], 1.0 - h[1] * (k <= 1.0 ? 0.0 : 1.0)};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S trace = state[0] * c.momentum + g * c.gradient_weight;
        next[0] = trace;
        if constexpr (kNesterov) {
            u = g + trace * c.momentum;
        } else {
            u = trace;
        }
    }
};

}  // namespace torchopt
