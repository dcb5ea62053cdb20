# SPDX-License-Identifier: Apache-2.0
"""Steps in place with compensated parameters and with states in 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt.tree import tree_leaves


def trained(dtype: torch.dtype, **options: bool) -> tuple[Tensor, torchopt.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5000, generator=generator, dtype=torch.float64).to(dtype)
    optimizer = torchopt.Adam([p], lr=1e-4, **options)
    for _ in range(100):
        p.grad = torch.randn(5000, generator=generator, dtype=torch.float64).to(dtype) + 1
        optimizer.step()
    return p, optimizer


def test_compensated_parameters_are_the_exact_ones_rounded_once() -> None:
    exact = trained(torch.float32)[0]
    lost = trained(torch.bfloat16)[0].float() - exact
    kept = trained(torch.bfloat16, compensated=True)[0].float() - exact
    # The start and the result are rounded once each, and the gradients to 8 bits.
    bound = exact.abs() * 2**-7 + 1e-3
    assert (kept.abs() <= bound).all()
    assert kept.mean().abs() < 0.2 * lost.mean().abs()


def test_states_are_in_8_bits_and_steps_are_close() -> None:
    plain, _ = trained(torch.float32)
    coded, optimizer = trained(torch.float32, in_8_bits=True)
    (state,) = optimizer.state_groups
    bytes_ = [x for x in tree_leaves(state) if isinstance(x, Tensor) and x.dtype == torch.uint8]
    assert [x.numel() for x in bytes_] == [5000, 5000]
    # 100 steps of 1e-4, of which less than a tenth is rounding.
    torch.testing.assert_close(coded, plain, rtol=0, atol=1e-3)
    assert not torch.equal(coded, plain)


@pytest.mark.parametrize("option", ["compensated", "in_8_bits"])
def test_the_options_hold_for_later_groups_too(option: str) -> None:
    first, second = (torch.ones(4096, dtype=torch.bfloat16) for _ in range(2))
    optimizer = torchopt.SGD([first], lr=2**-10, momentum=0.5, **{option: True})
    optimizer.add_param_group([second], impl=torchopt.sgd(2**-10, momentum=0.5))
    for _ in range(20):
        first.grad = second.grad = -torch.ones(4096, dtype=torch.bfloat16)
        optimizer.step()
    assert torch.equal(first, second)
    assert (first > 1).all() == (option == "compensated")
