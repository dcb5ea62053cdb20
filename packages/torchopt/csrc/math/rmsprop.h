// SPDX-License-Identifier: Apache-2.0
// RMSProp, before it is multiplied by the step size.
//
// T. Tieleman, G. Hinton, "Lecture 6.5: RMSProp", 2012; centred: A. Graves, "Generating Sequences With Recurrent Neural
// Networks", 2013, arXiv:1308.0850, equations 38-40 (eps added to the root, as in torch.optim.RMSprop):
//
//   nu' = alpha nu + (1 - alpha) g^2                 u = g / (sqrt(nu') + eps)
//   centred: mu' = alpha mu + (1 - alpha) g as well, u = g / (sqrt(nu' - mu'^2) + eps)
//
// Where the radicand is exactly 0 the derivative of u is 0.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"
#include "math/root.h"

namespace torchopt {

/// State: nu; centred: mu, nu. Hyper-parameters: alpha, eps.
template <bool kCentered>
struct RmsProp {
    static constexpr int kStates = kCentered ? 2 : 1;
    static constexpr int kHypers = 2;
    static constexpr int kCoefficients = 3;
    template <class S>
    struct Coefficients {
        S alpha, one_minus_alpha, eps;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double) {
        return {h[0], 1.0 - h[0], h[1]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S nu = state[kStates - 1] * c.alpha + (g * g) * c.one_minus_alpha;
        next[kStates - 1] = nu;
        if constexpr (kCentered) {
            const S mu = state[0] * c.alpha + g * c.one_minus_alpha;
            next[0] = mu;
            u = divide_by_root<S>(g, nu - mu * mu, c.eps);
        } else {
            u = divide_by_root<S>(g, nu, c.eps);
        }
    }
};

}  // namespace torchopt
