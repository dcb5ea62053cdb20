# SPDX-License-Identifier: Apache-2.0
"""Map a chain of rules to one kernel.

A kernel is a rule with the stages that all optimizers share. With gradient g and parameter p:

    g' = g (-g if maximize) + weight_decay p
    u, state' = rule(g', state)
    update = -lr (u + decoupled_weight_decay p)

A chain is read from left to right: each rule adds its part to the plan (`LeafRule.join`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.kernels.fused_rule import FusedRule, as_number, decays, has_kernel, is_none
from torchopt.lazy import lazy
from torchopt.transform.leaf_rule import LeafRule
from torchopt.transform.linear import AddDecayedWeights, FlipSignAndAddWeightDecay, Scale

__all__ = ["Plan", "longest_plan"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """A kernel for the first members of a chain.

    Attributes:
        size: The number of members that it covers.
        rules: Pairs (member, rule): one rule, or a rule and momentum after it, or none for SGD.
        weight_decay: Coefficient of the penalty.
        decoupled_weight_decay: Coefficient of the decay after the rule.
        lr: The step size, to be multiplied by the value of each of `schedules`.
        schedules: Pairs (member, function of the count).
        maximize: Maximise the objective instead of minimising it.
        closed: Whether there is a step size, after which no rule can join.
    """

    size: int = 0
    rules: tuple[tuple[int, Any], ...] = ()
    weight_decay: Any = 0.0
    decoupled_weight_decay: Any = 0.0
    lr: Any = -1.0
    schedules: tuple[tuple[int, Any], ...] = ()
    maximize: bool = False
    closed: bool = False

    def _with(self, **changes: Any) -> Plan:
        return dataclasses.replace(self, size=self.size + 1, **changes)

    def penalized(self, weight_decay: Any, maximize: bool) -> Plan | None:
        """Return the plan with sign and penalty, which come first."""
        if self.size:
            return None
        return self._with(weight_decay=weight_decay, maximize=maximize)

    def directed(self, rule: Any) -> Plan | None:
        """Return the plan with a rule."""
        if self.closed or self.schedules or decays(self.decoupled_weight_decay):
            return None
        plan = self._with(rules=(*self.rules, (self.size, rule)))
        return plan if has_kernel(plan.fused) else None

    def decayed(self, weight_decay: Any) -> Plan | None:
        """Return the plan with decoupled weight decay."""
        if self.closed or self.schedules or decays(self.decoupled_weight_decay):
            return None
        return self._with(decoupled_weight_decay=weight_decay)

    def scheduled(self, schedule: Any, sign: float) -> Plan | None:
        """Return the plan with a factor that depends on the count; with sign -1, the step size."""
        if self.closed:
            return None
        schedules = (*self.schedules, (self.size, schedule))
        if sign == 1.0:
            return self._with(schedules=schedules)
        return self._with(schedules=schedules, lr=1.0, closed=True)

    def scaled(self, sign: int, step_size: Any) -> Plan | None:
        """Return the plan with a factor: the step size, or at the front the sign."""
        number = not isinstance(step_size, Tensor)
        if self.size == 0 and number and sign * step_size == -1.0:
            return self._with(maximize=True)
        if self.closed or (sign == 1 and not number):
            return None  # -step_size would be a copy of the tensor's current value
        return self._with(lr=step_size if sign == -1 else -step_size, closed=True)

    @lazy
    def fused(self) -> FusedRule:
        """The kernel with its reference implementation."""
        rules = [rule for _, rule in self.rules]
        return FusedRule(
            "_".join(rule.kernel for rule in rules) or "sgd",
            tuple(role for rule in rules for role in rule.roles),
            tuple(name for rule in rules for name in (*rule.hypers, *rule.shared)),
            functools.partial(statement, tuple(rules)),
            any(rule.reads_params for rule in rules),
            all(rule.constant_derivative for rule in rules),
        )

    @lazy
    def states(self) -> tuple[tuple[int, str], ...]:
        """Pairs (member, field) for the states of the kernel."""
        return tuple((i, role) for i, rule in self.rules for role in rule.roles)

    @lazy
    def step(self) -> int | None:
        """The member that counts the steps of the rule; None if the rule does not need them."""
        counting = [i for i, rule in self.rules if "count" in rule.leaf_fields]
        return counting[-1] if counting else None

    @lazy
    def counted(self) -> tuple[int, ...]:
        """The members that count the steps of each leaf."""
        counting = [i for i, rule in self.rules if "count" in rule.leaf_fields]
        return tuple(sorted({*counting, *(i for i, _ in self.schedules)}))

    @lazy
    def shared(self) -> tuple[tuple[int, str], ...]:
        """Pairs (member, field) for the fields that leaves with equal counts share."""
        return tuple((i, name) for i, rule in self.rules for name in rule.shared)

    @lazy
    def equal(self) -> tuple[tuple[int, str], ...]:
        """Pairs (member, field) for the fields that must be equal for leaves in one call."""
        return (*((i, "count") for i in self.counted), *self.shared)

    @lazy
    def lists(self) -> tuple[tuple[int, str], ...]:
        """Pairs (member, field) for all fields with an entry for each leaf."""
        return (*self.states, *self.equal)

    @lazy
    def constants(self) -> dict[str, Any]:
        """All hyper-parameters by name, except for schedules and shared fields."""
        values = {name: getattr(rule, name) for _, rule in self.rules for name in rule.hypers}
        chain = {
            "weight_decay": self.weight_decay,
            "decoupled_weight_decay": self.decoupled_weight_decay,
        }
        return {"lr": self.lr, **chain, **values}

    @lazy
    def reads_params(self) -> bool:
        """Whether the updates depend on the parameters."""
        return self.fused.reads_params or decays(self.weight_decay, self.decoupled_weight_decay)

    @lazy
    def numbers(self) -> tuple[float, ...] | None:
        """All hyper-parameters in the order of the kernel; None if one of them may change."""
        if self.schedules or self.shared or self.tensors:
            return None
        values = self.constants
        return tuple(as_number(name, values[name]) for name in self.fused.all_hypers)

    @lazy
    def tensors(self) -> tuple[Tensor, ...]:
        """The constant hyper-parameters that are tensors."""
        return tuple(h for h in self.constants.values() if isinstance(h, Tensor))

    def has_arrays(self) -> bool:
        """Return whether a hyper-parameter is a tensor with other than one element.

        The stages broadcast it; the kernels take numbers.
        """
        return bool(self.tensors) and any(h.numel() != 1 for h in self.tensors)


def statement(
    rules: Sequence[Any],
    grads: Sequence[Tensor],
    roles: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor],
    steps: Sequence[Tensor],
    hypers: Mapping[str, Any],
    maximize: bool,
) -> list[list[Tensor]]:
    """Return the updates and new roles of the kernel, computed by the rules themselves.

    Half types are computed in float32 and rounded once, as the kernels do.

    Args:
        rules: The rules of the kernel.
        grads: Gradients.
        roles: For each of the kernel's states, a tensor for each gradient.
        params: Parameters; read by the rule, or if a weight decay is not -0.
        steps: The number of the step of each gradient, from 1, 0-dim int64 tensors.
        hypers: A number or 0-dim tensor for each of `fused.all_hypers`.
        maximize: Maximise the objective instead of minimising it.
    """
    dtypes = [g.dtype for g in grads]
    out, params = _widened(grads), _widened(params)
    states = [_widened(role) for role in roles]
    penalty, decay = hypers["weight_decay"], hypers["decoupled_weight_decay"]
    if params and not is_none(penalty):
        out = _apply(FlipSignAndAddWeightDecay(_rounded(penalty), maximize), out, params)
    elif maximize:
        out = [g.neg() for g in out]
    moved: list[list[Tensor]] = []
    for rule in rules:
        rule = dataclasses.replace(rule, **{name: hypers[name] for name in rule.hypers})
        old = states[len(moved) : len(moved) + len(rule.roles)]
        shared = [[hypers[name]] * len(out) for name in rule.shared]
        out, new = rule.directions(out, old, steps, shared, params)
        moved += new
    if params and not is_none(decay):
        out = _apply(AddDecayedWeights(_rounded(decay)), out, params)
    out = _apply(Scale(hypers["lr"], -1), out, params)
    return [[x.to(d) for x, d in zip(column, dtypes)] for column in (out, *moved)]


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.float() if x.dtype in _HALF else x for x in tensors]


def _rounded(decay: Any) -> Tensor:
    """Return a decay as a tensor, so that it is rounded before it is multiplied, as in kernels."""
    return decay if isinstance(decay, Tensor) else torch.tensor(decay, dtype=torch.float64)


def _apply(rule: LeafRule, out: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    return rule.update_leaves(out, (), params, inplace=False)[0]


def longest_plan(rules: Sequence[LeafRule | None]) -> Plan | None:
    """Return the kernel for the first of `rules`, or None if there is none.

    It ends with a step size. If it contains a rule, it may also end with the chain, or before a
    rule that needs whole tensors, such as LAMB's trust ratio.

    Args:
        rules: The rule of each member of a chain; None for members without a rule.
    """
    plan = Plan()
    for rule in rules:
        longer = None if rule is None else rule.join(plan)
        if longer is None:
            open_end = rule is not None and rule.takes_directions
            return plan if plan.closed or (plan.rules and open_end) else None
        plan = longer
    return plan if plan.closed or plan.rules else None
