// SPDX-License-Identifier: Apache-2.0
// A step in place on parameters and states that stay the same from step to step.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <string>
#include <variant>
#include <vector>

#include "bind/rule_table.h"
#include "bind/tensors.h"

namespace torchopt {

/// The step, counted from 1: a number, or a 0-dim int64 tensor on the device of the tensors. The same for all tensors.
using Step = std::variant<std::int64_t, py::object>;

/// Made after the caller has checked that the tensors of one index agree in shape, dtype, device and strides and that
/// they are contiguous. What is remembered is compared with the tensors before each step.
class StepPlan {
  public:
    StepPlan(const std::string& rule, py::list params, std::vector<py::list> states);

    /// Steps and returns true; or does nothing and returns false, where the gradients do not fit (missing, of another
    /// size, dtype, device or layout), where a tensor has moved or changed, or while another thread runs this plan.
    bool run(const py::list& grads, const Step& step, const py::object& hypers, bool maximize,
             int num_threads, int device, std::uintptr_t stream);

    /// Steps on the CPU from `counts`, which hold one and the same tensor, and returns the count plus one, a new tensor;
    /// or does nothing and returns None, where `run` would return false or `counts` are others.
    py::object advance(const py::list& grads, const py::list& counts, const py::object& hypers,
                       bool maximize, int num_threads);

  private:
    bool unmoved(const py::list& role, const std::vector<std::uintptr_t>& expected);
    bool take_gradients(const py::list& grads);
    bool take_step(const Step& step);

    const RuleEntry* rule_;
    py::list params_;
    std::vector<py::list> states_;
    std::mutex mutex_;  // held while a step runs: guards what follows
    Reader reader_;
    py::object hypers_;  // what `numbers_` was made from, if that cannot change
    std::vector<double> numbers_;
    Tensors tensors_;
    int device_ = kCpu;
};

}  // namespace torchopt
