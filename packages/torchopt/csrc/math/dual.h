// SPDX-License-Identifier: Apache-2.0
// Forward dual numbers: a value together with its exact partial derivatives.
//
// A rule written once for a scalar type S computes its value with S = float or double, and its value and
// Jacobian with S = Dual<T, N>, seeded with the N unit vectors.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace torchopt {

/// value + sum_j partial[j] * e_j with e_j * e_k = 0.
/// Example: `sqrt(Dual<double, 1>::seed(4.0, 0))` is {value 2, partial {0.25}}.
template <class T, int N>
struct Dual {
    T value;
    T partial[N];

    TORCHOPT_HOST_DEVICE static Dual constant(T x) {
        Dual out;
        out.value = x;
        for (int j = 0; j < N; ++j) out.partial[j] = T(0);
        return out;
    }
    TORCHOPT_HOST_DEVICE static Dual seed(T x, int index) {
        Dual out = constant(x);
        out.partial[index] = T(1);
        return out;
    }
};

template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator+(const Dual<T, N>& a, const Dual<T, N>& b) {
    Dual<T, N> out;
    out.value = a.value + b.value;
    for (int j = 0; j < N; ++j) out.partial[j] = a.partial[j] + b.partial[j];
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator+(const Dual<T, N>& a, T b) {
    Dual<T, N> out = a;
    out.value = a.value + b;
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator*(const Dual<T, N>& a, const Dual<T, N>& b) {
    Dual<T, N> out;
    out.value = a.value * b.value;
    for (int j = 0; j < N; ++j) out.partial[j] = a.partial[j] * b.value + a.value * b.partial[j];
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator*(const Dual<T, N>& a, T b) {
    Dual<T, N> out;
    out.value = a.value * b;
    for (int j = 0; j < N; ++j) out.partial[j] = a.partial[j] * b;
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator/(const Dual<T, N>& a, const Dual<T, N>& b) {
    Dual<T, N> out;
    out.value = a.value / b.value;
    for (int j = 0; j < N; ++j)
        out.partial[j] = (a.partial[j] - out.value * b.partial[j]) / b.value;
    return out;
}

// The three functions below let a rule treat plain numbers and duals alike.

template <class T>
TORCHOPT_HOST_DEVICE T value_of(const T& x) {
    return x;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE T value_of(const Dual<T, N>& x) {
    return x.value;
}

/// The same value with all derivatives dropped.
template <class T>
TORCHOPT_HOST_DEVICE T stop_gradient(const T& x) {
    return x;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> stop_gradient(const Dual<T, N>& x) {
    return Dual<T, N>::constant(x.value);
}

TORCHOPT_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
TORCHOPT_HOST_DEVICE double square_root(double x) { return sqrt(x); }
/// d sqrt(x) = dx / (2 sqrt(x)); the caller keeps x = 0 away (see rule files for the convention there).
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> square_root(const Dual<T, N>& x) {
    Dual<T, N> out;
    out.value = square_root(x.value);
    for (int j = 0; j < N; ++j) out.partial[j] = x.partial[j] / (T(2) * out.value);
    return out;
}

template <class S>
inline constexpr bool is_dual = false;
template <class T, int N>
inline constexpr bool is_dual<Dual<T, N>> = true;

}  // namespace torchopt
