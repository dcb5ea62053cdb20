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

/// T in a context where it is not deduced: `x * 2.0` then converts the number to the type of the dual.
template <class T>
struct SameType {
    using type = T;
};
template <class T>
using Number = typename SameType<T>::type;

template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator-(const Dual<T, N>& a) {
    Dual<T, N> out;
    out.value = -a.value;
    for (int j = 0; j < N; ++j) out.partial[j] = -a.partial[j];
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator+(const Dual<T, N>& a, const Dual<T, N>& b) {
    Dual<T, N> out;
    out.value = a.value + b.value;
    for (int j = 0; j < N; ++j) out.partial[j] = a.partial[j] + b.partial[j];
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator+(const Dual<T, N>& a, Number<T> b) {
    Dual<T, N> out = a;
    out.value = a.value + b;
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator+(Number<T> a, const Dual<T, N>& b) {
    return b + a;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator-(const Dual<T, N>& a, const Dual<T, N>& b) {
    Dual<T, N> out;
    out.value = a.value - b.value;
    for (int j = 0; j < N; ++j) out.partial[j] = a.partial[j] - b.partial[j];
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator-(const Dual<T, N>& a, Number<T> b) {
    return a + (-b);
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator-(Number<T> a, const Dual<T, N>& b) {
    return -b + a;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator*(const Dual<T, N>& a, const Dual<T, N>& b) {
    Dual<T, N> out;
    out.value = a.value * b.value;
    for (int j = 0; j < N; ++j) out.partial[j] = a.partial[j] * b.value + a.value * b.partial[j];
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator*(const Dual<T, N>& a, Number<T> b) {
    Dual<T, N> out;
    out.value = a.value * b;
    for (int j = 0; j < N; ++j) out.partial[j] = a.partial[j] * b;
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator*(Number<T> a, const Dual<T, N>& b) {
    return b * a;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator/(const Dual<T, N>& a, const Dual<T, N>& b) {
    Dual<T, N> out;
    out.value = a.value / b.value;
    for (int j = 0; j < N; ++j)
        out.partial[j] = (a.partial[j] - out.value * b.partial[j]) / b.value;
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator/(const Dual<T, N>& a, Number<T> b) {
    Dual<T, N> out;
    out.value = a.value / b;
    for (int j = 0; j < N; ++j) out.partial[j] = a.partial[j] / b;
    return out;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> operator/(Number<T> a, const Dual<T, N>& b) {
    Dual<T, N> out;
    out.value = a / b.value;
    for (int j = 0; j < N; ++j) out.partial[j] = -out.value * b.partial[j] / b.value;
    return out;
}

// The functions below let a rule treat plain numbers and duals in the same way.

template <class T>
TORCHOPT_HOST_DEVICE T value_of(const T& x) {
    return x;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE T value_of(const Dual<T, N>& x) {
    return x.value;
}

template <class S>
inline constexpr bool is_dual = false;
template <class T, int N>
inline constexpr bool is_dual<Dual<T, N>> = true;

/// 0 as an S.
template <class S>
TORCHOPT_HOST_DEVICE S zero() {
    if constexpr (is_dual<S>) {
        return S::constant(0);
    } else {
        return S(0);
    }
}

/// `first` if `condition`, else `second`, component by component, so that loops over it vectorise.
template <class T>
TORCHOPT_HOST_DEVICE T choose(bool condition, const T& first, const T& second) {
    return condition ? first : second;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> choose(bool condition, const Dual<T, N>& first,
                                       const Dual<T, N>& second) {
    Dual<T, N> out;
    out.value = condition ? first.value : second.value;
    for (int j = 0; j < N; ++j) out.partial[j] = condition ? first.partial[j] : second.partial[j];
    return out;
}

TORCHOPT_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
TORCHOPT_HOST_DEVICE double square_root(double x) { return sqrt(x); }
/// d sqrt(x) = dx / (2 sqrt(x)). The caller must exclude x = 0 (the rule files state the convention for it).
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> square_root(const Dual<T, N>& x) {
    Dual<T, N> out;
    out.value = square_root(x.value);
    for (int j = 0; j < N; ++j) out.partial[j] = x.partial[j] / (T(2) * out.value);
    return out;
}

/// |x|, with the derivative 0 at 0.
TORCHOPT_HOST_DEVICE float absolute(float x) { return fabsf(x); }
TORCHOPT_HOST_DEVICE double absolute(double x) { return fabs(x); }
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> absolute(const Dual<T, N>& x) {
    Dual<T, N> out;
    out.value = absolute(x.value);
    const T slope = x.value > T(0) ? T(1) : (x.value < T(0) ? T(-1) : T(0));
    for (int j = 0; j < N; ++j) out.partial[j] = x.partial[j] * slope;
    return out;
}

/// The larger of two numbers; NaN if either is NaN. If they are equal, its derivative is the mean of theirs.
template <class T>
TORCHOPT_HOST_DEVICE T maximum(const T& a, const T& b) {
    return (a > b || a != a) ? a : b;
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> maximum(const Dual<T, N>& a, const Dual<T, N>& b) {
    Dual<T, N> out;
    out.value = maximum(a.value, b.value);
    const T weight = a.value > b.value ? T(1) : (a.value == b.value ? T(0.5) : T(0));
    for (int j = 0; j < N; ++j)
        out.partial[j] = a.partial[j] * weight + b.partial[j] * (T(1) - weight);
    return out;
}

/// -1, 0 or 1, or NaN for NaN. The derivative is 0 everywhere.
template <class T>
TORCHOPT_HOST_DEVICE T sign(const T& x) {
    return x > T(0) ? T(1) : (x < T(0) ? T(-1) : x * T(0));
}
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> sign(const Dual<T, N>& x) {
    return Dual<T, N>::constant(sign(x.value));
}

/// x^k for a constant k. Used for coefficients, in double.
TORCHOPT_HOST_DEVICE double power(double x, double k) { return pow(x, k); }
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> power(const Dual<T, N>& x, double k) {
    Dual<T, N> out;
    out.value = pow(x.value, k);
    const T slope = k * pow(x.value, k - 1.0);
    for (int j = 0; j < N; ++j) out.partial[j] = x.partial[j] * slope;
    return out;
}

/// log(x) for x > 0. Used for coefficients, in double.
TORCHOPT_HOST_DEVICE double logarithm(double x) { return log(x); }
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> logarithm(const Dual<T, N>& x) {
    Dual<T, N> out;
    out.value = log(x.value);
    for (int j = 0; j < N; ++j) out.partial[j] = x.partial[j] / x.value;
    return out;
}

/// exp(x). Used for coefficients, in double.
TORCHOPT_HOST_DEVICE double exponential(double x) { return exp(x); }
template <class T, int N>
TORCHOPT_HOST_DEVICE Dual<T, N> exponential(const Dual<T, N>& x) {
    Dual<T, N> out;
    out.value = exp(x.value);
    for (int j = 0; j < N; ++j) out.partial[j] = x.partial[j] * out.value;
    return out;
}

}  // namespace torchopt
