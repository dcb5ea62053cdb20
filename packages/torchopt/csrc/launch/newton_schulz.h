// SPDX-License-Identifier: Apache-2.0
// Muon's iteration on small matrices, which brings the singular values of each close to one.
#pragma once

#include <cstdint>
#include <vector>

#include "launch/tensors.h"

namespace torchopt {

/// A matrix `[rows, columns]` of contiguous elements in float32 or float64, and the address of its result.
struct OrthogonalizedMatrix {
    std::int64_t rows, columns;
    Dtype dtype;
    std::uintptr_t source, target;
    double scale;  // of the result
};

/// x <- a x + b (x x^T) x + c (x x^T)^2 x, `steps` times, from x / max(|x|, eps).
struct NewtonSchulz {
    int steps;
    double a, b, c, eps;
};

/// Whether the iteration of such a matrix stays in the cache of a core. torch's matrix product is faster on larger
/// ones. Example: a 256 x 256 matrix in float32 is small.
bool is_small(std::int64_t rows, std::int64_t columns, Dtype dtype);

/// Writes the results, each computed on one thread. Sums use the dtype of the matrix; the norm is summed in double.
void newton_schulz(const std::vector<OrthogonalizedMatrix>& matrices, const NewtonSchulz& h,
                   int num_threads);

}  // namespace torchopt
