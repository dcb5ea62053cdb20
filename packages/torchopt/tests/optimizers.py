# SPDX-License-Identifier: Apache-2.0
"""One row for each optimizer: its three constructors, its twin in torch.optim, and a grid of
settings.

A new optimizer is a new row; every test that runs over `ROWS` or `CASES` then holds for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

import torchopt


@dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        name: The functional constructor's name.
        functional: `(**settings) -> GradientTransformation`.
        classic: `(params, **settings) -> Optimizer`.
        meta: `(module, **settings) -> MetaOptimizer`.
        twin: `(params, **settings) -> torch.optim.Optimizer`.
        settings: Grid of settings that both sides understand.
    """

    name: str
    functional: Callable[..., Any]
    classic: Callable[..., Any]
    meta: Callable[..., Any]
    twin: Callable[..., Any]
    settings: tuple[dict[str, Any], ...]


def grid(**axes: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """Return all combinations of the axes' values."""
    return tuple(dict(zip(axes, values)) for values in product(*axes.values()))


def sgd_grid() -> tuple[dict[str, Any], ...]:
    """Return the settings of SGD that torch accepts."""
    settings = grid(
        lr=(0.1,),
        momentum=(0.0, 0.9),
        dampening=(0.0, 0.5),
        weight_decay=(0.0, 0.1),
        nesterov=(False, True),
        maximize=(False, True),
    )
    return tuple(
        s for s in settings if not s["nesterov"] or (s["momentum"] > 0 and s["dampening"] == 0)
    )


ADAM_GRID = grid(
    lr=(0.05,),
    betas=((0.9, 0.999), (0.5, 0.8)),
    eps=(1e-8, 1e-2),
    weight_decay=(0.0, 0.1),
)

ROWS = {
    row.name: row
    for row in (
        Row(
            "sgd",
            torchopt.sgd,
            torchopt.SGD,
            torchopt.MetaSGD,
            torch.optim.SGD,
            sgd_grid(),
        ),
        Row(
            "adam",
            torchopt.adam,
            torchopt.Adam,
            torchopt.MetaAdam,
            torch.optim.Adam,
            (*ADAM_GRID, {"lr": 0.05, "maximize": True, "weight_decay": 0.1}),
        ),
        Row(
            "adamw",
            torchopt.adamw,
            torchopt.AdamW,
            torchopt.MetaAdamW,
            torch.optim.AdamW,
            (*ADAM_GRID, {"lr": 0.05, "maximize": True, "weight_decay": 0.1}),
        ),
        Row(
            "rmsprop",
            torchopt.rmsprop,
            torchopt.RMSProp,
            torchopt.MetaRMSProp,
            torch.optim.RMSprop,
            grid(
                lr=(0.05,),
                alpha=(0.99, 0.8),
                eps=(1e-8, 1e-2),
                weight_decay=(0.0, 0.1),
                momentum=(0.0, 0.9),
                centered=(False, True),
            ),
        ),
        Row(
            "adagrad",
            torchopt.adagrad,
            torchopt.AdaGrad,
            torchopt.MetaAdaGrad,
            torch.optim.Adagrad,
            grid(
                lr=(0.05,),
                lr_decay=(0.0, 0.1),
                weight_decay=(0.0, 0.1),
                initial_accumulator_value=(0.0, 0.5),
                eps=(1e-10, 1e-2),
            ),
        ),
        Row(
            "adadelta",
            torchopt.adadelta,
            torchopt.AdaDelta,
            torchopt.MetaAdaDelta,
            torch.optim.Adadelta,
            grid(lr=(1.0,), rho=(0.9, 0.5), eps=(1e-6, 1e-2), weight_decay=(0.0, 0.1)),
        ),
        Row(
            "adamax",
            torchopt.adamax,
            torchopt.AdaMax,
            torchopt.MetaAdaMax,
            torch.optim.Adamax,
            ADAM_GRID,
        ),
        Row(
            "radam",
            torchopt.radam,
            torchopt.RAdam,
            torchopt.MetaRAdam,
            torch.optim.RAdam,
            ADAM_GRID,
        ),
    )
}

CASES = [(row, settings) for row in ROWS.values() for settings in row.settings]
CASE_IDS = [
    f"{row.name}-{'-'.join(f'{k}={v}' for k, v in settings.items())}" for row, settings in CASES
]
