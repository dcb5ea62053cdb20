# SPDX-License-Identifier: Apache-2.0
"""Traced loops under autocast: the casts are those of the run, and only those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt


def product(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w).tanh().sum()


def given(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w, x = (torch.randn(6, 6, generator=generator).requires_grad_() for _ in range(2))
    return w, x


def autocast(*, enabled: bool = True) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("keep", ["all", "steps", 2])
@pytest.mark.parametrize("execute", ["eager", "trace"])
def test_autocast_of_a_backward_pass_is_not_that_of_the_run(execute: str, keep: Any) -> None:
    if execute == "eager" and keep == "all":
        pytest.skip("the backward pass is torch's own")
    rate = 0.015625
    inner = torchopt.inner_loop(product, torchopt.sgd, steps=3, execute=execute, keep=keep)
    w, x = given(0)
    with autocast():
        torch.autograd.grad(inner(w, x, lr=rate).losses.sum(), x)  # traces the adjoint
    with autocast():
        result = inner(w, x, lr=rate)
    inside = torch.autograd.grad(result.losses.sum(), x)[0]
    plain = torchopt.inner_loop(product, torchopt.sgd, steps=3, execute=execute, keep=keep)
    result = plain(w, x, lr=rate)
    with autocast():
        within = torch.autograd.grad(result.losses.sum(), x)[0]
    outside = torch.autograd.grad(plain(w, x, lr=rate).losses.sum(), x)[0]
    slow = torchopt.inner_loop(product, torchopt.sgd, steps=3)
    expected = torch.autograd.grad(slow(w, x, lr=rate).losses.sum(), x)[0]
    for found in (within, outside):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((inside - expected).abs().max()) > 1e-3


def test_operations_that_run_without_autocast_do_so_in_a_program() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (w * x).sum() ** 2

    found = []
    for execute in ("eager", "trace", "trace"):
        inner = torchopt.inner_loop(loss, torchopt.muon, steps=3, execute=execute)
        w, x = given(1)
        with autocast():
            result = inner(w, x, lr=0.01)
        found.append((result.params.detach(), *torch.autograd.grad(result.params.sum(), (w, x))))
    for got in found[1:]:
        for y, expected in zip(got, found[0], strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def test_a_default_dtype_that_changes_before_the_backward_pass_raises() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return product(w, x) * torch.full((), 1 / 3)

    inner = torchopt.inner_loop(loss, torchopt.sgd, steps=3, execute="trace", keep="steps")
    result = inner(*given(0), lr=0.01)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(RuntimeError, match="settings of torch"):
            result.losses.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
