# SPDX-License-Identifier: Apache-2.0
"""Meta-steps of torchopt and of jax on the same numbers."""
