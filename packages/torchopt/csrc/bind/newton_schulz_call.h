// SPDX-License-Identifier: Apache-2.0
// Muon's iteration over tensors as they come.
#pragma once

#include <pybind11/pybind11.h>

namespace torchopt {

namespace py = pybind11;

/// Returns a list: for each matrix the result of the iteration times its scale in a new tensor, None for one that is not
/// plain, dense, on the CPU, in float32 or float64, or that is too large for a core's cache; see launch/newton_schulz.h.
/// Returns None where there is no such matrix.
py::object newton_schulz_call(const py::list& matrices, const py::list& scales, int steps, double a,
                              double b, double c, double eps, int num_threads);

}  // namespace torchopt
