# SPDX-License-Identifier: Apache-2.0
"""The optimizer with the interface of torch.optim, driven by a gradient transformation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base import GradientTransformation, UninitializedState, require_transformation
from torchopt.kernels.devices import refuse_capture
from torchopt.kernels.fused_step import StepCache
from torchopt.optim.as_torch import AsTorch
from torchopt.optim.named_state import StateGroups, leaf_names
from torchopt.optim.param_group import ParamGroup
from torchopt.optim.states import StepLock, copied
from torchopt.optimizers.native import launch_step, step_inplace
from torchopt.precision import forget_casts
from torchopt.transform.compensated import compensated
from torchopt.transform.in_8_bits import in_8_bits
from torchopt.tree import PyTreeSpec, tree_flatten, tree_paths, tree_unflatten
from torchopt.update import add_, writable

__all__ = ["Optimizer", "require_distinct"]


def require_distinct(
    params: Sequence[Tensor], names: Sequence[str], known: Collection[int] = ()
) -> None:
    """Raise ValueError if a parameter occurs twice, because it would be stepped twice.

    `names` are for messages; `known` are the identities of parameters in other groups.
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


class Optimizer(StateGroups):
    """Steps parameters in place, from the gradients in their `grad`.

    A step that raises has changed neither parameters nor states. Threads that share an optimizer
    step one after the other.

    `state_dict` returns the states themselves: the next step copies them before it writes. In
    the named form, the names of parameters are their paths in the trees of the groups: keys of a
    dict, or numbers.

    `torch.amp.GradScaler` works with it: a step whose gradients are not all finite is skipped. For
    schedulers of `torch.optim.lr_scheduler`, see `TorchOptimizer`.

    Args:
        params: Tensors, or a tree of them.
        impl: The gradient transformation.
        compensated: Keep the rounding errors of bfloat16 and float16 parameters, and add them to
            the next step; see `torchopt.transform.compensated` for the bound of the error.
        in_8_bits: Keep states of 4096 elements or more in one byte per element, except for copies
            of the parameters; see `torchopt.transform.in_8_bits` for the bound of the error.

    Attributes:
        impl: The gradient transformation of the first group.
        impls: The gradient transformation of each group.
        param_groups: A tuple of tensors for each group, with itself under the key `"params"`.
        param_treespecs: The tree of each group.
        state_groups: The state of each group; `UninitializedState()` before the first step.

    Raises:
        TypeError: `impl` is not a gradient transformation, or a parameter is not a tensor.
        ValueError: There are no parameters, or one is given twice or is the result of an operation.

    Example:
        >>> import torch, torchopt
        >>> p = torch.tensor([3.0], requires_grad=True)
        >>> clipped = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.sgd(lr=0.5))
        >>> optimizer = Optimizer([p], clipped)
        >>> p.square().sum().backward()
        >>> optimizer.step()
        >>> p.detach()
        tensor([2.5000])
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        impl: GradientTransformation,
        *,
        compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None:
        require_transformation(impl, "Optimizer(params, impl)", duck=False)
        self.compensated, self.in_8_bits = compensated, in_8_bits
        self.impl = self._with_options(impl)
        self.impls: list[GradientTransformation] = []
        self.param_groups: list[ParamGroup] = []
        self.param_treespecs: list[PyTreeSpec] = []
        self.state_groups: list[Any] = []
        self._step_caches: list[StepCache] = []
        self._lock = StepLock()
        self.add_param_group(params)

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        """Yield this optimizer as one of torch, for `get_state_dict` and `set_state_dict` of
        `torch.distributed.checkpoint.state_dict`, which take several or a `torch.optim.Optimizer`.
        """
        yield AsTorch(self)

    def __repr__(self) -> str:
        count = sum(map(len, self.param_groups))
        return f"{type(self).__name__}({count} tensors, {self.impl!r})"

    def _with_options(self, impl: GradientTransformation) -> GradientTransformation:
        coded = in_8_bits(impl) if self.in_8_bits else impl
        # Outermost: the rounding error belongs to the updates that are applied.
        return compensated(coded) if self.compensated else coded

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the gradients of all parameters, or drop them.

        Args:
            set_to_none: Drop them; otherwise they are detached and zeroed in place.
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

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Step all parameters that have a gradient.

        Args:
            closure: Computes the loss and the gradients; called with gradients enabled.

        Returns:
            The result of the closure; None without a closure.

        Raises:
            TypeError: `closure` is not a function.
            MismatchError: A gradient or a state does not match its parameter.
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"step(closure): expected a function or None, got {type(closure).__name__}; "
                    "call loss.backward() and then step(); the optimizers whose step takes the "
                    "loss are MetaOptimizer, for modules, and FuncOptimizer"
                )
            with torch.enable_grad():
                loss = closure()
        with self._lock:
            if len(self.param_groups) != len(self.state_groups):
                raise ValueError(
                    f"step(): expected the {len(self.state_groups)} groups that have a state, got "
                    f"{len(self.param_groups)} in param_groups; add a group with add_param_group, "
                    "or make a new optimizer"
                )
            if self._lent:
                self.state_groups[:] = [copied(state) for state in self.state_groups]
                self._lent = False
            if len(self.param_groups) == 1:
                params, state = self.param_groups[0], self.state_groups[0]
                if params[0].is_cuda:
                    refuse_capture(params[0].device)
                if type(state) is UninitializedState:
                    state = self._state(0)
                # Native calls record no graph, so no_grad is not needed for them.
                grads = [p.grad for p in params]
                done, state = step_inplace(
                    self.impls[0], self._step_caches[0], params, grads, state
                )
                if not done:
                    updates, state = self._by_stages(0, grads, state)
                    add_(*updates)
                self.state_groups[0] = state
            else:
                self._step_groups()
            forget_casts()
        return loss

    def _step_groups(self) -> None:
        """Step all groups, or raise before anything is written."""
        steps: list[tuple[Any, Any]] = []
        used = []  # keeps the gradients alive, which a prepared step reads when it is launched
        for index, params in enumerate(self.param_groups):
            if params[0].is_cuda:
                refuse_capture(params[0].device)
            grads = [p.grad for p in params]
            used.append(grads)
            state = self._state(index)
            done, following = step_inplace(
                self.impls[index], self._step_caches[index], params, grads, state, launch=False
            )
            steps.append((None, following) if done else self._by_stages(index, grads, state))
        # Nothing is written before it is known that every group can step.
        for updates, _ in steps:
            if updates is not None:
                add_(*updates)
        for index, (updates, state) in enumerate(steps):
            if updates is None:
                launch_step(self._step_caches[index], state)
            self.state_groups[index] = state

    def _state(self, index: int) -> Any:
        """Return the state of a group; before its first step, the initial one."""
        state = self.state_groups[index]
        if isinstance(state, UninitializedState):
            with torch.no_grad():
                state = self.impls[index].init(self._tree(index))
        return state

    def _tree(self, index: int) -> Any:
        return tree_unflatten(self.param_treespecs[index], self.param_groups[index])

    @torch.no_grad()
    def _by_stages(self, index: int, grads: list[Tensor | None], state: Any) -> tuple[Any, Any]:
        """Return the arguments of `add_` and the next state of a group; nothing is written."""
        tree = self._tree(index)
        updates, state = self.impls[index].update(
            tree_unflatten(self.param_treespecs[index], grads),
            state,
            params=tree,
            inplace=False,
        )
        return writable(tree, updates), state

    def add_param_group(self, params: Any, *, impl: GradientTransformation | None = None) -> None:
        """Add a tree of tensors to optimize, with a separate state.

        Args:
            params: The tree, or an iterable of tensors such as `module.parameters()`.
            impl: The gradient transformation of the group, for example with other
                hyper-parameters; None for that of the optimizer.

        Raises:
            TypeError: A leaf is not a tensor, or `impl` is not a gradient transformation.
            ValueError: `params` is empty, holds the result of an operation, or repeats a parameter
                of this group or of another.
        """
        if impl is not None:
            require_transformation(impl, "add_param_group(params, impl=...)", duck=False)
        if isinstance(params, nn.Module):
            raise TypeError(
                f"{type(self).__name__}(params): expected tensors to optimize, got a module "
                f"({type(params).__name__}); pass module.parameters()"
            )
        leaves, spec = tree_flatten(params)
        if spec.is_leaf() and isinstance(params, Iterable) and not isinstance(params, Tensor):
            params = tuple(params)
            leaves, spec = tree_flatten(params)
        if not leaves:
            raise ValueError(
                "expected at least one tensor to optimize, got none; a generator such as "
                "module.parameters() is empty after its first use"
            )
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                groups = params if isinstance(params, (list, tuple)) else (params,)
                advice = "pass tensors, such as module.parameters()"
                if any(isinstance(group, dict) and "params" in group for group in groups):
                    advice = "call add_param_group(params, impl=torchopt.adam(lr)) for each group"
                raise TypeError(
                    f"expected tensors to optimize, got a leaf of type {type(leaf).__name__}; "
                    f"{advice}"
                )
            if leaf.grad_fn is not None and not leaf.retains_grad:
                raise ValueError(
                    f"expected leaf tensors to optimize, got one of shape {tuple(leaf.shape)} that "
                    f"was computed by {leaf.grad_fn.name()}, whose .grad stays None; make the "
                    "optimizer before the first step of a meta-optimizer, or pass the tensors that "
                    "it was computed from"
                )
        known = {id(p) for group in self.param_groups for p in group}
        require_distinct(leaves, [str(path) for path in tree_paths(params)], known)
        self.param_groups.append(ParamGroup(leaves))
        self.param_treespecs.append(spec)
        self.impls.append(self.impl if impl is None else self._with_options(impl))
        self.state_groups.append(UninitializedState())
        self._step_caches.append(StepCache())

    def _names_and_params(self, index: int) -> tuple[list[str], Any]:
        tree = self._tree(index)
        return leaf_names(tree), tree
