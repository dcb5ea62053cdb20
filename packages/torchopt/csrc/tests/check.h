// SPDX-License-Identifier: Apache-2.0
// A minimal test harness for the C++ tests.
#pragma once

#include <cmath>
#include <cstdio>

namespace torchopt::test {

inline int failures = 0;

inline void near(double got, double expected, double tolerance, const char* what, int line) {
    const double error = std::fabs(got - expected);
    if (!(error <= tolerance * std::fmax(1.0, std::fabs(expected)))) {
        std::fprintf(stderr, "line %d: %s: expected %.17g, got %.17g\n", line, what, expected, got);
        ++failures;
    }
}

}  // namespace torchopt::test

#define CHECK_NEAR(got, expected, tolerance) \
    torchopt::test::near((got), (expected), (tolerance), #got, __LINE__)
#define CHECK_TRUE(condition) \
    torchopt::test::near((condition) ? 1.0 : 0.0, 1.0, 0.0, #condition, __LINE__)
