# SPDX-License-Identifier: Apache-2.0
r"""Attention that can be differentiated twice, in memory linear in the length of the sequence.

The fast kernels of `torch.nn.functional.scaled_dot_product_attention` have neither a second
derivative nor a forward mode. Its math implementation has both but keeps an array
`[queries, keys]`. Here the same function

.. math::
    O = \mathrm{softmax}(s\, Q K^\top + M)\, V

is computed for one chunk of queries at a time, and all its derivatives are computed in the same
way, starting from the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.precision import with_autocast
from torchopt.torch_internals import autocast_now
from torchopt.tree_function import Operation, apply_operation, is_transforming, linearize

__all__ = ["attention"]

_BYTES = 2**22  # of the weights of one chunk of queries


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what `torch.nn.functional.scaled_dot_product_attention` returns.

    Differentiable to any order, in every mode. Without dropout and outside transforms, every
    derivative takes memory linear in the number of queries.

    Args:
        query: `[*batch, queries, size]`.
        key: `[*batch, keys, size]`.
        value: `[*batch, keys, width]`.
        attn_mask: A tensor that is added to s Q K^T, or a bool tensor that is True for the keys
            that a query sees; it broadcasts to `[*batch, queries, keys]`.
        dropout_p: Probability with which a weight is dropped; 0 by default.
        is_causal: Whether a query sees only the keys up to its own position.
        scale: The factor s; None: 1 / sqrt(size).
        enable_gqa: Whether several heads of the query share one head of key and value.

    Returns:
        `[*batch, queries, width]`; zeros for a query that sees no key.

    Raises:
        ValueError: Both `attn_mask` and `is_causal=True` are given.

    Example:
        >>> import torch
        >>> q = torch.eye(2).reshape(1, 1, 2, 2)
        >>> attention(q, q, q, is_causal=True)[0, 0, 0]
        tensor([1., 0.])
    """
    if enable_gqa:
        repeats = query.size(-3) // key.size(-3)
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    mask = _mask(query, key, attn_mask, is_causal)
    rows = query.size(-2)
    batch = math.prod(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]))
    size = max(1, _BYTES // max(1, batch * key.size(-2) * query.element_size()))
    # Inside transforms and with dropout, separate operations for each chunk would break the
    # rules of the transform and of random numbers.
    if dropout_p > 0 or is_transforming() or size >= rows:
        return _chunk(query, key, value, mask, scale=scale, dropout_p=dropout_p)
    parts = []
    for start in range(0, rows, size):
        some = None if mask is None or mask.size(-2) == 1 else mask[..., start : start + size, :]
        inputs: tuple[Tensor, ...] = (query[..., start : start + size, :], key, value)
        used = some if mask is None or mask.size(-2) > 1 else mask
        if used is not None:
            inputs = (*inputs, used) if used.is_floating_point() else inputs
        constant = used if used is not None and not used.is_floating_point() else None
        parts.append(_recomputed(_bound(scale, constant), inputs))
    return torch.cat(parts, dim=-2)


def _bound(scale: float, constant: Tensor | None) -> Callable[..., Tensor]:
    cast = autocast_now()  # a derivative is computed outside of it

    def chunk(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        with with_autocast(cast):
            return _chunk(query, key, value, constant if mask is None else mask, scale=scale)

    return chunk


def _mask(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    if not is_causal:
        return None if attn_mask is None else torch.atleast_2d(attn_mask)
    if attn_mask is not None:
        raise ValueError(
            "scaled_dot_product_attention: expected attn_mask=None with is_causal=True, got both."
        )
    shape = (query.size(-2), key.size(-2))
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()


def _chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    weights = (query * scale) @ key.mT
    if mask is None:
        weights = weights.softmax(-1)
    else:
        hidden = ~mask if mask.dtype == torch.bool else mask == float("-inf")
        # A query that sees no key gets zeros, as in torch. Its weights are made finite before the
        # softmax, so that no derivative is NaN.
        blind = hidden.all(-1, keepdim=True)
        added = weights if mask.dtype == torch.bool else weights + mask
        weights = added.masked_fill(hidden, float("-inf")).masked_fill(blind, 0.0)
        weights = weights.softmax(-1).masked_fill(blind, 0.0)
    if dropout_p > 0:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    return weights @ value


def _recomputed(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Tensor:
    """Return the tensor `function(*tensors)`; each derivative is computed from the tensors."""
    (out,) = apply_operation(_operation(lambda *xs: (function(*xs),), len(tensors)), *tensors)
    return out


def _operation(function: Callable[..., tuple[Tensor, ...]], count: int) -> Operation:
    """Return a function of `count` tensors as an operation, and its derivatives likewise."""

    def derivative(outputs: int) -> Operation:
        def pulled(*tensors: Tensor) -> tuple[Tensor, ...]:
            _, pull = linearize(function, *tensors[:count])
            return tuple(pull(tuple(tensors[count:])))

        return _operation(pulled, count + outputs)

    return Operation(function, None, function, count, derivative)
