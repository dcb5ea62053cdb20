# SPDX-License-Identifier: Apache-2.0
"""Find the parts of a state that need full precision, such as copies of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchopt.base import GradientTransformation
from torchopt.torch_internals import foreach_copy_
from torchopt.tree import tree_leaves

__all__ = ["Origins", "exact_tensors", "followed_start"]


# Their results have only the form of their argument.
_LIKE = {
    getattr(where, name)
    for where in (torch, Tensor)
    for name in dir(where)
    if name.endswith("_like") or name.startswith("new_")
}
# They return nothing, and write to their first argument.
_WITHOUT_RESULT = {Tensor.__setitem__, foreach_copy_}


class Origins(TorchFunctionMode):
    """Finds which of some tensors the others are computed from, while it is entered.

    A graph would need tensors that require a gradient in place of the parameters, and masks and
    labels may depend on whether these do, or on which tensors they are.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        # A tensor that is gone may have left its id to another one.
        self._known = {id(x): (x, [x]) for x in tensors}

    def of(self, x: Any) -> list[Tensor]:
        """Return the tensors that `x` is, or is computed from."""
        return self._known[id(x)][1] if id(x) in self._known else []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and note what its results are computed from."""
        out = func(*args, **(kwargs or {}))
        if func in _LIKE:
            return out
        found: dict[int, Tensor] = {}
        for x in tree_leaves([*args, *(kwargs or {}).values()]):
            found.update((id(origin), origin) for origin in self.of(x))
        if found:
            for y in tree_leaves((out, args[0]) if func in _WITHOUT_RESULT else out):
                if isinstance(y, Tensor):
                    self._known[id(y)] = (y, list(found.values()))
        return out


def followed_start(inner: GradientTransformation, params: Any) -> tuple[Any, Origins]:
    """Return `inner.init(params)`, and what knows which of its tensors copy which parameters."""
    origins = Origins([p for p in tree_leaves(params) if isinstance(p, Tensor)])
    with origins:
        return inner.init(params), origins


def exact_tensors(state: Any) -> set[int]:
    """Return the ids of the tensors in the `exact_fields` of states."""
    found: set[int] = set()

    def look(node: Any) -> bool:
        for name in type(node).exact_fields() if hasattr(type(node), "exact_fields") else ():
            found.update(map(id, tree_leaves(getattr(node, name))))
        return False

    tree_leaves(state, is_leaf=look)
    return found
