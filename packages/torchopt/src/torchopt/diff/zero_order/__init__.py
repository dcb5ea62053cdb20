# SPDX-License-Identifier: Apache-2.0
"""Gradients estimated from function values. Calling the module calls `zero_order`.

`loop`: draw (`directions`) ──▶ evaluate (`evaluate`) ──▶ weigh (`estimators`) ──▶ sum

| module | contents |
|---|---|
| `decorator` | `zero_order` |
| `engine`, `inner` | the engine, `ZeroOrder`; inner problems |
| `call`, `refusals` | one call of a decorated function, as autograd sees it; what it refuses |
| `nn` | `ZeroOrderGradientModule` |
| `directions`, `independent`, `structured` | random directions, regenerated from a seed |
| `seeds` | seeds of directions, and random numbers common to all evaluations |
| `estimators` | compute the coefficients of directions from losses |
| `utilities`, `surrogate` | losses as ranks; control variates |
| `loop` | the loop over directions, in chunks |
| `evaluate` | losses at perturbed points of a tree |
| `layout`, `form` | leaves that are perturbed; as one vector, or one by one |
| `evaluator` | one function at many points, by vmap or one after the other |
| `error_bars` | `GradientEstimate`: a gradient with its standard error |
| `precision` | dtypes of sums, and perturbations that are rounded away |
| `seed_replay` | in-place perturbation of large models |
| `low_rank`, `factors` | low-rank perturbations of the weights of any module |
| `search` | PGPE, SNES, guided ES: methods that learn mean and scale of the perturbations |
| `unrolled` | full, truncated, persistent and noise-reuse evolution strategies for inner loops |
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torchopt.diff.zero_order import (
    decorator,
    directions,
    error_bars,
    estimators,
    evaluate,
    low_rank,
    nn,
    search,
    seed_replay,
    unrolled,
)
from torchopt.diff.zero_order.decorator import zero_order
from torchopt.diff.zero_order.directions import (
    Directions,
    FromDistribution,
    Gaussian,
    Guided,
    Orthogonal,
    Rademacher,
    Sobol,
    Sphere,
)
from torchopt.diff.zero_order.engine import ZeroOrder
from torchopt.diff.zero_order.error_bars import GradientEstimate
from torchopt.diff.zero_order.estimators import Estimator
from torchopt.diff.zero_order.nn import ZeroOrderGradientModule

__all__ = [
    "Directions",
    "Estimator",
    "FromDistribution",
    "Gaussian",
    "GradientEstimate",
    "Guided",
    "Orthogonal",
    "Rademacher",
    "Sobol",
    "Sphere",
    "ZeroOrder",
    "ZeroOrderGradientModule",
    "zero_order",
]


class _CallableModule(ModuleType):
    """Makes calling `torchopt.diff.zero_order` the same as calling its `zero_order`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return zero_order(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
