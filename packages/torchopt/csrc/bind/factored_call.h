// SPDX-License-Identifier: Apache-2.0
// Adafactor's step over Python lists of tensors.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

namespace torchopt {

namespace py = pybind11;

/// Takes one step and returns (updates, rows, columns) in new tensors. With `inplace` it writes to the given rows and
/// columns instead; see launch/factored_rms.h. `hypers` are weight, rho, eps1, eps2 and d. Does nothing and returns
/// None if a tensor is not plain, dense, on the CPU and in float32 or float64, if one has no elements, or if one tensor
/// alone would keep most threads waiting.
py::object factored_rms_call(const py::list& grads, const py::list& params, const py::list& rows,
                             const py::list& columns, const std::vector<double>& hypers,
                             bool inplace, int num_threads);

}  // namespace torchopt
