# SPDX-License-Identifier: Apache-2.0
"""Zero-order gradients: evaluations a second, error against evaluations, memory."""
