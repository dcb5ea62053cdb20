# SPDX-License-Identifier: Apache-2.0
"""The rules in plain torch operations, differentiable to any order: the oracle and the fallback.

Each function works on one tensor, returns new tensors, and is stated independently of the C++
rules.
"""
