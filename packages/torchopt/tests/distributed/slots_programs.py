# SPDX-License-Identifier: Apache-2.0
"""Steps whose gradients are added up in shared memory."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
from distributed_programs import outcome
from torch import Tensor

import torchopt.distributed as todist
from torchopt.distributed import buckets
from torchopt.distributed.slots import Slots

TASKS = [0.5, -1.0, 2.0, 0.25, 3.0]
_DTYPES = (torch.float64, torch.float32, torch.complex128)


def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(700 + k, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for k in range(3)
        for dtype in _DTYPES
    ]


def loss(params: list[Tensor], task: float) -> Tensor:
    return sum(((p * (task + k)).abs() ** 2).sum().double() for k, p in enumerate(params))  # type: ignore[return-value]


def reference() -> list[Tensor]:
    params = leaves()
    return [
        g / len(TASKS) for g in torch.autograd.grad(sum(loss(params, t) for t in TASKS), params)
    ]


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def steps(bucket_bytes: int, room: int, blind: int) -> list[dict[str, Any]]:
    """Return, for each of three steps, the gradients, and the sums here and by torch.

    Args:
        bucket_bytes: As in `TaskParallel`.
        room: Bytes of a slot.
        blind: A rank that does not find the memory; -1: none.
    """
    params = leaves()
    engine = todist.TaskParallel(params, bucket_bytes=bucket_bytes)
    slots = engine.group.slots
    assert slots is not None
    found = []
    here: list[Any] = []
    put, start_sum = Slots.put, engine.group.start_sum

    def counted(*args: Any) -> Any:
        shares = put(*args)
        here.append(shares is not None)
        return shares

    def by_torch(x: Tensor) -> Any:
        torchs.append(x.numel())
        return start_sum(x)

    is_blind = blind == todist.get_rank()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(slots, "room", room))
        if is_blind:
            stack.enter_context(mock.patch.object(slots, "is_open", False))
            stack.enter_context(mock.patch.object(slots, "open", return_value=None))
        stack.enter_context(mock.patch.object(Slots, "put", counted))
        stack.enter_context(mock.patch.object(engine.group, "start_sum", by_torch))
        for _ in range(3):
            torchs: list[int] = []
            here.clear()
            for p in params:
                p.grad = None
            step = engine.backward(lambda t: loss(params, t), TASKS)
            found.append(
                {
                    "grads": [p.grad for p in params],
                    "losses": step.losses,
                    "here": sum(here),
                    "torch": len(torchs),
                    "buckets": len(buckets.filled(params, bucket_bytes)),
                    "is_open": slots.is_open,
                }
            )
    return found


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def gradients_of_another_dtype(n: int, deterministic: bool) -> list[list[Tensor]]:
    """Return the gradients of three steps; rank 0 alone uses the last parameter."""
    params = [torch.ones(n, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    for p in params:
        p.grad_dtype = torch.float32
    engine = todist.TaskParallel(params, deterministic=deterministic)

    def loss(task: float) -> Tensor:
        used = params if task == 1.0 else params[:1]
        return sum((p.float() * task).sum() for p in used)  # type: ignore[return-value]

    found = []
    for _ in range(3):
        for p in params:
            p.grad = None
        engine.backward(loss, [1.0, 2.0**-10])
        found.append([p.grad.clone() for p in params if p.grad is not None])
    return found


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def gradients_of_changed_dtypes(n: int, deterministic: bool) -> list[list[Tensor]]:
    """Return the gradients of three steps; one dtype changes before each of the last two."""
    params = [torch.ones(n, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    engine = todist.TaskParallel(params, deterministic=deterministic)
    found = []
    for k in range(3):
        for p in params:
            p.grad = None
        if k == 1:
            params[0].grad_dtype = torch.float32
        elif k == 2:
            params[1].data = params[1].data.double()
        engine.backward(lambda t: sum((p.double() * t).sum() for p in params), [1.0, 2.0**-10])
        found.append([p.grad.clone() for p in params if p.grad is not None])
    return found


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def dtypes_that_differ(n: int, of_gradient: bool) -> Any:
    """Change the dtype of a parameter, or that of its gradients, on rank 1 alone."""
    p = torch.ones(n, requires_grad=True)
    engine = todist.TaskParallel([p])

    def step() -> Any:
        return engine.backward(lambda t: (p * t).sum(), [1.0, 2.0])

    step()
    before, p.grad = p.grad, None
    if todist.get_rank() == 1 and of_gradient:
        p.grad_dtype = torch.float64
    elif todist.get_rank() == 1:
        p.data = p.data.double()
    return outcome(step), p.grad, before
