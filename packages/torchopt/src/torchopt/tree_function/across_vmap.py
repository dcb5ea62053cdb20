# SPDX-License-Identifier: Apache-2.0
"""Call functions below a vmap, on whole batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.torch_internals import count_transforms, is_batched
from torchopt.tree import tree_flatten, tree_unflatten

__all__ = ["call_across_vmap"]

# Takes a function, its tensors and one more argument, and returns the result of the function.
Caller = Callable[[Callable[..., Any], Sequence[Tensor], Any], Any]


class _AcrossVmap(torch.autograd.Function):
    """A Function that is only ever called under vmap, and only has that rule."""

    @staticmethod
    def forward(*args: Any) -> Any:
        raise AssertionError("called outside of a vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        raise AssertionError("called outside of a vmap")

    @staticmethod
    def vmap(info: Any, in_dims: Any, caller: Any, *tensors: Tensor) -> Any:
        return caller(info, in_dims[1:], tensors)


def call_across_vmap(
    call: Caller, function: Callable[..., Any], tensors: Sequence[Tensor], more: Any
) -> Any:
    """Return `call(function, tensors, more)`, run below the surrounding vmap.

    There `function` operates on whole batches. If there is no surrounding transform, another one
    than a vmap, or more than one, or if no tensor is batched, `function(*tensors)` is called as it
    is.
    """
    if count_transforms() != 1 or not any(map(is_batched, tensors)):
        return function(*tensors)
    form: list[Any] = []

    def below(info: Any, dims: tuple[int | None, ...], plain: tuple[Tensor, ...]) -> Any:
        def one(*inner: Tensor) -> Any:
            leaves, spec = tree_flatten(function(*inner), none_is_leaf=True)
            others = [None if isinstance(x, Tensor) else x for x in leaves]
            form[:] = [spec, others, [isinstance(x, Tensor) for x in leaves]]
            return tuple(x for x in leaves if isinstance(x, Tensor))

        batched = torch.func.vmap(one, dims, randomness=info.randomness)
        out = call(batched, plain, more)
        return out, (0,) * len(out)

    found = iter(_AcrossVmap.apply(below, *tensors))  # type: ignore[no-untyped-call]
    spec, others, tensor = form
    return tree_unflatten(spec, [next(found) if t else x for t, x in zip(tensor, others)])
