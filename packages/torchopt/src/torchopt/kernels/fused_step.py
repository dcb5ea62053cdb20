# SPDX-License-Identifier: Apache-2.0
"""A whole optimizer step in place, in one native call that allocates and records nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt import _C
from torchopt.kernels.devices import EXCHANGE, placement, refusal, refuse_count, unavailable
from torchopt.kernels.fused_rule import FusedRule
from torchopt.torch_internals import bump_versions
from torchopt.tree_function import is_watched

__all__ = ["StepCache"]


class StepCache:
    """The checks of parameters and states that one step has made, for the next step.

    Each step compares the cache with its tensors, so a stale cache costs time, never a wrong
    result. It is not part of the state of an optimizer: a copy or a pickle is empty.

    Attributes:
        state: Room for the caller: the state after its last step.
        quick: Room for the caller: what it needs to repeat the last step. None before the first
            step, and whenever the tensors were checked again.
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

    def step(
        self,
        rule: FusedRule,
        params: Sequence[Tensor] | None,
        grads: Sequence[Any],
        states: Sequence[list[Tensor]],
        step: Any,
        hypers: Sequence[float],
        maximize: bool = False,
        launch: bool = True,
    ) -> Exception | None:
        """Step `params` and `states` in place and return None, or do nothing and return the reason.

        A single native pass is not possible if a gradient is missing or not contiguous, if tensors
        differ in dtype or device or share memory, or if autograd or a transform tracks them. See
        `torchopt.kernels.native.attempt` for the arguments. The check is reused only if `params`
        and the lists in `states` are the same objects as in the last step.
        """
        if not params:
            return unavailable("there are no parameters")
        if isinstance(step, Tensor) and (EXCHANGE is None or not params[0].is_cpu):
            wrong = refuse_count(step, params[0])  # elsewhere the plan judges it
            if wrong is not None:
                return wrong
        new = not (
            self.plan is not None
            and self.rule is rule
            and self.params is params
            and len(self.states) == len(states)
            and all(a is b for a, b in zip(self.states, states))
        )
        for again in (new, True):
            refused = self._renew(rule, params, tuple(states)) if again else None
            if refused is not None or self.plan is None:
                return refused
            device, stream = placement(params[0])
            if self.plan.run(
                grads,  # type: ignore[arg-type]
                step,
                hypers,
                maximize,
                torch.get_num_threads(),
                device,
                stream,
                launch,
            ):
                if launch:
                    bump_versions(self.written)
                return None
            if any(g is None for g in grads):
                break
            # Otherwise the memory of a tensor has moved: check everything again.
        return unavailable("a gradient is missing, or is not like its parameter in memory")

    @torch.no_grad()  # so that requires_grad alone does not make a parameter a watched tensor
    def _renew(
        self, rule: FusedRule, params: Sequence[Tensor], states: tuple[list[Tensor], ...]
    ) -> Exception | None:
        """Check all tensors and remember them; return why they cannot be stepped in one pass."""
        self.plan = self.quick = None
        refused = refusal(rule, params, list(zip(rule.states, states)), plain=True)
        if refused is not None:
            return refused
        self.written = [*params, *(x for role in states for x in role)]
        for x in self.written:
            if (
                x.dtype != params[0].dtype
                or x.device != params[0].device
                or x.is_inference()
                or is_watched(x)
            ):
                return unavailable("a tensor cannot be stepped with the others, or is watched")
        if any(x.requires_grad for role in states for x in role):
            return unavailable("a state requires a gradient")
        try:  # refuses layouts that the kernels cannot read, and memory that is stepped twice
            self.plan = _C.StepPlan(rule.name, list(params), list(states))
        except ValueError as error:
            return unavailable(str(error))
        self.rule, self.params, self.states = rule, params, states
        return None
