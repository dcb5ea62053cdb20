# SPDX-License-Identifier: Apache-2.0
"""The optimizer with the interface of torch.optim, driven by a gradient transformation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.alias.fused import step_inplace
from torchopt.base import GradientTransformation, UninitializedState, require_transformation
from torchopt.kernels.fused_step import StepCache
from torchopt.kernels.registry import refuse_capture
from torchopt.optim.named_state import leaf_names, load_named_state, named_state
from torchopt.tree import PyTreeSpec, tree_flatten, tree_paths, tree_unflatten
from torchopt.update import apply_updates

__all__ = ["Optimizer", "require_distinct"]


def require_distinct(
    params: Sequence[Tensor], names: Sequence[str], known: Collection[int] = ()
) -> None:
    """Raise ValueError where a parameter occurs twice, so that it would be stepped twice.

    Args:
        params: The tensors.
        names: What to call each.
        known: The identities of parameters that are stepped already.
    """
    first: dict[int, str] = {}
    for p, name in zip(params, names):
        if id(p) in known:
            raise ValueError(
                f"some parameters appear in more than one parameter group: {name} is in a group "
                "already; expected each parameter once. Leave it out of this group."
            )
        if id(p) in first:
            raise ValueError(
                f"some parameters appear in more than one place: {first[id(p)]} and {name} are "
                "one tensor; expected each parameter once. Leave one out, and put the stepped "
                "tensor in both places."
            )
        first[id(p)] = name


class Optimizer:
    """Steps parameters in place, from the gradients in their `grad`.

    Args:
        params: Tensors, or a tree of them.
        impl: The gradient transformation.

    Attributes:
        impl: The gradient transformation of the first group.
        impls: The gradient transformation of each group.
        param_groups: A tuple of tensors for each group.
        param_treespecs: The tree of each group.
        state_groups: The state of each group; `UninitializedState()` before the first step.

    Raises:
        TypeError: `impl` is no gradient transformation, or a parameter is no tensor.
    """

    def __init__(self, params: Iterable[Tensor], impl: GradientTransformation) -> None:
        require_transformation(impl, "Optimizer(params, impl)", duck=False)
        self.impl = impl
        self.impls: list[GradientTransformation] = []
        self.param_groups: list[tuple[Tensor, ...]] = []
        self.param_treespecs: list[PyTreeSpec] = []
        self.state_groups: list[Any] = []
        self._step_caches: list[StepCache] = []
        if isinstance(params, nn.Module):
            raise TypeError(
                f"{type(self).__name__}(params): expected tensors to optimize, got a module "
                f"({type(params).__name__}); pass module.parameters()"
            )
        if not isinstance(params, (list, tuple, dict, Tensor)):
            params = tuple(params)
        self.add_param_group(params)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the gradients of all parameters, or drop them.

        Args:
            set_to_none: Drop them; otherwise they are cut from their graph and zeroed in place.
        """
        for group in self.param_groups:
            for p in group:
                if p.grad is None:
                    continue
                if set_to_none:
                    p.grad = None
                    continue
                if p.grad.grad_fn is not None:
                    p.grad.detach_()
                else:
                    p.grad.requires_grad_(False)
                p.grad.zero_()

    def state_dict(self) -> tuple[Any, ...]:
        """Return the state of each group. The tensors are shared with the optimizer."""
        return tuple(self.state_groups)

    def load_state_dict(self, state_dict: Sequence[Any]) -> None:
        """Take over the state of each group. The tensors are shared with `state_dict`.

        Raises:
            ValueError: The number of groups differs.
        """
        if len(state_dict) != len(self.param_groups):
            raise ValueError(
                f"load_state_dict: expected a state for each of {len(self.param_groups)} parameter "
                "groups, "
                f"got {len(state_dict)}"
            )
        self.state_groups[:] = list(state_dict)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Step all parameters that have a gradient.

        Args:
            closure: Computes the loss and the gradients; called with gradients enabled.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, params in enumerate(self.param_groups):
            if params[0].is_cuda:
                refuse_capture(params[0].device)
            leaves = [p.grad for p in params]
            # Kernels record nothing, so nothing has to be switched off for them.
            done, self.state_groups[index] = step_inplace(
                self.impls[index],
                self._step_caches[index],
                params,
                leaves,
                self._initialized(index),
            )
            if not done:
                self._step_by_stages(index, leaves)
        return loss

    def _initialized(self, index: int) -> Any:
        """Return the state of a group, made before its first step."""
        state = self.state_groups[index]
        if isinstance(state, UninitializedState):
            with torch.no_grad():
                tree = tree_unflatten(self.param_treespecs[index], self.param_groups[index])
                state = self.state_groups[index] = self.impls[index].init(tree)
        return state

    @torch.no_grad()
    def _step_by_stages(self, index: int, leaves: list[Tensor | None]) -> None:
        spec = self.param_treespecs[index]
        tree = tree_unflatten(spec, self.param_groups[index])
        grads = tree_unflatten(spec, leaves)
        updates, self.state_groups[index] = self.impls[index].update(
            grads, self.state_groups[index], params=tree, inplace=True
        )
        apply_updates(tree, updates, inplace=True)

    def add_param_group(self, params: Any, *, impl: GradientTransformation | None = None) -> None:
        """Add a tree of tensors to optimize, with a state of its own.

        Args:
            params: The tree.
            impl: Its gradient transformation, for other hyper-parameters; None for that of the
                optimizer.

        Raises:
            TypeError: A leaf is no tensor, or `impl` is no gradient transformation.
            ValueError: There is no leaf, or a parameter is given twice or in a group already.
        """
        if impl is not None:
            require_transformation(impl, "add_param_group(params, impl=...)", duck=False)
        leaves, spec = tree_flatten(params)
        if not leaves:
            raise ValueError(
                "expected at least one tensor to optimize, got none; a generator such as "
                "module.parameters() is empty when it was used before"
            )
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"expected tensors to optimize, got a leaf of type {type(leaf).__name__}; "
                    "pass tensors, such as module.parameters()"
                )
        known = {id(p) for group in self.param_groups for p in group}
        require_distinct(leaves, [str(path) for path in tree_paths(params)], known)
        self.param_groups.append(tuple(leaves))
        self.param_treespecs.append(spec)
        self.impls.append(self.impl if impl is None else impl)
        self.state_groups.append(UninitializedState())
        self._step_caches.append(StepCache())

    def named_state_dict(self) -> dict[str, Any]:
        """Return the states with a name for each tensor; see `MetaOptimizer.named_state_dict`.

        The names of parameters are their paths in the trees that were given: keys of a dict, or
        numbers.
        """
        return named_state(self._groups())

    def load_named_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `named_state_dict` returned; see `MetaOptimizer.load_named_state_dict`.

        Raises:
            ValueError: Another format, or names that are missing or left over.
        """
        self.state_groups[:] = load_named_state(state_dict, self._groups())

    def _groups(self) -> list[tuple[GradientTransformation, Any, list[str], Any]]:
        trees = [tree_unflatten(s, p) for s, p in zip(self.param_treespecs, self.param_groups)]
        return [
            (impl, state, leaf_names(tree), tree)
            for impl, state, tree in zip(self.impls, self.state_groups, trees)
        ]
