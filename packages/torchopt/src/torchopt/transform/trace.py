# SPDX-License-Identifier: Apache-2.0
"""The direction of an optimizer; see `torchopt.optimizers.sgd`."""

from torchopt.optimizers.sgd import DampenedTraceState, TraceState, trace

__all__ = ["DampenedTraceState", "TraceState", "trace"]
