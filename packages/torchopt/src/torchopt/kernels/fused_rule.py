# SPDX-License-Identifier: Apache-2.0
"""What a kernel computes: its names, and its reference implementation in torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchopt import _C
from torchopt.kernels.missing import why_missing

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["CHAIN_HYPERS", "FusedRule", "as_number", "decays", "has_kernel", "is_none"]

CHAIN_HYPERS = ("lr", "weight_decay", "decoupled_weight_decay")
"""The hyper-parameters of the shared stages; those of the rule follow."""


@dataclass(frozen=True)
class FusedRule:
    """A rule that has kernels, between the stages that all optimizers share.

    Attributes:
        name: Its name in `csrc/math/rules.h`.
        states: What it remembers, in the order of the kernels.
        hypers: Its hyper-parameters, in the order of the kernels.
        statement: The same for lists of tensors in plain torch; see `plan.statement`.
        reads_params: Whether the rule itself reads the parameter.
        constant_derivative: Whether its derivative with respect to gradient, states and parameter
            depends on none of them, only on hyper-parameters and step. Nothing is kept for it.
    """

    name: str
    states: tuple[str, ...]
    hypers: tuple[str, ...]
    statement: Callable[..., list[list[Any]]]
    reads_params: bool = False
    constant_derivative: bool = False

    @property
    def all_hypers(self) -> tuple[str, ...]:
        """All hyper-parameters of an optimizer with this rule, in the order of the kernels."""
        return CHAIN_HYPERS + self.hypers


def has_kernel(rule: FusedRule) -> bool:
    """Return whether the extension has a kernel with this name, these states and hyper-parameters.

    Without the extension, every kernel counts as present.
    """
    if why_missing(_C) is not None:
        return True
    return _C.RULES.get(rule.name) == (len(rule.states), len(rule.all_hypers))


def as_number(name: str, value: Any) -> float:
    """Return the hyper-parameter `name` as the kernels take it.

    A weight decay that is the number 0 is none, which they know as -0. A tensor is one, whatever it
    holds: with 0 it adds 0 p, which is NaN for an infinite p.
    """
    number = float(value)
    if number != 0.0 or name not in CHAIN_HYPERS[1:]:
        return number
    return 0.0 if isinstance(value, torch.Tensor) else -0.0


def is_none(decay: Any) -> bool:
    """Return whether a weight decay that the kernels know stands for none."""
    return not isinstance(decay, torch.Tensor) and decay == 0.0 and math.copysign(1.0, decay) < 0


def decays(*coefficients: Any) -> bool:
    """Return whether there is weight decay. A tensor counts as one, whatever its value."""
    return any(isinstance(value, torch.Tensor) or value != 0.0 for value in coefficients)
