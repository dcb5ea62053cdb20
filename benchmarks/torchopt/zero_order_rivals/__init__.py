# SPDX-License-Identifier: Apache-2.0
"""Zero-order gradients, a module a library.

Each has `DISTRIBUTIONS`, `library`, and

* `estimator(case, weights, x, y)` -> a function without arguments that returns the estimated
  gradient of `case.samples` antithetic pairs as a flat NumPy array;
* optionally `toy(fn, point, method, samples, sigma, seed)` -> the estimate for a toy function of a
  torch vector, and its number of evaluations.
"""
