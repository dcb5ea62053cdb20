// SPDX-License-Identifier: Apache-2.0
#include "launch/newton_schulz.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__GNUC__)

namespace torchopt {
/// The number of steps of a wide matrix before its product with itself is computed anew.
inline constexpr int kSquares = 3;
}  // namespace torchopt

#define TORCHOPT_SET baseline
#define TORCHOPT_TARGET
#define TORCHOPT_BYTES 16
#define TORCHOPT_ROWS 4
#include "launch/newton_schulz.inc"
#undef TORCHOPT_SET
#undef TORCHOPT_TARGET
#undef TORCHOPT_BYTES
#undef TORCHOPT_ROWS

#if defined(__x86_64__) && !defined(__clang__) && !defined(__APPLE__)
#define TORCHOPT_HAS_SETS 1

#define TORCHOPT_SET avx2
#define TORCHOPT_TARGET __attribute__((target("arch=x86-64-v3")))
#define TORCHOPT_BYTES 32
#define TORCHOPT_ROWS 4
#include "launch/newton_schulz.inc"
#undef TORCHOPT_SET
#undef TORCHOPT_TARGET
#undef TORCHOPT_BYTES
#undef TORCHOPT_ROWS

#define TORCHOPT_SET avx512
#define TORCHOPT_TARGET __attribute__((target("arch=x86-64-v4")))
#define TORCHOPT_BYTES 64
#define TORCHOPT_ROWS 8
#include "launch/newton_schulz.inc"
#undef TORCHOPT_SET
#undef TORCHOPT_TARGET
#undef TORCHOPT_BYTES
#undef TORCHOPT_ROWS
#endif

#endif

namespace torchopt {
namespace {

/// Every instruction set pads rows and columns to a multiple of this.
constexpr std::int64_t kPadding = 16;
constexpr std::size_t kAlignment = 64;
/// The maximum size in bytes of the working memory for a small matrix.
constexpr std::int64_t kCache = 1 << 20;

std::int64_t work_bytes(std::int64_t rows, std::int64_t columns, Dtype dtype) {
    const std::int64_t m = (std::min(rows, columns) + kPadding - 1) / kPadding * kPadding;
    const std::int64_t n = (std::max(rows, columns) + kPadding - 1) / kPadding * kPadding;
    return 2 * m * (m + n) * (dtype == Dtype::kFloat64 ? 8 : 4);
}

using Iterate = void (*)(const OrthogonalizedMatrix&, const NewtonSchulz&, void*);

/// The implementation for the current processor; null if the compiler has no vector types.
Iterate body() {
#if defined(TORCHOPT_HAS_SETS)
    if (__builtin_cpu_supports("x86-64-v4")) return avx512::iterate_one;
    if (__builtin_cpu_supports("x86-64-v3")) return avx2::iterate_one;
#endif
#if defined(__GNUC__)
    return baseline::iterate_one;
#else
    return nullptr;
#endif
}

}  // namespace

bool is_small(std::int64_t rows, std::int64_t columns, Dtype dtype) {
    if (body() == nullptr || std::max(rows, columns) > kCache) return false;
    return work_bytes(rows, columns, dtype) <= kCache;
}

void newton_schulz(const std::vector<OrthogonalizedMatrix>& matrices, const NewtonSchulz& h,
                   [[maybe_unused]] int num_threads) {
    const Iterate iterate = body();
    const auto count = static_cast<std::int64_t>(matrices.size());
    std::int64_t bytes = 0;
    for (const OrthogonalizedMatrix& x : matrices)
        bytes = std::max(bytes, work_bytes(x.rows, x.columns, x.dtype));
    // Allocates working memory for each thread before the threads start, so that exceptions reach the caller.
    const auto room = static_cast<std::size_t>(bytes);
    const std::unique_ptr<unsigned char[]> memory(
        new unsigned char[room * static_cast<std::size_t>(std::max(num_threads, 1)) + kAlignment]);
    auto* const begin = reinterpret_cast<unsigned char*>(
        (reinterpret_cast<std::uintptr_t>(memory.get()) + kAlignment - 1) / kAlignment *
        kAlignment);
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
#endif
    for (std::int64_t i = 0; i < count; ++i) {
#if defined(_OPENMP)
        const int thread = num_threads > 1 ? omp_get_thread_num() : 0;
#else
        const int thread = 0;
#endif
        iterate(matrices[static_cast<std::size_t>(i)], h,
                begin + room * static_cast<std::size_t>(thread));
    }
}

}  // namespace torchopt
