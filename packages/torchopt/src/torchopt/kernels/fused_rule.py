# SPDX-License-Identifier: Apache-2.0
"""The description of a kernel: its names, and its reference implementation in torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torchopt import _C
from torchopt.kernels.missing import why_missing

__all__ = ["CHAIN_HYPERS", "FusedRule", "as_number", "decays", "has_kernel", "is_none"]

CHAIN_HYPERS = ("lr", "weight_decay", "decoupled_weight_decay")
"""The hyper-parameters of the shared stages, which come before those of the rule."""


@dataclass(frozen=True)
class FusedRule:
    """An update rule with kernels. The stages around it are the same for all optimizers.

    Attributes:
        name: Its name in `csrc/math/rules.h`.
        states: The names of its states, in the order of the kernels.
        hypers: The names of its hyper-parameters, in the order of the kernels.
        statement: The reference implementation on lists of tensors; see `plan.statement`.
        reads_params: Whether the rule itself reads the parameter.
        constant_derivative: Whether its derivative with respect to gradient, states and parameter
            depends only on the hyper-parameters and the step. Then no tensors are saved for it.
    """

    name: str
    states: tuple[str, ...]
    hypers: tuple[str, ...]
    statement: Callable[..., list[list[Any]]]
    reads_params: bool = False
    constant_derivative: bool = False

    @property
    def all_hypers(self) -> tuple[str, ...]:
        """The names of all hyper-parameters of an optimizer with this rule, in kernel order."""
        return CHAIN_HYPERS + self.hypers


def has_kernel(rule: FusedRule) -> bool:
    """Return whether the extension has a kernel of this name with as many states and hypers.

    If the extension is missing, every kernel counts as present.
    """
    if why_missing(_C) is not None:
        return True
    return _C.RULES.get(rule.name) == (len(rule.states), len(rule.all_hypers))


def as_number(name: str, value: Any) -> float:
    """Return the hyper-parameter `name` in the form that the kernels expect.

    The number 0 means that there is no weight decay, which the kernels encode as -0. A tensor
    always means weight decay, even if it holds 0: then it adds 0 p, which is NaN for an infinite p.
    """
    number = float(value)
    if number != 0.0 or name not in CHAIN_HYPERS[1:]:
        return number
    return 0.0 if isinstance(value, torch.Tensor) else -0.0


def is_none(decay: Any) -> bool:
    """Return whether an encoded weight decay means that there is none; see `as_number`."""
    return not isinstance(decay, torch.Tensor) and decay == 0.0 and math.copysign(1.0, decay) < 0


def decays(*coefficients: Any) -> bool:
    """Return whether there is weight decay. A tensor counts as weight decay, whatever its value."""
    return any(isinstance(value, torch.Tensor) or value != 0.0 for value in coefficients)
