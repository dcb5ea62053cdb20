# SPDX-License-Identifier: Apache-2.0
"""The table of fused rules: one row for each row of `csrc/math/rules.h`.

An optimizer is a rule between stages that all optimizers share. With gradient g and parameter p:

    g' = g (-g to maximize) + weight_decay p
    u, state' = rule(g', state)
    update = -lr (u + decoupled_weight_decay p)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchopt.kernels.reference import directions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor


__all__ = ["CHAIN_HYPERS", "RULES", "FusedRule", "as_number", "reference_update"]

CHAIN_HYPERS = ("lr", "weight_decay", "decoupled_weight_decay")
"""The hyper-parameters of the shared stages; those of the rule follow."""

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FusedRule:
    """A rule that has kernels.

    Attributes:
        name: Its name in `torchopt._C.RULES`.
        states: What it remembers, in the order of the kernels.
        hypers: Its hyper-parameters, in the order of the kernels.
        direction: The same rule in plain torch; see `reference.directions`.
        reads_params: Whether the rule itself reads the parameter, which `direction` takes last.
        constant_derivative: Whether its derivative with respect to gradient, states and parameter
            depends on none of them, only on hyper-parameters and step. Nothing is kept for it.
    """

    name: str
    states: tuple[str, ...]
    hypers: tuple[str, ...]
    direction: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    reads_params: bool = False
    constant_derivative: bool = False

    @property
    def all_hypers(self) -> tuple[str, ...]:
        """All hyper-parameters of an optimizer with this rule, in the order of the kernels."""
        return CHAIN_HYPERS + self.hypers


_ADAM = ("b1", "b2", "eps", "eps_root")
_MOMENTUM = ("momentum", "dampening")

RULES = {
    rule.name: rule
    for rule in (
        FusedRule("adadelta", ("mu", "nu"), ("rho", "eps"), directions.adadelta),
        FusedRule("adagrad", ("sum_of_squares",), ("eps",), directions.adagrad),
        FusedRule("adam", ("mu", "nu"), _ADAM, directions.adam),
        FusedRule("adamax", ("mu", "nu"), ("b1", "b2", "eps"), directions.adamax),
        FusedRule(
            "adan", ("mu", "delta", "nu", "previous"), ("b1", "b2", "b3", "eps"), directions.adan
        ),
        FusedRule("amsgrad", ("mu", "nu", "nu_max"), _ADAM, directions.amsgrad),
        FusedRule(
            "asgd",
            ("average",),
            ("eta", "lambd", "alpha", "t0"),
            directions.asgd,
            reads_params=True,
            constant_derivative=True,
        ),
        FusedRule("lion", ("mu",), ("b1", "b2"), directions.lion, constant_derivative=True),
        FusedRule("momentum", ("trace",), _MOMENTUM, directions.momentum, constant_derivative=True),
        FusedRule(
            "nadam", ("mu", "nu"), (*_ADAM, "momentum_decay", "mu_product"), directions.nadam
        ),
        FusedRule("nesterov", ("trace",), _MOMENTUM, directions.nesterov, constant_derivative=True),
        FusedRule("radam", ("mu", "nu"), ("b1", "b2", "eps"), directions.radam),
        FusedRule("rmsprop", ("nu",), ("alpha", "eps"), directions.rmsprop),
        FusedRule("rmsprop_centered", ("mu", "nu"), ("alpha", "eps"), directions.rmsprop_centered),
        FusedRule(
            "rmsprop_centered_momentum",
            ("mu", "nu", "trace"),
            ("alpha", "eps", *_MOMENTUM),
            directions.rmsprop_centered_momentum,
        ),
        FusedRule(
            "rmsprop_momentum",
            ("nu", "trace"),
            ("alpha", "eps", *_MOMENTUM),
            directions.rmsprop_momentum,
        ),
        FusedRule(
            "rprop",
            ("previous", "step_size"),
            ("eta_minus", "eta_plus", "min_step", "max_step"),
            directions.rprop,
        ),
        FusedRule("sgd", (), (), directions.sgd, constant_derivative=True),
    )
}


def as_number(name: str, value: Any) -> float:
    """Return the hyper-parameter `name` as the kernels take it.

    A weight decay that is the number 0 is none, which they know as -0. A tensor is one, whatever it
    holds: with 0 it adds 0 p, which is NaN for an infinite p.
    """
    number = float(value)
    if number != 0.0 or name not in CHAIN_HYPERS[1:]:
        return number
    return 0.0 if isinstance(value, torch.Tensor) else -0.0


def _is_none(decay: Any) -> bool:
    return not isinstance(decay, torch.Tensor) and decay == 0.0 and math.copysign(1.0, decay) < 0


def reference_update(
    rule: FusedRule,
    g: Tensor,
    state: Sequence[Tensor],
    p: Tensor | None,
    step: Tensor,
    hypers: Mapping[str, Any],
    *,
    maximize: bool,
) -> tuple[Tensor, ...]:
    """Return (update, *state') of one tensor in differentiable torch operations.

    Half types are computed in float32, as the kernels do.

    Args:
        rule: The rule.
        g: Gradient.
        state: One tensor for each of `rule.states`.
        p: Parameter; read only where a weight decay is not -0, or by the rule.
        step: 0-dim int64 tensor, counted from 1.
        hypers: One number or 0-dim tensor for each of `rule.all_hypers`.
        maximize: Go up instead of down.
    """
    dtype = g.dtype
    if dtype in _HALF:
        g, state = g.float(), [x.float() for x in state]
        p = None if p is None else p.float()
    if maximize:
        g = -g
    if p is not None and not _is_none(hypers["weight_decay"]):
        g = g + p * hypers["weight_decay"]
    read = (p,) if rule.reads_params else ()
    named = {name: hypers[name] for name in rule.hypers}
    u, new_state = rule.direction(g, state, step, named, *read)
    if p is not None and not _is_none(hypers["decoupled_weight_decay"]):
        u = u + p * hypers["decoupled_weight_decay"]
    return tuple(x.to(dtype) for x in (u * -hypers["lr"], *new_state))
