# SPDX-License-Identifier: Apache-2.0
"""Take, restore and detach snapshots of modules and optimizers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchopt.params.containers import named_containers, parameter_slots
from torchopt.params.lineage import descend, inherit_hooks
from torchopt.shown import shown
from torchopt.tree import tree_leaves
from torchopt.typing import Device

__all__ = [
    "ModuleState",
    "copy_tensor",
    "detach_buffers_",
    "detach_tree_",
    "extract_module_state",
    "recover_module_state",
]

MODES = ("reference", "ref", "copy", "clone", "deepcopy", "deepclone")


class _ModuleState(NamedTuple):
    params: tuple[dict[str, Tensor], ...]
    buffers: tuple[dict[str, Tensor], ...]
    visual_contents: dict[Any, Any] | None = None
    detach_buffers: bool = False


class ModuleState(_ModuleState):
    """A snapshot of a module.

    Attributes:
        params: Parameters by name, one dictionary for each sub-module that has any.
        buffers: Buffers by name, one dictionary for each sub-module that has any.
        visual_contents: Names for `torchopt.visual.make_dot`, or None.
        detach_buffers: Whether the buffers are copied each time that the snapshot is restored.
    """

    # The names of the sub-modules that have parameters, and of those that have buffers. It is not a
    # field, because a snapshot must be a tuple of four. It is None in a snapshot that the caller
    # or a tree function made.
    _places: tuple[tuple[str, ...], tuple[str, ...]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleState:
        parts: list[Any] = [copy.deepcopy(part, memo) for part in self]
        twin = ModuleState(*parts)
        twin._places = self._places
        for own, copied in zip(self.params, twin.params):
            for name, x in own.items():
                inherit_hooks(x, copied[name])
        return twin


# The public module, which pickles refer to.
ModuleState.__module__ = "torchopt.utils"


def copy_tensor(x: Tensor, by: str, device: Device | None) -> Tensor:
    """Return `x`, a copy in the graph, or a detached copy; see `extract_state_dict`."""
    if by not in MODES:
        raise AssertionError(f"`by` must be one of {', '.join(map(repr, MODES))}; got {shown(by)}")
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
        return out
    if not torch.is_grad_enabled():  # without a graph: a leaf, as after a step
        out.requires_grad_(x.requires_grad)
    if out.requires_grad:
        descend(x, out)
    return out


def _copies(
    containers: dict[str, Any], by: str, device: Device | None, memo: dict[int, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Copy each tensor once, so that tied tensors stay tied."""
    as_they_are = by in ("reference", "ref") and device is None

    def copied(x: Tensor) -> Tensor:
        if as_they_are:
            return x
        if id(x) not in memo:
            memo[id(x)] = copy_tensor(x, by, device)
        return memo[id(x)]

    present = {
        place: {name: copied(x) for name, x in container.items() if isinstance(x, Tensor)}
        for place, container in containers.items()
    }
    return {place: container for place, container in present.items() if container}


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
            # One function may have computed several parameters, but can be the key of only one.
            if x.grad_fn is not None and x.grad_fn not in visual_contents:
                visual_contents[x.grad_fn] = (name, x)
            else:
                visual_contents[x] = name
    live_params, live_buffers = named_containers(module, with_buffers)
    memo: dict[int, Tensor] = {}
    params = _copies(live_params, by, device, memo)
    buffers = _copies(live_buffers, "deepcopy" if detach_buffers else by, device, memo)
    state = ModuleState(
        params=tuple(params.values()),
        buffers=tuple(buffers.values()),
        visual_contents=visual_contents,
        detach_buffers=detach_buffers,
    )
    state._places = tuple(params), tuple(buffers)
    return state


def _check_fits(
    kind: str,
    containers: dict[str, Any],
    state: tuple[dict[str, Tensor], ...],
    places: tuple[str, ...] | None,
) -> None:
    def differs(expected: Any, got: Any, where: str = "") -> ValueError:
        return ValueError(
            f"recover_state_dict: expected {kind} {expected}{where}, got {got}; the snapshot was "
            "taken from another module."
        )

    if len(containers) != len(state):
        raise differs(f"of {len(containers)} sub-modules", f"those of {len(state)}")
    if places is not None and not _is_same_place(tuple(containers), places):
        own, other = next(pair for pair in zip(containers, places) if pair[0] != pair[1])
        raise differs(f"of the sub-module {own!r}", f"those of {other!r}")
    for (place, container), saved in zip(containers.items(), state):
        where = f" in the sub-module {place!r}" if place else ""
        live = {name: x.shape for name, x in container.items() if isinstance(x, Tensor)}
        if live.keys() != saved.keys():
            name = min(live.keys() ^ saved.keys())
            pair = ("with", "without") if name in live else ("without", "with")
            raise differs(f"{pair[0]} {name!r}", f"those {pair[1]} {name!r}", where)
        for name, x in saved.items():
            if x.shape != live[name]:
                raise differs(f"{name!r} of shape {tuple(live[name])}", tuple(x.shape), where)


def _is_same_place(own: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Return whether names are equal, apart from a wrapper around the whole module."""
    if own == other or not own:
        return True
    long, short = (own, other) if len(own[0]) > len(other[0]) else (other, own)
    wrapper = long[0].removesuffix(short[0]).removesuffix(".")
    return all(a == f"{wrapper}.{b}".removesuffix(".") for a, b in zip(long, short))


def recover_module_state(module: nn.Module, state: ModuleState) -> None:
    """Put the tensors of a snapshot back into `module`; see `recover_state_dict`."""
    params, buffers = named_containers(module, with_buffers=bool(state.buffers))
    live: list[Any] = []
    places_of_params, places_of_buffers = state._places or (None, None)
    for kind, containers, saved, places in (
        ("parameters", params, state.params, places_of_params),
        ("buffers", buffers, state.buffers, places_of_buffers),
    ):
        if not _is_alike(containers, saved, places):
            containers = {k: c for k, c in containers.items() if _has_tensors(c)}
            _check_fits(kind, containers, saved, places)
        live.append(containers.values())
    buffers_now = dict(zip(buffers, state.buffers))
    if state.detach_buffers:
        buffers_now = _copies(buffers_now, "deepcopy", None, {})
    for container, tensors in zip(live[0], state.params):
        container.update(tensors)
    for container, tensors in zip(live[1], buffers_now.values()):
        container.update(tensors)


def _has_tensors(container: dict[str, Any]) -> bool:
    return any(isinstance(x, Tensor) for x in container.values())


def _is_alike(
    containers: dict[str, Any], state: Sequence[Any], places: tuple[str, ...] | None
) -> bool:
    """Return whether a snapshot has exactly the keys and shapes of the containers (quick test)."""
    if len(containers) != len(state) or (places is not None and tuple(containers) != places):
        return False
    for container, saved in zip(containers.values(), state):
        if container.keys() != saved.keys():
            return False
        for name, x in container.items():
            if x is None or x.shape != saved[name].shape:
                return False
    return True


def detach_tree_(tree: Any) -> None:
    """Detach every tensor of a tree from its graph, in place; `requires_grad` is kept."""
    for x in {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}.values():
        requires_grad = x.requires_grad
        x.detach_().requires_grad_(requires_grad)


def detach_buffers_(containers: Iterable[Mapping[str, Tensor | None]]) -> None:
    """Detach computed buffers from their graph, in place; they no longer require a gradient.

    A layer refuses to update a running statistic that is a leaf and requires a gradient.
    """
    for container in containers:
        for x in container.values():
            if x is not None and x.grad_fn is not None:
                x.detach_().requires_grad_(False)
