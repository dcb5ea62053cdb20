// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "launch/cuda.cuh"
#include "launch/cuda.h"

namespace torchopt {
namespace {

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("torchopt: ") + what +
                                 " failed: " + cudaGetErrorString(status));
    }
}

/// Makes `device` current and restores the previous one. The static runtime has a current device of its own.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
};

template <class Rule, class T>
void run_typed(const Tensors& tensors, const typename Rule::Hyper& hyper, cudaStream_t stream) {
    using Table = LaunchTable<Rule>;
    static_assert(sizeof(Table) + sizeof(typename Rule::Hyper) <= 4096,
                  "the table must fit the kernel parameters");
    constexpr std::int64_t kMaxBlocks = std::int64_t{1} << 30;
    Table table{};
    std::int64_t blocks = 0;
    const auto flush = [&] {
        if (table.num_tensors == 0) return;
        multi_tensor_kernel<Rule, T>
            <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table, hyper);
        check(cudaGetLastError(), "the launch of a multi-tensor kernel");
        table.num_tensors = 0;
        blocks = 0;
    };
    for (std::size_t i = 0; i < tensors.sizes.size(); ++i) {
        if (tensors.sizes[i] == 0) continue;
        const std::int64_t needed = (tensors.sizes[i] + kBlockElements - 1) / kBlockElements;
        if (needed > kMaxBlocks)
            throw std::runtime_error("torchopt: a tensor has more than 2^41 elements");
        if (table.num_tensors == Table::kMaxTensors || blocks + needed > kMaxBlocks) flush();
        const int t = table.num_tensors++;
        for (int r = 0; r < Rule::kInputs; ++r)
            table.address[t][r] = tensors.inputs[static_cast<std::size_t>(r)][i];
        for (int r = 0; r < Rule::kOutputs; ++r)
            table.address[t][Rule::kInputs + r] = tensors.outputs[static_cast<std::size_t>(r)][i];
        table.step[t] = tensors.steps[i];
        table.size[t] = tensors.sizes[i];
        table.first_block[t] = static_cast<std::uint32_t>(blocks);
        blocks += needed;
    }
    flush();
}

}  // namespace

template <class Rule>
void run_on_cuda(const Tensors& tensors, const typename Rule::Hyper& hyper, int device,
                 std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    switch (tensors.dtype) {
        case Dtype::kFloat32: return run_typed<Rule, float>(tensors, hyper, cuda_stream);
        case Dtype::kFloat64: return run_typed<Rule, double>(tensors, hyper, cuda_stream);
    }
}

template void run_on_cuda<Adam>(const Tensors&, const AdamHyper&, int, std::uintptr_t);
template void run_on_cuda<Vjp<Adam>>(const Tensors&, const AdamHyper&, int, std::uintptr_t);
template void run_on_cuda<AdamW>(const Tensors&, const AdamWHyper&, int, std::uintptr_t);
template void run_on_cuda<Vjp<AdamW>>(const Tensors&, const AdamWHyper&, int, std::uintptr_t);
template void run_on_cuda<Momentum<false>>(const Tensors&, const MomentumHyper&, int,
                                           std::uintptr_t);
template void run_on_cuda<Vjp<Momentum<false>>>(const Tensors&, const MomentumHyper&, int,
                                                std::uintptr_t);
template void run_on_cuda<Momentum<true>>(const Tensors&, const MomentumHyper&, int,
                                          std::uintptr_t);
template void run_on_cuda<Vjp<Momentum<true>>>(const Tensors&, const MomentumHyper&, int,
                                               std::uintptr_t);

}  // namespace torchopt
