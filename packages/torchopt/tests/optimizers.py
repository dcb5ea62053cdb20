# SPDX-License-Identifier: Apache-2.0
"""One row for each optimizer: its three constructors, its twin in torch.optim, and a grid of
settings.

A new optimizer is a new row; every test that runs over `ROWS` or `CASES` then holds for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import references
import torch

import torchopt
from torchopt import alias
from torchopt.index import OPTIMIZERS


@dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        name: The functional constructor's name.
        functional: `(**settings) -> GradientTransformation`.
        classic: `(params, **settings) -> Optimizer`.
        meta: `(module, **settings) -> MetaOptimizer`.
        twin: `(params, **settings) -> torch.optim.Optimizer`.
        settings: Grid of settings that both optimizers accept.
        joint: Whether the step of a tensor depends on the other tensors.
    """

    name: str
    functional: Callable[..., Any]
    classic: Callable[..., Any]
    meta: Callable[..., Any]
    twin: Callable[..., Any]
    settings: tuple[dict[str, Any], ...]
    joint: bool = False


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


def new_row(
    name: str,
    twin: Callable[..., Any],
    settings: tuple[dict[str, Any], ...],
    *,
    joint: bool = False,
) -> Row:
    """Return the row of an optimizer that the published package does not have."""
    return Row(
        name,
        getattr(alias, name),
        getattr(torchopt, OPTIMIZERS[name]),
        getattr(torchopt, f"Meta{OPTIMIZERS[name]}"),
        twin,
        settings,
        joint,
    )


def like_adam(lr: float, eps: tuple[float, ...], betas: Any = (0.9, 0.99)) -> tuple[Any, ...]:
    """Return settings of an optimizer with Adam's hyper-parameters."""
    plain = grid(lr=(lr,), betas=(betas,), eps=eps, weight_decay=(0.0, 0.1))
    return (*plain, {**plain[-1], "maximize": True})


def of_torch(make: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """Return an optimizer of torch with fixed settings."""
    return lambda params, **settings: make(params, **settings, **fixed)


class InDouble:
    """An optimizer of torch that keeps its scalars (products, step sizes) in float64."""

    def __init__(self, make: Callable[..., Any], params: Any, **settings: Any) -> None:
        self.optimizer = make(params, **settings)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            self.optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)


