// SPDX-License-Identifier: Apache-2.0
// The rules behind a common type, and the only entry point to their kernels.
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

/// The rule of that name. Throws std::invalid_argument if there is none.
const RuleEntry& find_rule(const std::string& name);

/// The kind with that code. Throws std::invalid_argument if there is none.
Kind find_kind(int code);

/// The number of tensors that a kernel reads and writes for each index. The last `inputs` - `required` inputs may be
/// absent. If any input may be absent, so may every output.
struct RoleCounts {
    std::size_t inputs, outputs, required;
};
RoleCounts role_counts(const RuleEntry& rule, Kind kind);

/// Where and how a launch runs. `device` is kCpu or the index of a CUDA device.
struct Placement {
    int num_threads;
    int device;
    std::uintptr_t stream;
    std::uintptr_t partials;
};

/// Runs a kernel and releases the interpreter lock if that pays. Returns the cotangents of the hyper-parameters on the
/// CPU; on CUDA they are in `partials`.
std::vector<double> launch(const RuleEntry& rule, Kind kind, const Tensors& tensors,
                           const std::vector<double>& hypers, bool maximize,
                           const Placement& placement);

[[noreturn]] inline void refuse(const std::string& what) {
    throw std::invalid_argument("torchopt._C: " + what);
}

}  // namespace torchopt
