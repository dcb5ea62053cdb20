# SPDX-License-Identifier: Apache-2.0
"""Check states that are loaded, cast them to their parameters, and copy states."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt import transform
from torchopt.base import EmptyState, GradientTransformation, UninitializedState
from torchopt.tree import flatten_up_to, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["Caster", "StepLock", "copied", "fitted_state"]

# What states consist of, so that `torch.load` reads them with weights_only=True.
torch.serialization.add_safe_globals(
    [
        x
        for x in (EmptyState, UninitializedState, *vars(transform).values())
        if hasattr(x, "_fields")
    ]
)


class StepLock(type(threading.RLock())):  # type: ignore[misc]  # the class has no public name
    """The lock of an optimizer, held while it steps or returns its state.

    A copy is a new lock. In a child of fork() the lock is free, even if a thread of the parent
    held it.
    """

    def __init__(self) -> None:
        _locks.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepLock, ()


_locks: weakref.WeakSet[StepLock] = weakref.WeakSet()


def _free_in_child() -> None:
    for lock in _locks:
        if not lock._is_owned():
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_in_child)


@torch.no_grad()
def copied(state: Any) -> Any:
    """Return a copy of a state, into which a step may write.

    Leaves that require a gradient are never written to, and are not copied.
    """
    memo: dict[int, Tensor] = {}  # shared tensors stay shared

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor) or (x.is_leaf and x.requires_grad):
            return x
        if id(x) not in memo:
            memo[id(x)] = x.clone()
        return memo[id(x)]

    return tree_map(own, state)


class Caster:
    """Casts the tensors of a loaded state to the dtypes and devices of a new one.

    As in torch.optim, moments get the dtypes of their parameters: a float32 state in a bfloat16
    module would turn the weights into float32. Tensors that need no cast are not copied.

    Args:
        what: The start of messages.
        params: The parameters. Tensors that a new state does not have yet are cast to their dtype.
    """

    def __init__(self, what: str, params: Any) -> None:
        self.what = what
        dtypes = {p.dtype for p in tree_leaves(params) if isinstance(p, Tensor)}
        self._dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
        self._memo: dict[tuple[int, Any, Any], Tensor] = {}

    def refuse(self, where: str, expected: str, got: str) -> ValueError:
        """Return the error to raise."""
        return ValueError(
            f"{self.what}: at {where}: expected {expected}, got {got}; it is the state of another "
            "optimizer or of other parameters. Nothing was loaded."
        )

    def cast(self, new: Any, old: Any, where: str) -> Any:
        """Return the leaf `new` in the dtype and on the device of `old`, a leaf of a new state.

        Raises:
            ValueError: The shapes differ, or the cast would lose an imaginary or fractional part.
        """
        if not isinstance(new, Tensor):
            is_number = isinstance(new, (int, float)) and isinstance(old, Tensor) and not old.ndim
            if isinstance(old, Tensor) and new is not None and not is_number:
                raise self.refuse(where, f"a tensor of shape {tuple(old.shape)}", _kind(new))
            return new
        if old is None:  # such as a mean without any gradient yet
            cast = self._dtype is not None and new.is_floating_point()
            return self._to(new, self._dtype, new.device) if cast else new
        if not isinstance(old, Tensor):
            if new.dim() == 0:
                return new
            raise self.refuse(where, _kind(old), f"a tensor of shape {tuple(new.shape)}")
        if new.shape != old.shape:
            raise self.refuse(where, f"shape {tuple(old.shape)}", f"shape {tuple(new.shape)}")
        fractions = old.is_floating_point() or old.is_complex()
        if (new.is_complex() and not old.is_complex()) or (
            not fractions and (new.is_floating_point() or new.is_complex())
        ):
            raise self.refuse(where, str(old.dtype), str(new.dtype))
        return self._to(new, old.dtype, old.device)

    def _to(self, x: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        key = (id(x), dtype, device)
        if key not in self._memo:
            self._memo[key] = x.to(dtype=dtype, device=device)
        return self._memo[key]

    def fit(self, new: Any, old: Any, where: str) -> Any:
        """Return the state `new` with the containers, dtypes and devices of `old`."""
        if new is None:
            return new
        if isinstance(old, tuple) and hasattr(old, "_fields"):
            if type(new) is not type(old):
                raise self.refuse(where, type(old).__name__, _kind(new))
            fields = zip(old._fields, new, old)
            return type(old)(*(self.fit(n, o, f"{where}.{name}") for name, n, o in fields))
        if isinstance(old, (tuple, list)):
            if not isinstance(new, (tuple, list)) or hasattr(new, "_fields"):
                raise self.refuse(where, f"{len(old)} entries", _kind(new))
            if len(new) != len(old):
                raise self.refuse(where, f"{len(old)} entries", f"{len(new)}")
            pairs = enumerate(zip(new, old))
            return type(old)([self.fit(n, o, f"{where}[{i}]") for i, (n, o) in pairs])
        if isinstance(old, dict):
            if not isinstance(new, dict) or new.keys() != old.keys():
                got = f"keys {_some(new)}" if isinstance(new, dict) else _kind(new)
                raise self.refuse(where, f"keys {_some(old)}", got)
            made = copy.copy(new)  # of the same class and order
            made.update({k: self.fit(v, old[k], f"{where}[{k!r}]") for k, v in new.items()})
            return made
        leaves, spec = tree_flatten(old, none_is_leaf=True)
        if spec.num_nodes == 1 and len(leaves) == 1:
            return self.cast(new, old, where)
        parts = flatten_up_to(spec, new, f"{self.what}: at {where}")
        return tree_unflatten(spec, [self.fit(n, o, where) for n, o in zip(parts, leaves)])


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return f"a {type(value).__name__} of {len(value)} entries"
    return type(value).__name__


def _some(keys: Sequence[Any] | dict[Any, Any], limit: int = 4) -> str:
    shown = ", ".join(repr(k) for k in list(keys)[:limit])
    return f"[{shown}{', ...' if len(keys) > limit else ''}]"


def require_states(states: Any, count: int) -> None:
    """Raise unless `states` is a list or tuple of `count` states, as `state_dict` returns them.

    Raises:
        TypeError: It is not a tuple or a list.
        ValueError: It has another length.
    """
    if not isinstance(states, (tuple, list)):
        raise TypeError(
            "load_state_dict: expected what state_dict() of this class returned, a tuple, got "
            f"{type(states).__name__}; a state of torch.optim cannot be loaded"
        )
    if len(states) != count:
        raise ValueError(
            f"load_state_dict: expected a state for each of {count} groups, got {len(states)}"
        )


def fitted_state(saved: Any, impl: GradientTransformation, params: Any, where: str) -> Any:
    """Return a state for `load_state_dict`, cast to the form of `impl.init(params)`.

    `where` is its name in messages.

    Raises:
        ValueError: It is the state of another transformation or of other parameters.
    """
    if isinstance(saved, UninitializedState):
        return saved
    with torch.no_grad():
        template = impl.init(params)
    return Caster("load_state_dict", params).fit(saved, template, where)
