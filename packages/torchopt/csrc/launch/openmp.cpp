// SPDX-License-Identifier: Apache-2.0
#include "launch/openmp.h"

#include <algorithm>
#include <cstddef>

// The inner loop is compiled once for AVX2 and once for the baseline, chosen when the library is loaded.
// The attribute sits on a plain function (not on a template, not on the one that holds the parallel region):
// gcc outlines parallel regions, and the outlined body would not be cloned.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__APPLE__)
#define TORCHOPT_CLONES __attribute__((target_clones("arch=x86-64-v3", "default"), noinline))
#elif defined(__GNUC__)
#define TORCHOPT_CLONES __attribute__((noinline))
#else
#define TORCHOPT_CLONES
#endif

namespace torchopt {
namespace {

/// One unit of work: elements [begin, begin + count) of tensor `tensor`.
struct Chunk {
    std::size_t tensor;
    std::int64_t begin;
    std::int64_t count;
};

template <class Rule, class T>
TORCHOPT_HOST_DEVICE void loop(const typename Rule::template Coefficients<T>& coefficients,
                               const T* const* inputs, T* const* outputs, std::int64_t count) {
    const T* in[Rule::kInputs];
    T* out[Rule::kOutputs];
    for (int r = 0; r < Rule::kInputs; ++r) in[r] = inputs[r];
    for (int r = 0; r < Rule::kOutputs; ++r) out[r] = outputs[r];
    const typename Rule::template Coefficients<T> c = coefficients;
    // Elements are independent and an output aliases an input at the same index at most.
#if defined(_OPENMP)
#pragma omp simd
#elif defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
    for (std::int64_t i = 0; i < count; ++i) {
        T x[Rule::kInputs];
        T y[Rule::kOutputs];
        for (int r = 0; r < Rule::kInputs; ++r) x[r] = in[r][i];
        Rule::apply(c, x, y);
        for (int r = 0; r < Rule::kOutputs; ++r) out[r][i] = y[r];
    }
}

template <class Rule, class T>
struct Loop;

#define TORCHOPT_LOOP(NAME, RULE, T)                                                             \
    TORCHOPT_CLONES void NAME(const RULE::Coefficients<T>& c, const T* const* in, T* const* out, \
                              std::int64_t n) {                                                  \
        loop<RULE, T>(c, in, out, n);                                                            \
    }                                                                                            \
    template <>                                                                                  \
    struct Loop<RULE, T> {                                                                       \
        static constexpr auto run = &NAME;                                                       \
    };

#define TORCHOPT_LOOPS(NAME, RULE)             \
    TORCHOPT_LOOP(NAME##_float32, RULE, float) \
    TORCHOPT_LOOP(NAME##_float64, RULE, double)

TORCHOPT_LOOPS(adam, Adam)
TORCHOPT_LOOPS(adam_vjp, Vjp<Adam>)
TORCHOPT_LOOPS(adamw, AdamW)
TORCHOPT_LOOPS(adamw_vjp, Vjp<AdamW>)
TORCHOPT_LOOPS(momentum, Momentum<false>)
TORCHOPT_LOOPS(momentum_vjp, Vjp<Momentum<false>>)
TORCHOPT_LOOPS(nesterov, Momentum<true>)
TORCHOPT_LOOPS(nesterov_vjp, Vjp<Momentum<true>>)

template <class Rule, class T>
void run_typed(const Tensors& tensors, const typename Rule::Hyper& hyper, int num_threads) {
    using Coefficients = typename Rule::template Coefficients<T>;
    std::vector<Coefficients> coefficients;
    std::vector<Chunk> chunks;
    coefficients.reserve(tensors.sizes.size());
    std::int64_t total = 0;
    for (std::size_t i = 0; i < tensors.sizes.size(); ++i) {
        const auto step = *reinterpret_cast<const std::int64_t*>(tensors.steps[i]);
        coefficients.push_back(Rule::template coefficients<T>(hyper, step));
        for (std::int64_t begin = 0; begin < tensors.sizes[i]; begin += kChunk) {
            chunks.push_back({i, begin, std::min(kChunk, tensors.sizes[i] - begin)});
        }
        total += tensors.sizes[i];
    }

    const auto run_chunk = [&](const Chunk& chunk) {
        const T* in[Rule::kInputs];
        T* out[Rule::kOutputs];
        for (std::size_t r = 0; r < Rule::kInputs; ++r)
            in[r] = reinterpret_cast<const T*>(tensors.inputs[r][chunk.tensor]) + chunk.begin;
        for (std::size_t r = 0; r < Rule::kOutputs; ++r)
            out[r] = reinterpret_cast<T*>(tensors.outputs[r][chunk.tensor]) + chunk.begin;
        Loop<Rule, T>::run(coefficients[chunk.tensor], in, out, chunk.count);
    };

    const auto num_chunks = static_cast<std::int64_t>(chunks.size());
    const auto threads = static_cast<int>(std::min<std::int64_t>(
        {std::max(num_threads, 1), num_chunks, (total + kChunk - 1) / kChunk}));
    if (threads <= 1) {
        for (const Chunk& chunk : chunks) run_chunk(chunk);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
    for (std::int64_t i = 0; i < num_chunks; ++i) run_chunk(chunks[static_cast<std::size_t>(i)]);
}

}  // namespace

template <class Rule>
void run_on_cpu(const Tensors& tensors, const typename Rule::Hyper& hyper, int num_threads) {
    switch (tensors.dtype) {
        case Dtype::kFloat32: return run_typed<Rule, float>(tensors, hyper, num_threads);
        case Dtype::kFloat64: return run_typed<Rule, double>(tensors, hyper, num_threads);
    }
}

template void run_on_cpu<Adam>(const Tensors&, const AdamHyper&, int);
template void run_on_cpu<Vjp<Adam>>(const Tensors&, const AdamHyper&, int);
template void run_on_cpu<AdamW>(const Tensors&, const AdamWHyper&, int);
template void run_on_cpu<Vjp<AdamW>>(const Tensors&, const AdamWHyper&, int);
template void run_on_cpu<Momentum<false>>(const Tensors&, const MomentumHyper&, int);
template void run_on_cpu<Vjp<Momentum<false>>>(const Tensors&, const MomentumHyper&, int);
template void run_on_cpu<Momentum<true>>(const Tensors&, const MomentumHyper&, int);
template void run_on_cpu<Vjp<Momentum<true>>>(const Tensors&, const MomentumHyper&, int);

}  // namespace torchopt
