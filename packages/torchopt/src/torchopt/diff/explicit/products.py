# SPDX-License-Identifier: Apache-2.0
"""Matrix products in a block that is evaluated twice.

They take most of the time of a block. For a first derivative they are kept from one evaluation to
the next, since they are the smaller part of the memory. In forward over reverse mode they and their
tangents would be the larger part. There they are computed again, except the cotangents of
parameters, of which only the derivative is needed. For a product AB and a cotangent D, the
cotangents of the factors are D Bᵀ and Aᵀ D. Their derivative in the directions A' and B' is D B'ᵀ
for A, A'ᵀ D for B, and A'B + AB' for D. The last one is the tangent of AB. It is kept where AB is
not larger than A, which saves two products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from torchopt.torch_internals import (
    any_autocast,
    in_forward_mode,
    is_zero_tensor,
    no_view,
    top_saved_tensor_hooks,
)
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
        self._kept: list[_Product] = []  # every one, in order
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
            self._kept.append(_Product(operands, out))
            return out
        kept = next(self._remaining, None)
        is_known = id(args[1]) in self._known
        if kept is None or not kept.is_of(operands):
            self._remaining, kept = iter(()), _Product(operands)
        elif kept.is_changed():
            kept = _Product(operands)
        if not (kept.is_used or is_known):
            return func(*args)
        with torch.no_grad():
            value = no_view(func(*args)) if kept.value is None else kept.value
        # A gradient that the block itself takes during its evaluation needs all cotangents.
        return kept.again(operands, value, lambda: is_known and self._remaining is None)


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
    # A checkpoint counts what its function saves and evaluates it again outside this context.
    if any_autocast() or is_transforming() or top_saved_tensor_hooks(True) is not None:
        return None
    operands = [a, b, *more]
    alike = all(x.dtype == a.dtype and x.layout is torch.strided for x in operands)
    return operands if alike else None


def _form(operands: Sequence[Tensor]) -> list[Any]:
    return [(x.shape, x.dtype, x.device) for x in operands]


def _is_small(a: Tensor, b: Tensor) -> bool:
    """Return whether the product has no more columns than numbers are summed up for each."""
    return b.size(-1) <= a.size(-1)


class _Product:
    """A product that was computed: the form of its factors, and what is kept of it.

    Attributes:
        value: The product itself, if it has no tangent.
        tangent: Its tangent, if that is small.
    """

    def __init__(self, operands: Sequence[Tensor], out: Tensor | None = None) -> None:
        self._form = _form(operands)
        value, tangent = (None, None) if out is None else parts_of(out)
        small = tangent is not None and _is_small(*operands[:2]) and not is_zero_tensor(tangent)
        self.tangent = tangent if small else None
        self.value = None if value is None or tangent is not None else value.detach()
        kept = [x for x in (self.value, self.tangent) if x is not None]
        self._versions = [(x, x._version) for x in kept]

    @property
    def is_used(self) -> bool:
        """Whether anything is kept."""
        return bool(self._versions)

    def is_of(self, operands: Sequence[Tensor]) -> bool:
        """Return whether this can be the product of these factors."""
        return self._form == _form(operands)

    def is_changed(self) -> bool:
        """Return whether what is kept was changed in place since."""
        return any(x._version != version for x, version in self._versions)

    def again(
        self, operands: Sequence[Tensor], value: Tensor, is_known: Callable[[], bool]
    ) -> Tensor:
        """Return the product with a graph from these factors."""
        out: Tensor = apply_sweep(_Again(value, self.tangent, is_known), *operands)[0]
        return out


class _Again:
    """A kept product, an implementation of `torchopt.tree_function.Sweep`."""

    def __init__(self, value: Tensor, tangent: Tensor | None, is_known: Callable[[], bool]) -> None:
        self._value, self._tangent, self._is_known = [value], tangent, is_known

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
        return apply_sweep(_Slopes(self._tangent, self._is_known()), *inputs, cotangent)


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

    def __init__(self, tangent: Tensor | None, is_known: bool) -> None:
        self._tangent, self._is_known = tangent, is_known

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
        rows, of_a, of_b = _rows(given, b), None, None
        if db is not None:
            of_a = (rows @ db.mT).reshape(a.shape)
        if da is not None:
            of_b = _rows(da, b).mT @ rows
        if self._tangent is not None:
            return (of_a, of_b, *(None for _ in more), self._tangent)
        of_given = [x.expand_as(given) for x in more if x is not None]
        of_given += [x @ y for x, y in ((a, db), (da, b)) if x is not None and y is not None]
        total = sum(of_given[1:], of_given[0]) if of_given else None
        return (of_a, of_b, *(None for _ in more), total)
