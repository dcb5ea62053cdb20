// SPDX-License-Identifier: Apache-2.0
// The rules with their types erased, and the one way into their kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch/tensors.h"

namespace torchopt {

/// One row of the table of rules.
struct RuleEntry {
    const char* name;
    int states;
    int hypers;
    void (*run_on_cpu)(const CpuLaunch&);
    void (*run_on_cuda)(const CudaLaunch&);  // null without CUDA
};

/// All rules.
const std::vector<RuleEntry>& rule_table();

/// The rule of that name; throws std::invalid_argument where there is none.
const RuleEntry& find_rule(const std::string& name);

/// The kind of that code; throws std::invalid_argument where there is none.
Kind find_kind(int code);

/// How many tensors of each index a kernel reads and writes. Of those, `inputs` - `required` may be absent, and if any
/// may, so may all outputs.
struct RoleCounts {
    std::size_t inputs, outputs, required;
};
RoleCounts role_counts(const RuleEntry& rule, Kind kind);

/// Where and how a launch runs: `device` is kCpu, or an index.
struct Placement {
    int num_threads;
    int device;
    std::uintptr_t stream;
    std::uintptr_t partials;
};

/// Runs a kernel, without the interpreter lock where that pays; returns the cotangents of the hyper-parameters (on the
/// CPU; else they are in `partials`).
std::vector<double> launch(const RuleEntry& rule, Kind kind, const Tensors& tensors,
                           const std::vector<double>& hypers, bool maximize,
                           const Placement& placement);

[[noreturn]] inline void refuse(const std::string& what) {
    throw std::invalid_argument("torchopt._C: " + what);
}

}  // namespace torchopt
