// SPDX-License-Identifier: Apache-2.0
// A step in place on parameters and states that stay the same from step to step.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "bind/rule_table.h"
#include "bind/tensors.h"

namespace torchopt {

/// Made after the caller has checked that the tensors of one index agree in shape, dtype, device and strides and that
/// they are contiguous. What is remembered is compared with the tensors before each step.
class StepPlan {
  public:
    StepPlan(const std::string& rule, py::list params, std::vector<py::list> states);

    /// Steps and returns true; or does nothing and returns false, where the gradients do not fit (missing, of another
    /// size, dtype, device or layout, in the memory that the step writes to), where a tensor has moved or changed, or
    /// while another thread runs this plan. Without `launch` the step is only prepared.
    /// The step, counted from 1, is a number or a 0-dim int64 tensor on the device of the tensors, which is read there:
    /// its value is never asked for through Python, which would wait for the device.
    bool run(const py::list& grads, const py::object& step, const py::object& hypers, bool maximize,
             int num_threads, int device, std::uintptr_t stream, bool launch);

    /// Steps on the CPU from `counts`, which hold one and the same tensor, and returns the count plus one, a new tensor;
    /// or does nothing and returns None, where `run` would return false or `counts` are others.
    py::object advance(const py::list& grads, const py::list& counts, const py::object& hypers,
                       bool maximize, int num_threads, bool launch);

    /// Takes the step that was prepared last. The gradients and the step are still alive and where they were.
    void launch();

  private:
    bool unmoved(const py::list& role, const std::vector<std::uintptr_t>& expected);
    bool take_gradients(const py::list& grads);
    bool take_step(const py::object& step);
    bool is_apart(const Dense& gradient, std::size_t index);

    const RuleEntry* rule_;
    py::list params_;
    std::vector<py::list> states_;
    std::vector<Span> written_;  // in order
    // The process in which a step runs, 0 while none does: guards what follows. A number and not a mutex, which a child
    // forked in the meantime would find locked.
    std::atomic<std::uint64_t> running_{0};
    Reader reader_;
    py::object hypers_;  // what `numbers_` was made from, if that cannot change
    std::vector<double> numbers_;
    Tensors tensors_;
    std::vector<std::uintptr_t>
        apart_;  // addresses of gradients that are known to be apart from `written_`
    bool maximize_ = false;
    Placement placement_{};
    int device_ = kCpu;
};

}  // namespace torchopt
