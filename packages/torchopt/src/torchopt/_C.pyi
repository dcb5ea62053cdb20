# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N999 - the name that Python extensions have
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT32: int
FLOAT64: int
FLOAT16: int
BFLOAT16: int
UPDATE: int
DECAYED_UPDATE: int
STEP: int
UPDATE_VJP: int
DECAYED_UPDATE_VJP: int
HYPER_VJP: int
WITH_CUDA: bool
WITH_OPENMP: bool
CUDA_BLOCK_ELEMENTS: int
RULES: dict[str, tuple[int, int]]

def run(
    rule: str,
    kind: int,
    inputs: Sequence[list[Tensor]],
    outputs: Sequence[list[Tensor]],
    steps: int | list[Tensor],
    dtype: int,
    hypers: Sequence[float],
    *,
    maximize: bool,
    num_threads: int,
    device: int = -1,
    stream: int = 0,
    partials: int = 0,
) -> list[float]: ...

class StepPlan:
    def __init__(
        self,
        rule: str,
        params: list[Tensor],
        states: Sequence[list[Tensor]],
        dtype: torch.dtype,
        dtype_code: int,
    ) -> None: ...
    def run(
        self,
        grads: list[Tensor | None],
        steps: int | list[Tensor],
        hypers: Sequence[float],
        maximize: bool,
        num_threads: int,
        device: int,
        stream: int,
    ) -> bool: ...
