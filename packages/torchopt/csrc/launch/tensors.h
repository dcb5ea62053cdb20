// SPDX-License-Identifier: Apache-2.0
// The tensors of one launch: raw addresses, role by role. Nothing here owns memory.
#pragma once

#include <cstdint>
#include <vector>

namespace torchopt {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1 };

/// Addresses of contiguous tensors of one dtype on one device.
/// `inputs[role][i]` and `outputs[role][i]` have `sizes[i]` elements. An output may be the same address as an input of the
/// same index (in place); any other overlap is undefined. `steps[i]` is the address of one int64, the step of tensor i
/// counted from 1, on the same device as the tensor.
struct Tensors {
    std::vector<std::vector<std::uintptr_t>> inputs;
    std::vector<std::vector<std::uintptr_t>> outputs;
    std::vector<std::uintptr_t> steps;
    std::vector<std::int64_t> sizes;
    Dtype dtype;
};

}  // namespace torchopt
