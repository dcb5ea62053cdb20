# SPDX-License-Identifier: Apache-2.0
"""Skip steps with NaN or infinite gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torchopt.base import GradientTransformation, require_transformation
from torchopt.precision import stored
from torchopt.transform.base import Wrapper
from torchopt.tree import tree_leaves, tree_map

__all__ = ["ApplyIfFiniteState", "apply_if_finite"]


class ApplyIfFiniteState(NamedTuple):
    """`failures`: skipped steps in a row; `total`: skipped steps; `inner_state`."""

    failures: int
    total: int
    inner_state: Any


@dataclass(frozen=True)
class ApplyIfFinite(Wrapper):
    """Steps `inner` if all gradients are finite."""

    max_failures: int

    def init(self, params: Any) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(0, 0, self.inner.init(params))

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Step, or leave parameters and state unchanged."""
        known = [g.detach() for g in tree_leaves(updates) if not g.is_meta]
        finite = [torch.isfinite(stored(g)).all() for g in known]
        if not finite or bool(torch.stack([f.to(finite[0].device) for f in finite]).all()):
            stepped, inner_state = self.inner.update(
                updates, state.inner_state, params=params, inplace=inplace
            )
            return stepped, ApplyIfFiniteState(0, state.total, inner_state)
        failures = state.failures + 1
        if failures > self.max_failures:
            raise FloatingPointError(
                f"apply_if_finite: the gradients of {failures} steps in a row have been NaN or "
                f"infinite, more than max_failures={self.max_failures}; lower the step size, clip "
                "the gradients, or look for the operation with torch.autograd.detect_anomaly()."
            )
        skipped = tree_map(lambda g: None, updates, none_is_leaf=True)
        return skipped, ApplyIfFiniteState(failures, state.total + 1, state.inner_state)


def apply_if_finite(inner: GradientTransformation, max_failures: int = 5) -> GradientTransformation:
    """Return the transformation that skips steps whose gradients are not all finite.

    A skipped step returns updates of None and leaves the state of `inner` unchanged. The test waits
    for the device.

    Args:
        inner: The transformation that steps.
        max_failures: Skipped steps in a row that are accepted.

    Raises:
        ValueError: A negative `max_failures`.
        FloatingPointError: From `update`, after more than `max_failures` skipped steps in a row.

    Example:
        >>> import torchopt
        >>> optimizer = apply_if_finite(torchopt.sgd(1.0))
        >>> updates, state = optimizer.update((torch.tensor(float("nan")),), optimizer.init(()))
        >>> updates, state.total
        ((None,), 1)
    """
    if max_failures < 0:
        raise ValueError(f"apply_if_finite: expected max_failures >= 0, got {max_failures}")
    require_transformation(inner, "apply_if_finite(inner)")
    return ApplyIfFinite(inner, max_failures).pair()
