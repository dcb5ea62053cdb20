// SPDX-License-Identifier: Apache-2.0
// Square roots with a derivative at zero.
//
// Where a radicand is exactly zero, the derivative of the quotient (or of the root) is defined to be zero; the value is
// that of the formula. A parameter whose gradients have all been zero is at such a point, where the square root has no
// derivative.
#pragma once

#include "math/dual.h"
#include "math/host_device.h"

namespace torchopt {

/// sqrt(x), with derivative 0 at 0.
template <class S>
TORCHOPT_HOST_DEVICE S root(const S& x) {
    if constexpr (is_dual<S>) {
        const bool at_zero = value_of(x) == 0;
        const S safe = choose(at_zero, S::constant(1), x);
        return choose(at_zero, S::constant(0), square_root(safe));
    } else {
        return square_root(x);
    }
}

/// numerator / (sqrt(radicand) + eps), with derivative 0 where the radicand is 0.
template <class S, class C>
TORCHOPT_HOST_DEVICE S divide_by_root(const S& numerator, const S& radicand, const C& eps) {
    if constexpr (is_dual<S>) {
        const bool at_zero = value_of(radicand) == 0;
        const S safe = choose(at_zero, S::constant(1), radicand);
        const S at_root = S::constant(value_of(numerator) / value_of(eps));
        return choose(at_zero, at_root, numerator / (square_root(safe) + eps));
    } else {
        return numerator / (square_root(radicand) + eps);
    }
}

}  // namespace torchopt
