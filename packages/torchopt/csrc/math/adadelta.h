// SPDX-License-Identifier: Apache-2.0
// AdaDelta, before it is multiplied by the step size.
//
// M. D. Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, arXiv:1212.5701, Algorithm 1:
//
//   mu' = rho mu + (1 - rho) g^2,   u = g sqrt(nu + eps) / sqrt(mu' + eps),   nu' = rho nu + (1 - rho) u^2
//
// Where a radicand is exactly 0 (eps = 0 only) the derivative through its root is 0.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"
#include "math/root.h"

namespace torchopt {

/// State: mu (of squared gradients), nu (of squared directions). Hyper-parameters: rho, eps.
struct Adadelta {
    static constexpr int kStates = 2;
    static constexpr int kHypers = 2;
    static constexpr int kCoefficients = 3;
    template <class S>
    struct Coefficients {
        S rho, one_minus_rho, eps;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double) {
        return {h[0], 1.0 - h[0], h[1]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const S mu = state[0] * c.rho + (g * g) * c.one_minus_rho;
        const S nu = state[1];
        const S numerator = g * root<S>(nu + c.eps);
        u = divide_by_root<S>(numerator, mu + c.eps, decltype(value_of(g))(0));
        next[0] = mu;
        next[1] = nu * c.rho + (u * u) * c.one_minus_rho;
    }
};

}  // namespace torchopt
