# SPDX-License-Identifier: Apache-2.0
"""Take and restore snapshots of modules and optimizers, and detach them from their graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from torchopt.optim.meta.base import MetaOptimizer
from torchopt.optim.states import StepLock
from torchopt.params.containers import SlotCache, extract_module_containers
from torchopt.params.snapshot import (
    ModuleState,
    copy_tensor,
    detach_buffers_,
    detach_tree_,
    extract_module_state,
    recover_module_state,
)
from torchopt.tree import tree_leaves, tree_map
from torchopt.typing import Device, TensorTree

__all__ = [
    "ModuleState",
    "extract_module_containers",
    "extract_state_dict",
    "module_clone",
    "module_detach_",
    "recover_state_dict",
    "stop_gradient",
]


@overload
def extract_state_dict(
    target: nn.Module,
    *,
    by: str = ...,
    device: Device | None = ...,
    with_buffers: bool = ...,
    detach_buffers: bool = ...,
    enable_visual: bool = ...,
    visual_prefix: str = ...,
) -> ModuleState: ...
@overload
def extract_state_dict(
    target: MetaOptimizer,
    *,
    by: str = ...,
    device: Device | None = ...,
    with_buffers: bool = ...,
    detach_buffers: bool = ...,
    enable_visual: bool = ...,
    visual_prefix: str = ...,
) -> tuple[Any, ...]: ...
def extract_state_dict(
    target: nn.Module | MetaOptimizer,
    *,
    by: str = "reference",
    device: Device | None = None,
    with_buffers: bool = True,
    detach_buffers: bool = False,
    enable_visual: bool = False,
    visual_prefix: str = "",
) -> ModuleState | tuple[Any, ...]:
    """Return a snapshot of a module or of a meta-optimizer, for `recover_state_dict`.

    Args:
        target: A module or a meta-optimizer.
        by: `"reference"` (`"ref"`): the same tensors. `"copy"` (`"clone"`): copies in the graph,
            through which gradients reach the originals; leaves under `torch.no_grad()`.
            `"deepcopy"` (`"deepclone"`): detached copies; parameters stay parameters. Tensors that
            are shared stay shared.
        device: Where to put the tensors.
        with_buffers: Include the module's buffers.
        detach_buffers: Copy and detach the buffers, here and at each recovery. Use it for running
            statistics.
        enable_visual: Record names for `torchopt.visual.make_dot`.
        visual_prefix: A prefix of those names.

    Returns:
        A `ModuleState` for a module; the tuple of states for a meta-optimizer.

    Raises:
        TypeError: `target` is neither a module nor a meta-optimizer.
        AssertionError: An unknown `by`.

    Example:
        >>> import torchopt
        >>> net = nn.Linear(1, 1)
        >>> start = extract_state_dict(net, by="reference")
        >>> optimizer = torchopt.MetaSGD(net, lr=0.1)
        >>> optimizer.step(net(torch.ones(1, 1)).sum())
        >>> recover_state_dict(net, start)
        >>> net.weight is start.params[0]["weight"]
        True
    """
    if isinstance(target, nn.Module):
        return extract_module_state(
            target,
            by=by,
            device=device,
            with_buffers=with_buffers,
            detach_buffers=detach_buffers,
            enable_visual=enable_visual,
            visual_prefix=visual_prefix,
        )
    if isinstance(target, MetaOptimizer):
        memo: dict[int, Tensor] = {}

        def copied(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) not in memo:
                memo[id(x)] = copy_tensor(x, by, device)
            return memo[id(x)]

        return cast("tuple[Any, ...]", tree_map(copied, target.state_dict()))
    raise TypeError(
        f"Unexpected class of {type(target).__name__}: expected an nn.Module or a "
        "MetaOptimizer; pass the object that has the parameters"
    )


def recover_state_dict(
    target: nn.Module | MetaOptimizer, state: ModuleState | tuple[Any, ...]
) -> None:
    """Restore a snapshot.

    The module or optimizer gets the tensors of the snapshot themselves. Nothing is copied, except
    for buffers that were taken with `detach_buffers`. See `extract_state_dict` for an example.

    Args:
        target: The module or meta-optimizer from which the snapshot was taken, or one with the same
            structure: the same names and shapes, or a wrapper around such a module.
        state: The result of `extract_state_dict`.

    Raises:
        TypeError: `target` is neither a module nor a meta-optimizer, or `state` is not a snapshot
            of its kind.
        ValueError: The module of the snapshot has other sub-modules, names or shapes; nothing is
            restored then.
    """
    if isinstance(target, nn.Module):
        if not isinstance(state, ModuleState):
            raise TypeError(
                "recover_state_dict: expected a ModuleState for a module, got "
                f"{type(state).__name__}; pass what extract_state_dict(module) returned"
            )
        recover_module_state(target, state)
    elif isinstance(target, MetaOptimizer):
        if isinstance(state, ModuleState):
            raise TypeError(
                "recover_state_dict: expected the snapshot of a meta-optimizer, got that of a "
                "module; pass what extract_state_dict(optimizer) returned"
            )
        target.load_state_dict(state)
    elif isinstance(state, (nn.Module, MetaOptimizer)):
        raise TypeError(
            "recover_state_dict(target, state): expected the module or the meta-optimizer first, "
            f"got {type(target).__name__} first; exchange the two arguments"
        )
    else:
        raise TypeError(
            f"Unexpected class of {type(target).__name__}: expected an nn.Module or a "
            "MetaOptimizer; pass the object that has the parameters"
        )


def stop_gradient(target: ModuleState | nn.Module | MetaOptimizer | TensorTree) -> None:
    """Detach tensors from the graph that computed them, in place.

    The tensors become leaves. They require a gradient if they did before, except for buffers that
    were computed. Values stay as they are, and so does everything that refers to the tensors.

    Args:
        target: A module (its parameters and buffers), a meta-optimizer (its state), a
            `ModuleState`, or a tree of tensors. Leaves such as numbers are ignored.

    Raises:
        TypeError: A module, a meta-optimizer or an iterator is a leaf of a tree.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> y = x * 2
        >>> stop_gradient(y)
        >>> y.grad_fn is None, y.requires_grad
        (True, True)
    """
    if isinstance(target, nn.Module):
        params, buffers = extract_module_containers(target)
        detach_tree_([list(c.values()) for c in params])
        detach_buffers_(buffers)
    elif isinstance(target, MetaOptimizer):
        detach_tree_(target.state_dict())
    elif isinstance(target, ModuleState):
        detach_tree_(target.params)
        detach_buffers_(target.buffers)
    else:
        for leaf in tree_leaves(target):
            if isinstance(leaf, (nn.Module, MetaOptimizer, Iterator)):
                raise TypeError(
                    f"stop_gradient: expected a tree of tensors, got one with {type(leaf).__name__}"
                    " as a leaf; call stop_gradient for each module and optimizer, and pass "
                    "list(...) of an iterator"
                )
        detach_tree_(target)


def module_detach_(
    target: ModuleState | nn.Module | MetaOptimizer | TensorTree,
) -> ModuleState | nn.Module | MetaOptimizer | TensorTree:
    """Detach `target` from its graph as `stop_gradient` does, and return it."""
    stop_gradient(target)
    return target


def module_clone(
    target: nn.Module | MetaOptimizer | TensorTree,
    *,
    by: str = "reference",
    detach_buffers: bool = False,
    device: Device | None = None,
) -> nn.Module | MetaOptimizer | TensorTree:
    """Return a clone of a module, a meta-optimizer or a tree of tensors.

    Args:
        target: The object to clone. A cloned meta-optimizer steps the same module, with its own
            state.
        by: How tensors are copied; see `extract_state_dict`.
        detach_buffers: Copy and detach the buffers.
        device: Where to put the tensors.

    Returns:
        An object of the class of `target`.

    Raises:
        TypeError: `target` is a tree with a leaf that is not a tensor.
        AssertionError: An unknown `by`.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> clone = module_clone(net, by="deepcopy")
        >>> clone.weight is net.weight, torch.equal(clone.weight, net.weight)
        (False, True)
    """
    if isinstance(target, nn.Module):
        params, buffers = extract_module_containers(target)
        # The structure is copied; tensors, including fast weights, are shared until replaced below.
        memo: dict[int, Any] = {
            id(x): x
            for container in (*params, *buffers)
            for x in container.values()
            if x is not None
        }
        clone = copy.deepcopy(target, memo)
        state = extract_state_dict(target, by=by, detach_buffers=detach_buffers, device=device)
        recover_module_state(clone, state)
        return clone
    if isinstance(target, MetaOptimizer):
        twin = copy.copy(target)
        twin.param_containers_groups = list(target.param_containers_groups)
        twin._modules = list(target._modules)
        twin._slots = SlotCache()
        twin._stepped = list(target._stepped)
        twin._lock = StepLock()
        twin.impls = list(target.impls)
        twin.state_groups = list(extract_state_dict(target, by=by, device=device))
        return twin
    if not all(isinstance(x, torch.Tensor) for x in tree_leaves(target)):
        leaf = next(x for x in tree_leaves(target) if not isinstance(x, torch.Tensor))
        raise TypeError(
            "module_clone: expected a module, a meta-optimizer or a tree of tensors, got "
            f"{type(leaf).__name__}; copy other optimizers with copy.deepcopy"
        )
    return tree_map(lambda x: copy_tensor(x, by, device), target)
