# SPDX-License-Identifier: Apache-2.0
"""The live dictionaries that hold the parameters and buffers of a module."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.params.lineage import descend
from torchopt.params.watched import WatchedDict, reads_plainly
from torchopt.typing import ModuleTensorContainers

__all__ = [
    "Slot",
    "SlotCache",
    "extract_module_containers",
    "named_containers",
    "parameter_slot_groups",
    "parameter_slots",
    "require_replaceable",
]


# Looked up once, because every snapshot visits each sub-module.
_Script = torch.jit.ScriptModule
_named_modules = nn.Module.named_modules


def extract_module_containers(
    module: nn.Module, with_buffers: bool = True
) -> tuple[ModuleTensorContainers, ModuleTensorContainers]:
    """Return the non-empty parameter and buffer dictionaries of a module and its sub-modules.

    The dictionaries are those of the modules: writing to them changes the modules.

    Args:
        module: A module.
        with_buffers: Whether to return buffers; otherwise the second tuple is empty.

    Returns:
        (dictionaries of parameters, dictionaries of buffers), in the order of
        `module.modules()`.

    Raises:
        RuntimeError: `module` is not a module, or its parameters cannot be replaced by tensors.
    """
    params, buffers = named_containers(module, with_buffers)
    return tuple(params.values()), tuple(buffers.values())


def named_containers(
    module: nn.Module, with_buffers: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameter and buffer dictionaries by the names of the sub-modules."""
    params: dict[str, Any] = {}
    buffers: dict[str, Any] = {}
    for name, submodule in require_replaceable(module):
        if submodule._parameters:
            params[name] = submodule._parameters
        if with_buffers and submodule._buffers:
            buffers[name] = submodule._buffers
    return params, buffers


def require_replaceable(module: Any) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of a module and of its sub-modules.

    Raises:
        RuntimeError: `module` is not a module, or its parameters cannot be replaced by tensors.
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise RuntimeError(
            f"Unexpected class of the first argument: expected an nn.Module, got {kind}; pass the "
            "module itself, not its parameters"
        )
    submodules = named_submodules(module)
    for name, submodule in submodules:
        if isinstance(submodule, _Script):
            raise _scripted(name, submodule)
    return submodules


def named_submodules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return `list(module.named_modules())`, without a generator for each level."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", module)]
    while pending:
        name, submodule = pending.pop()
        if submodule is None or id(submodule) in seen:
            continue
        if type(submodule).named_modules is not _named_modules or isinstance(submodule, _Script):
            return list(module.named_modules())  # it may yield other modules than it holds
        seen.add(id(submodule))
        found.append((name, submodule))
        below = submodule._modules
        if below:
            prefix = f"{name}." if name else ""
            pending += [(prefix + key, below[key]) for key in reversed(below)]
    return found


def _scripted(name: str, submodule: nn.Module) -> RuntimeError:
    where = f"the sub-module {name!r}" if name else "the module"
    return RuntimeError(
        f"Unexpected class of {where}: expected an nn.Module whose parameters can be "
        f"replaced by tensors with a graph, got a scripted one "
        f"({type(submodule).__name__}), whose code keeps its own; pass the module that it "
        "was scripted from"
    )


