// SPDX-License-Identifier: Apache-2.0
// How the inner loops of the CPU kernels are compiled.
#pragma once

// The inner loop is compiled for AVX-512, for AVX2 and for the baseline, chosen when the library is loaded. AVX-512 takes
// half the time of AVX2 where the processor has units of its width (Zen 5: 0.12 ns an element of Adam in place instead
// of 0.23).
// The attribute sits on plain functions (not on a template, not on the one that holds the parallel region):
// gcc outlines parallel regions, and the outlined body would not be cloned. Without optimization nothing is vectorised,
// so there are no clones then.
#if defined(__OPTIMIZE__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__APPLE__)
#define TORCHOPT_CLONES \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#elif defined(__GNUC__)
#define TORCHOPT_CLONES __attribute__((noinline))
#else
#define TORCHOPT_CLONES
#endif

// Says that iterations are independent. Not "omp simd": gcc gives the arrays inside such a loop one slot for each lane
// before it knows that they are registers, and then does not vectorise at all.
#if defined(__clang__)
#define TORCHOPT_SIMD _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define TORCHOPT_SIMD _Pragma("GCC ivdep")
#else
#define TORCHOPT_SIMD
#endif

// For what is a part of a function with TORCHOPT_CLONES: the clones must have its body.
#if defined(__GNUC__)
#define TORCHOPT_INLINE inline __attribute__((always_inline))
#else
#define TORCHOPT_INLINE inline
#endif
