# SPDX-License-Identifier: Apache-2.0
"""The index of optimizers: one line each, with the function and the name of its classes.

`torchopt.lion`, `torchopt.Lion`, `torchopt.MetaLion`, `torchopt.alias.lion` and
`torchopt.transform.scale_by_lion` are made from the line of `lion` and `optimizers/lion.py`. After
a change, run `python tools/make_stubs.py`, which writes the stubs that type checkers read.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

__all__ = ["ALIASES", "OPTIMIZERS", "exported"]

OPTIMIZERS = {
    "adabelief": "AdaBelief",
    "adadelta": "AdaDelta",
    "adafactor": "Adafactor",
    "adagrad": "AdaGrad",
    "adam": "Adam",
    "adamax": "AdaMax",
    "adamw": "AdamW",
    "adan": "Adan",
    "ademamix": "AdEMAMix",
    "adopt": "ADOPT",
    "amsgrad": "AMSGrad",
    "amsgradw": "AMSGradW",
    "asgd": "ASGD",
    "lamb": "LAMB",
    "lars": "LARS",
    "lion": "Lion",
    "mars": "MARS",
    "muon": "Muon",
    "nadam": "NAdam",
    "nadamw": "NAdamW",
    "prodigy": "Prodigy",
    "psgd": "PSGD",
    "radam": "RAdam",
    "rmsprop": "RMSProp",
    "rprop": "Rprop",
    "schedule_free_adamw": "ScheduleFreeAdamW",
    "schedule_free_radam": "ScheduleFreeRAdam",
    "schedule_free_sgd": "ScheduleFreeSGD",
    "sgd": "SGD",
    "shampoo": "Shampoo",
    "signum": "Signum",
    "soap": "SOAP",
    "sophia": "Sophia",
    "yogi": "Yogi",
}

ALIASES = {
    "Adadelta": "AdaDelta",
    "Adagrad": "AdaGrad",
    "Adamax": "AdaMax",
    "RMSprop": "RMSProp",
}
"""Alternative names of classes, spelled as in torch.optim."""

FILES = {
    "adamw": "adam",
    "amsgradw": "amsgrad",
    "nadamw": "nadam",
    "schedule_free_adamw": "schedule_free",
    "schedule_free_sgd": "schedule_free",
}
"""The files in `torchopt.optimizers` of optimizers that share one; others have their own name."""


PUBLISHED = {
    **{name: f"torchopt.alias.{name}" for name in ("adadelta", "adagrad", "adam", "adamax")},
    **{name: f"torchopt.alias.{name}" for name in ("adamw", "radam", "rmsprop", "sgd")},
    **{
        name: f"torchopt.transform.{home}"
        for home, names in {
            "scale_by_adadelta": ("ScaleByAdadeltaState", "scale_by_adadelta"),
            "scale_by_adam": ("ScaleByAdamState", "scale_by_accelerated_adam", "scale_by_adam"),
            "scale_by_adamax": ("ScaleByAdamaxState", "scale_by_adamax"),
            "scale_by_radam": ("ScaleByRAdamState", "scale_by_radam"),
            "scale_by_rms": ("ScaleByRmsState", "scale_by_rms"),
            "scale_by_rss": ("ScaleByRssState", "scale_by_rss"),
            "scale_by_stddev": ("ScaleByRStdDevState", "scale_by_stddev"),
            "trace": ("DampenedTraceState", "TraceState", "trace"),
        }.items()
        for name in names
    },
}
"""The modules of names in the published package, to which pickles refer."""


@functools.cache
def exported() -> dict[str, Any]:
    """Return the public names of all files of optimizers: functions, transformations, states."""
    found: dict[str, Any] = {}
    for name in OPTIMIZERS:
        module = importlib.import_module(f"torchopt.optimizers.{FILES.get(name, name)}")
        found.update((public, getattr(module, public)) for public in module.__all__)
    for name, home in PUBLISHED.items():
        found[name].__module__ = home
    return found
