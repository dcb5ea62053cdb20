# SPDX-License-Identifier: Apache-2.0
"""A functional optimizer that keeps its state."""

from __future__ import annotations

from torch import Tensor

from torchopt.base import GradientTransformation, UninitializedState
from torchopt.optim.base import check_transformation
from torchopt.optim.gradients import gradients
from torchopt.tree import tree_flatten, tree_paths, tree_unflatten
from torchopt.typing import OptState, Params
from torchopt.update import apply_updates

__all__ = ["FuncOptimizer"]


class FuncOptimizer:
    """Steps a tree of parameters from a loss, differentiably.

    Args:
        impl: The gradient transformation.
        inplace: Write into the parameters, and do not make the gradients differentiable.

    Attributes:
        impl: The gradient transformation.
        optim_state: Its state; `UninitializedState()` before the first step.
        inplace: The default of `step`.

    Raises:
        TypeError: `impl` is no gradient transformation.

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
        check_transformation(impl)
        self.impl = impl
        self.optim_state: OptState = UninitializedState()
        self.inplace = bool(inplace)

    def step(self, loss: Tensor, params: Params, inplace: bool | None = None) -> Params:
        """Return the parameters after one step on `loss`.

        Args:
            loss: 0-dim tensor computed from `params`.
            params: Any tree of tensors, or one tensor. Parameters that do not require a gradient,
                or that the loss does not use, are returned as they are.
            inplace: Overrides the default given to the constructor.

        Raises:
            TypeError: `loss` is no tensor.
            ValueError: `loss` is no scalar.
            NotDifferentiableError: `loss` depends on none of the parameters.
        """
        inplace = self.inplace if inplace is None else bool(inplace)
        if isinstance(self.optim_state, UninitializedState):
            self.optim_state = self.impl.init(params)
        leaves, spec = tree_flatten(params)
        names = [str(path) for path in tree_paths(params)]
        grads = tree_unflatten(spec, gradients(loss, leaves, names, create_graph=not inplace))
        updates, self.optim_state = self.impl.update(
            grads, self.optim_state, params=params, inplace=inplace
        )
        return apply_updates(params, updates, inplace=inplace)

    def state_dict(self) -> OptState:
        """Return the state. The tensors are shared with the optimizer."""
        return self.optim_state

    def load_state_dict(self, state_dict: OptState) -> None:
        """Take over a state. The tensors are shared with `state_dict`."""
        self.optim_state = state_dict
