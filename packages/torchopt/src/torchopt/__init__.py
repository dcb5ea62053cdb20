# SPDX-License-Identifier: Apache-2.0
"""Differentiable optimization for PyTorch.

`import torchopt` imports nothing but this file; the first use of a name imports what it needs.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from torchopt.version import __version__

if TYPE_CHECKING:
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
    from torchopt.alias.adadelta import adadelta
    from torchopt.alias.adagrad import adagrad
    from torchopt.alias.adam import adam
    from torchopt.alias.adamax import adamax
    from torchopt.alias.adamw import adamw
    from torchopt.alias.radam import radam
    from torchopt.alias.rmsprop import rmsprop
    from torchopt.alias.sgd import sgd
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
    from torchopt.transform.nan_to_num import nan_to_num
    from torchopt.update import apply_updates
    from torchopt.utils import (
        extract_state_dict,
        module_clone,
        module_detach_,
        recover_state_dict,
        stop_gradient,
    )

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

# Imported together by the first use of any of them, or of any name above: optimizers.
_CORE = (
    *("accelerated_op", "alias", "base", "clip", "combine", "errors", "hook", "optim"),
    *("optim.meta", "params", "pytree", "schedule", "transform", "typing", "update", "utils"),
)
# Imported one by one when they are asked for.
_LATER = ("diff", "distributed", "linalg", "linear_solve", "nn", "solvers", "visual")
# Where each name above comes from.
_HOMES = {
    "accelerated_op_available": ("torchopt.accelerated_op", "is_available"),
    **{name: ("torchopt.alias", name) for name in ("adadelta", "adagrad", "adam", "adamax")},
    **{name: ("torchopt.alias", name) for name in ("adamw", "radam", "rmsprop", "sgd")},
    "apply_updates": ("torchopt.update", "apply_updates"),
    "chain": ("torchopt.combine", "chain"),
    "clip_grad_norm": ("torchopt.clip", "clip_grad_norm"),
    "nan_to_num": ("torchopt.transform", "nan_to_num"),
    "register_hook": ("torchopt.hook", "register_hook"),
    **{name: ("torchopt.utils", name) for name in ("extract_state_dict", "recover_state_dict")},
    **{name: ("torchopt.utils", name) for name in ("module_clone", "module_detach_")},
    "stop_gradient": ("torchopt.utils", "stop_gradient"),
    # The classes of optimizers.
    **{
        name: ("torchopt.optim.meta" if name.startswith("Meta") else "torchopt.optim", name)
        for name in __all__
        if name[0].isupper()
    },
}


def _extension() -> Any:
    """Return the extension, or what stands for it where it cannot be imported."""
    try:
        return importlib.import_module("torchopt._C")
    except ImportError as error:
        from torchopt.errors import MissingExtensionWarning
        from torchopt.kernels.missing import MissingExtension

        missing = MissingExtension(error)
        warnings.warn(
            f"torchopt: {missing.import_error}. Everything works on plain torch operations, more "
            "slowly; where the platform has a C++20 compiler, reinstalling from source builds it.",
            MissingExtensionWarning,
            stacklevel=3,
        )
        return missing


def __getattr__(name: str) -> Any:
    if name == "_C":
        globals()[name] = _extension()
        return globals()[name]
    if name in _LATER:
        return importlib.import_module(f"torchopt.{name}")
    if name not in _HOMES and name not in _CORE:
        raise AttributeError(f"module 'torchopt' has no attribute {name!r}")
    # All at once: so that no name is looked up here later, while a program is being compiled.
    for module in _CORE:
        importlib.import_module(f"torchopt.{module}")
    for public, (home, original) in _HOMES.items():
        globals()[public] = getattr(importlib.import_module(home), original)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_LATER, *(m for m in _CORE if "." not in m)})
