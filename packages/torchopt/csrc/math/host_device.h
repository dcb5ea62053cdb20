// SPDX-License-Identifier: Apache-2.0
// The only file that depends on which compiler reads the rules.
#pragma once

#if defined(__CUDACC__)
#define TORCHOPT_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define TORCHOPT_HOST_DEVICE __forceinline
#else
// always_inline lets a rule be cloned together with the loop that calls it (launch/loops.h).
#define TORCHOPT_HOST_DEVICE inline __attribute__((always_inline))
#endif
