# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations as torch.optim.Optimizer, for learning-rate schedulers and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation, UninitializedState, require_transformation
from torchopt.optim.named_state import load_named_state, named_state
from torchopt.update import apply_updates

__all__ = ["TorchOptimizer"]


class TorchOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that steps with a gradient transformation.

    Schedulers of `torch.optim.lr_scheduler`, `torch.amp.GradScaler`, hooks and whatever else asks
    for a `torch.optim.Optimizer` work with it. Each parameter group has its own hyper-parameters,
    in the dictionary of the group; a change there counts from the next step on.

    Args:
        params: Tensors, or dictionaries with `"params"` and hyper-parameters of that group.
        make: Makes the transformation from hyper-parameters, such as `torchopt.adam`.
        hyper_parameters: Arguments of `make` for all groups.

    Raises:
        TypeError: An unknown hyper-parameter, or `make` returns no gradient transformation.
        ValueError: A hyper-parameter out of range.

    Example:
        >>> import torchopt
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = TorchOptimizer([w], torchopt.sgd, lr=1.0)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        >>> for _ in range(2):
        ...     w.grad = torch.ones(1)
        ...     optimizer.step()
        ...     scheduler.step()
        >>> w.detach()
        tensor([-0.5000])
    """

    def __init__(
        self,
        params: Any,
        make: Callable[..., GradientTransformation],
        **hyper_parameters: Any,
    ) -> None:
        self.make = make
        self._states: list[Any] = []
        self._cache: list[tuple[dict[str, Any], GradientTransformation] | None] = []
        require_transformation(make(**hyper_parameters), "TorchOptimizer(params, make)", duck=False)
        super().__init__(params, hyper_parameters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: a dictionary with `"params"` and the hyper-parameters of the group."""
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len({id(p) for p in params}) != len(params):
            self.param_groups.pop()
            raise ValueError(
                "some parameters appear twice in one parameter group; expected each parameter once"
            )
        self._states.append(UninitializedState())
        self._cache.append(None)
        self._transformation(len(self._states) - 1)

    def _hyper_parameters(self, index: int) -> dict[str, Any]:
        group = self.param_groups[index]
        # Schedulers leave notes of their own, such as initial_lr, in the groups.
        return {name: group[name] for name in group if name in self._accepted()}

    def _accepted(self) -> frozenset[str]:
        names: set[str] = set(self.defaults)
        for group in self.param_groups:
            names |= set(group)
        return frozenset(names - {"params", "param_names", "initial_lr", "max_lr", "min_lr"})

    def _transformation(self, index: int) -> GradientTransformation:
        hyper = self._hyper_parameters(index)
        cached = self._cache[index]
        if cached is not None and _same(cached[0], hyper):
            return cached[1]
        made = self.make(**hyper)
        self._cache[index] = (dict(hyper), made)
        state = self._states[index]
        if cached is not None and not isinstance(state, UninitializedState):
            # Another value of a hyper-parameter may add or drop stages without a state.
            names, params = self._names_and_params(index)
            saved = named_state([(cached[1], state, names, params)])
            (self._states[index],) = load_named_state(saved, [(made, state, names, params)])
        return made

    def _names_and_params(self, index: int) -> tuple[list[str], list[Tensor]]:
        params: list[Tensor] = self.param_groups[index]["params"]
        return [str(i) for i in range(len(params))], params

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            params: list[Tensor] = group["params"]
            transformation = self._transformation(index)
            if isinstance(self._states[index], UninitializedState):
                self._states[index] = transformation.init(params)
            updates, self._states[index] = transformation.update(
                [p.grad for p in params], self._states[index], params=params, inplace=True
            )
            apply_updates(params, updates, inplace=True)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states, named and versioned, and the groups as torch.optim does."""
        packed = super().state_dict()
        packed["state"] = named_state(
            [
                (self._transformation(i), state, *self._names_and_params(i))
                for i, state in enumerate(self._states)
            ]
        )
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: Other groups or parameters, or the state of another optimizer.
        """
        saved = state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        self._cache = [None] * len(self.param_groups)
        self._states = load_named_state(
            saved,
            [
                (self._transformation(i), state, *self._names_and_params(i))
                for i, state in enumerate(self._states)
            ],
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_own": (self.make, self._states)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("_own", None)
        super().__setstate__(state)
        if own is not None:
            self.make, self._states = own
            self._cache = [None] * len(self.param_groups)


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        first[k] is second[k] or (not isinstance(first[k], Tensor) and first[k] == second[k])
        for k in first
    )
