# SPDX-License-Identifier: Apache-2.0
"""Compute in another dtype than that of the parameters, and keep states in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation, require_transformation
from torchopt.transform.base import Wrapper
from torchopt.tree import flatten_up_to, require_tensor_tree, tree_flatten, tree_map, tree_unflatten

__all__ = ["in_precision"]


@dataclass(frozen=True)
class InPrecision(Wrapper):
    """Casts gradients and parameters to `dtype` for `inner`."""

    dtype: torch.dtype

    def _cast(self, tree: Any) -> Any:
        def cast(x: Tensor | None) -> Tensor | None:
            return x if x is None or not x.is_floating_point() else x.to(self.dtype)

        return tree_map(cast, tree, none_is_leaf=True)

    def init(self, params: Any) -> Any:
        require_tensor_tree(params, "init(params): a parameter")
        return self.inner.init(self._cast(params))

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Step in `dtype`; return updates in the dtype of the gradients, or of the parameters."""
        stepped, state = self.inner.update(
            self._cast(updates),
            state,
            params=None if params is None else self._cast(params),
            inplace=inplace,
        )
        grads, spec = tree_flatten(updates, none_is_leaf=True)
        rows = flatten_up_to(spec, stepped, "updates")
        # `inner` may step by an earlier gradient. Else `params` need not be of the same containers.
        late = any(g is None and u is not None for u, g in zip(rows, grads))
        given = flatten_up_to(spec, params, "params") if late and params is not None else grads
        likes = [p if g is None else g for g, p in zip(grads, given)]
        out = [u if u is None or x is None else u.to(x.dtype) for u, x in zip(rows, likes)]
        return tree_unflatten(spec, out), state


def in_precision(
    inner: GradientTransformation, dtype: torch.dtype = torch.float32
) -> GradientTransformation:
    """Return `inner` with its arithmetic and its states in `dtype`.

    Use it for bfloat16 parameters with float32 moments. Updates have the dtype of the gradients; if
    there is none, that of the parameters.

    Args:
        inner: The transformation.
        dtype: A floating-point dtype.

    Raises:
        TypeError: `dtype` is not a floating-point dtype.

    Example:
        >>> import torchopt
        >>> optimizer = in_precision(torchopt.adam())
        >>> optimizer.init((torch.zeros(1, dtype=torch.bfloat16),))[0].mu[0].dtype
        torch.float32
    """
    if not dtype.is_floating_point:
        raise TypeError(f"in_precision: expected a floating-point dtype, got {dtype}")
    require_transformation(inner, "in_precision(inner, dtype)")
    return InPrecision(inner, dtype).pair()
