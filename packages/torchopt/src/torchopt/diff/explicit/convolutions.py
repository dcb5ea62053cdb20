# SPDX-License-Identifier: Apache-2.0
"""Convolutions of a batch of tasks as products of matrices.

If each task has its own weights, vmap makes one convolution with as many groups as tasks. On a CPU
torch has no fast kernel for that, nor for its derivatives. It is fast for matrix products, and
their derivatives are matrix products again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchopt.torch_internals import is_batched

__all__ = ["ConvolutionsAsProducts"]

MOST = 49  # entries of a window: so many times is the image copied


class ConvolutionsAsProducts(TorchFunctionMode):
    """A context in which 2-dimensional convolutions with batched weights are matrix products.

    Only convolutions on a CPU whose weights are batched by a vmap are replaced.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or its replacement."""
        kwargs = kwargs or {}
        found = _product(*args, **kwargs) if func is torch.conv2d else None
        return func(*args, **kwargs) if found is None else found


def _product(
    input: Tensor,  # noqa: A002 - the names of torch
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return a convolution as a matrix product, or None to leave it to torch."""
    if not is_batched(weight) or groups != 1 or isinstance(padding, str):
        return None
    if input.ndim != 4 or input.device.type != "cpu":
        return None
    if input.dtype not in (torch.float32, torch.float64) or input.dtype is not weight.dtype:
        return None
    (rows, columns), (down, right), (top, left) = map(_pair, (stride, dilation, padding))
    *_, channels, height, width = weight.shape
    count, _, above, across = input.shape
    high = (above + 2 * top - down * (height - 1) - 1) // rows + 1
    wide = (across + 2 * left - right * (width - 1) - 1) // columns + 1
    if height * width > MOST or high <= 0 or wide <= 0 or input.shape[1] != channels:
        return None
    image = torch.nn.functional.pad(input.transpose(0, 1), (left, left, top, top))
    below, beside = rows * (high - 1) + 1, columns * (wide - 1) + 1
    windows = [
        image[:, :, i : i + below : rows, j : j + beside : columns]
        for i in range(0, down * height, down)
        for j in range(0, right * width, right)
    ]
    entries = torch.stack(windows, 1).reshape(channels * height * width, count * high * wide)
    found = (weight.flatten(1) @ entries).reshape(len(weight), count, high, wide).transpose(0, 1)
    return found if bias is None else found + bias[:, None, None]


def _pair(x: Any) -> tuple[int, int]:
    found = (x,) if isinstance(x, int) else tuple(x)
    return (found[0], found[-1])
