# SPDX-License-Identifier: Apache-2.0
"""Take, restore and detach snapshots of modules and optimizers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchopt.params.containers import extract_module_containers, parameter_slots
from torchopt.params.lineage import descend, inherit_hooks
from torchopt.tree import tree_leaves
from torchopt.typing import Device, ModuleTensorContainers

__all__ = [
    "ModuleState",
    "copy_tensor",
    "detach_buffers_",
    "detach_tree_",
    "extract_module_state",
    "recover_module_state",
]

MODES = ("reference", "ref", "copy", "clone", "deepcopy", "deepclone")


class ModuleState(NamedTuple):
    """A snapshot of a module.

    Attributes:
        params: Parameters by name, for each sub-module that has any.
        buffers: Buffers by name, for each sub-module that has any.
        visual_contents: Names for `torchopt.visual.make_dot`, or None.
        detach_buffers: Whether recovering copies the buffers.
    """

    params: tuple[dict[str, Tensor], ...]
    buffers: tuple[dict[str, Tensor], ...]
    visual_contents: dict[Any, Any] | None = None
    detach_buffers: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleState:
        parts: list[Any] = [copy.deepcopy(part, memo) for part in self]
        twin = ModuleState(*parts)
        for own, copied in zip(self.params, twin.params):
            for name, x in own.items():
                inherit_hooks(x, copied[name])
        return twin


# Where the public finds it, and where pickles look for it.
ModuleState.__module__ = "torchopt.utils"


def copy_tensor(x: Tensor, by: str, device: Device | None) -> Tensor:
    """Return `x`, a copy inside the graph, or a copy outside of it; see `extract_state_dict`."""
    if by not in MODES:
        raise AssertionError(f"`by` must be one of {', '.join(map(repr, MODES))}; got {by!r}")
    if by in ("reference", "ref"):
        out = x
        if device is None:
            return out
    elif by in ("copy", "clone"):
        out = x.clone()
    else:
        out = x.clone().detach_().requires_grad_(x.requires_grad)
    if device is not None:
        moved = out.to(device)
        if by in ("deepcopy", "deepclone"):
            moved = moved.detach().requires_grad_(x.requires_grad)
        out = moved
    if by in ("deepcopy", "deepclone"):
        if isinstance(x, nn.Parameter):
            out = nn.Parameter(out, requires_grad=x.requires_grad)
        inherit_hooks(x, out)
    elif out.requires_grad:
        descend(x, out)
    return out


def _copies(
    containers: ModuleTensorContainers, by: str, device: Device | None, memo: dict[int, Tensor]
) -> tuple[dict[str, Tensor], ...]:
    """Copy tensors, each of them once: what is shared stays shared."""
    if by in ("reference", "ref") and device is None:
        present = [{k: x for k, x in c.items() if isinstance(x, Tensor)} for c in containers]
        return tuple(container for container in present if container)

    def copied(x: Tensor) -> Tensor:
        if id(x) not in memo:
            memo[id(x)] = copy_tensor(x, by, device)
        return memo[id(x)]

    present = [
        {name: copied(x) for name, x in container.items() if isinstance(x, Tensor)}
        for container in containers
    ]
    return tuple(container for container in present if container)


def _present(containers: ModuleTensorContainers) -> list[Any]:
    return [c for c in containers if any(isinstance(x, Tensor) for x in c.values())]


def extract_module_state(
    module: nn.Module,
    *,
    by: str,
    device: Device | None,
    with_buffers: bool,
    detach_buffers: bool,
    enable_visual: bool,
    visual_prefix: str,
) -> ModuleState:
    """Return a snapshot of `module`; see `extract_state_dict`."""
    visual_contents: dict[Any, Any] | None = None
    if enable_visual:
        visual_contents = {}
        for slot in parameter_slots(module):
            x = slot.get()
            name = visual_prefix + slot.names[0]
            # One function may have computed several of them; it can stand for one only.
            if x.grad_fn is not None and x.grad_fn not in visual_contents:
                visual_contents[x.grad_fn] = (name, x)
            else:
                visual_contents[x] = name
    params, buffers = extract_module_containers(module, with_buffers)
    memo: dict[int, Tensor] = {}
    return ModuleState(
        params=_copies(params, by, device, memo),
        buffers=_copies(buffers, "deepcopy" if detach_buffers else by, device, memo),
        visual_contents=visual_contents,
        detach_buffers=detach_buffers,
    )


def _check_fits(
    kind: str, containers: Sequence[Mapping[str, Any]], state: tuple[dict[str, Tensor], ...]
) -> None:
    if len(containers) != len(state):
        raise ValueError(
            f"recover_state_dict: expected a snapshot with {len(containers)} sub-modules that have "
            f"{kind}, "
            f"got {len(state)}; it was taken from another module."
        )
    for index, (container, saved) in enumerate(zip(containers, state)):
        live = {name: x.shape for name, x in container.items() if isinstance(x, Tensor)}
        names = set(live)
        if names != set(saved):
            raise ValueError(
                f"recover_state_dict: expected {kind} {sorted(names)} in sub-module {index} of the "
                "snapshot, "
                f"got {sorted(saved)}; it was taken from another module."
            )
        for name, x in saved.items():
            if x.shape != live[name]:
                raise ValueError(
                    f"recover_state_dict: expected {kind} with {name!r} of shape "
                    f"{tuple(live[name])} in sub-module {index} of the snapshot, got "
                    f"{tuple(x.shape)}; it was taken from another module."
                )


def recover_module_state(module: nn.Module, state: ModuleState) -> None:
    """Put the tensors of a snapshot back into `module`; see `recover_state_dict`."""
    params, buffers = extract_module_containers(module, with_buffers=bool(state.buffers))
    live: list[Any] = []
    for kind, containers, saved in (
        ("parameters", params, state.params),
        ("buffers", buffers, state.buffers),
    ):
        if not _is_alike(containers, saved):
            containers = tuple(_present(containers))
            _check_fits(kind, containers, saved)
        live.append(containers)
    for container, tensors in zip(live[0], state.params):
        container.update(tensors)
    for container, tensors in zip(live[1], state.buffers):
        if state.detach_buffers:
            container.update({n: copy_tensor(x, "deepcopy", None) for n, x in tensors.items()})
        else:
            container.update(tensors)


def _is_alike(containers: ModuleTensorContainers, state: Sequence[Mapping[str, Tensor]]) -> bool:
    """Return whether a snapshot has exactly what the containers have, which is quick to see."""
    if len(containers) != len(state):
        return False
    for container, saved in zip(containers, state):
        if container.keys() != saved.keys():
            return False
        for name, x in container.items():
            if x is None or x.shape != saved[name].shape:
                return False
    return True


def detach_tree_(tree: Any) -> None:
    """Cut every tensor of a tree from its graph, in place; `requires_grad` is kept."""
    for x in {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}.values():
        requires_grad = x.requires_grad
        x.detach_().requires_grad_(requires_grad)


def detach_buffers_(containers: Iterable[Mapping[str, Tensor | None]]) -> None:
    """Cut buffers that were computed from their graph, in place; they require no gradient then.

    A running statistic as a leaf that requires a gradient would be refused by its own layer.
    """
    for container in containers:
        for x in container.values():
            if x is not None and x.grad_fn is not None:
                x.detach_().requires_grad_(False)
