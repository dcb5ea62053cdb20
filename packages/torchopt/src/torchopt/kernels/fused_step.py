# SPDX-License-Identifier: Apache-2.0
"""A whole optimizer step in place, in one native call: nothing is allocated, nothing recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt import _C
from torchopt.kernels.devices import placement
from torchopt.kernels.native import refusal
from torchopt.torch_internals import bump_versions
from torchopt.tree_function import is_watched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchopt.kernels.fused_rule import FusedRule


__all__ = ["StepCache"]


class StepCache:
    """What `step` has learned about parameters and states, for the next step.

    Each step compares it with the tensors, so it is never wrong, only sometimes useless. It is
    not part of the state of an optimizer: a copy of it is empty.

    Attributes:
        state: What the caller's last step returned, for the caller.
        quick: What the caller needs for another step like the last one, for the caller. None
            where there was none, or where it has to be determined again.
    """

    def __init__(self) -> None:
        self.rule: FusedRule | None = None
        self.params: Sequence[Tensor] = ()
        self.states: tuple[list[Tensor], ...] = ()
        self.written: list[Tensor] = []
        self.plan: _C.StepPlan | None = None
        self.state: Any = None
        self.quick: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StepCache:
        return StepCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return StepCache, ()

    def fits(
        self, rule: FusedRule, params: Sequence[Tensor], states: Sequence[list[Tensor]]
    ) -> bool:
        """Return whether this was made for the same objects."""
        return (
            self.plan is not None
            and self.rule is rule
            and self.params is params
            and len(self.states) == len(states)
            and all(a is b for a, b in zip(self.states, states))
        )

    @torch.no_grad()  # so that a parameter counts as watched only by what is not its own gradient
    def renew(
        self, rule: FusedRule, params: Sequence[Tensor], states: Sequence[list[Tensor]]
    ) -> bool:
        """Check all tensors and remember them; return False where they cannot be stepped so."""
        self.plan = self.quick = None
        if not params or not _steppable(rule, params, states):
            return False
        states = tuple(states)
        try:
            self.plan = _C.StepPlan(rule.name, list(params), list(states))
        except ValueError:
            return False  # a kind of memory that the kernels cannot read
        self.rule, self.params, self.states = rule, params, states
        self.written = [*params, *(x for role in states for x in role)]
        return True

    def step(
        self,
        rule: FusedRule,
        params: Sequence[Tensor],
        grads: list[Any],
        states: Sequence[list[Tensor]],
        step: int | Tensor,
        hypers: Sequence[float],
        *,
        maximize: bool = False,
        launch: bool = True,
    ) -> bool:
        """Step `params` and `states` in place and return True, or do nothing and return False.

        The result is that of `native.update` followed by adding the updates to the parameters.
        False is returned where one plain native pass over all tensors is not possible: a gradient
        is missing or not contiguous, tensors differ in dtype or device or share memory, or
        something watches them.

        Args:
            rule: The rule.
            params: Parameters. This is of use while this is the same object.
            grads: A gradient or None for each parameter.
            states: For each of the rule's states, one tensor for each parameter.
            step: The number of this step, from 1: a number or a 0-dim int64 tensor, one for all.
            hypers: A number for each of `rule.all_hypers`, in their order.
            maximize: Go up instead of down.
            launch: Step now; otherwise only check that the step can be taken, for `plan.launch`.
        """
        if not self.fits(rule, params, states) and not self.renew(rule, params, states):
            return False
        for _ in range(2):
            device, stream = placement(params[0])
            if self.plan is not None and self.plan.run(
                grads, step, hypers, maximize, torch.get_num_threads(), device, stream, launch
            ):
                if launch:
                    bump_versions(self.written)
                return True
            # A gradient that does not fit, or a tensor that moved: check again from scratch.
            if any(g is None for g in grads) or not self.renew(rule, params, states):
                return False
        return False


def _steppable(
    rule: FusedRule, params: Sequence[Tensor], states: Sequence[Sequence[Tensor]]
) -> bool:
    if refusal(rule, params, list(zip(rule.states, states)), plain=True) is not None:
        return False
    for x in (x for role in (params, *states) for x in role):
        if (
            x.dtype != params[0].dtype
            or x.device != params[0].device
            or not x.is_contiguous()
            or x.is_neg()
            or x.is_inference()
            or is_watched(x)
        ):
            return False
    if any(x.requires_grad for role in states for x in role):
        return False
    # Shared memory would be stepped twice.
    return _C.are_disjoint([x for role in (params, *states) for x in role])
