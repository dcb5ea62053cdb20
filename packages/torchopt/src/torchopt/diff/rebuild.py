# SPDX-License-Identifier: Apache-2.0
"""Copy a transformation with other tensors in it.

A transformation that was made with a tensor holds it in a field, a schedule or a closure. To
differentiate with respect to the tensor, the transformation is copied with another tensor in its
place; the original does not change.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchopt.diff.closure import ATOMS, captured, slot_names
from torchopt.errors import NotDifferentiableError
from torchopt.lazy import lazy

__all__ = ["rebuilt"]


def rebuilt(value: Any, tensors: Mapping[int, Tensor]) -> Any:
    """Return `value` with some of its tensors replaced.

    Args:
        value: A transformation, or any object that holds tensors.
        tensors: The replacement of each tensor, by the id of the tensor.

    Raises:
        NotDifferentiableError: A tensor is in a place where it cannot be replaced.
    """
    if not tensors:
        return value
    changed = _Rebuild(tensors).of(value)
    for name, found in captured(changed, Tensor):
        if id(found) in tensors and tensors[id(found)] is not found:
            raise NotDifferentiableError(
                f"inner_loop: expected an optimizer that holds its tensor {name} in fields or "
                f"closures, got one of shape {tuple(found.shape)} in another place; pass it in the "
                "call, as in inner(params, batch, lr=lr)."
            )
    return changed


class _Rebuild:
    """One pass over a value; an object that occurs twice is copied once."""

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        self._tensors = tensors
        self._done: dict[int, Any] = {}
        self._held: list[Any] = []  # kept alive, so that no id is reused

    def of(self, value: Any) -> Any:
        if id(value) in self._tensors:
            return self._tensors[id(value)]
        if isinstance(value, (*ATOMS, Tensor, type, types.ModuleType, types.BuiltinFunctionType)):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = value  # a cycle ends here
            self._held.append(value)
            self._done[id(value)] = self._made(value)
        return self._done[id(value)]

    def _made(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            owner, function = self.of(value.__self__), self.of(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            made = tuple(map(self.of, parts))
            same = all(x is y for x, y in zip(made, parts))
            return value if same else functools.partial(made[0], *made[1], **made[2])
        if isinstance(value, tuple):
            members = [self.of(x) for x in value]
            if all(x is y for x, y in zip(members, value)):
                return value
            if type(value) is tuple:
                return tuple(members)
            made = tuple.__new__(type(value), members)
            if hasattr(value, "__dict__"):
                made.__dict__.update(self._entries(vars(value)))
            return made
        if isinstance(value, list):
            members = [self.of(x) for x in value]
            return value if all(x is y for x, y in zip(members, value)) else members
        if type(value) is dict:
            entries = self._entries(value)
            return value if all(entries[k] is value[k] for k in value) else entries
        return self._object(value)

    def _entries(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return {k: self.of(x) for k, x in value.items()}

    def _function(self, value: types.FunctionType) -> Any:
        cells = value.__closure__ or ()
        contents = []
        for cell in cells:
            try:
                contents.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                contents.append(cell)
        made = [x if x is c else self.of(x) for x, c in zip(contents, cells)]
        defaults = self.of(value.__defaults__)
        named = self.of(value.__kwdefaults__)
        used = {k: value.__globals__[k] for k in value.__code__.co_names if k in value.__globals__}
        changed = {k: self._tensors[id(x)] for k, x in used.items() if id(x) in self._tensors}
        if (
            not changed
            and all(x is y for x, y in zip(made, contents))
            and defaults is value.__defaults__
            and named is value.__kwdefaults__
        ):
            return value
        function = types.FunctionType(
            value.__code__,
            {**value.__globals__, **changed} if changed else value.__globals__,
            value.__name__,
            defaults,
            tuple(old if x is y else types.CellType(x) for x, y, old in zip(made, contents, cells)),
        )
        function.__kwdefaults__ = named
        function.__dict__.update(vars(value))
        return function

    def _object(self, value: Any) -> Any:
        kind: Any = type(value)
        table = getattr(value, "__dict__", None)
        has_table = isinstance(table, dict)
        held = table if isinstance(table, dict) else {}
        # Cached properties are computed again; they may refer back to this object.
        held = {k: x for k, x in held.items() if not _is_computed(kind, k)}
        if isinstance(value, nn.Module):
            tables = ("_parameters", "_buffers", "_modules")
            entries = {
                k: {n: self.of(y) for n, y in x.items()} if k in tables else self.of(x)
                for k, x in held.items()
            }
            same = all(
                all(entries[k][n] is y for n, y in x.items()) if k in tables else entries[k] is x
                for k, x in held.items()
            )
        else:
            entries = self._entries(held)
            same = all(entries[k] is x for k, x in held.items())
        slots = {n: getattr(value, n) for n in slot_names(kind) if hasattr(value, n)}
        members = self._entries(slots)
        if same and all(members[n] is x for n, x in slots.items()):
            return value
        made = copy.copy(value)
        if has_table:
            made.__dict__.clear()
            made.__dict__.update(entries)
        for n, x in members.items():
            object.__setattr__(made, n, x)
        return made


@functools.lru_cache(4096)
def _is_computed(kind: type, name: str) -> bool:
    found = inspect.getattr_static(kind, name, None)
    return isinstance(found, (functools.cached_property, lazy))
