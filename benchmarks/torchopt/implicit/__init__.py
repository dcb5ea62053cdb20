# SPDX-License-Identifier: Apache-2.0
"""Implicit gradients of problems whose answers linear algebra gives."""
