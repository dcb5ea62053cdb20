# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N999 - the name that Python extensions have
from collections.abc import Sequence

FLOAT32: int
FLOAT64: int
WITH_CUDA: bool
WITH_OPENMP: bool

def adam(
    inputs: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    steps: Sequence[int],
    sizes: Sequence[int],
    dtype: int,
    *,
    b1: float,
    b2: float,
    eps: float,
    eps_root: float,
    num_threads: int,
    device: int = -1,
    stream: int = 0,
) -> None: ...
def adam_vjp(
    inputs: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    steps: Sequence[int],
    sizes: Sequence[int],
    dtype: int,
    *,
    b1: float,
    b2: float,
    eps: float,
    eps_root: float,
    num_threads: int,
    device: int = -1,
    stream: int = 0,
) -> None: ...
