# SPDX-License-Identifier: Apache-2.0
"""The live dictionaries that hold the parameters and buffers of a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchopt.typing import ModuleTensorContainers

__all__ = ["Slot", "extract_module_containers", "parameter_slots"]


def extract_module_containers(
    module: nn.Module, with_buffers: bool = True
) -> tuple[ModuleTensorContainers, ModuleTensorContainers]:
    """Return the non-empty parameter and buffer dictionaries of a module and its sub-modules.

    The dictionaries are those of the modules: writing to them changes the modules.

    Args:
        module: A module.
        with_buffers: Without them the second tuple is empty.

    Raises:
        RuntimeError: `module` is no module.
    """
    if not isinstance(module, nn.Module):
        raise RuntimeError(f"Unexpected class of {module}: expected an nn.Module")
    params: list[Any] = []
    buffers: list[Any] = []
    for submodule in module.modules():
        if submodule._parameters:
            params.append(submodule._parameters)
        if with_buffers and submodule._buffers:
            buffers.append(submodule._buffers)
    return tuple(params), tuple(buffers)


@dataclass
class Slot:
    """One parameter and all the places that hold it.

    Attributes:
        places: (dictionary, key) of each place; more than one for tied parameters.
        names: The dotted name of each place.
    """

    places: list[tuple[dict[str, Tensor | None], str]]
    names: list[str]

    def get(self) -> Tensor:
        """Return the tensor."""
        container, key = self.places[0]
        value = container[key]
        assert value is not None
        return value

    def set(self, value: Tensor) -> None:
        """Put `value` in all places."""
        for container, key in self.places:
            container[key] = value


def parameter_slots(module: nn.Module) -> list[Slot]:
    """Return the distinct parameters of a module, by module and then by sorted name.

    Parameters that are one tensor form one slot.
    """
    slots: dict[int, Slot] = {}
    for prefix, submodule in module.named_modules():
        container: dict[str, Any] = submodule._parameters
        for key in sorted(container):
            tensor = container[key]
            if tensor is None:
                continue
            slot = slots.setdefault(id(tensor), Slot([], []))
            slot.places.append((container, key))
            slot.names.append(f"{prefix}.{key}" if prefix else key)
    return list(slots.values())
