// SPDX-License-Identifier: Apache-2.0
// The multi-tensor kernel: one launch serves up to kMaxTensors tensors, whatever their sizes.
#pragma once

#include <cstdint>

#include "math/rule.h"

namespace torchopt {

inline constexpr int kThreads = 256;
/// Elements one block handles; each thread strides over them, so neighbouring threads touch neighbouring elements.
inline constexpr std::int64_t kBlockElements = 2048;
/// Bounded by the 4 KiB of kernel parameters that every supported device accepts.
inline constexpr int kMaxParameterBytes = 3584;

/// Passed by value as a kernel parameter: no table has to be copied to the device.
template <class Rule>
struct LaunchTable {
    static constexpr int kRoles = Rule::kInputs + Rule::kOutputs;
    static constexpr int kMaxTensors = kMaxParameterBytes / (8 * (kRoles + 2) + 4);
    std::uintptr_t address[kMaxTensors][kRoles];
    std::uintptr_t step[kMaxTensors];
    std::int64_t size[kMaxTensors];
    std::uint32_t first_block[kMaxTensors];  // first block of each tensor, ascending
    int num_tensors;
};

template <class Rule, class T>
__global__ void __launch_bounds__(kThreads)
    multi_tensor_kernel(const __grid_constant__ LaunchTable<Rule> table,
                        const typename Rule::Hyper hyper) {
    // The tensor of this block: the last one whose first block is not after it.
    int low = 0;
    int high = table.num_tensors - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table.first_block[middle] <= blockIdx.x) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    __shared__ typename Rule::template Coefficients<T> shared;
    if (threadIdx.x == 0) {
        shared = Rule::template coefficients<T>(
            hyper, *reinterpret_cast<const std::int64_t*>(table.step[low]));
    }
    __syncthreads();
    const typename Rule::template Coefficients<T> c = shared;

    const std::int64_t begin =
        static_cast<std::int64_t>(blockIdx.x - table.first_block[low]) * kBlockElements;
    const std::int64_t stop = begin + kBlockElements;
    const std::int64_t end = stop < table.size[low] ? stop : table.size[low];
    for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        T in[Rule::kInputs];
        T out[Rule::kOutputs];
        for (int r = 0; r < Rule::kInputs; ++r)
            in[r] = reinterpret_cast<const T*>(table.address[low][r])[i];
        Rule::apply(c, in, out);
        for (int r = 0; r < Rule::kOutputs; ++r)
            reinterpret_cast<T*>(table.address[low][Rule::kInputs + r])[i] = out[r];
    }
}

}  // namespace torchopt
