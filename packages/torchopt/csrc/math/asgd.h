// SPDX-License-Identifier: Apache-2.0
// Averaged SGD; its step size is part of the direction.
//
// B. T. Polyak, A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, with the step size of
// torch.optim.ASGD. With k the step, counted from 1, and a the average of the iterates:
//
//   eta_k = eta / (1 + lambda eta (k - 1))^alpha
//   u = eta_k (g + lambda p),   a' = a + (p - u - a) / max(1, k - 1 - t0)
//
// The average is that of p - u, because the surrounding chain multiplies by a step size of 1.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"

namespace torchopt {

/// State: average. Hyper-parameters: eta, lambd, alpha, t0. Reads the parameter.
/// Example: g = 1, p = 3, average 0, eta = 0.5, lambd = 0, k = 1 gives u = 0.5 and the average 2.5.
struct Asgd {
    static constexpr bool kReadsParameter = true;
    static constexpr int kStates = 1;
    static constexpr int kHypers = 4;
    static constexpr int kCoefficients = 3;
    template <class S>
    struct Coefficients {
        S eta, lambd, weight;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double k) {
        const S decay = 1.0 + h[1] * h[0] * (k - 1.0);
        const S averaged = (k - 1.0) - h[3];
        const bool averages = value_of(averaged) >= 1.0;
        return {h[0] * exponential(-(h[2] * logarithm(decay))), h[1],
                1.0 / choose(averages, averaged, S(1.0 + h[3] * 0.0))};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S& p,
                                           const S* state, S& u, S* next) {
        u = (g + p * c.lambd) * c.eta;
        next[0] = state[0] + (p - u - state[0]) * c.weight;
    }
};

}  // namespace torchopt
