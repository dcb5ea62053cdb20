# SPDX-License-Identifier: Apache-2.0
"""torch.optim in one of its implementations."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor

from benchmarks.harness.case import UnsupportedError

DISTRIBUTIONS = ("torch",)
library: Any = torch

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
    "adamax": ("Adamax", {}),
    "radam": ("RAdam", {}),
    "rmsprop": ("RMSprop", {"momentum": 0.9, "centered": True}),
    "adagrad": ("Adagrad", {}),
    "adadelta": ("Adadelta", {}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "nadam": ("NAdam", {}),
    "asgd": ("ASGD", {}),
    "rprop": ("Rprop", {}),
    "adafactor": ("Adafactor", {}),
    "muon": ("Muon", {"momentum": 0.95, "weight_decay": 0.0}),
}


def in_place(params: list[Tensor], name: str, **implementation: bool) -> Callable[[], Any]:
    """Return the step of an optimizer of torch."""
    if name not in SETTINGS:
        raise UnsupportedError(f"it has no {name}")
    cls, settings = SETTINGS[name]
    if name == "muon" and implementation == {"foreach": False}:
        implementation = {}  # the loop is its only one
    try:
        optimizer = getattr(torch.optim, cls)(params, lr=1e-3, **settings, **implementation)
    except TypeError as error:
        raise UnsupportedError(f"{cls} has no such implementation") from error
    step: Callable[[], Any] = optimizer.step
    return step
