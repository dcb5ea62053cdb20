# SPDX-License-Identifier: Apache-2.0
"""Products of matrices in a block, which a second evaluation of it does not compute again.

They are most of the time of a block, and the smaller part of its memory. Of a product Y = AB the
first evaluation keeps Y and its tangent Y' = A'B + AB'. In the second one the slopes for a
cotangent D of Y are D Bᵀ and Aᵀ D. Their own derivative, in the direction of A' and B', is

    D B'ᵀ for A,    A'ᵀ D for B,    Y' for D.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from torchopt.torch_internals import any_autocast, in_forward_mode, top_saved_tensor_hooks
from torchopt.tree_function import PLAIN, apply_sweep, is_transforming

__all__ = ["Products", "parts_of"]

_LEAST = 32  # numbers that are summed up, from which on a product is kept
_NAMES = {"linear", "matmul", "__matmul__", "mm", "bmm"}


def parts_of(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a tensor without its tangent, and the tangent."""
    return forward_ad.unpack_dual(x) if in_forward_mode() else (x, None)


class Products(TorchFunctionMode):
    """A context in which products are kept, and within `again` those that are used in their place.

    A second evaluation has the same arguments. One that takes another way than the first computes
    what is left itself.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        super().__init__()
        self._kept: list[_Product] = []
        self._remaining: Iterator[_Product] | None = None
        self._known: Set[int] = frozenset()

    @contextlib.contextmanager
    def again(self, known: Sequence[Tensor]) -> Iterator[None]:
        """Return a context for the second evaluation. It uses up what was kept.

        Args:
            known: Factors whose own slopes nobody asks for, only their derivatives.
        """
        self._known = {id(x) for x in known}
        self._remaining, self._kept = iter(self._kept), []
        try:
            with self:
                yield
        finally:
            self._remaining = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or return a product that was kept."""
        operands = _operands(getattr(func, "__name__", None), args) if not kwargs else None
        if operands is None:
            return func(*args, **(kwargs or {}))
        if self._remaining is None:
            out = func(*args)
            self._kept.append(_Product(operands, out))
            return out
        kept = next(self._remaining, None)
        if kept is None or not kept.is_of(operands):
            self._remaining = iter(())
            return func(*args)
        if kept.is_changed():
            return func(*args)
        return kept.again(operands, is_known=id(args[1]) in self._known)


def _operands(name: Any, args: Sequence[Any]) -> list[Tensor] | None:
    """Return the factors of a product, and perhaps what is added to each row of it."""
    if name not in _NAMES or not all(type(x) in PLAIN for x in args if x is not None):
        return None
    a, b, *more = (x for x in args if x is not None)
    if name == "linear":
        b = b.mT
    shared = a.ndim >= 2 and b.ndim == 2
    if not (shared or (a.ndim == b.ndim > 2 and a.shape[:-2] == b.shape[:-2])):
        return None
    if a.size(-1) < _LEAST or not a.is_floating_point():
        return None
    # A checkpoint counts what its function saves, and evaluates it once more, outside of this.
    if any_autocast() or is_transforming() or top_saved_tensor_hooks(True) is not None:
        return None
    operands = [a, b, *more]
    alike = all(x.dtype == a.dtype and x.layout is torch.strided for x in operands)
    return operands if alike else None


def _form(operands: Sequence[Tensor]) -> list[Any]:
    return [(x.shape, x.dtype, x.device) for x in operands]


class _Product:
    """A product that was computed, and its tangent."""

    def __init__(self, operands: Sequence[Tensor], out: Tensor) -> None:
        value, tangent = parts_of(out)
        self._form = _form(operands)
        self._value, self._tangent = value.detach(), None if tangent is None else tangent.detach()
        self._versions = self._counted()

    def _counted(self) -> list[int]:
        return [x._version for x in (self._value, self._tangent) if x is not None]

    def is_of(self, operands: Sequence[Tensor]) -> bool:
        """Return whether it may be the product of these."""
        return self._form == _form(operands)

    def is_changed(self) -> bool:
        """Return whether it was written to since."""
        return self._counted() != self._versions

    def again(self, operands: Sequence[Tensor], *, is_known: bool) -> Tensor:
        """Return the product, with the graph that these give it."""
        out: Tensor = apply_sweep(_Again(self._value, self._tangent, is_known), *operands)[0]
        return out


class _Again:
    """A product that is kept, as `torchopt.tree_function.Sweep` wants it."""

    def __init__(self, value: Tensor, tangent: Tensor | None, is_known: bool) -> None:
        self._value, self._tangent, self._is_known = [value], tangent, is_known

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the product."""
        return (self._value.pop(),)

    def pull_back(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the slopes; in grad mode to be differentiated, once."""
        (cotangent,) = cotangents
        assert cotangent is not None
        if not torch.is_grad_enabled():
            return _slopes(inputs, cotangent)
        slopes = _Slopes(self._tangent, self._is_known)
        return apply_sweep(slopes, *inputs, cotangent)


def _slopes(
    inputs: Sequence[Tensor], cotangent: Tensor, *, is_known: bool = False
) -> tuple[Tensor, ...]:
    """Return the cotangents of the factors, and of what is added to each row."""
    a, b, *more = inputs
    rows, given = _rows(a, b), _rows(cotangent, b)
    found = [(given @ b.mT).reshape(a.shape)]
    if is_known:
        return (*found, *(x.new_zeros(()).expand_as(x) for x in (b, *more)))
    # As torch does it, to the last bit.
    turned = b.stride(-2) == 1 and b.stride(-1) == b.size(-2)
    found.append((given.mT @ rows).mT if turned else rows.mT @ given)
    return (*found, *(cotangent.sum(tuple(range(cotangent.ndim - 1))) for _ in more))


def _rows(x: Tensor, b: Tensor) -> Tensor:
    """Return x as one matrix, if its rows all meet the same one."""
    return x.flatten(0, -2) if b.ndim == 2 else x


class _Slopes:
    """The slopes of a product, as `torchopt.tree_function.Sweep` wants them."""

    def __init__(self, tangent: Tensor | None, is_known: bool) -> None:
        self._tangent, self._is_known = tangent, is_known

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the slopes; zeros for those that nobody asks for."""
        *operands, cotangent = inputs
        return _slopes(operands, cotangent, is_known=self._is_known)

    def pull_back(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return their derivative, in the direction of the tangents of the factors."""
        a, b, *_, given = inputs
        da, db, *more = cotangents
        tangent, self._tangent = self._tangent, None
        if tangent is None:
            terms = [*([] if da is None else [da @ b]), *([] if db is None else [a @ db])]
            terms += [x.expand_as(given) for x in more if x is not None]
            tangent = sum(terms[1:], terms[0]) if terms else None
        of_a = None if db is None else (given @ db.mT).reshape(a.shape)
        of_b = None if da is None else _rows(da, b).mT @ _rows(given, b)
        return (of_a, of_b, *(None for _ in more), tangent)
