// SPDX-License-Identifier: Apache-2.0
// Rprop without weight backtracking. Its step size is part of the direction.
//
// M. Riedmiller, H. Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm", 1993,
// in the variant of torch.optim.Rprop. With g0 the gradient before and s the step size of an element:
//
//   s' = clamp(s eta_plus if g g0 > 0, s eta_minus if g g0 < 0, else s)
//   g' = 0 where g g0 < 0, else g
//   u = sign(g') s'
//
// The next step compares its gradient with g'. The sign of NaN is 0, as in torch.sign. The derivative of the sign is 0,
// so derivatives reach u only through s.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"

namespace torchopt {

/// State: previous (g'), step_size. Hyper-parameters: eta_minus, eta_plus, min_step, max_step.
/// Example: g = 2, previous 1, step size 0.5, eta_plus 1.2 gives u = 0.6.
struct Rprop {
    static constexpr int kStates = 2;
    static constexpr int kHypers = 4;
    static constexpr int kCoefficients = 4;
    template <class S>
    struct Coefficients {
        S eta_minus, eta_plus, min_step, max_step;
    };

    template <class S>
    TORCHOPT_HOST_DEVICE static Coefficients<S> coefficients(const S* h, double) {
        return {h[0], h[1], h[2], h[3]};
    }

    template <class C, class S>
    TORCHOPT_HOST_DEVICE static void apply(const Coefficients<C>& c, const S& g, const S* state,
                                           S& u, S* next) {
        const auto agreement = value_of(g) * value_of(state[0]);
        const bool turned = agreement < 0;
        const S grown = choose(agreement > 0, S(state[1] * c.eta_plus), state[1]);
        S size = choose(turned, S(state[1] * c.eta_minus), grown);
        size = choose(value_of(size) < value_of(c.min_step), S(zero<S>() + c.min_step), size);
        size = choose(value_of(size) > value_of(c.max_step), S(zero<S>() + c.max_step), size);
        next[0] = choose(turned, zero<S>(), g);
        next[1] = size;
        const S direction = sign<>(next[0]);
        const bool is_number = value_of(direction) == value_of(direction);
        u = choose(is_number, direction, zero<S>()) * size;
    }
};

}  // namespace torchopt
