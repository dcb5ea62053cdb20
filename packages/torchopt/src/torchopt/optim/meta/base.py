# SPDX-License-Identifier: Apache-2.0
"""The optimizer that steps a module differentiably."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchopt.base import GradientTransformation, UninitializedState
from torchopt.optim.base import check_transformation
from torchopt.optim.gradients import gradients
from torchopt.params.containers import (
    Slot,
    extract_module_containers,
    parameter_slots,
)
from torchopt.typing import ModuleTensorContainers
from torchopt.update import apply_updates

__all__ = ["MetaOptimizer"]


class MetaOptimizer:
    """Steps the parameters of a module as part of the graph.

    After a step the module holds fast weights: tensors that are functions of the parameters it held
    before. A loss computed from them can be differentiated with respect to those, through any
    number of steps. The original parameters, and optimizers made for them, are untouched;
    `extract_state_dict` and `recover_state_dict` bring them back.

    Frozen parameters stay as they are. A parameter that several sub-modules share is stepped once
    and stays shared.

    Args:
        module: The module to step.
        impl: The gradient transformation.

    Attributes:
        impl: The gradient transformation.
        param_containers_groups: The parameter dictionaries of each module.
        state_groups: The state of each module; `UninitializedState()` before the first step.

    Raises:
        TypeError: `impl` is no gradient transformation.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> start = net.weight
        >>> optimizer = torchopt.MetaSGD(net, lr=0.1)
        >>> optimizer.step((net.weight ** 2).sum())
        >>> torch.autograd.grad(net.weight.sum(), start)
        (tensor([[0.8000]]),)
    """

    def __init__(self, module: nn.Module, impl: GradientTransformation) -> None:
        check_transformation(impl)
        self.impl = impl
        self.param_containers_groups: list[ModuleTensorContainers] = []
        self.state_groups: list[Any] = []
        self._modules: list[nn.Module] = []
        self.add_param_group(module)

    def step(self, loss: Tensor) -> None:
        """Replace the parameters of the modules by the parameters after one step on `loss`.

        Args:
            loss: 0-dim tensor computed from the modules' present parameters.

        Raises:
            TypeError: `loss` is no tensor.
            ValueError: `loss` is no scalar.
            NotDifferentiableError: `loss` depends on none of the parameters.
        """
        slot_groups = [parameter_slots(module) for module in self._modules]
        slots: list[Slot] = [slot for group in slot_groups for slot in group]
        found = gradients(loss, [slot.get() for slot in slots], [slot.names[0] for slot in slots])
        start = 0
        for index, group in enumerate(slot_groups):
            params = tuple(slot.get() for slot in group)
            grads = tuple(found[start : start + len(group)])
            start += len(group)
            if isinstance(self.state_groups[index], UninitializedState):
                self.state_groups[index] = self.impl.init(params)
            updates, self.state_groups[index] = self.impl.update(
                grads, self.state_groups[index], params=params, inplace=False
            )
            new_params = apply_updates(params, updates, inplace=False)
            for slot, p, new in zip(group, params, new_params):
                if new is not p:
                    slot.set(new)

    def add_param_group(self, module: nn.Module) -> None:
        """Add a module to step, with a state of its own."""
        self.param_containers_groups.append(
            extract_module_containers(module, with_buffers=False)[0]
        )
        self._modules.append(module)
        self.state_groups.append(UninitializedState())

    def state_dict(self) -> tuple[Any, ...]:
        """Return the state of each module. The tensors are shared with the optimizer."""
        return tuple(self.state_groups)

    def load_state_dict(self, state_dict: Sequence[Any]) -> None:
        """Take over the state of each module. The tensors are shared with `state_dict`.

        Raises:
            ValueError: The number of modules differs.
        """
        if len(state_dict) != len(self.state_groups):
            raise ValueError(
                f"load_state_dict: expected a state for each of {len(self.state_groups)} modules, "
                f"got {len(state_dict)}"
            )
        self.state_groups[:] = list(state_dict)
