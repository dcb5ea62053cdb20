// SPDX-License-Identifier: Apache-2.0
// Stochastic gradient descent with momentum, before the multiplication with the step size.
//
// I. Sutskever, J. Martens, G. Dahl, G. Hinton, "On the importance of initialization and momentum in deep learning",
// ICML 2013, in the form of torch.optim.SGD (the step size multiplies the trace, not the gradient):
//
//   t' = g                                     in the first step (k = 1; t is 0 there)
//   t' = momentum t + (1 - dampening) g        later
//   u  = g + momentum t'   (nesterov),   u = t'   otherwise
#pragma once

#include <cstdint>

#include "math/dual.h"
#include "math/host_device.h"

namespace torchopt {

struct MomentumHyper {
    double momentum, dampening;
};

template <class T>
struct MomentumCoefficients {
    T momentum, gradient_weight;  // gradient_weight = 1 in the first step, 1 - dampening later
};

/// In: g, t. Out: u, t'.
/// Example: momentum 0.9, dampening 0.5, t = 2, g = 1, k = 2 gives t' = 0.9 * 2 + 0.5 = 2.3 and u = 2.3
/// (u = 1 + 0.9 * 2.3 = 3.07 with Nesterov's correction).
template <bool kNesterov>
struct Momentum {
    static constexpr int kInputs = 2;
    static constexpr int kOutputs = 2;
    using Hyper = MomentumHyper;
    template <class T>
    using Coefficients = MomentumCoefficients<T>;

    template <class T>
    TORCHOPT_HOST_DEVICE static MomentumCoefficients<T> coefficients(const MomentumHyper& h,
                                                                     std::int64_t step) {
        return {static_cast<T>(h.momentum), static_cast<T>(step <= 1 ? 1.0 : 1.0 - h.dampening)};
    }

    template <class T, class S>
    TORCHOPT_HOST_DEVICE static void apply(const MomentumCoefficients<T>& c, const S (&in)[2],
                                           S (&out)[2]) {
        const S& g = in[0];
        const S trace = in[1] * c.momentum + g * c.gradient_weight;
        out[1] = trace;
        if constexpr (kNesterov) {
            out[0] = g + trace * c.momentum;
        } else {
            out[0] = trace;
        }
    }
};

}  // namespace torchopt
