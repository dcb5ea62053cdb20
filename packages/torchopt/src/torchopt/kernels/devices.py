# SPDX-License-Identifier: Apache-2.0
"""Which tensors the fused kernels support, and how they are passed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from torchopt import _C
from torchopt.errors import KernelUnavailableError
from torchopt.kernels.fused_rule import FusedRule
from torchopt.kernels.missing import why_missing
from torchopt.torch_internals import FakeTensor, has_tangent, is_wrapped, with_and_without_negation
from torchopt.tree_function import PLAIN

__all__ = [
    "DTYPE_CODES",
    "explain_unavailable",
    "has_code_for",
    "placement",
    "refusal",
    "refuse_capture",
    "refuse_count",
    "unavailable",
]

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""The codes of `Dtype` in csrc/launch/tensors.h."""


def _learn_tensors(exchange: object) -> None:
    """Set how the extension reads tensors: through torch's C interface, or their methods (None)."""
    if why_missing(_C) is None:
        _C.learn_tensors(PLAIN, tuple(DTYPE_CODES), exchange)


# Since torch 2.10.
EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
_learn_tensors(EXCHANGE)
if why_missing(_C) is None and hasattr(_C, "learn_negation"):  # an older build asks the tensors
    _C.learn_negation(*with_and_without_negation())


def explain_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why there is no fused kernel for `dtype` on `device`, or None if there is one."""
    missing = why_missing(_C)
    if missing is not None:
        return missing
    if dtype not in DTYPE_CODES:
        return f"the fused kernels support float64, float32, float16 and bfloat16, got {dtype}"
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        if not _C.WITH_CUDA:
            return "this build of torchopt has no CUDA kernels (build it with TORCHOPT_CUDA=ON)"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        index = torch.cuda.current_device() if device.index is None else device.index
        return _why_no_code(index)
    return f"there are fused kernels for cpu and cuda, got a tensor on {device}"


@functools.cache
def _why_no_code(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if has_code_for(capability, _C.CUDA_ARCHITECTURES):
        return None
    return (
        f"this build of torchopt has kernels for the architectures {_C.CUDA_ARCHITECTURES}, got "
        f"cuda:{index} of compute capability {capability[0]}.{capability[1]} (build it with "
        f"CMAKE_CUDA_ARCHITECTURES={capability[0]}{capability[1]})"
    )


def has_code_for(capability: tuple[int, int], architectures: str) -> bool:
    """Return whether a device can run code compiled for `architectures`.

    Args:
        capability: The compute capability of the device, (major, minor).
        architectures: CMake's list, separated by commas, such as "80-real,90-virtual". Machine code
            ("real") runs on devices with the same major and at least the minor capability. PTX
            ("virtual") runs on all devices with at least that capability. A number alone stands for
            both. Words such as "all" count as supported.
    """
    for entry in filter(None, architectures.split(",")):
        number, _, kind = entry.partition("-")
        digits = number.rstrip("af")
        if not digits.isdigit():
            return True
        compiled = (int(digits[:-1]), int(digits[-1]))
        specific = digits != number  # code for one family of devices
        if capability >= compiled and (
            capability[0] == compiled[0] or (kind != "real" and not specific)
        ):
            return True
    return not architectures


def refuse_capture(device: torch.device) -> None:
    """Raise if the current stream of `device` is being captured in a CUDA graph.

    A replay calls the kernels with the arguments of the capture: every replay would repeat the same
    step, with the same count and hyper-parameters.

    Raises:
        RuntimeError: The stream is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step(): expected no capture of a CUDA graph, got one on the current stream; its "
            "replays would repeat this step with the current count and hyper-parameters; step "
            "after the replay, or capture the functional update with states of your own"
        )


def placement(x: Tensor) -> tuple[int, int]:
    """Return the device index and the current stream of `x` for the kernels; (-1, 0) on the CPU."""
    if x.device.type == "cpu":
        return -1, 0
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    return index, torch.cuda.current_stream(x.device).cuda_stream


def refusal(
    rule: FusedRule,
    grads: Sequence[Tensor],
    roles: Sequence[tuple[str, Sequence[Tensor]]],
    *,
    plain: bool = False,
) -> Exception | None:
    """Return why no kernel supports these tensors, or None if one does.

    Args:
        rule: The update rule.
        grads: The gradients.
        roles: The other inputs: for each, its name and one tensor for each gradient.
        plain: Whether tensors inside a transform or with a tangent are refused too.
    """
    for g in grads:
        if type(g) not in PLAIN and (plain or not isinstance(g, FakeTensor)):
            return unavailable(f"the fused kernels support plain tensors, got a {type(g).__name__}")
    for kind in {(g.device, g.dtype): None for g in grads}:
        reason = explain_unavailable(*kind)
        if reason is not None:
            return unavailable(reason)
    for g in grads:
        if g.layout is not torch.strided:
            return unavailable(f"the fused kernels support dense tensors, got {g.layout}")
        if plain and (is_wrapped(g) or has_tangent(g)):
            return unavailable("a transform follows a gradient")
    for name, role in roles:
        if len(role) != len(grads):
            return ValueError(
                f"fused {rule.name}: expected {len(grads)} tensors in {name}, got {len(role)}."
            )
        for g, x in zip(grads, role):
            if x is None:
                return unavailable(f"a tensor of {name} is missing")
            if plain and (type(x) not in PLAIN or is_wrapped(x) or has_tangent(x)):
                return unavailable(f"a transform follows a tensor of {name}")
            if g.shape != x.shape or g.dtype != x.dtype or g.device != x.device:
                return ValueError(
                    f"fused {rule.name}: expected {name} of the shape, dtype and device of the "
                    f"gradient, {tuple(g.shape)} {g.dtype} {g.device}; got {tuple(x.shape)} "
                    f"{x.dtype} {x.device}."
                )
    return None


def refuse_count(count: Tensor, like: Tensor) -> KernelUnavailableError | None:
    """Return why kernels cannot read the number of a step from `count`, or None if they can.

    They read its memory, so bytes of another dtype, or of a device other than that of a tensor that
    is stepped, would be taken for a number.
    """
    whole = count.dtype == torch.int64 and count.dim() == 0 and not count.is_neg()
    if whole and count.device == like.device:
        return None
    return unavailable(
        f"it reads steps as 0-dim int64 tensors on {like.device}, got {tuple(count.shape)} "
        f"{count.dtype} on {count.device}"
    )


def unavailable(reason: str) -> KernelUnavailableError:
    """Return the error for a kernel that was requested and cannot run."""
    return KernelUnavailableError(
        f"the fused kernel was requested, but {reason}; "
        "use use_accelerated_op=False or backend='reference' for these parameters."
    )
