# SPDX-License-Identifier: Apache-2.0
"""Linear operators: square linear maps on trees of tensors, with explicit parameters."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchopt.linear_solve.layout import Layout
from torchopt.precision import autocast_devices, present_autocast, without_autocast
from torchopt.tree import PyTreeSpec, tree_flatten, tree_unflatten
from torchopt.tree_function import linearize, uncompiled

__all__ = ["BoundOperator", "LinearOperator", "Tag", "in_present_autocast", "transpose_linear"]

Tensors = tuple[Tensor, ...]
FlatMap = Callable[[Tensor], Tensor]


class Tag(enum.Enum):
    """A known property of an operator, which is not checked.

    SYMMETRIC means Hermitian for complex operators, and so does POSITIVE_DEFINITE.
    """

    SYMMETRIC = "symmetric"
    POSITIVE_DEFINITE = "positive_definite"
    DIAGONAL = "diagonal"
    LOWER_TRIANGULAR = "lower_triangular"
    UPPER_TRIANGULAR = "upper_triangular"


def _closure_of_tags(tags: Iterable[Tag | str]) -> frozenset[Tag]:
    found = {Tag(tag) for tag in tags}
    if Tag.POSITIVE_DEFINITE in found:
        found.add(Tag.SYMMETRIC)
    return frozenset(found)


_TRANSPOSED = {
    Tag.LOWER_TRIANGULAR: Tag.UPPER_TRIANGULAR,
    Tag.UPPER_TRIANGULAR: Tag.LOWER_TRIANGULAR,
}


def _transposed_tags(tags: frozenset[Tag]) -> frozenset[Tag]:
    return frozenset(_TRANSPOSED.get(tag, tag) for tag in tags)


def _conjugate(number: Any) -> Any:
    return number.conj() if isinstance(number, Tensor) else number.conjugate()


def transpose_linear(function: FlatMap, example: Tensor) -> FlatMap:
    """Return v -> Aᴴ v for a linear function v -> A v, linearised once.

    Args:
        function: A linear function of vectors.
        example: A vector of the size, dtype and device that it takes. Its value is not used.
    """
    _, pull = linearize(function, torch.zeros_like(example))
    return lambda v: pull(v)[0]


@dataclass(frozen=True)
class BoundOperator:
    """A linear operator on vectors of length n, with its parameters filled in, for solvers.

    Attributes:
        mv: v -> A v.
        rmv: v -> Aᴴ v.
        layout: The trees that the vectors represent.
        tags: The known properties of A.
        adjoint: Whether A is the adjoint of the operator that was made first.
        again: Binds the operator again, for operators that draw random numbers; None: the operator
            never changes.
    """

    mv: FlatMap
    rmv: FlatMap
    layout: Layout
    tags: frozenset[Tag] = frozenset()
    adjoint: bool = False
    again: Callable[[], BoundOperator] | None = None

    @property
    def T(self) -> BoundOperator:  # noqa: N802 - as in torch
        """Aᴴ."""
        return replace(
            self,
            mv=self.rmv,
            rmv=self.mv,
            tags=_transposed_tags(self.tags),
            adjoint=not self.adjoint,
            again=None if self.again is None else lambda: self.fresh().T,
        )

    def fresh(self) -> BoundOperator:
        """Return the operator bound again, so that it draws new random numbers."""
        return self if self.again is None else self.again()

    def through(self, change: Callable[[FlatMap, bool], FlatMap]) -> BoundOperator:
        """Return the operator with its products changed.

        Args:
            change: Maps a product, and whether it is the one with Aᴴ, to another product.
        """
        return replace(
            self,
            mv=change(self.mv, False),
            rmv=change(self.rmv, True),
            again=None if self.again is None else lambda: self.fresh().through(change),
        )

    @property
    def size(self) -> int:
        """The number of unknowns, n."""
        return self.layout.size

    def matrix(self, like: Tensor, *, vectorize: bool) -> Tensor:
        """Return A as an n x n matrix, by n products.

        Args:
            like: A vector of the dtype and device of the matrix.
            vectorize: Compute the products under one `torch.func.vmap` instead of one by one.
        """
        eye = torch.eye(self.size, dtype=like.dtype, device=like.device)
        if self.size == 0:
            return eye
        if vectorize:
            columns: Tensor = torch.func.vmap(self.mv)(eye)
            return columns.T
        return torch.stack([self.mv(e) for e in eye.unbind()], dim=1)

    def shifted(self, ridge: float | Tensor | None) -> BoundOperator:
        """Return A + ridge I."""
        if ridge is None:
            return self
        both = ridge, _conjugate(ridge)
        return self.through(lambda product, adjoint: lambda v: product(v) + both[adjoint] * v)


def _bind_function(
    function: Callable[[Any, Any], Any],
    params_spec: PyTreeSpec,
    layout: Layout,
    hermitian: bool,
    like: tuple[torch.dtype, torch.device],
) -> Callable[..., tuple[FlatMap, FlatMap]]:
    """Return the map tensors -> (mv, rmv) for a function of (params, tree)."""

    def bind(*tensors: Tensor) -> tuple[FlatMap, FlatMap]:
        params = tree_unflatten(params_spec, tensors)

        def mv(v: Tensor) -> Tensor:
            return layout.ravel(function(params, layout.unravel(v)), "output of the operator")

        if hermitian:
            return mv, mv
        dtype, device = like
        pulls: list[FlatMap] = []

        def rmv(v: Tensor) -> Tensor:
            if not pulls:
                pulls.append(
                    transpose_linear(mv, torch.zeros(layout.size, dtype=dtype, device=device))
                )
            return pulls[0](v)

        return mv, rmv

    return bind


@dataclass(frozen=True)
class LinearOperator:
    """A square linear map A(p) on trees of tensors, with explicit parameters p.

    Solves with it are differentiable with respect to p, in every mode and to any order, because p
    is an argument and not hidden in a closure. Make one with `from_function` or `from_matrix`.

    Attributes:
        bind: Maps the parameters to the products v -> A v and v -> Aᴴ v on vectors.
        params: The tensors that A depends on.
        layout: The trees that A maps.
        tags: The known properties of A.
        adjoint: Whether A is the adjoint of the operator that was made first.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import CG, LinearOperator, linear_solve
        >>> d = torch.tensor([2.0, 4.0], requires_grad=True)
        >>> A = LinearOperator.from_function(lambda d, v: d * v, d, torch.ones(2), ["diagonal"])
        >>> linear_solve(A, torch.tensor([2.0, 2.0]), CG()).value.sum().backward()
        >>> d.grad  # -b / d^2
        tensor([-0.5000, -0.1250])
    """

    bind: Callable[..., tuple[FlatMap, FlatMap]]
    params: Tensors
    layout: Layout
    tags: frozenset[Tag] = field(default_factory=frozenset)
    adjoint: bool = False

    @staticmethod
    @uncompiled
    def from_function(
        function: Callable[[Any, Any], Any], params: Any, like: Any, tags: Iterable[Tag | str] = ()
    ) -> LinearOperator:
        """Return the operator v -> function(params, v).

        Args:
            function: Maps params and a tree v to another tree like v; linear in v.
            params: A tree of tensors; solves are differentiable with respect to them.
            like: A tree of tensors with the structure, shapes and dtypes of v.
            tags: The known properties of the operator.

        Raises:
            TypeError: `params` contain something other than tensors, or `like` is not a tree of
                floating-point or complex tensors.
        """
        layout = Layout.of(like, "LinearOperator: like")
        tensors, spec = tree_flatten(params)
        for x in tensors:
            if not isinstance(x, Tensor):
                raise TypeError(
                    "LinearOperator.from_function: params: expected a tree of tensors, got "
                    f"{type(x).__name__} in it; close over numbers in the function"
                )
        known = _closure_of_tags(tags)
        vector = layout.ravel(like)
        bind = _bind_function(
            function, spec, layout, Tag.SYMMETRIC in known, (vector.dtype, vector.device)
        )
        return LinearOperator(bind, tuple(tensors), layout, known)

    @staticmethod
    def from_matrix(matrix: Tensor, tags: Iterable[Tag | str] = ()) -> LinearOperator:
        """Return the operator of an [n, n] matrix on vectors [n].

        Raises:
            TypeError: The matrix is not square.
        """
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise TypeError(
                f"Linear operator must be a square matrix, but has shape: {tuple(matrix.shape)}"
            )

        def product(m: Tensor) -> FlatMap:
            def mv(v: Tensor) -> Tensor:
                if not autocast_devices():
                    return m @ v
                with without_autocast():
                    return m @ v

            return mv

        def bind(m: Tensor) -> tuple[FlatMap, FlatMap]:
            return product(m), product(m.mH)

        like = torch.empty(len(matrix), dtype=matrix.dtype, device=matrix.device)
        layout = Layout.of(like, "LinearOperator: matrix")
        return LinearOperator(bind, (matrix,), layout, _closure_of_tags(tags))

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as in torch
        """Aᴴ."""
        if Tag.SYMMETRIC in self.tags:
            return self
        bind = self.bind

        def swapped(*params: Tensor) -> tuple[FlatMap, FlatMap]:
            mv, rmv = bind(*params)
            return rmv, mv

        tags = _transposed_tags(self.tags)
        return replace(self, bind=swapped, tags=tags, adjoint=not self.adjoint)

    def shifted(self, ridge: float | Tensor | None) -> LinearOperator:
        """Return A + ridge I."""
        if ridge is None:
            return self
        bind, extra = self.bind, (ridge,) if isinstance(ridge, Tensor) else ()
        if extra and extra[0].numel() != 1:
            raise ValueError(f"ridge: expected one number, got shape {tuple(extra[0].shape)}")

        def shifted(*params: Tensor) -> tuple[FlatMap, FlatMap]:
            mv, rmv = bind(*params[: len(params) - len(extra)])
            shift = params[-1].reshape(()) if extra else ridge
            back = _conjugate(shift)
            return lambda v: mv(v) + shift * v, lambda v: rmv(v) + back * v

        # A + i I is not Hermitian for Hermitian A.
        real = not (extra[0].is_complex() if extra else isinstance(ridge, complex))
        tags = self.tags if real else self.tags - {Tag.SYMMETRIC, Tag.POSITIVE_DEFINITE}
        return replace(self, bind=shifted, params=(*self.params, *extra), tags=tags)

    def triangle(self) -> LinearOperator:
        """Return the triangle of A that the tags name, with zeros in the other one."""
        bind, layout = self.bind, self.layout
        upper = Tag.UPPER_TRIANGULAR in self.tags

        def masked(*params: Tensor) -> tuple[FlatMap, FlatMap]:
            matrix = BoundOperator(*bind(*params), layout).matrix(
                torch.zeros(layout.size, dtype=layout.dtype, device=self._device()),
                vectorize=False,
            )
            part = matrix.triu() if upper else matrix.tril()
            return lambda v: part @ v, lambda v: part.mH @ v

        return replace(self, bind=masked)

    def normal(self) -> LinearOperator:
        """Return AᴴA."""
        bind = self.bind

        def product(*params: Tensor) -> tuple[FlatMap, FlatMap]:
            mv, rmv = bind(*params)

            def normal(v: Tensor) -> Tensor:
                return rmv(mv(v))

            return normal, normal

        return replace(self, bind=product, tags=frozenset({Tag.SYMMETRIC}))

    def bound(self, params: Tensors | None = None) -> BoundOperator:
        """Return the operator on vectors for these parameters; None: its own."""
        given = self.params if params is None else params
        mv, rmv = self.bind(*given)
        return BoundOperator(
            mv, rmv, self.layout, self.tags, self.adjoint, lambda: self.bound(given)
        )

    @uncompiled
    def mv(self, tree: Any) -> Any:
        """Return A v for a tree v."""
        vector = self.layout.ravel(tree, "LinearOperator.mv")
        return self.layout.unravel(self.bound().mv(vector))

    @uncompiled
    def as_matrix(self) -> Tensor:
        """Return A as an [n, n] matrix, by n products."""
        like = torch.zeros(self.layout.size, dtype=self.layout.dtype, device=self._device())
        return self.bound().matrix(like, vectorize=True)

    def _device(self) -> torch.device:
        return self.params[0].device if self.params else torch.get_default_device()


def in_present_autocast(operator: LinearOperator) -> LinearOperator:
    """Return the operator with all its products in the present autocast settings."""
    bind, keep = operator.bind, present_autocast()
    if keep(bind) is bind:
        return operator

    def kept(*params: Tensor) -> tuple[FlatMap, FlatMap]:
        mv, rmv = keep(bind)(*params)
        return keep(mv), keep(rmv)

    return replace(operator, bind=kept)
