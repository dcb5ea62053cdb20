// SPDX-License-Identifier: Apache-2.0
// Muon's iteration over Python lists of tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace torchopt {

namespace py = pybind11;

/// Returns a list with one item for each matrix: the result of the iteration times its scale in a new tensor. The item
/// is None if the matrix is not plain, dense, on the CPU and in float32 or float64, or if it is too large for the cache
/// of a core; see launch/newton_schulz.h. Returns None if no matrix qualifies.
py::object newton_schulz_call(const py::list& matrices, const py::list& scales, int steps, double a,
                              double b, double c, double eps, int num_threads);

}  // namespace torchopt
