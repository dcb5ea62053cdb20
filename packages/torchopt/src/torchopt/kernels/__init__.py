# SPDX-License-Identifier: Apache-2.0
"""Fused kernels: one native call for all tensors of a step. `native` is the entry point."""
