# SPDX-License-Identifier: Apache-2.0
"""A functional optimizer that keeps its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation, UninitializedState, require_transformation
from torchopt.optim.base import require_distinct
from torchopt.optim.gradients import gradients, no_attribute
from torchopt.optim.named_state import leaf_names, load_named_state, named_state
from torchopt.optim.states import StepLock, fitted_state
from torchopt.optimizers.short import short_step
from torchopt.params.lineage import descend
from torchopt.tree import require_tensor_tree, tree_flatten, tree_leaves, tree_paths, tree_unflatten
from torchopt.typing import OptState, Params
from torchopt.update import apply_updates, writable

__all__ = ["FuncOptimizer"]


class FuncOptimizer:
    """Steps a tree of parameters from a loss, differentiably.

    The new parameters are functions of the old ones, so that a later loss can be differentiated
    through the steps. Under `torch.no_grad()` a step makes no graph: the new parameters are leaves,
    and require a gradient if the old ones did.

    Args:
        impl: The gradient transformation.
        inplace: Write into the parameters; the steps are then not differentiable.

    Attributes:
        impl: The gradient transformation.
        optim_state: Its state; `UninitializedState()` before the first step.
        inplace: The default of `step`.

    Raises:
        TypeError: `impl` is not a gradient transformation.

    Example:
        >>> import torch, torchopt
        >>> optimizer = FuncOptimizer(torchopt.sgd(lr=0.1))
        >>> lr_scale = torch.tensor(1.0, requires_grad=True)
        >>> params = {"w": torch.tensor(3.0, requires_grad=True)}
        >>> params = optimizer.step(lr_scale * params["w"] ** 2, params)
        >>> torch.autograd.grad(params["w"], lr_scale)
        (tensor(-0.6000),)
    """

    def __init__(self, impl: GradientTransformation, *, inplace: bool = False) -> None:
        require_transformation(impl, "FuncOptimizer(impl)", duck=False)
        self.impl = impl
        self.optim_state: OptState = UninitializedState()
        self.inplace = bool(inplace)
        self._fits = True  # whether the state is known to be for the parameters
        self._lock = StepLock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.impl!r})"

    if not TYPE_CHECKING:  # type checkers would accept every name
        __getattr__ = no_attribute

    def step(self, loss: Tensor, params: Params, inplace: bool | None = None) -> Params:
        """Return the parameters after one step on `loss`.

        Args:
            loss: 0-dim tensor computed from `params`.
            params: A tree of tensors, or one tensor. Parameters that do not require a gradient, or
                that the loss does not use, are returned unchanged.
            inplace: Overrides the default given to the constructor.

        Returns:
            A tree like `params`: new tensors, or with `inplace` the same ones.

        Raises:
            TypeError: `loss` or a parameter is not a tensor.
            ValueError: `loss` is not a scalar, a parameter occurs twice, or the loaded state is
                that of another optimizer or of other parameters.
            NotDifferentiableError: `loss` depends on none of the parameters.
        """
        with self._lock:
            return self._step(loss, params, inplace)

    def _step(self, loss: Tensor, params: Params, inplace: bool | None) -> Params:
        inplace = self.inplace if inplace is None else bool(inplace)
        leaves, spec = tree_flatten(params)
        if not all(isinstance(p, Tensor) for p in leaves):
            require_tensor_tree(params, "step(loss, params): a parameter")
        state = self.optim_state
        if isinstance(state, UninitializedState):
            state = self.impl.init(params)
        elif not self._fits:
            state = fitted_state(state, self.impl, params, "state")
        names = [str(path) for path in tree_paths(params)]
        require_distinct(leaves, names)
        keep_graph = not inplace and torch.is_grad_enabled()
        grads = gradients(loss, leaves, names, create_graph=keep_graph)
        found = None if inplace else short_step(self.impl, leaves, grads, state)
        if found is not None:
            stepped: Any = tree_unflatten(spec, found[0])
            state = found[1]
        else:
            tree = tree_unflatten(spec, grads)
            with torch.set_grad_enabled(not inplace and torch.is_grad_enabled()):
                # Nothing is written before it is known that the step succeeds.
                updates, state = self.impl.update(tree, state, params=params, inplace=False)
            if inplace:
                writable(params, updates)
            stepped = apply_updates(params, updates, inplace=inplace)
        self.optim_state, self._fits = state, True
        if not inplace:
            for old, new in zip(leaves, tree_leaves(stepped)):
                if new is not old:
                    if not keep_graph:
                        new.requires_grad_(old.requires_grad)
                    descend(old, new)
        return stepped

    def state_dict(self) -> OptState:
        """Return the current state. Later steps do not change what was returned."""
        return self.optim_state

    def load_state_dict(self, state_dict: OptState) -> None:
        """Load a state. The next step checks it and casts it to the dtypes of its parameters.

        Later steps do not change `state_dict`.
        """
        with self._lock:
            self.optim_state, self._fits = state_dict, False

    def named_state_dict(self, params: Params) -> dict[str, Any]:
        """Return the state with a name for each tensor; see `MetaOptimizer.named_state_dict`.

        Args:
            params: The tree that is stepped; its paths are the names.
        """
        return named_state([(self.impl, self.optim_state, leaf_names(params), params)])

    def load_named_state_dict(self, state_dict: dict[str, Any], params: Params) -> None:
        """Load a result of `named_state_dict`; see `MetaOptimizer.load_named_state_dict`.

        Args:
            state_dict: The result of `named_state_dict`.
            params: The tree that is stepped.

        Raises:
            ValueError: Another format, names that are missing or left over, or other shapes;
                nothing is loaded then.
        """
        with self._lock:
            group = (self.impl, self.optim_state, leaf_names(params), params)
            (self.optim_state,) = load_named_state(state_dict, [group])
            self._fits = True
