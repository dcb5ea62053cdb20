# SPDX-License-Identifier: Apache-2.0
"""Make an optimizer from rules: sign and weight decay first, the step size last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation, identity, members_of
from torchopt.combine import chain
from torchopt.optimizers.native import Backend, FusedChain
from torchopt.transform.add_decayed_weights import add_decayed_weights
from torchopt.transform.base import LeafRule, as_transformation, transformation
from torchopt.transform.linear import FlipSignAndAddWeightDecay, Scale
from torchopt.transform.scale_by_schedule import ScaleBySchedule
from torchopt.transform.validate import check
from torchopt.typing import ScalarOrSchedule

__all__ = ["flip_sign_and_add_weight_decay", "optimizer", "scale_by_neg_lr"]

DEFAULT_BACKEND: Backend = "auto"
"""How the optimizers made without `use_accelerated_op` compute their steps; see `with_backend`."""

_chain_flat = True
_IDENTITY = identity()


def _set_use_chain_flat(use_chain_flat: bool) -> None:
    """Choose whether the optimizers made from now on work on lists of leaves or on trees."""
    global _chain_flat
    _chain_flat = use_chain_flat


def _get_use_chain_flat() -> bool:
    """Return whether the optimizers made now work on lists of leaves."""
    return _chain_flat


def optimizer(
    *directions: LeafRule | GradientTransformation | None,
    lr: ScalarOrSchedule,
    weight_decay: float | Tensor = 0.0,
    decoupled_weight_decay: float | Tensor = 0.0,
    mask: Any = None,
    maximize: bool = False,
    backend: Backend | None = None,
    name: str = "chain",
) -> GradientTransformation:
    """Return the optimizer p' = p - lr (u + decoupled_weight_decay p).

    Here u is the result of `directions` for g + weight_decay p, or for -g + weight_decay p if
    `maximize`. If there is a kernel for this chain of rules, one native call steps all tensors.

    Args:
        directions: Rules, applied one after the other; None is skipped.
        lr: Step size, or a schedule.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2, >= 0.
        decoupled_weight_decay: Coefficient of the decay after the rules, >= 0.
        mask: Which parameters decay after the rules; see `add_decayed_weights`.
        maximize: Maximise the objective instead of minimising it.
        backend: See `with_backend`.
        name: The name in its `repr`.

    Raises:
        ValueError: A hyper-parameter is out of range.

    Example:
        >>> from torchopt.optimizers.adam import Adam
        >>> optimizer(Adam(0.9, 0.999, 1e-8), lr=0.1, name="my_adam")
        my_adam(lr=0.1, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0)
    """
    return compose(
        flip_sign_and_add_weight_decay.rule(weight_decay, maximize),
        *directions,
        add_decayed_weights.rule(decoupled_weight_decay, mask),
        scale_by_neg_lr.rule(lr),
        backend=backend,
        name=name,
    )


def compose(
    *stages: LeafRule | GradientTransformation | None,
    backend: Backend | None = None,
    name: str = "chain",
) -> GradientTransformation:
    """Chain stages, for lists or for trees according to `_set_use_chain_flat`."""
    flat = _get_use_chain_flat()
    members = [_member(stage, flat) for stage in stages]
    if not flat:
        return chain(*members)
    kept = members_of(tuple(members))
    return FusedChain(kept, backend or DEFAULT_BACKEND, rounds_once=True, name=name).pair()


def _member(stage: LeafRule | GradientTransformation | None, flat: bool) -> GradientTransformation:
    if stage is None:
        return _IDENTITY
    if isinstance(stage, LeafRule):
        return as_transformation(stage, already_flattened=flat)
    return stage


@transformation
def flip_sign_and_add_weight_decay(
    weight_decay: float | Tensor = 0.0, maximize: bool = False
) -> LeafRule | None:
    """Return the first stage of optimizers: u = g + weight_decay * p, or with -g if `maximize`.

    Args:
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2, >= 0.
        maximize: Maximise the objective instead of minimising it.

    Raises:
        ValueError: A negative `weight_decay`.
    """
    check(weight_decay, "a number >= 0", "weight_decay value")
    if not isinstance(weight_decay, torch.Tensor) and weight_decay == 0.0:
        return Scale(-1.0) if maximize else None
    return FlipSignAndAddWeightDecay(weight_decay, maximize)


@transformation
def scale_by_neg_lr(lr: ScalarOrSchedule) -> LeafRule:
    """Return the last stage of the optimizers: u = -lr * g.

    Args:
        lr: A number >= 0, a 0-dim tensor, or a schedule; see `scale_by_schedule`. A tensor is read
            in each step, so that a change of its value takes effect in the next step.

    Raises:
        ValueError: A negative number.
    """
    if callable(lr) and not isinstance(lr, torch.Tensor):
        return ScaleBySchedule(lr, -1.0)
    check(lr, "a number >= 0", "learning rate")
    return Scale(lr, -1)


for _published in (flip_sign_and_add_weight_decay, scale_by_neg_lr):
    setattr(_published, "__module__", "torchopt.alias.utils")  # noqa: B010 - a Protocol has none
