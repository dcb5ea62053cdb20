# SPDX-License-Identifier: Apache-2.0
"""The update rules in torch operations, differentiable to any order.

They are the reference that the kernels are tested against, and what runs if there is no kernel.
Each function takes one tensor for each role, returns new tensors, and is written independently of
the C++ rules.
"""
