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

/// Created after the caller has checked that the tensors of one index are contiguous and agree in shape, dtype, device
/// and strides. Each step first compares the tensors with the stored facts.
class StepPlan {
  public:
    StepPlan(const std::string& rule, py::list params, std::vector<py::list> states);

    /// Takes a step and returns true. Does nothing and returns false if the gradients do not fit (missing, of another
    /// size, dtype, device or layout, or in memory that the step writes to), if a tensor has moved or changed, or while
    /// another thread runs this plan. Without `launch` the step is only prepared. The step number, counted from 1, is a
    /// number or a 0-dim int64 tensor on the device of the other tensors. Such a tensor is read on the device: reading
    /// it through Python would wait for the device.
    bool run(const py::list& grads, const py::object& step, const py::object& hypers, bool maximize,
             int num_threads, int device, std::uintptr_t stream, bool launch);

    /// Takes a step on the CPU and returns the count plus one as a new tensor. `counts` must hold one and the same
    /// tensor. Does nothing and returns None if `counts` are different or `run` would return false.
    py::object advance(const py::list& grads, const py::list& counts, const py::object& hypers,
                       bool maximize, int num_threads, bool launch);

    /// Launches the step that was prepared last. The caller keeps the gradients and the step number alive and in place.
    void launch();

  private:
    bool unmoved(const py::list& role, const std::vector<std::uintptr_t>& expected);
    bool take_gradients(const py::list& grads);
    bool take_step(const py::object& step);
    bool is_apart(const Dense& gradient, std::size_t index);

    const RuleEntry* rule_;
    py::list params_;
    std::vector<py::list> states_;
    std::vector<Span> written_;  // sorted
    // The process in which a step is running; 0 if none is. It protects the members below. It is a number and not a
    // mutex, because a child forked during a step would inherit a locked mutex.
    std::atomic<std::uint64_t> running_{0};
    Reader reader_;
    py::object hypers_;  // the source of `numbers_`, if it is immutable
    std::vector<double> numbers_;
    Tensors tensors_;
    std::vector<std::uintptr_t>
        apart_;  // addresses of gradients that are known to be apart from `written_`
    bool maximize_ = false;
    Placement placement_{};
    int device_ = kCpu;
};

}  // namespace torchopt
