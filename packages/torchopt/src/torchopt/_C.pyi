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
CUDA_ARCHITECTURES: str
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
def fused_call(
    rule: str,
    kind: int,
    tensors: Sequence[Tensor | None],
    size: int,
    needed: Sequence[bool] | None,
    step: int | Tensor,
    hypers: Sequence[float],
    maximize: bool,
    num_threads: int,
    record: bool,
) -> tuple[Tensor | None, ...] | bool | None: ...
def factored_rms(
    grads: list[Tensor],
    params: list[Tensor],
    rows: list[Tensor],
    columns: list[Tensor],
    hypers: Sequence[float],
    inplace: bool,
    num_threads: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]] | None: ...
def newton_schulz(
    matrices: list[Tensor],
    scales: list[float],
    steps: int,
    a: float,
    b: float,
    c: float,
    eps: float,
    num_threads: int,
) -> list[Tensor | None] | None: ...
def successor(count: object) -> Tensor | None: ...
def are_one(items: list[object]) -> bool: ...
def are_disjoint(tensors: list[Tensor]) -> bool: ...
def learn_tensors(
    classes: tuple[type, ...], dtypes: tuple[torch.dtype, ...], exchange: object
) -> None: ...
def learn_negation(plain: list[Tensor], negated: list[Tensor]) -> bool: ...
def release_buffers() -> None: ...
def set_buffer_limit(limit: int) -> int: ...
def buffer_usage() -> tuple[int, int]: ...

class StepPlan:
    def __init__(self, rule: str, params: list[Tensor], states: Sequence[list[Tensor]]) -> None: ...
    def advance(
        self,
        grads: list[Tensor | None],
        counts: list[Tensor],
        hypers: Sequence[float],
        maximize: bool,
        num_threads: int,
        launch: bool = ...,
    ) -> Tensor | None: ...
    def run(
        self,
        grads: list[Tensor | None],
        step: int | Tensor,
        hypers: Sequence[float],
        maximize: bool,
        num_threads: int,
        device: int,
        stream: int,
        launch: bool = ...,
    ) -> bool: ...
    def launch(self) -> None: ...
