// SPDX-License-Identifier: Apache-2.0
// Adafactor's step over tensors as they come.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

namespace torchopt {

namespace py = pybind11;

/// Returns (updates, rows, columns) of one step in new tensors, with `inplace` rows and columns written to; see launch/factored_rms.h. `hypers` are weight, rho, eps1,
/// eps2 and d. Returns None, having done nothing, where the tensors are not all plain, dense, on the CPU and in float32 or
/// float64, where one has no elements, or where one tensor alone would keep most threads waiting.
py::object factored_rms_call(const py::list& grads, const py::list& params, const py::list& rows,
                             const py::list& columns, const std::vector<double>& hypers,
                             bool inplace, int num_threads);

}  // namespace torchopt
