// SPDX-License-Identifier: Apache-2.0
// An update or its derivative over Python lists of tensors: checks, allocation and computation in one call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace torchopt {

namespace py = pybind11;

/// Runs `kind` over `tensors`, which hold the kernel's input roles one after the other, `size` tensors each. Returns a
/// pair. Its first item holds the output roles in the same order, in new tensors. With `record`, its second item says
/// whether an input requires a gradient, so that the result must be part of a graph. Does nothing and returns None
/// unless all tensors are plain, dense, on the CPU, of one dtype and, index by index, of one shape. Tensors that the
/// kernel does not require may be None. `needed` says which outputs are wanted, None for all; the others are None in
/// the result. `step` is a number or a 0-dim int64 tensor.
py::object fused_call(const std::string& rule, int kind, const py::object& tensors,
                      std::size_t size, const py::object& needed, const py::object& step,
                      const std::vector<double>& hypers, bool maximize, int num_threads,
                      bool record);

/// Returns `count` + 1 as a new tensor for a 0-dim int64 tensor on the CPU, and None for any other object.
py::object successor(const py::object& count);

/// Whether all items are the same object.
bool are_one(const py::list& items);

}  // namespace torchopt
