# SPDX-License-Identifier: Apache-2.0
"""Convolutions as products of matrices give what torch's convolutions give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchopt.diff.explicit.convolutions import ConvolutionsAsProducts

WAYS: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"padding": (2, 1), "stride": (2, 3)},
    {"dilation": 2, "stride": 2},
    {"padding": "same"},
    {"groups": 2},
]


class _Count(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self._names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._names.append(func.name())
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> int:
        return sum(name in x for x in self._names)


@pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(3, 3), (1, 1), (2, 5), (8, 8)])
@pytest.mark.parametrize("options", WAYS)
def test_a_product_is_the_convolution_of_each_task_with_both_derivatives(
    options: dict[str, Any], size: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    inner = 4 // options.get("groups", 1)
    shapes = [(3, 2, 4, 17, 18), (3, 6, inner, *size), *([(3, 6)] if bias else [])]
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def found() -> list[torch.Tensor]:
        value = torch.func.vmap(lambda *x: nn.functional.conv2d(*x, **options))(*given)
        first = torch.autograd.grad(value.pow(3).sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
        return [value, *first, *second]

    expected = found()
    with ConvolutionsAsProducts():
        got = found()
    for x, y in zip(got, expected):
        assert (x - y).abs().max() <= 1e-12 * y.abs().max()


def test_what_is_no_convolution_of_tasks_is_left_to_torch() -> None:
    images, weights = torch.randn(3, 2, 4, 9, 9), torch.randn(3, 6, 4, 3, 3)
    shared = torch.func.vmap(lambda x: nn.functional.conv2d(x, weights[0]))
    each = torch.func.vmap(nn.functional.conv2d)
    with _Count() as count, ConvolutionsAsProducts():
        shared(images)
        assert count.of("convolution") == 1
        each(images, weights)
        assert count.of("convolution") == 1
        each(images[:, 0], weights)
        assert count.of("convolution") == 2
        for wrong in (images[:, :, :3], images[..., :2, :2]):
            with pytest.raises(RuntimeError, match=r"[Cc]hannels|[Kk]ernel size"):
                each(wrong, weights)