def in_double(make: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """Return an optimizer of torch with float64 scalars and fixed settings."""
    return lambda params, **settings: InDouble(make, params, **settings, **fixed)


MORE = (
    new_row("amsgrad", of_torch(torch.optim.Adam, amsgrad=True), ADAM_GRID),
    new_row("amsgradw", of_torch(torch.optim.AdamW, amsgrad=True), ADAM_GRID),
    new_row(
        "nadam",
        in_double(torch.optim.NAdam),
        (*ADAM_GRID, {"lr": 0.05, "momentum_decay": 0.1, "maximize": True, "weight_decay": 0.1}),
    ),
    new_row("nadamw", in_double(torch.optim.NAdam, decoupled_weight_decay=True), ADAM_GRID),
    new_row(
        "asgd",
        in_double(torch.optim.ASGD),
        (
            *grid(
                lr=(0.1,), lambd=(1e-4, 0.1), alpha=(0.75,), t0=(1e6, 3), weight_decay=(0.0, 0.1)
            ),
            {"lr": 0.1, "maximize": True},
        ),
    ),
    new_row(
        "rprop",
        torch.optim.Rprop,
        (
            *grid(
                lr=(0.05,), etas=((0.5, 1.2), (0.3, 2.0)), step_sizes=((1e-6, 50.0), (0.01, 0.1))
            ),
            {"lr": 0.05, "maximize": True},
        ),
    ),
    new_row(
        "lion",
        references.twin(references.lion),
        (
            *grid(lr=(0.02,), betas=((0.9, 0.99), (0.5, 0.8)), weight_decay=(0.0, 0.1)),
            {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1, "maximize": True},
        ),
    ),
    new_row("yogi", references.twin(references.yogi), like_adam(0.05, (1e-3, 1e-2))),
    new_row("adabelief", references.twin(references.adabelief), like_adam(0.05, (1e-8, 1e-2))),
    new_row(
        "adan",
        references.twin(references.adan),
        like_adam(0.05, (1e-8, 1e-2), (0.98, 0.92, 0.99)),
    ),
    new_row("adopt", references.twin(references.adopt), like_adam(0.05, (1e-6, 1e-2))),
    new_row("lamb", references.twin(references.lamb), like_adam(0.05, (1e-6, 1e-2))),
    new_row(
        "lars",
        references.twin(references.lars),
        grid(lr=(1.0,), momentum=(0.0, 0.9), weight_decay=(0.0, 0.1), trust_coefficient=(0.02,)),
    ),
    new_row(
        "shampoo",
        references.twin(references.shampoo),
        (
            *grid(
                lr=(0.1,),
                momentum=(0.0, 0.9),
                weight_decay=(0.0, 0.1),
                eps=(0.1,),
                update_every=(1, 3),
            ),
            {
                "lr": 0.1,
                "momentum": 0.9,
                "weight_decay": 0.1,
                "eps": 0.01,
                "update_every": 1,
                "maximize": True,
            },
        ),
    ),
    new_row(
        "sophia",
        references.twin(references.sophia),
        grid(
            lr=(0.02,),
            betas=((0.9, 0.99), (0.5, 0.8)),
            rho=(0.04, 100.0),
            weight_decay=(0.0, 0.1),
            batch_size=(4.0,),
            update_every=(1, 4),
        ),
    ),
    new_row(
        "adafactor",
        # torch divides by the size of a parameter, zero or not.
        lambda params, **settings: InDouble(
            torch.optim.Adafactor, [p for p in params if p.numel()], foreach=False, **settings
        ),
        (
            *grid(
                lr=(0.1,),
                beta2_decay=(-0.8, -0.5),
                eps=((None, 1e-3), (1e-5, 0.1)),
                d=(1.0, 2.0),
                weight_decay=(0.0, 0.1),
            ),
            {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        ),
    ),
    new_row(
        "muon",
        references.twin(references.muon),
        (
            *grid(
                lr=(0.05,),
                momentum=(0.9,),
                weight_decay=(0.0, 0.1),
                nesterov=(True, False),
                match_rms=(False, True),
                ns_steps=(5,),
            ),
            {
                "lr": 0.05,
                "momentum": 0.9,
                "weight_decay": 0.1,
                "nesterov": True,
                "match_rms": False,
                "ns_steps": 3,
                "maximize": True,
            },
        ),
    ),
    new_row(
        "signum",
        references.twin(references.signum),
        (
            *grid(lr=(0.02,), momentum=(0.9, 0.0), weight_decay=(0.0, 0.1)),
            {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1, "maximize": True},
        ),
    ),
    new_row(
        "ademamix",
        references.twin(references.ademamix),
        (
            *grid(
                lr=(0.05,),
                betas=((0.9, 0.99, 0.999), (0.5, 0.8, 0.9)),
                alpha=(5.0,),
                eps=(1e-8, 1e-2),
                weight_decay=(0.0, 0.1),
                warmup_steps=(0, 6),
            ),
            {
                "lr": 0.05,
                "betas": (0.9, 0.99, 0.999),
                "alpha": 2.0,
                "eps": 1e-2,
                "weight_decay": 0.1,
                "warmup_steps": 4,
                "maximize": True,
            },
        ),
    ),
    new_row(
        "mars",
        references.twin(references.mars),
        (
            *grid(
                lr=(0.05,),
                betas=((0.95, 0.99), (0.5, 0.8)),
                gamma=(0.025, 0.5),
                eps=(1e-8, 1e-2),
                weight_decay=(0.0, 0.1),
            ),
            {
                "lr": 0.05,
                "betas": (0.9, 0.99),
                "gamma": 0.1,
                "eps": 1e-2,
                "weight_decay": 0.1,
                "maximize": True,
            },
        ),
    ),
    new_row(
        "prodigy",
        references.Prodigy,
        (
            *grid(
                lr=(1.0,),
                betas=((0.9, 0.99),),
                eps=(1e-8, 1e-2),
                weight_decay=(0.0, 0.1),
                d0=(0.01, 0.05),
                growth_rate=(None, 1.5),
            ),
            {
                "lr": 0.5,
                "betas": (0.9, 0.99),
                "eps": 1e-2,
                "d0": 0.01,
                "weight_decay": 0.1,
                "maximize": True,
            },
        ),
        joint=True,
    ),
    new_row(
        "psgd",
        references.twin(references.psgd),
        (
            *grid(
                lr=(0.05,),
                momentum=(0.9, 0.0),
                weight_decay=(0.0, 0.1),
                precondition_lr=(0.1, 0.5),
                initial_scale=(1.0, 0.3),
                seed=(0, 7),
            ),
            {
                "lr": 0.05,
                "momentum": 0.5,
                "weight_decay": 0.1,
                "precondition_lr": 0.2,
                "initial_scale": 2.0,
                "seed": 1,
                "max_size": 3,
                "maximize": True,
            },
        ),
    ),
    new_row(
        "soap",
        references.twin(references.soap),
        (
            *grid(
                lr=(0.05,),
                betas=((0.95, 0.95), (0.5, 0.8)),
                eps=(1e-2, 0.1),
                weight_decay=(0.0, 0.1),
                shampoo_beta=(0.9,),
                update_every=(1, 3),
            ),
            {
                "lr": 0.05,
                "betas": (0.9, 0.99),
                "eps": 1e-2,
                "shampoo_beta": 0.5,
                "weight_decay": 0.1,
                "update_every": 2,
                "maximize": True,
            },
        ),
    ),
    new_row(
        "schedule_free_radam",
        references.twin(references.schedule_free_radam),
        (
            *grid(
                lr=(0.05,),
                betas=((0.9, 0.99), (0.5, 0.9)),
                eps=(1e-8, 1e-2),
                weight_decay=(0.0, 0.1),
                sgd_phase=(True, False),
            ),
            {
                "lr": 0.05,
                "betas": (0.9, 0.99),
                "eps": 1e-2,
                "weight_decay": 0.1,
                "maximize": True,
                "sgd_phase": True,
            },
        ),
    ),
    new_row(
        "schedule_free_sgd",
        references.twin(references.schedule_free_sgd),
        grid(lr=(0.2,), beta=(0.9, 0.5), weight_decay=(0.0, 0.1), warmup_steps=(0, 4)),
    ),
    new_row(
        "schedule_free_adamw",
        references.twin(references.schedule_free_adamw),
        grid(
            lr=(0.05,),
            betas=((0.9, 0.99),),
            eps=(1e-8, 1e-2),
            weight_decay=(0.0, 0.1),
            warmup_steps=(0, 4),
        ),
    ),
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
        *MORE,
    )
}

CASES = [(row, settings) for row in ROWS.values() for settings in row.settings]
CASE_IDS = [
    f"{row.name}-{'-'.join(f'{k}={v}' for k, v in settings.items())}" for row, settings in CASES
]

SMOOTH: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"lr": 0.1}),
    "sgd-momentum": ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "sgd-nesterov": ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": ("adam", {"eps": 1e-2, "weight_decay": 0.1}),
    "adam-eps_root": ("adam", {"eps": 1e-8, "eps_root": 1e-3}),
    "adam-fused": ("adam", {"eps": 1e-2, "use_accelerated_op": True}),
    "adam-fused-eps_root": ("adam", {"eps": 0.1, "eps_root": 1e-3, "use_accelerated_op": True}),
    "adamw": ("adamw", {"eps": 1e-2, "weight_decay": 0.1}),
    "rmsprop": ("rmsprop", {"eps": 1e-2}),
    "rmsprop-centered": ("rmsprop", {"eps": 1e-2, "centered": True, "momentum": 0.9}),
    "adagrad": ("adagrad", {"lr_decay": 0.1, "eps": 1e-2}),
    "adadelta": ("adadelta", {"lr": 1.0, "eps": 1e-2}),
    "adamax": ("adamax", {"eps": 1e-2}),
    "radam": ("radam", {"betas": (0.9, 0.99), "eps": 1e-2}),
    "amsgrad": ("amsgrad", {"eps": 1e-2, "weight_decay": 0.1}),
    "amsgradw": ("amsgradw", {"eps": 1e-2}),
    "nadam": ("nadam", {"eps": 1e-2, "momentum_decay": 0.1}),
    "nadamw": ("nadamw", {"eps": 1e-2, "weight_decay": 0.1}),
    "asgd": ("asgd", {"lr": 0.1, "lambd": 0.1, "t0": 1}),
    "rprop": ("rprop", {"lr": 0.1}),
    "lion": ("lion", {"lr": 0.1, "weight_decay": 0.1}),
    "yogi": ("yogi", {"eps": 1e-2}),
    "adabelief": ("adabelief", {"eps": 1e-2, "weight_decay": 0.1}),
    "adan": ("adan", {"eps": 1e-2, "weight_decay": 0.1}),
    "adopt": ("adopt", {"lr": 0.1, "betas": (0.9, 0.99)}),
    "lamb": ("lamb", {"eps": 1e-2, "weight_decay": 0.1}),
    "lars": ("lars", {"trust_coefficient": 0.1, "weight_decay": 0.1}),
    "adafactor": ("adafactor", {"lr": 0.5, "eps": (1e-3, 1e-3), "weight_decay": 0.1}),
    "muon": ("muon", {"lr": 0.1, "momentum": 0.9, "adamw_eps": 1e-2}),
    "shampoo": (
        "shampoo",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "eps": 0.1, "decay": 0.9},
    ),
    "sophia": ("sophia", {"lr": 0.1, "rho": 1.0, "batch_size": 4.0, "update_every": 2}),
    "signum": ("signum", {"lr": 0.1, "weight_decay": 0.1}),
    "ademamix": ("ademamix", {"eps": 1e-2, "weight_decay": 0.1}),
    "ademamix-warmup": ("ademamix", {"eps": 1e-2, "warmup_steps": 5}),
    "mars": ("mars", {"eps": 1e-2, "weight_decay": 0.1}),
    "prodigy": ("prodigy", {"betas": (0.9, 0.9), "eps": 0.1, "weight_decay": 0.1, "d0": 0.5}),
    "prodigy-bounded": (
        "prodigy",
        {"betas": (0.9, 0.9), "eps": 0.1, "d0": 0.05, "growth_rate": 1.01},
    ),
    "soap": ("soap", {"eps": 1e-2, "weight_decay": 0.1, "update_every": 1}),
    "psgd": ("psgd", {"weight_decay": 0.1, "precondition_lr": 0.3}),
    "psgd-diagonal": ("psgd", {"precondition_lr": 0.3, "max_size": 2}),
    "schedule_free_radam": (
        "schedule_free_radam",
        {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-2, "weight_decay": 0.1, "sgd_phase": True},
    ),
    "schedule_free_sgd": ("schedule_free_sgd", {"lr": 0.1, "weight_decay": 0.1}),
    "schedule_free_adamw": ("schedule_free_adamw", {"lr": 0.1, "eps": 1e-2}),
}
"""One setting for each branch of a rule, away from kinks: name -> (optimizer, settings)."""

