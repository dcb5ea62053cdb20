# SPDX-License-Identifier: Apache-2.0
"""The exceptions torchopt raises beyond Python's own."""

from __future__ import annotations

__all__ = ["KernelUnavailableError", "NotDifferentiableError", "TorchOptError"]


class TorchOptError(Exception):
    """Base of the exceptions defined by torchopt."""


class KernelUnavailableError(TorchOptError, RuntimeError):
    """A fused kernel was asked for explicitly and cannot run on these tensors."""


class NotDifferentiableError(TorchOptError, RuntimeError):
    """A gradient was asked for with respect to something the loss does not depend on."""
