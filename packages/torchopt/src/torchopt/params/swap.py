# SPDX-License-Identifier: Apache-2.0
"""Run a module with other tensors. The whole package uses this one implementation."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchopt.errors import NotDifferentiableError
from torchopt.params.watched import CONTAINERS, Layer, WatchedDict, watch_one
from torchopt.torch_internals import is_checkpoint_in_transform

__all__ = ["MISSING", "Swap", "places_of", "replace", "resumed"]

#: The placeholder for a tensor that a module did not have.
MISSING = object()


def find_table(module: nn.Module, name: str) -> tuple[nn.Module, WatchedDict | None, str]:
    """Return (sub-module, dictionary, key) of a dotted name.

    The dictionary is None if no parameter, buffer or meta-parameter has this name.

    Raises:
        KeyError: There is no such sub-module.
        TypeError: The sub-module is scripted.
    """
    path, _, key = name.rpartition(".")
    owner: Any = module
    for part in path.split(".") if path else ():
        owner = getattr(owner, part, None)
        if not isinstance(owner, nn.Module):
            raise KeyError(f"{name}: {type(module).__name__} has no sub-module {path!r}")
    for kind in CONTAINERS:
        table = owner.__dict__.get(kind)
        if table is not None and key in table:
            if not isinstance(table, WatchedDict):
                watch_one(owner)
                table = owner.__dict__[kind]
            if not isinstance(table, WatchedDict):
                raise TypeError(
                    f"{name}: the tensors of a {type(owner).__name__} cannot be exchanged; "
                    "expected a module that is not scripted."
                )
            return owner, table, key
    return owner, None, key


def places_of(module: nn.Module, name: str) -> list[tuple[Any, str]]:
    """Return all places of a parameter, as (weak reference to the dictionary, key)."""
    walk = module.named_modules(remove_duplicate=False)
    names = next((group for group in ties(walk).values() if name in group), [name])
    found = [find_table(module, each) for each in names]
    return [(weakref.ref(table), key) for _, table, key in found if table is not None]


def ties(walk: Iterable[tuple[str, nn.Module]]) -> dict[int, list[str]]:
    """Return the names of the tied tensors of a module, by the `id` of the tensor.

    Args:
        walk: The pairs from `named_modules(remove_duplicate=False)`.
    """
    held = [
        (id(x), prefix, key)
        for prefix, submodule in walk
        for kind in CONTAINERS[:2]
        for key, x in _plain_items(submodule.__dict__.get(kind))
        if x is not None
    ]
    if len({x for x, _, _ in held}) == len(held):
        return {}
    names: dict[int, list[str]] = {}
    for x, prefix, key in held:
        names.setdefault(x, []).append(f"{prefix}.{key}" if prefix else key)
    return {x: found for x, found in names.items() if len(found) > 1}


def _plain_items(table: Any) -> Any:
    return dict.items(table) if isinstance(table, dict) else ()


def _with_ties(walk: Iterable[tuple[str, nn.Module]], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tensors`, completed with all names of tied parameters; see `ties`."""
    out = dict(tensors)
    for group in ties(walk).values():
        given = [name for name in group if name in tensors]
        if not given:
            continue
        first = tensors[given[0]]
        if any(tensors[name] is not first for name in given):
            raise ValueError(
                f"functional_call: {given} are tied and got different tensors; "
                "give one of them, or pass tie_weights=False."
            )
        out.update(dict.fromkeys(group, first))
    return out