# Settings whose default is at a kink, or has no effect.
_VALUES = {
    "d": 0.8, "eps": 1e-2, "eps_root": 1e-3, "momentum": 0.5, "weight_decay": 0.1,
    "initial_scale": 0.3, "initial_accumulator_value": 0.3, "initial_accumulator": 0.3,
    "lr_decay": 0.1,
}  # fmt: skip


def hypers_of(case: str) -> dict[tuple[str, int | None], float]:
    """Return the numbers among the settings of `SMOOTH[case]`: (name, index in a tuple) -> value.

    All hyper-parameters of the optimizer that are floats are among them.
    """
    name, settings = SMOOTH[case]
    signature = inspect.signature(ROWS[name].functional)
    values = {k: p.default for k, p in signature.parameters.items()} | settings
    found: dict[tuple[str, int | None], float] = {}
    for key, value in values.items():
        if isinstance(value, float):
            usual = _VALUES.get(key, value)
            found[key, None] = value if key in settings and value and key != "d" else usual
        elif isinstance(value, tuple) and all(isinstance(x, float) for x in value):
            found.update({(key, i): x for i, x in enumerate(value)})
    return found


def with_hypers(case: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return the settings of `SMOOTH[case]` with `values` in place of `hypers_of(case)`."""
    changed: dict[str, Any] = dict(SMOOTH[case][1])
    parts: dict[str, list[Any]] = {}
    for (key, index), value in zip(hypers_of(case), values, strict=True):
        if index is None:
            changed[key] = value
        else:
            parts.setdefault(key, []).append(value)
    return changed | {key: tuple(members) for key, members in parts.items()}
