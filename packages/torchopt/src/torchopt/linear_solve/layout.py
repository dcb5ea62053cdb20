# SPDX-License-Identifier: Apache-2.0
"""The layout of a tree of tensors in one vector."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchopt.shown import shown
from torchopt.tree import PyTreeSpec, tree_flatten, tree_unflatten

__all__ = ["Layout"]

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """The layout of a tree of tensors in one vector: its raveled leaves, concatenated.

    Attributes:
        spec: The structure of the tree.
        shapes: The shape of each leaf.
        dtypes: The dtype of each leaf; the vector has their common dtype.
        real: Whether a complex number takes two places, for its real and its imaginary part; leaves
            are then converted to the dtype of the vector. Maps of such vectors need not be
            complex-linear.
    """

    spec: PyTreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    real: bool = False

    @staticmethod
    def of(tree: Any, what: str, *, real: bool = False) -> Layout:
        """Return the layout of a tree of floating-point or complex tensors.

        Raises:
            TypeError: A leaf is not such a tensor, or there are no leaves; the message starts with
                `what`.
            ValueError: The leaves are on several devices.
        """
        leaves, spec = tree_flatten(tree)
        if not leaves:
            raise TypeError(f"{what}: expected a tree with at least one tensor, got {shown(tree)}")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{what}: expected tensors, got {type(leaf).__name__}")
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise TypeError(
                    f"{what}: expected floating-point or complex tensors, got {leaf.dtype}"
                )
        devices = {leaf.device for leaf in leaves}
        if len(devices) > 1:
            raise ValueError(
                f"{what}: expected tensors on one device, got {sorted(map(str, devices))}"
            )
        return Layout(spec, tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves), real)

    @cached_property
    def sizes(self) -> list[int]:
        """The number of places of each leaf."""
        pairs = (self.real and dtype.is_complex for dtype in self.dtypes)
        return [shape.numel() * (1 + pair) for shape, pair in zip(self.shapes, pairs)]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the vector."""
        dtypes = (x.to_real() if self.real else x for x in self.dtypes)
        return functools.reduce(torch.promote_types, dtypes)

    @property
    def is_paired(self) -> bool:
        """Whether there are complex numbers that take two places."""
        return self.real and any(dtype.is_complex for dtype in self.dtypes)

    @cached_property
    def pairs(self) -> Layout:
        """The layout of the same vector for trees with real pairs instead of complex numbers.

        Linear solvers get this one, because they may rely on linearity.
        """
        if not self.is_paired:
            return self
        both = list(zip(self.shapes, self.dtypes))
        shapes = (torch.Size((*s, 2)) if t.is_complex else s for s, t in both)
        return Layout(self.spec, tuple(shapes), tuple(t.to_real() for _, t in both))

    @property
    def size(self) -> int:
        """The length of the vector."""
        return sum(self.sizes)

    def ravel(self, tree: Any, what: str = "tree") -> Tensor:
        """Return the vector of a tree with this layout.

        Raises:
            ValueError: The tree has another structure or other shapes; the message starts with
                `what`.
        """
        leaves, spec = tree_flatten(tree)
        if len(leaves) != len(self.shapes) or spec != self.spec:
            raise ValueError(f"{what}: expected a tree like {self.spec}, got {spec}")
        for i, (leaf, shape) in enumerate(zip(leaves, self.shapes)):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{what}: expected a tensor as leaf {i}, got {type(leaf).__name__}")
            if leaf.shape != shape:
                raise ValueError(
                    f"{what}: expected shape {tuple(shape)} for leaf {i}, got {tuple(leaf.shape)}"
                )
            if self.real and leaf.is_complex() and not self.dtypes[i].is_complex:
                raise TypeError(
                    f"{what}: expected real numbers for leaf {i}, which is {self.dtypes[i]}, got "
                    f"{leaf.dtype}. Make the solution complex, or return its real and its "
                    "imaginary part."
                )
        return self.join(leaves)

    def join(self, leaves: Iterable[Tensor]) -> Tensor:
        """Return the vector of the leaves."""
        parts = []
        for x, dtype in zip(leaves, self.dtypes):
            if self.real:
                x = torch.view_as_real(x.to(dtype).resolve_conj()) if dtype.is_complex else x
                x = x.to(self.dtype)
            parts.append(x if x.ndim == 1 else x.reshape(x.numel()))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, vector: Tensor) -> Tensors:
        """Return the leaves of a vector."""
        leaves = []
        parts = (vector,) if len(self.shapes) == 1 else vector.split(self.sizes)
        for x, shape, dtype in zip(parts, self.shapes, self.dtypes):
            if self.real and dtype.is_complex:
                re, im = x.reshape(*shape, 2).unbind(-1)
                leaves.append(torch.complex(re, im).to(dtype))
            else:
                leaves.append((x if x.shape == shape else x.reshape(shape)).to(dtype))
        return tuple(leaves)

    def unravel(self, vector: Tensor) -> Any:
        """Return the tree of a vector."""
        return tree_unflatten(self.spec, self.split(vector))
