# SPDX-License-Identifier: Apache-2.0
r"""Steps with momentum in integers, which can be undone to the last bit.

Position X and velocity V are multiples of 2^-44. A step with the gradient g,

    V' = mu V + [g],    X' = X - [lr V'],

where [.] rounds to such multiples, is undone by X = X' + [lr V'] and mu V = V' - [g], with the
gradient g at X. A product with mu = n / d loses log2(d / n) bits of each velocity. They are moved
to a buffer B (Maclaurin et al. 2015, https://arxiv.org/abs/1502.03492, algorithm 3):

    B1 = B d + V mod d,    V' = n (V // d) + B1 mod n,    B' = B1 // n.

A full buffer is put aside: one word of 64 bits every 364 steps for mu = 0.9, every 60 for 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["FixedPoint", "from_units", "to_units"]

BITS = 44
UNIT = 2.0**-BITS
MOST = 2.0**60  # limit of the integers; the limit of the numbers is 2^16
FULL = 2**62


def to_units(x: Tensor) -> Tensor:
    """Return numbers as nearest multiples of the unit; complex numbers as pairs."""
    x = x.detach()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return torch.round(x.double() / UNIT).long()


def from_units(x: Tensor, like: Tensor) -> Tensor:
    """Return multiples of the unit as numbers with the dtype of `like`."""
    found = x.double() * UNIT
    if like.is_complex():
        found = torch.view_as_complex(found.contiguous())
    return found.to(like.dtype)


@dataclass(frozen=True)
class FixedPoint:
    """Positions and velocities of several tensors, and the bits that velocities have lost.

    Attributes:
        position: Multiples of the unit, int64.
        velocity: Multiples of the unit, int64.
        momentum: The fraction mu = n / d.
        buffer: One int64 for each entry of the velocities.
        levels: The number of steps in each buffer put aside, then in the current one.
        words: The buffers that were put aside.
        fits: Whether all numbers so far were small enough, a bool tensor.
    """

    position: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...]
    momentum: Fraction
    buffer: tuple[Tensor, ...]
    levels: tuple[int, ...] = (0,)
    words: tuple[tuple[Tensor, ...], ...] = field(default=(), repr=False)
    fits: Tensor | None = None

    @staticmethod
    def of(position: Sequence[Tensor], velocity: Sequence[Tensor], mu: Fraction) -> FixedPoint:
        """Return the nearest multiples of the unit, with empty buffers."""
        x, v = (tuple(map(to_units, tensors)) for tensors in (position, velocity))
        return FixedPoint(x, v, mu, tuple(map(torch.zeros_like, v))).judged((*position, *velocity))

    @property
    def capacity(self) -> int:
        """How many steps fit into a buffer."""
        n, d = self.momentum.numerator, self.momentum.denominator
        return max(1, int(math.log2(FULL / d**2) / math.log2(d / n)))

    def judged(self, numbers: Sequence[Tensor]) -> FixedPoint:
        """Return the same with `fits` updated by some numbers."""
        fits = [(x.detach().abs() < MOST * UNIT).all() for x in numbers]
        before = [] if self.fits is None else [self.fits]
        return replace(self, fits=torch.stack([*before, *fits]).all())

    def stepped(self, grads: Sequence[Tensor | None], lr: float) -> FixedPoint:
        """Return the result of a step; a tensor whose gradient is None does not change."""
        n, d = self.momentum.numerator, self.momentum.denominator
        buffer, levels, words = self.buffer, self.levels, self.words
        if levels[-1] == self.capacity:
            words, levels = (*words, buffer), (*levels, 0)
            buffer = tuple(map(torch.zeros_like, buffer))
        x, v, b = list(self.position), list(self.velocity), list(buffer)
        for i, g in enumerate(grads):
            if g is None:
                continue
            pushed = b[i] * d + v[i] % d
            v[i] = v[i].div(d, rounding_mode="floor") * n + pushed % n + to_units(g)
            b[i] = pushed.div(n, rounding_mode="floor")
            x[i] = x[i] - _times(v[i], lr)
        found = replace(
            self,
            position=tuple(x),
            velocity=tuple(v),
            buffer=tuple(b),
            levels=(*levels[:-1], levels[-1] + 1),
            words=words,
        )
        present = [g for g in grads if g is not None]
        return found.judged([*present, *(y.double() * UNIT for y in (*x, *v))])

    def positions_before(self, stepped: Sequence[bool], lr: float) -> tuple[Tensor, ...]:
        """Return the positions before a step in which the tensors `stepped` had a gradient."""
        pairs = zip(self.position, self.velocity, stepped)
        return tuple(x + _times(v, lr) if moved else x for x, v, moved in pairs)

    def undone(self, grads: Sequence[Tensor | None], lr: float) -> FixedPoint:
        """Return the values before a step with these gradients."""
        n, d = self.momentum.numerator, self.momentum.denominator
        v, b = list(self.velocity), list(self.buffer)
        for i, g in enumerate(grads):
            if g is None:
                continue
            decayed = v[i] - to_units(g)
            pushed = b[i] * n + decayed % n
            v[i] = decayed.div(n, rounding_mode="floor") * d + pushed % d
            b[i] = pushed.div(d, rounding_mode="floor")
        levels, words = (*self.levels[:-1], self.levels[-1] - 1), self.words
        if levels[-1] == 0 and words:
            b, levels, words = list(words[-1]), levels[:-1], words[:-1]
        return replace(
            self,
            position=self.positions_before([g is not None for g in grads], lr),
            velocity=tuple(v),
            buffer=tuple(b),
            levels=levels,
            words=words,
        )


def _times(v: Tensor, lr: float) -> Tensor:
    return torch.round(v.double() * lr).long()
