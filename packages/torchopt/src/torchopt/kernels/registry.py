# SPDX-License-Identifier: Apache-2.0
"""Which tensors the fused kernels can serve, and how they are handed over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensor

from torchopt import _C
from torchopt.errors import KernelUnavailableError
from torchopt.kernels.missing import why_missing
from torchopt.tree_function import PLAIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


__all__ = ["DTYPE_CODES", "check_fused", "explain_unavailable", "placement"]

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""The codes of `Dtype` in csrc/launch/tensors.h."""


def _learn_tensors(exchange: object) -> None:
    """Tell the extension how to read tensors: by torch's C interface, None to ask their methods."""
    if why_missing(_C) is None:
        _C.learn_tensors(PLAIN, tuple(DTYPE_CODES), exchange)


# Since torch 2.10.
EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
_learn_tensors(EXCHANGE)


def explain_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why there is no fused kernel for `dtype` on `device`, or None where there is one."""
    missing = why_missing(_C)
    if missing is not None:
        return missing
    if dtype not in DTYPE_CODES:
        return f"the fused kernels serve float64, float32, float16 and bfloat16, got {dtype}"
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        if not _C.WITH_CUDA:
            return "this build of torchopt has no CUDA kernels (build it with TORCHOPT_CUDA=ON)"
        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    return f"there are fused kernels for cpu and cuda, got a tensor on {device}"


def check_fused(tensors: Sequence[Tensor]) -> None:
    """Raise unless one fused call can serve all `tensors`.

    Raises:
        KernelUnavailableError: No kernel for this dtype, device or layout.
    """
    for x in tensors:
        reason = explain_unavailable(x.device, x.dtype)
        if reason is None and x.layout is not torch.strided:
            reason = f"the fused kernels serve dense tensors, got {x.layout}"
        if reason is None and not (type(x) in PLAIN or isinstance(x, FakeTensor)):
            reason = f"the fused kernels serve plain tensors, got a {type(x).__name__}"
        if reason is not None:
            raise KernelUnavailableError(
                f"the fused kernel was asked for, but {reason}; "
                "use use_accelerated_op=False or backend='reference' for these parameters."
            )


def placement(x: Tensor) -> tuple[int, int]:
    """Return the device index and the current stream of `x` as the kernels expect them."""
    if x.device.type == "cpu":
        return -1, 0
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    return index, torch.cuda.current_stream(x.device).cuda_stream
