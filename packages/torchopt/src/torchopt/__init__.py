# SPDX-License-Identifier: Apache-2.0
"""Differentiable optimization for PyTorch."""

from __future__ import annotations

import importlib
from types import ModuleType

from torchopt import (
    accelerated_op,
    alias,
    base,
    clip,
    combine,
    errors,
    hook,
    optim,
    params,
    pytree,
    schedule,
    transform,
    typing,
    update,
    utils,
    version,
)
from torchopt.accelerated_op import is_available as accelerated_op_available
from torchopt.alias import adadelta, adagrad, adam, adamax, adamw, radam, rmsprop, sgd
from torchopt.clip import clip_grad_norm
from torchopt.combine import chain
from torchopt.hook import register_hook
from torchopt.optim import (
    SGD,
    AdaDelta,
    Adadelta,
    AdaGrad,
    Adagrad,
    Adam,
    AdaMax,
    Adamax,
    AdamW,
    FuncOptimizer,
    Optimizer,
    RAdam,
    RMSProp,
    RMSprop,
)
from torchopt.optim.meta import (
    MetaAdaDelta,
    MetaAdadelta,
    MetaAdaGrad,
    MetaAdagrad,
    MetaAdam,
    MetaAdaMax,
    MetaAdamax,
    MetaAdamW,
    MetaOptimizer,
    MetaRAdam,
    MetaRMSProp,
    MetaRMSprop,
    MetaSGD,
)
from torchopt.transform import nan_to_num
from torchopt.update import apply_updates
from torchopt.utils import (
    extract_state_dict,
    module_clone,
    module_detach_,
    recover_state_dict,
    stop_gradient,
)
from torchopt.version import __version__

__all__ = [
    "SGD",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FuncOptimizer",
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaSGD",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RMSprop",
    "accelerated_op_available",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "apply_updates",
    "chain",
    "clip_grad_norm",
    "extract_state_dict",
    "module_clone",
    "module_detach_",
    "nan_to_num",
    "radam",
    "recover_state_dict",
    "register_hook",
    "rmsprop",
    "sgd",
    "stop_gradient",
]

# Imported when they are first asked for: each of them takes a while, and most programs need none.
_LAZY = ("diff", "distributed", "linalg", "linear_solve", "nn", "solvers", "visual")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"torchopt.{name}")
    raise AttributeError(f"module 'torchopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
