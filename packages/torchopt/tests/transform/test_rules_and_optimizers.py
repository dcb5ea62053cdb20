# SPDX-License-Identifier: Apache-2.0
"""An optimizer is its public rule, times minus the step size where the rule has none of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt import alias, transform
from torchopt.base import GradientTransformation
from torchopt.optimizers import stages

DOUBLE = torch.float64
LR = 0.1

# Rules whose step is multiplied by the step size, and the optimizers that are made of them.
MULTIPLIED: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "accelerated_adam": (
        lambda: transform.scale_by_accelerated_adam(),
        lambda: alias.adam(LR, use_accelerated_op=True),
    ),
    "adabelief": (lambda: transform.scale_by_belief(), lambda: alias.adabelief(LR)),
    "adadelta": (lambda: transform.scale_by_adadelta(), lambda: alias.adadelta(LR)),
    "adagrad": (lambda: transform.scale_by_rss(), lambda: alias.adagrad(LR)),
    "adam": (lambda: transform.scale_by_adam(), lambda: alias.adam(LR)),
    "adamax": (lambda: transform.scale_by_adamax(), lambda: alias.adamax(LR)),
    "adan": (lambda: transform.scale_by_adan(), lambda: alias.adan(LR)),
    "ademamix": (lambda: transform.scale_by_ademamix(), lambda: alias.ademamix(LR)),
    "adopt": (lambda: transform.scale_by_adopt(), lambda: alias.adopt(LR)),
    "amsgrad": (lambda: transform.scale_by_amsgrad(), lambda: alias.amsgrad(LR)),
    "lion": (lambda: transform.scale_by_lion(), lambda: alias.lion(LR)),
    "mars": (lambda: transform.scale_by_mars(), lambda: alias.mars(LR)),
    "nadam": (lambda: transform.scale_by_nadam(), lambda: alias.nadam(LR)),
    "psgd": (lambda: transform.scale_by_psgd(), lambda: alias.psgd(LR)),
    "radam": (lambda: transform.scale_by_radam(), lambda: alias.radam(LR)),
    "rmsprop": (lambda: transform.scale_by_rms(0.99), lambda: alias.rmsprop(LR)),
    "rmsprop_centered": (
        lambda: transform.scale_by_stddev(0.99),
        lambda: alias.rmsprop(LR, centered=True),
    ),
    "sgd": (
        lambda: transform.trace(0.9, 0.5, False),
        lambda: alias.sgd(LR, momentum=0.9, dampening=0.5),
    ),
    "shampoo": (lambda: transform.scale_by_shampoo(), lambda: alias.shampoo(LR)),
    "soap": (lambda: transform.scale_by_soap(), lambda: alias.soap(LR)),
    "sophia": (lambda: transform.scale_by_sophia(), lambda: alias.sophia(LR, weight_decay=0.0)),
    "yogi": (lambda: transform.scale_by_yogi(), lambda: alias.yogi(LR)),
}

# Rules that know the step size: their step is the update, or the way against it.
WHOLE: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "asgd": (lambda: transform.scale_by_asgd(LR), lambda: alias.asgd(LR)),
    "adafactor": (lambda: transform.scale_by_factored_rms(LR), lambda: alias.adafactor(LR)),
    "prodigy": (lambda: transform.scale_by_prodigy(LR, d0=0.1), lambda: alias.prodigy(LR, d0=0.1)),
    "rprop": (lambda: transform.scale_by_rprop(LR), lambda: alias.rprop(LR)),
    "schedule_free": (lambda: transform.schedule_free(LR), lambda: alias.schedule_free_sgd(LR)),
}


def params() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(4, 3, generator=generator, dtype=DOUBLE),
        "b": torch.randn(3, generator=generator, dtype=DOUBLE),
    }


def stepped(transformation: GradientTransformation) -> dict[str, Tensor]:
    p = params()
    state = transformation.init(p)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        g = {k: torch.randn(v.shape, generator=generator, dtype=DOUBLE) for k, v in p.items()}
        updates, state = transformation.update(g, state, params=p, inplace=False)
        p = torchopt.apply_updates(p, updates, inplace=False)
    return p


@pytest.mark.parametrize("name", MULTIPLIED)
def test_a_rule_times_minus_the_step_size_is_the_optimizer(name: str) -> None:
    rule, optimizer = MULTIPLIED[name]
    want = stepped(optimizer())
    assert not torch.equal(want["w"], params()["w"])
    torch.testing.assert_close(stepped(torchopt.chain(rule(), transform.scale(-LR))), want)
    torch.testing.assert_close(stepped(torchopt.chain(rule(), stages.scale_by_neg_lr(LR))), want)


@pytest.mark.parametrize("name", WHOLE)
def test_a_rule_with_its_own_step_size_is_the_optimizer(name: str) -> None:
    rule, optimizer = WHOLE[name]
    want = stepped(optimizer())
    assert not torch.equal(want["w"], params()["w"])
    sign = transform.scale(1.0 if name in ("schedule_free", "prodigy") else -1.0)
    torch.testing.assert_close(stepped(torchopt.chain(rule(), sign)), want)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_stages_of_an_optimizer_are_what_optimizer_makes(maximize: bool) -> None:
    """u = g + weight_decay p, by Adam, then -lr (u + decoupled_weight_decay p)."""
    whole = stages.optimizer(
        transform.scale_by_adam.rule(),
        lr=LR,
        weight_decay=0.3,
        decoupled_weight_decay=0.2,
        maximize=maximize,
    )
    by_hand = torchopt.chain(
        stages.flip_sign_and_add_weight_decay(0.3, maximize),
        transform.scale_by_adam(),
        transform.add_decayed_weights(0.2),
        transform.scale(-LR),
    )
    torch.testing.assert_close(stepped(whole), stepped(by_hand), rtol=1e-12, atol=1e-12)
    sign = -1.0 if maximize else 1.0
    g, p = {"w": torch.ones(2, dtype=DOUBLE)}, {"w": torch.full((2,), 5.0, dtype=DOUBLE)}
    first = stages.flip_sign_and_add_weight_decay(0.3, maximize)
    got, _ = first.update(g, first.init(p), params=p, inplace=False)
    torch.testing.assert_close(got["w"], torch.full((2,), sign + 1.5, dtype=DOUBLE))
