# SPDX-License-Identifier: Apache-2.0
"""torchopt's optimizers for `torch.distributed.checkpoint.state_dict`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchopt.optim.named_state import owners
from torchopt.optim.states import require_states

if TYPE_CHECKING:
    from torchopt.optim.base import Optimizer

__all__ = ["AsTorch"]


class AsTorch(torch.optim.Optimizer):
    """An optimizer in the form that `get_state_dict` and `set_state_dict` of torch expect.

    It has a state for each parameter.

    Args:
        optimizer: The optimizer whose states are shown and loaded.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        super().__init__([{"params": list(group)} for group in optimizer.param_groups], {})
        self._show()

    def _show(self) -> None:
        self.state.clear()
        optimizer = self._optimizer
        with optimizer._lock:
            named = optimizer.named_state_dict()
            ends = [owners(state, names) for _, state, names, _ in optimizer._groups()]
        for group, names, shown in zip(named["groups"], ends, self.param_groups):
            params = dict(zip(group["params"], shown["params"]))
            for key, value in group["state"].items():
                if key in names:
                    field = key.removesuffix(f".{names[key]}")
                    self.state[params[names[key]]][field] = value
                else:
                    shown[key] = value

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the states without a step: torch calls this to have states to load into."""
        del closure
        optimizer = self._optimizer
        with optimizer._lock:
            optimizer.state_groups[:] = map(optimizer._state, range(len(optimizer.state_groups)))
        self._show()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of `state_dict`, perhaps with other tensors."""
        named = self._optimizer.named_state_dict()
        require_states(state_dict["param_groups"], len(named["groups"]))
        for group, given in zip(named["groups"], state_dict["param_groups"]):
            values: dict[str, Any] = {k: x for k, x in given.items() if k != "params"}
            for name, parameter in zip(group["params"], given["params"]):
                for field, value in state_dict["state"].get(parameter, {}).items():
                    values[f"{field}.{name}"] = value
            group["initialized"], group["state"] = True, values
        self._optimizer.load_named_state_dict(named)
        self._show()
