// SPDX-License-Identifier: Apache-2.0
// Lion, before it is multiplied by the step size. Its weight decay is the decoupled one (see rule.h).
//
// X. Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv:2302.06675, Algorithm 2:
//
//   u = sign(b1 mu + (1 - b1) g),   mu' = b2 mu + (1 - b2) g
//
// The derivative of the sign is 0 everywhere, so derivatives reach the gradient only through mu'.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"

namespace torchopt {

/// State: mu. Hyper-parameters: b1, b2.
struct Lion {
    static constexpr int kStates = 1;
    static constexpr int kHypers = 2;
    static constexpr int kCoefficients = 4;
    template <class S>
    struct Coefficients {
        S b1, b2, one_minus_b1, one_minus_b2;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double) {
        return {h[0], h[1], 1.0 - h[0], 1.0 - h[1]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        u = sign<>(S(state[0] * c.b1 + g * c.one_minus_b1));
        next[0] = state[0] * c.b2 + g * c.one_minus_b2;
    }
};

}  // namespace torchopt
