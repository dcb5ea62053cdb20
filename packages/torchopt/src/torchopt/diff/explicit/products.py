# SPDX-License-Identifier: Apache-2.0
"""Matrix products in a block that is evaluated twice.

They take most of the time of a block. For a first derivative they are kept from one evaluation to
the next, since they are the smaller part of the memory. In forward over reverse mode they and their
tangents would be the larger part. There they are computed again, except the cotangents of
parameters, of which only the derivative is needed. For a product AB and a cotangent D, the
cotangents of the factors are D Bᵀ and Aᵀ D. Their derivative in the directions A' and B' is D B'ᵀ
for A, A'ᵀ D for B, and A'B + AB' for D.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from torchopt.torch_internals import any_autocast, in_forward_mode, no_view, top_saved_tensor_hooks
from torchopt.tree_function import PLAIN, apply_sweep, is_transforming

__all__ = ["Products", "parts_of"]

_LEAST = 32  # the least inner dimension of a product that is kept
_NAMES = {"linear", "matmul", "__matmul__", "mm", "bmm"}


def parts_of(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a tensor without its tangent, and the tangent or None."""
    return forward_ad.unpack_dual(x) if in_forward_mode() else (x, None)


class Products(TorchFunctionMode):
    """A context that keeps products; within `again` it returns the kept ones.

    The second evaluation has the same arguments. If it takes another path than the first one, it
    computes the remaining products itself.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        super().__init__()
        self._kept: list[_Product] = []
        self._remaining: Iterator[_Product] | None = None
        self._known: Set[int] = frozenset()

    @contextlib.contextmanager
    def again(self, known: Sequence[Tensor]) -> Iterator[None]:
        """Return a context for the second evaluation, which consumes the kept products.

        Args:
            known: Factors whose cotangents are not needed, only the derivatives of these.
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
            if all(parts_of(x)[1] is None for x in operands):
                self._kept.append(_Product(operands, out.detach()))
            return out
        kept = next(self._remaining, None)
        is_known = id(args[1]) in self._known
        if kept is None or not kept.is_of(operands):
            self._remaining = iter(())
            if not is_known:
                return func(*args)
            with torch.no_grad():
                kept = _Product(operands, no_view(func(*args)))
        if kept.is_changed():
            return func(*args)
        # A gradient that the block itself takes during its evaluation needs all cotangents.
        return kept.again(operands, lambda: is_known and self._remaining is None)


def _operands(name: Any, args: Sequence[Any]) -> list[Tensor] | None:
    """Return the factors of a product, and a bias if there is one; None for other operations."""
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
    # A checkpoint counts what its function saves and evaluates it again outside of this context.
    if any_autocast() or is_transforming() or top_saved_tensor_hooks(True) is not None:
        return None
    operands = [a, b, *more]
    alike = all(x.dtype == a.dtype and x.layout is torch.strided for x in operands)
    return operands if alike else None


def _form(operands: Sequence[Tensor]) -> list[Any]:
    return [(x.shape, x.dtype, x.device) for x in operands]


class _Product:
    """A product that was computed."""

    def __init__(self, operands: Sequence[Tensor], value: Tensor) -> None:
        self._form, self._value, self._version = _form(operands), value, value._version

    def is_of(self, operands: Sequence[Tensor]) -> bool:
        """Return whether this can be the product of these factors."""
        return self._form == _form(operands)

    def is_changed(self) -> bool:
        """Return whether the product was changed in place since."""
        return self._value._version != self._version

    def again(self, operands: Sequence[Tensor], is_known: Callable[[], bool]) -> Tensor:
        """Return the product with a graph from these factors."""
        out: Tensor = apply_sweep(_Again(self._value, is_known), *operands)[0]
        return out


class _Again:
    """A kept product, an implementation of `torchopt.tree_function.Sweep`."""

    def __init__(self, value: Tensor, is_known: Callable[[], bool]) -> None:
        self._value, self._is_known = [value], is_known

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the product."""
        return (self._value.pop(),)

    def pull_back(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the factors; in grad mode they can be differentiated once."""
        (cotangent,) = cotangents
        assert cotangent is not None
        if not torch.is_grad_enabled():
            return _slopes(inputs, cotangent)
        return apply_sweep(_Slopes(self._is_known()), *inputs, cotangent)


def _slopes(
    inputs: Sequence[Tensor], cotangent: Tensor, *, is_known: bool = False
) -> tuple[Tensor, ...]:
    """Return the cotangents of the factors and of the bias."""
    a, b, *more = inputs
    rows, given = _rows(a, b), _rows(cotangent, b)
    found = [(given @ b.mT).reshape(a.shape)]
    if is_known:
        return (*found, *(x.new_zeros(()).expand_as(x) for x in (b, *more)))
    # The same operations as in torch, for the same bits.
    turned = b.stride(-2) == 1 and b.stride(-1) == b.size(-2)
    found.append((given.mT @ rows).mT if turned else rows.mT @ given)
    return (*found, *(cotangent.sum(tuple(range(cotangent.ndim - 1))) for _ in more))


def _rows(x: Tensor, b: Tensor) -> Tensor:
    """Return x as one matrix if all its rows are multiplied by the same matrix b."""
    return x.flatten(0, -2) if b.ndim == 2 else x


class _Slopes:
    """The cotangents of the factors, an implementation of `torchopt.tree_function.Sweep`."""

    def __init__(self, is_known: bool) -> None:
        self._is_known = is_known

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the cotangents; zeros for those that are not needed."""
        *operands, cotangent = inputs
        return _slopes(operands, cotangent, is_known=self._is_known)

    def pull_back(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the derivative of the cotangents, given directions for the factors."""
        a, b, *_, given = inputs
        da, db, *more = cotangents
        rows, of_given = _rows(given, b), [x.expand_as(given) for x in more if x is not None]
        of_a = of_b = None
        if db is not None:
            of_a, of_given = (rows @ db.mT).reshape(a.shape), [*of_given, a @ db]
        if da is not None:
            of_b, of_given = _rows(da, b).mT @ rows, [*of_given, da @ b]
        total = sum(of_given[1:], of_given[0]) if of_given else None
        return (of_a, of_b, *(None for _ in more), total)
