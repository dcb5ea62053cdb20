// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that launch/cuda.inc uses, implemented on the host, so that any C++ compiler can compile
// it.
//
// A block is `blockDim.x` threads with a barrier, and blocks run one after another. Shared memory is static memory. So
// the thread sanitizer detects a missing __syncthreads, and the address sanitizer an access outside a tensor. This does
// not model warps, caches or time.
#pragma once

#include <barrier>
#include <cstdint>
#include <cstring>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static

struct dim3 {
    unsigned x = 1;
    unsigned y = 1;
    unsigned z = 1;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

template <class Word>
void __stwb(Word* address, Word word) {
    *address = word;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

namespace emulated_cuda {

inline thread_local dim3 thread_index;
inline thread_local dim3 block_index;
inline thread_local std::barrier<>* block_barrier = nullptr;

/// The arguments of the last launches, for tests of the launch logic.
struct Launch {
    unsigned blocks;
    unsigned threads;
    cudaStream_t stream;
};
inline std::vector<Launch> launches;
inline cudaError_t last_error = cudaSuccess;
/// The current context of the calling thread: the address of a device's number, or null. Also the devices that have
/// one.
inline int devices[4] = {0, 1, 2, 3};
inline void* current_context = nullptr;
inline std::vector<int> used_devices;

inline int get_context(void** context) {
    *context = current_context;
    return 0;
}
inline int set_context(void* context) {
    current_context = context;
    return 0;
}

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cvref_t<A>*>(arguments[I])...);
}

}  // namespace emulated_cuda

#define threadIdx (::emulated_cuda::thread_index)
#define blockIdx (::emulated_cuda::block_index)

inline void __syncthreads() { emulated_cuda::block_barrier->arrive_and_wait(); }

inline cudaError_t cudaGetLastError() {
    return std::exchange(emulated_cuda::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline cudaError_t cudaSetDevice(int device) {
    emulated_cuda::used_devices.push_back(device);
    emulated_cuda::current_context = &emulated_cuda::devices[device];
    return cudaSuccess;
}

#define CUDART_VERSION 13000
inline constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long, void*) {
    *function = std::strcmp(name, "cuCtxGetCurrent") == 0
                    ? reinterpret_cast<void*>(&emulated_cuda::get_context)
                    : reinterpret_cast<void*>(&emulated_cuda::set_context);
    return cudaSuccess;
}

template <class... A>
cudaError_t cudaLaunchKernel(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments,
                             std::size_t, cudaStream_t stream) {
    emulated_cuda::launches.push_back({grid.x, block.x, stream});
    if (grid.x == 0 || block.x == 0 || block.x > 1024)
        return emulated_cuda::last_error = cudaErrorInvalidConfiguration;
    std::barrier<> barrier(static_cast<std::ptrdiff_t>(block.x));
    const auto run = [&](unsigned thread) {
        emulated_cuda::thread_index = dim3(thread);
        emulated_cuda::block_barrier = &barrier;
        for (unsigned b = 0; b < grid.x; ++b) {
            emulated_cuda::block_index = dim3(b);
            emulated_cuda::call(kernel, arguments, std::index_sequence_for<A...>());
            barrier.arrive_and_wait();  // the next block uses other shared memory
        }
    };
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < block.x; ++thread) threads.emplace_back(run, thread);
    for (std::thread& thread : threads) thread.join();
    return cudaSuccess;
}
