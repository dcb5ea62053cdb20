// SPDX-License-Identifier: Apache-2.0
// An update or its derivative over tensors as they come: checked, allocated and computed in one call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace torchopt {

namespace py = pybind11;

/// Runs `kind` over `tensors`, which are the kernel's input roles one after the other, `size` tensors each. Returns a
/// pair: the output roles in the same way, in new tensors; and with `record`, whether one of the tensors requires a
/// gradient, so that a graph follows. Returns None, having done nothing, where the tensors are not all
/// plain, dense, on the CPU, of one dtype and, index by index, of one shape; those that a kernel can do without may be
/// None. `needed` says which outputs are wanted, None for all; the others are None in the result. `step` is a number or
/// a 0-dim int64 tensor.
py::object fused_call(const std::string& rule, int kind, const py::object& tensors,
                      std::size_t size, const py::object& needed, const py::object& step,
                      const std::vector<double>& hypers, bool maximize, int num_threads,
                      bool record);

/// `count` + 1 as a new tensor, for a 0-dim int64 tensor on the CPU; None for any other object.
py::object successor(const py::object& count);

/// Whether the items are one and the same object.
bool are_one(const py::list& items);

}  // namespace torchopt
