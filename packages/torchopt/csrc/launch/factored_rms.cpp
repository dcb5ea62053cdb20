// SPDX-License-Identifier: Apache-2.0
#include "launch/factored_rms.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "launch/loops.h"

namespace torchopt {
namespace {

/// Sums of up to this many elements use the dtype of the tensors, in `kLanes` parts. The sums of these are in double.
constexpr std::int64_t kBlock = 1024;
constexpr int kLanes = 16;

template <class T>
TORCHOPT_INLINE T at_most(T x, T most) {
    return x > most ? most : x;  // NaN is kept
}

template <class T>
TORCHOPT_INLINE T at_least(T x, T least) {
    return x < least ? least : x;
}

template <class T>
TORCHOPT_INLINE double square_sum(const T* x, std::int64_t count) {
    double total = 0;
    for (std::int64_t begin = 0; begin < count; begin += kBlock) {
        const std::int64_t size = std::min(kBlock, count - begin);
        const T* const part = x + begin;
        T lanes[kLanes] = {};
        const std::int64_t whole = size / kLanes * kLanes;
        for (std::int64_t i = 0; i < whole; i += kLanes) {
            TORCHOPT_SIMD
            for (int k = 0; k < kLanes; ++k) lanes[k] += part[i + k] * part[i + k];
        }
        for (std::int64_t i = whole; i < size; ++i) lanes[0] += part[i] * part[i];
        for (int k = 0; k < kLanes; ++k) total += static_cast<double>(lanes[k]);
    }
    return total;
}

/// old + weight (value - old), with both bounded by the largest finite number of the dtype.
template <class T>
TORCHOPT_INLINE T moved(T old, T value, T weight) {
    constexpr T most = std::numeric_limits<T>::max();
    old = at_most(old, most);
    return old + weight * (at_most(value, most) - old);
}

/// u = g / sqrt(variance), where the variance of element i is `factor` * second[i], but at least `least`.
template <class T>
TORCHOPT_INLINE void directions(const T* g, const T* second, T factor, T least, T* u,
                                std::int64_t count) {
    TORCHOPT_SIMD
    for (std::int64_t i = 0; i < count; ++i)
        u[i] = g[i] * (T(1) / std::sqrt(at_least(factor * second[i], least)));
}

template <class T>
TORCHOPT_INLINE void step_matrices(const FactoredTensor& x, T weight, T eps1) {
    const auto* g = reinterpret_cast<const T*>(x.gradient);
    const auto* row = reinterpret_cast<const T*>(x.row);
    const auto* column = reinterpret_cast<const T*>(x.column);
    auto* u = reinterpret_cast<T*>(x.update);
    auto* new_row = reinterpret_cast<T*>(x.new_row);
    auto* new_column = reinterpret_cast<T*>(x.new_column);
    std::vector<double> sums(static_cast<std::size_t>(x.columns));
    for (std::int64_t b = 0; b < x.batch; ++b) {
        double* const of_columns = sums.data();
        std::fill(sums.begin(), sums.end(), 0.0);
        double total = 0;
        for (std::int64_t r = 0; r < x.rows; ++r) {
            const T* const line = g + r * x.columns;
            TORCHOPT_SIMD
            for (std::int64_t c = 0; c < x.columns; ++c)
                of_columns[c] += static_cast<double>(line[c] * line[c]);
            const double mean = square_sum(line, x.columns) / static_cast<double>(x.columns);
            new_row[r] = moved(row[r], static_cast<T>(mean), weight);
            total += static_cast<double>(new_row[r]);
        }
        for (std::int64_t c = 0; c < x.columns; ++c)
            new_column[c] = moved(
                column[c], static_cast<T>(of_columns[c] / static_cast<double>(x.rows)), weight);
        const T mean = at_least(at_most(static_cast<T>(total / static_cast<double>(x.rows)),
                                        std::numeric_limits<T>::max()),
                                eps1);
        for (std::int64_t r = 0; r < x.rows; ++r)
            directions(g + r * x.columns, new_column, new_row[r] / mean, eps1 * eps1,
                       u + r * x.columns, x.columns);
        g += x.rows * x.columns;
        u += x.rows * x.columns;
        row += x.rows;
        new_row += x.rows;
        column += x.columns;
        new_column += x.columns;
    }
}

template <class T>
TORCHOPT_INLINE void step_vector(const FactoredTensor& x, T weight, T eps1) {
    const auto* g = reinterpret_cast<const T*>(x.gradient);
    const auto* row = reinterpret_cast<const T*>(x.row);
    auto* new_row = reinterpret_cast<T*>(x.new_row);
    TORCHOPT_SIMD
    for (std::int64_t i = 0; i < x.rows; ++i) new_row[i] = moved(row[i], g[i] * g[i], weight);
    directions(g, new_row, T(1), eps1 * eps1, reinterpret_cast<T*>(x.update), x.rows);
}

template <class T>
TORCHOPT_INLINE void step(const FactoredTensor& x, const FactoredHypers& h) {
    const T weight = static_cast<T>(h.weight);
    const T eps1 = h.eps1 < 0 ? std::numeric_limits<T>::epsilon() : static_cast<T>(h.eps1);
    const std::int64_t count = x.is_vector ? x.rows : x.batch * x.rows * x.columns;
    if (count == 0) return;
    if (x.is_vector)
        step_vector<T>(x, weight, eps1);
    else
        step_matrices<T>(x, weight, eps1);
    auto* const u = reinterpret_cast<T*>(x.update);
    const double size = std::sqrt(static_cast<double>(count));
    const double of_p = std::sqrt(square_sum(reinterpret_cast<const T*>(x.parameter), count));
    const double of_u = std::sqrt(square_sum(u, count));
    const double factor =
        at_least(of_p / size, h.eps2) * h.rho / at_least(of_u / (size * h.d), 1.0);
    const T scale = static_cast<T>(factor);
    TORCHOPT_SIMD
    for (std::int64_t i = 0; i < count; ++i) u[i] *= scale;
}

TORCHOPT_CLONES void step_one(const FactoredTensor& x, const FactoredHypers& h) {
    if (x.dtype == Dtype::kFloat64)
        step<double>(x, h);
    else
        step<float>(x, h);
}

}  // namespace

void factored_rms(const std::vector<FactoredTensor>& tensors, const FactoredHypers& hypers,
                  [[maybe_unused]] int num_threads) {
    const auto count = static_cast<std::int64_t>(tensors.size());
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
#endif
    for (std::int64_t i = 0; i < count; ++i) step_one(tensors[static_cast<std::size_t>(i)], hypers);
}

}  // namespace torchopt
