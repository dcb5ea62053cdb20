# SPDX-License-Identifier: Apache-2.0
"""Formulas that rules are made of, in torch operations that are differentiable to any order."""
