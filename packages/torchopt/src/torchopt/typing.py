# SPDX-License-Identifier: Apache-2.0
"""The types in torchopt's signatures."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Optional, Protocol, Union, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.futures import Future

from optree.typing import PyTree
from torchopt.base import (
    ChainedGradientTransformation,
    EmptyState,
    GradientTransformation,
    UninitializedState,
)

__all__ = [
    "ChainedGradientTransformation",
    "Device",
    "Distribution",
    "EmptyState",
    "Future",
    "GradientTransformation",
    "LinearSolver",
    "ListOfOptionalTensors",
    "ListOfTensors",
    "ModuleTensorContainers",
    "Numeric",
    "OptState",
    "OptionalTensor",
    "OptionalTensorOrOptionalTensors",
    "OptionalTensorTree",
    "Params",
    "PyTree",
    "RRef",
    "Samplable",
    "SampleFunc",
    "Scalar",
    "ScalarOrSchedule",
    "Schedule",
    "SequenceOfOptionalTensors",
    "SequenceOfTensors",
    "Size",
    "Tensor",
    "TensorContainer",
    "TensorOrTensors",
    "TensorTree",
    "TupleOfOptionalTensors",
    "TupleOfTensors",
    "UninitializedState",
    "Updates",
]

Size = torch.Size
Device = Union[torch.device, str, int]
Scalar = Union[float, int, bool]
Numeric = Union[Tensor, Scalar]
Schedule = Callable[[Numeric], Numeric]
ScalarOrSchedule = Union[float, Tensor, Schedule]

#: Python's type system cannot describe trees of tensors more precisely.
TensorTree = Any
OptionalTensorTree = Any
Params = Any
Updates = Any
OptState = Any

OptionalTensor = Optional[Tensor]
ListOfTensors = list[Tensor]
TupleOfTensors = tuple[Tensor, ...]
SequenceOfTensors = Sequence[Tensor]
TensorOrTensors = Union[Tensor, SequenceOfTensors]
ListOfOptionalTensors = list[Optional[Tensor]]
TupleOfOptionalTensors = tuple[Optional[Tensor], ...]
SequenceOfOptionalTensors = Sequence[Optional[Tensor]]
OptionalTensorOrOptionalTensors = Union[Optional[Tensor], SequenceOfOptionalTensors]

TensorContainer = dict[str, Optional[Tensor]]
ModuleTensorContainers = tuple[TensorContainer, ...]

LinearSolver = Callable[[Callable[[TensorTree], TensorTree], TensorTree], TensorTree]
SampleFunc = Callable[[Size], Any]

RRef: Any = None  # where torch has no remote calls
with contextlib.suppress(ImportError):
    RRef = getattr(importlib.import_module("torch.distributed.rpc"), "RRef", None)


@runtime_checkable
class Samplable(Protocol):
    """Anything with a ``sample`` method, such as a torch distribution."""

    def sample(self, sample_shape: Size = Size()) -> Any:  # noqa: B008 - immutable
        """Return a sample of the given shape."""
