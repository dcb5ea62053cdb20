# SPDX-License-Identifier: Apache-2.0
"""One row of hyper-parameters and inputs for each fused rule, shared by all tests of the grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from optimizers import CASES
from torch import Tensor

from torchopt.kernels import native
from torchopt.kernels.fused_rule import CHAIN_HYPERS, FusedRule, decays
from torchopt.kernels.fused_step import StepCache


def _rules() -> dict[str, FusedRule]:
    """Return the fused rules of the optimizers in the table, by name."""
    found = {}
    for row, settings in CASES:
        made = row.functional(**settings)
        part = getattr(getattr(made.update, "__self__", None), "part", None)
        if part is not None:
            found[part.plan.fused.name] = part.plan.fused
    return found


RULES = _rules()


def fused_update(
    name: str,
    grads: Sequence[Tensor],
    states: Sequence[list[Tensor]],
    params: Sequence[Tensor] | None,
    step: Any,
    hypers: dict[str, Any],
    **options: Any,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the updates and the new state by the rule `name`, or raise why there is no kernel.

    A list of steps, one for each gradient, takes as many calls.
    """
    if isinstance(step, list):
        rows = [
            fused_update(
                name,
                [g],
                [[role[i]] for role in states],
                params and [params[i]],
                k,
                hypers,
                **options,
            )
            for i, (g, k) in enumerate(zip(grads, step))
        ]
        new = [[states[0] for states in column] for column in zip(*(new for _, new in rows))]
        return [u for (u,), _ in rows], new
    rule = RULES[name]
    reads = rule.reads_params or decays(*(hypers[key] for key in CHAIN_HYPERS[1:]))
    found = native.attempt(rule, grads, states, params if reads else None, step, hypers, **options)
    if isinstance(found, Exception):
        raise found
    return found


def fused_update_(name: str, *args: Any, **options: Any) -> list[Tensor]:
    """Return the updates and write the new state into the old one."""
    return fused_update(name, *args, inplace=True, **options)[0]


def fused_step_(
    cache: StepCache,
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Any],
    states: Sequence[list[Tensor]],
    *rest: Any,
) -> bool:
    """Step in place with the rule `name` and return whether it was done."""
    found = native.attempt(RULES[name], grads, states, params, *rest, into=cache)
    return not isinstance(found, Exception)


def reference_update(
    rule: FusedRule,
    g: Tensor,
    state: Sequence[Tensor],
    p: Tensor | None,
    step: Tensor,
    hypers: dict[str, Any],
    *,
    maximize: bool,
) -> tuple[Tensor, ...]:
    """Return (update, *state') of one tensor from the reference implementation."""
    params = [] if p is None else [p]
    columns = rule.statement([g], [[x] for x in state], params, [step], hypers, maximize)
    return tuple(column[0] for column in columns)


CHAIN = {"lr": 0.1, "weight_decay": 0.0, "decoupled_weight_decay": 0.0}
DECAYED = {"lr": 0.1, "weight_decay": 0.05, "decoupled_weight_decay": 0.02}

_VALUES: dict[str, float] = {
    "b1": 0.9,
    "b2": 0.99,
    "b3": 0.95,
    "eps": 1e-3,
    "eps_root": 1e-4,
    "rho": 0.9,
    "alpha": 0.95,
    "momentum": 0.9,
    "dampening": 0.3,
    "momentum_decay": 0.004,
    "mu_product": 0.4,
    "eta": 0.3,
    "lambd": 0.1,
    "t0": -1.5,
    "eta_minus": 0.5,
    "eta_plus": 1.2,
    "min_step": 0.2,
    "max_step": 2.0,
    "warmup_steps": 7.0,
}

HYPERS = {name: {key: _VALUES[key] for key in rule.hypers} for name, rule in RULES.items()}
HYPERS["nesterov"]["dampening"] = 0.0

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (3, 5), (257,), (16385,), (2, 20000))

POSITIVE = ("nu", "nu_max", "sum_of_squares", "step_size")


def make_inputs(
    name: str,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    *,
    zeros: bool = True,
) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """Return gradients, states and parameters; with `zeros`, some elements of each are zero."""
    generator = torch.Generator().manual_seed(11)

    def role(kind: str) -> list[Tensor]:
        out = []
        for shape in shapes:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            if kind in POSITIVE or (kind == "mu" and name == "adadelta"):
                # Above the square of the first moment, so that the variance is positive.
                x = x.square() + (1.5 if "centered" in name else 0.1)
            elif kind == "mu" and "centered" in name:
                x = x.clamp(-1, 1)
            if zeros and kind != "p":
                x.view(-1)[:: 5 if kind == "g" else 10] = 0.0
            out.append(x.to(dtype))
        return out

    return role("g"), [role(kind) for kind in RULES[name].states], role("p")


def all_hypers(name: str, chain: dict[str, float], **changes: Any) -> dict[str, Any]:
    """Return all hyper-parameters of an optimizer with the rule `name`."""
    return {**chain, **HYPERS[name], **changes}
