// SPDX-License-Identifier: Apache-2.0
// One launch: what to compute, on which tensors. Nothing here owns the tensors' memory.
#pragma once

#include <cstdint>
#include <vector>

namespace torchopt {

/// The dtype of all tensors of a launch. Half types are computed in float.
enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

/// See math/rule.h: Forward of each form, Vjp of both updates, HyperVjp.
enum class Kind : int {
    kUpdate = 0,
    kDecayedUpdate = 1,
    kStep = 2,
    kUpdateVjp = 3,
    kDecayedUpdateVjp = 4,
    kHyperVjp = 5
};

/// Addresses of tensors of one dtype on one device, in the order of the kernel's roles.
/// `inputs[role][i]` and `outputs[role][i]` have `sizes[i]` elements, element k of each belonging together. An output may
/// be the same address as an input of the same index (in place); any other overlap is undefined. The address 0 stands
/// for a tensor that is absent: as an input it is read as zeros, as an output it is not written.
struct Tensors {
    std::vector<std::vector<std::uintptr_t>> inputs;
    std::vector<std::vector<std::uintptr_t>> outputs;
    std::vector<std::int64_t> sizes;
    /// Address of one int64 for each tensor, the step counted from 1, on the tensor's device; empty: `step` for all.
    std::vector<std::uintptr_t> steps;
    std::int64_t step = 1;
    Dtype dtype = Dtype::kFloat32;
};

/// A launch on the CPU. `hypers` in the order of math/rule.h. A kind that differentiates the hyper-parameters adds
/// their cotangents to `hyper_cotangents`.
struct CpuLaunch {
    Kind kind;
    const Tensors& tensors;
    const std::vector<double>& hypers;
    bool maximize;
    int num_threads;
    double* hyper_cotangents;
};

/// A launch on a CUDA device. `stream` is a cudaStream_t as an integer. A kind that differentiates the hyper-parameters
/// writes one row of their cotangents for each block to `partials`, to be added up by the caller.
struct CudaLaunch {
    Kind kind;
    const Tensors& tensors;
    const std::vector<double>& hypers;
    bool maximize;
    int device;
    std::uintptr_t stream;
    double* partials;
};

}  // namespace torchopt