def _check_names(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    missing, unknown = sorted(known - tensors.keys()), sorted(tensors.keys() - known)
    if missing or unknown:
        parts = [f"Missing key(s): {missing[:8]}"] * bool(missing)
        parts += [f"Unexpected key(s): {unknown[:8]}"] * bool(unknown)
        raise RuntimeError(
            f"functional_call(strict=True) on {type(module).__name__}: {'; '.join(parts)}."
        )


class Swap:
    """A context in which a module holds other tensors, in this thread only.

    Checkpoints that begin inside use these tensors whenever they are recomputed. Contexts may be
    nested, entered again, and left in any order.

    Args:
        module: The module.
        tensors: The tensors by dotted name. A name may be that of a parameter, a buffer, a
            meta-parameter, or an attribute that is a tensor.
        tie_weights: Whether one name of a tied parameter sets it under all its names.
        strict: Whether names that are missing or unknown raise.
        allow_missing: Whether to accept names that the module does not have. Inside the context
            they are attributes.

    Raises:
        KeyError: A name is unknown and `allow_missing` is False.
        RuntimeError: `strict` is True, and names are missing or unknown.
        TypeError: A value is not a tensor, or a sub-module is scripted.
        ValueError: Tied parameters got different tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Mapping[str, Any],
        *,
        tie_weights: bool = False,
        strict: bool = False,
        allow_missing: bool = False,
    ) -> None:
        walk = list(module.named_modules(remove_duplicate=not tie_weights))
        for _, submodule in walk:
            watch_one(submodule)  # tensors that are not given may change before a recomputation too
        if tie_weights:
            tensors = _with_ties(walk, tensors)
        if strict:
            _check_names(module, tensors)
        self._places: dict[str, tuple[WatchedDict, str]] = {}
        self._attributes: list[tuple[nn.Module, str, Any]] = []
        held: dict[object, dict[str, Any]] = {}
        for name, x in tensors.items():
            if x is not None and not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
            owner, table, key = find_table(module, name)
            if table is not None:
                self._places[name] = table, key
                held.setdefault(table.token, {})[key] = x
                continue
            if isinstance(getattr(type(owner), key, None), property):
                raise KeyError(
                    f"{name} is computed by {type(owner).__name__}, such as by a parametrization; "
                    f"expected the names of named_parameters(), such as "
                    f"'parametrizations.{key}.original'"
                )
            if not allow_missing and not isinstance(owner.__dict__.get(key), Tensor):
                raise KeyError(
                    f"{name}: {type(module).__name__} has no parameter or buffer of this name"
                )
            self._attributes.append((owner, key, x))
        self._held = held
        self._open: list[tuple[Layer, list[tuple[nn.Module, str, Any]]]] = []

    def __enter__(self) -> None:
        layer = Layer(self._held, [key for _, key, _ in self._attributes])
        layer.__enter__()
        before = [(owner, key, _exchange(owner, key, x)) for owner, key, x in self._attributes]
        self._open.append((layer, before))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        layer, before = self._open.pop()
        for owner, key, x in reversed(before):
            _exchange(owner, key, x)
        layer.__exit__()
        if isinstance(error, RuntimeError) and is_checkpoint_in_transform(error):
            raise NotDifferentiableError(
                "the module recomputes activations (torch.utils.checkpoint) inside a transform of "
                "torch.func, which has no rule for that; expected a module that keeps them there, "
                "such as its objective with checkpointing switched off."
            ) from error

    def held(self) -> dict[str, Any]:
        """Return the tensors by name, as they are after the module has run."""
        return {name: self._held[t.token][key] for name, (t, key) in self._places.items()}


def _exchange(owner: nn.Module, key: str, x: Any) -> Any:
    """Put a tensor into an attribute that is not a parameter; return the previous value."""
    before = owner.__dict__.get(key, MISSING)
    if x is MISSING:
        del owner.__dict__[key]
    else:
        owner.__dict__[key] = x
    return before


def replace(module: nn.Module, name: str, tensor: Any, allow_missing: bool) -> Any:
    """Put a tensor into a module permanently, by its dotted name; return the previous one.

    Raises:
        KeyError: The name is unknown and `allow_missing` is False.
    """
    owner, table, key = find_table(module, name)
    if table is not None:
        before = table[key]
        if tensor is MISSING:
            del table[key]
        else:
            table[key] = tensor
        return before
    if isinstance(owner.__dict__.get(key), Tensor):
        return _exchange(owner, key, tensor)
    if not allow_missing:
        raise KeyError(f"{name}: {type(module).__name__} has no parameter or buffer of this name")
    if tensor is not MISSING:
        owner._parameters[key] = tensor
    return MISSING


def resumed(swap: Swap, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Return a generator that runs each step of `steps` inside `swap`."""
    send, value = steps.send, None
    while True:
        with swap:
            try:
                item = send(value)
            except StopIteration as stop:
                return stop.value
        try:
            value = yield item
            send = steps.send
        except GeneratorExit:
            with swap:
                steps.close()
            raise
        except BaseException as error:
            send, value = steps.throw, error
