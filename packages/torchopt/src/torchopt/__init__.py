# SPDX-License-Identifier: Apache-2.0
"""Differentiable optimization for PyTorch.

`import torchopt` imports only this file and a table of names; a module is imported when one of its
names is first used.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from torchopt.index import ALIASES, OPTIMIZERS
from torchopt.version import __version__

# The modules of optimizers. The first use of any of them, or of any public name, imports them all.
_CORE = (
    *("accelerated_op", "alias", "base", "clip", "combine", "errors", "hook", "optim"),
    *("optim.meta", "params", "pytree", "schedule", "transform", "typing", "update", "utils"),
)
# Modules that are imported one by one when they are first used.
_LATER = (
    *("diff", "distributed", "linalg", "linear_solve", "nn"),
    *("second_order", "solvers", "visual"),
)
_CLASSES = (*OPTIMIZERS.values(), *ALIASES)
# Public names of engines, whose modules are imported one by one as well.
_APART = {"inner_loop": ("torchopt.diff.explicit", "inner_loop")}
# The module and the name there of each public name.
_HOMES = {
    "accelerated_op_available": ("torchopt.accelerated_op", "is_available"),
    "apply_updates": ("torchopt.update", "apply_updates"),
    "chain": ("torchopt.combine", "chain"),
    "clip_grad_norm": ("torchopt.clip", "clip_grad_norm"),
    "nan_to_num": ("torchopt.transform", "nan_to_num"),
    "register_hook": ("torchopt.hook", "register_hook"),
    **{name: ("torchopt.utils", name) for name in ("extract_state_dict", "recover_state_dict")},
    **{name: ("torchopt.utils", name) for name in ("module_clone", "module_detach_")},
    "stop_gradient": ("torchopt.utils", "stop_gradient"),
    # Each optimizer in its three forms.
    **{name: ("torchopt.alias", name) for name in OPTIMIZERS},
    **{name: ("torchopt.optim", name) for name in ("FuncOptimizer", "Optimizer", *_CLASSES)},
    "MetaOptimizer": ("torchopt.optim.meta", "MetaOptimizer"),
    **{f"Meta{name}": ("torchopt.optim.meta", f"Meta{name}") for name in _CLASSES},
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def _extension() -> Any:
    """Return the extension module, or a substitute if it cannot be imported."""
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
    if name in _APART:
        home, original = _APART[name]
        globals()[name] = getattr(importlib.import_module(home), original)
        return globals()[name]
    if name not in _HOMES and name not in _CORE:
        raise AttributeError(f"module 'torchopt' has no attribute {name!r}")
    # All at once, so that no name is looked up here later while torch.compile traces a program.
    for module in _CORE:
        importlib.import_module(f"torchopt.{module}")
    for public, (home, original) in _HOMES.items():
        globals()[public] = getattr(importlib.import_module(home), original)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_APART, *_LATER, *(m for m in _CORE if "." not in m)})
