# SPDX-License-Identifier: Apache-2.0
"""Keep the states of an optimizer in 8 bits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation, require_transformation
from torchopt.errors import NotDifferentiableError
from torchopt.params.sharded import require_whole
from torchopt.torch_internals import in_dispatch_mode
from torchopt.transform.base import Wrapper
from torchopt.transform.copies import exact_tensors, followed_start
from torchopt.transform.validate import check
from torchopt.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torchopt.tree_function import any_watched, is_traced, is_transforming

__all__ = ["Quantized", "in_8_bits"]


DIFFERENTIATED = (
    "an optimizer whose numbers are constants, got one of numbers or parameters that are "
    "differentiated; detach them, step under torch.no_grad(), or use the optimizer without "
    "in_8_bits"
)


class Quantized(NamedTuple):
    """A quantized tensor: `codes`, uint8 of its shape; `scales`, the largest absolute value of each
    block, in float32; `empty`, a tensor of its dtype without elements.
    """

    codes: Tensor
    scales: Tensor
    empty: Tensor


def code_values(device: Any = "cpu") -> Tensor:
    """Return the 256 values in [-1, 1] of the codes, in increasing order, on a device.

    For each sign there are 2^(7-i) evenly spaced values from 10^-i to 10^(1-i), so that larger
    values are more accurate.
    """
    positive = []
    for i in range(7):
        # Without a device it would be the default one of the first caller, such as meta.
        ends = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float64, device="cpu")
        positive.append((ends[:-1] + ends[1:]) / 2 * 10.0 ** (i - 6))
    values = torch.cat(positive)
    zero, one = values.new_zeros(1), values.new_ones(1)
    return torch.cat([-values, zero, values, one]).sort().values.to(device, torch.float32)


_kept_values = functools.cache(code_values)


def _values(device: Any) -> Tensor:
    # A table that is made under a mode may be a fake, which is of no use outside of it.
    kept = not (is_traced() or in_dispatch_mode())
    return _kept_values(device) if kept else code_values(device)


def _blocks(x: Tensor, size: int) -> Tensor:
    flat = x.detach().reshape(-1).to(torch.float32)
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).reshape(-1, size)


def quantize(x: Tensor, block_size: int) -> Quantized:
    """Return `x` with the nearest code for each element, relative to the scale of its block."""
    blocks = _blocks(x, block_size)
    scales = blocks.abs().amax(dim=1)
    unit = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    values = _values(x.device)
    codes = torch.bucketize(unit, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    flat = codes.reshape(-1)[: x.numel()]
    return Quantized(flat.reshape(x.shape), scales, x.detach().new_empty(0))


def dequantize(q: Quantized, block_size: int) -> Tensor:
    """Return the tensor whose codes are `q`."""
    values = _values(q.codes.device)[q.codes.reshape(-1).long()]
    scaled = _blocks(values, block_size) * q.scales[:, None]
    return scaled.reshape(-1)[: q.codes.numel()].reshape(q.codes.shape).to(q.empty.dtype)


@dataclass(frozen=True)
class InEightBits(Wrapper):
    """Decodes the state of `inner` before each step, and encodes it afterwards."""

    block_size: int
    min_size: int

    def _is_large(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.numel() >= self.min_size

    def _coded(self, x: Any) -> Any:
        return quantize(x, self.block_size) if self._is_large(x) else x

    def init(self, params: Any) -> Any:
        """Return the state of `inner`, encoded except for what has to be exact."""
        large = [x for x in tree_leaves(params) if isinstance(x, Tensor)]
        large = [x for x in large if x.numel() >= self.min_size]
        require_whole(large, "in_8_bits", "give whole tensors, or keep the states as they are")
        state, origins = followed_start(self.inner, params)
        exact = exact_tensors(state)

        def start(x: Any) -> Any:
            found = origins.of(x)
            if is_transforming():
                return x if found or id(x) in exact else self._coded(x)
            _require_constants([p for p in found if not _is_trained(p)], DIFFERENTIATED)
            if found:
                return x.detach()
            return x if id(x) in exact else self._coded(x)

        return tree_map(start, state)

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        _require_constants(
            (updates, state),
            "gradients without a graph or transform, because codes have no derivative; use the "
            "optimizer without in_8_bits to differentiate steps, or detach the gradients",
        )

        old = tree_leaves(state, is_leaf=is_coded, none_is_leaf=True)

        def full(x: Any) -> Any:
            return dequantize(x, self.block_size) if is_coded(x) else x

        state = tree_map(full, state, is_leaf=is_coded)
        if torch.is_grad_enabled():
            # The parameters that a program trains in place are leaves of its graph.
            params = tree_map(lambda p: p.detach() if _is_trained(p) else p, params)
        stepped, state = self.inner.update(updates, state, params=params, inplace=inplace)
        _require_constants((stepped, state), DIFFERENTIATED)
        new, spec = tree_flatten(state, none_is_leaf=True)
        # What `init` left as it is stays so.
        kept = map(self._is_large, old) if len(old) == len(new) else [False] * len(new)
        exact = exact_tensors(state)
        coded = [x if keep or id(x) in exact else self._coded(x) for x, keep in zip(new, kept)]
        return stepped, tree_unflatten(spec, coded)


def is_coded(x: Any) -> bool:
    """Return whether a leaf of a state is a quantized tensor."""
    return isinstance(x, Quantized)


def _is_trained(p: Any) -> bool:
    return isinstance(p, Tensor) and p.is_leaf and not is_transforming()


def _require_constants(trees: Any, expected: str) -> None:
    """Raise if a derivative of a tensor is taken, which codes would cut off."""
    if not is_traced() and any_watched([x for x in tree_leaves(trees) if isinstance(x, Tensor)]):
        raise NotDifferentiableError(f"in_8_bits: expected {expected}")


def in_8_bits(
    inner: GradientTransformation, block_size: int = 256, min_size: int = 4096
) -> GradientTransformation:
    r"""Return `inner` with its states in one byte per element, plus 4 bytes per block.

    Between steps, a state is kept as :math:`s_b\, c`, with s_b the largest absolute value of a
    block and c the nearest of 256 numbers in [-1, 1]. For each sign, 64 of them are between 0.1 and
    1, and each decade below has half as many, down to 1e-7. The error of an element x is at most
    0.0071 s_b, 0.0043 s_b, 0.00085 s_b, 0.00017 s_b, ... if |x| is at most s_b, 0.1 s_b,
    0.01 s_b, 0.001 s_b, ... Elements below 2.7e-7 s_b can become zero, so the eps of Adam matters.

    Copies of the parameters in a state, such as the iterates of schedule-free optimizers, the slow
    weights of lookahead and the average of ASGD, stay as they are: steps smaller than the error
    would be lost in them.
    So do the matrices of Shampoo, SOAP, PSGD and GaLore, which would no longer be positive
    definite, orthogonal or triangular, and the ascent of `sam`, from which steps go back.

    Codes have no derivative: use it for steps in place. A differentiated step raises.

    Args:
        inner: The optimizer.
        block_size: Number of elements that share a scale, >= 1.
        min_size: Tensors with fewer elements are not quantized.

    Raises:
        ValueError: `block_size` is out of range.
        TypeError: From `init`, for DTensors, whose blocks would depend on their shards.
        NotDifferentiableError: From `update`, for gradients or states that are differentiated.

    References:
        T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer, 8-bit Optimizers via Block-wise
        Quantization, 2022, https://arxiv.org/abs/2110.02861, section 2.

    Example:
        >>> import torch, torchopt
        >>> optimizer = in_8_bits(torchopt.sgd(0.1, momentum=0.9), min_size=1)
        >>> state = optimizer.init(torch.zeros(3))
        >>> _, state = optimizer.update(torch.tensor([1.0, 0.5, 0.0]), state)
        >>> state[0].trace[0].codes.dtype
        torch.uint8
    """
    check(block_size, "an integer >= 1", "block_size value")
    require_transformation(inner, "in_8_bits(inner, ...)")
    return InEightBits(inner, block_size, min_size).pair()