class Slot:
    """One parameter and all the places that hold it.

    Attributes:
        value: The tensor; None between steps.
        places: (dictionary, key) of each place; more than one for tied parameters.
        names: The dotted name of each place.
        references: Weak references to the watched dictionaries among the places, and their keys;
            None until they are needed.
    """

    __slots__ = ("names", "places", "references", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.places: list[tuple[dict[str, Tensor | None], str]] = []
        self.names: list[str] = []
        self.references: list[Any] | None = None

    def get(self) -> Tensor:
        """Return the tensor."""
        assert isinstance(self.value, Tensor)
        return self.value

    def set(self, value: Tensor, *, plainly: bool = False) -> None:
        """Put `value` into all places. It inherits the hooks of the tensor that it replaces.

        Args:
            value: The tensor.
            plainly: Whether `reads_plainly()` is known to be True.
        """
        if self.references is None:
            self.references = [
                (weakref.ref(c), key) for c, key in self.places if isinstance(c, WatchedDict)
            ]
        descend(self.value, value, self.references)
        self.value = value
        for container, key in self.places:
            if plainly and type(container) is WatchedDict:
                _put(container, key, value)
            else:
                container[key] = value


_put = dict.__setitem__


def parameter_slots(module: nn.Module) -> list[Slot]:
    """Return the distinct parameters of a module, by module and then by sorted name.

    Tied parameters form one slot.
    """
    return parameter_slot_groups([module])[0]


def parameter_slot_groups(modules: Sequence[nn.Module]) -> list[list[Slot]]:
    """Return the distinct parameters of each module; a shared one belongs to the first module."""
    return _slot_groups([named_submodules(module) for module in modules])


def _slot_groups(walks: Sequence[Sequence[tuple[str, nn.Module]]]) -> list[list[Slot]]:
    slots: dict[int, Slot] = {}
    groups = []
    for walk in walks:
        before = len(slots)
        for prefix, submodule in walk:
            container: dict[str, Any] = submodule._parameters
            for key, tensor in sorted(container.items()) if container else ():
                if tensor is None:
                    continue
                slot = slots.get(id(tensor))
                if slot is None:
                    slot = slots[id(tensor)] = Slot(tensor)
                slot.places.append((container, key))
                slot.names.append(f"{prefix}.{key}" if prefix else key)
        groups.append(list(slots.values())[before:])
    return groups


class SlotCache:
    """The slots of some modules. They are searched for again only after the modules changed.

    Attributes:
        names: The name of each slot, for each module.
        tables: The dictionaries of parameters.
    """

    def __init__(self) -> None:
        self.names: list[list[str]] = []
        self.tables: list[dict[str, Any]] = []
        self._groups: list[list[Slot]] = []
        self._modules: list[nn.Module] = []
        # (__dict__ of a sub-module, its parameters, how many, keys of None, its own sub-modules)
        self._walk: list[
            tuple[dict[str, Any], dict[str, Any], int, list[str], tuple[Any, ...]]
        ] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return SlotCache, ()  # a copy searches again

    def groups(self, modules: Sequence[nn.Module]) -> list[list[Slot]]:
        """Return `parameter_slot_groups(modules)`."""
        if len(self._modules) != len(modules) or not self._still_fits():
            self._modules = list(modules)
            walks = [named_submodules(module) for module in modules]
            self._groups = _slot_groups(walks)
            self.names = [[slot.names[0] for slot in group] for group in self._groups]
            self._walk = [
                (
                    submodule.__dict__,
                    submodule._parameters,
                    len(submodule._parameters),
                    [key for key, x in submodule._parameters.items() if x is None],
                    tuple(submodule._modules.values()),
                )
                for walk in walks
                for _, submodule in walk
            ]
            self.tables = [table for _, table, size, *_ in self._walk if size]
        return self._groups

    def release(self) -> None:
        """Drop the references to the tensors, whose graphs may be large."""
        for group in self._groups:
            for slot in group:
                slot.value = None

    def _still_fits(self) -> bool:
        """Return whether a new search would find the same places; read the tensors in them."""
        for own, table, size, empty, below in self._walk:
            if own.get("_parameters") is not table or len(table) != size:
                return False
            modules = own["_modules"]
            if (modules or below) and tuple(modules.values()) != below:
                return False
            if empty and any(table[key] is not None for key in empty):
                return False
        read: Any = dict.get if reads_plainly() else _get
        seen: set[int] = set()
        total = 0
        for group in self._groups:
            total += len(group)
            for slot in group:
                places = slot.places
                table, key = places[0]
                first = slot.value = read(table, key)
                if first is None:
                    return False
                if len(places) > 1 and any(read(*place) is not first for place in places[1:]):
                    return False
                seen.add(id(first))
        return len(seen) == total


def _get(table: dict[str, Any], key: str) -> Any:
    return table.get(key)
