// SPDX-License-Identifier: Apache-2.0
// One launch: what to compute, and on which tensors. Nothing here owns the memory of the tensors.
#pragma once

#include <cstdint>
#include <vector>

namespace torchopt {

/// The dtype of all tensors of a launch. Half types are computed in float.
enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

/// See math/rule.h: Forward in its forms, Vjp of both updates, HyperVjp.
enum class Kind : int {
    kUpdate = 0,
    kDecayedUpdate = 1,
    kStep = 2,
    kUpdateVjp = 3,
    kDecayedUpdateVjp = 4,
    kHyperVjp = 5
};

/// The addresses of tensors of one dtype on one device, in the order of the kernel's roles. `inputs[role][i]` and
/// `outputs[role][i]` have `sizes[i]` elements, and elements with the same index belong together. An output may have
/// the address of an input with the same index (in place). Any other overlap is undefined behaviour. The address 0
/// stands for an absent tensor: as an input it reads as zeros, as an output it is not written.
struct Tensors {
    std::vector<std::vector<std::uintptr_t>> inputs;
    std::vector<std::vector<std::uintptr_t>> outputs;
    std::vector<std::int64_t> sizes;
    /// The address of an int64 for each tensor on its device: the step, counted from 1. If empty, `step` applies to
    /// all.
    std::vector<std::uintptr_t> steps;
    std::int64_t step = 1;
    Dtype dtype = Dtype::kFloat32;
};

/// A launch on the CPU. `hypers` are in the order of math/rule.h. A kind that differentiates the hyper-parameters adds
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
/// writes one row of cotangents for each block to `partials`, which the caller must add up.
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
