// SPDX-License-Identifier: Apache-2.0
// Adafactor's step, the only rule whose elements depend on each other.
#pragma once

#include <cstdint>
#include <vector>

#include "launch/tensors.h"

namespace torchopt {

/// One tensor `[batch, rows, columns]`, or a vector with `rows` elements. The members are addresses of contiguous
/// elements. The last three are written, unless there are no elements.
struct FactoredTensor {
    bool is_vector;
    std::int64_t batch, rows, columns;
    Dtype dtype;  // float32 or float64
    std::uintptr_t gradient, parameter, row, column;
    std::uintptr_t update, new_row, new_column;
};

/// The hyper-parameters of a step; see scale_by_factored_rms. A negative `eps1` stands for the spacing of the dtype at
/// one.
struct FactoredHypers {
    double weight, rho, eps1, eps2, d;
};

/// Steps each tensor on a single thread.
void factored_rms(const std::vector<FactoredTensor>& tensors, const FactoredHypers& hypers,
                  int num_threads);

}  // namespace torchopt
