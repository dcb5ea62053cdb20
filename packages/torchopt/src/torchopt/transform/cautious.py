# SPDX-License-Identifier: Apache-2.0
"""Leave out the elements of a step that increase the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation, require_transformation
from torchopt.precision import dense, widened
from torchopt.transform.base import Wrapper
from torchopt.tree import tree_map

__all__ = ["cautious"]


@dataclass(frozen=True)
class Cautious(Wrapper):
    """Masks the updates of `inner`."""

    maximize: bool

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Step `inner` and mask what it returns."""
        stepped, state = self.inner.update(updates, state, params=params, inplace=inplace)
        return tree_map(self._masked, stepped, updates, none_is_leaf=True), state

    def _masked(self, u: Tensor | None, g: Tensor | None) -> Tensor | None:
        if u is None or g is None:
            return u
        u, g = dense(u), dense(g)
        if u.is_complex():
            pairs = (torch.view_as_real(x.resolve_conj()) for x in (u, g))
            masked = self._masked(*pairs)
            assert masked is not None
            return torch.view_as_complex(masked)
        product = g.sign() * u.sign()  # cannot underflow
        aligned = product >= 0 if self.maximize else product <= 0
        share = u.numel() / (aligned.sum().to(torch.float64) + 1.0)
        # NaN is kept, so that it stays visible. The share may be too large for a half type.
        kept: Tensor = widened(torch.where(aligned | u.isnan(), u, 0.0))
        return (kept * share.to(kept.dtype)).to(u.dtype)


def cautious(inner: GradientTransformation, *, maximize: bool = False) -> GradientTransformation:
    r"""Return `inner` without the elements of its step that do not point downhill.

    .. math::
        \phi = [u \circ g \le 0], \qquad u' = \frac{d}{|\phi|_0 + 1}\, \phi \circ u

    with u the update of `inner` (which is added to the parameters), g the gradient, and d the
    number of elements of the tensor. The factor compensates for the elements that are left out.

    The mask is piecewise constant, so the derivative is that of the elements that are kept. It is
    exact wherever no element of u or g is zero. Weight decay inside `inner` is a part of u. To
    leave it unmasked, wrap the direction alone:
    `chain(cautious(scale_by_adam(), maximize=True), add_decayed_weights(0.1), scale(-1e-3))`.

    Args:
        inner: The optimizer.
        maximize: Whether `inner` points uphill, as directions without the minus sign do: elements
            are kept where they have the sign of g.

    References:
        K. Liang, L. Chen, B. Liu, Q. Liu, Cautious Optimizers: Improving Training with One Line of
        Code, 2024, https://arxiv.org/abs/2411.16085, Algorithm 1.

    Example:
        >>> import torch, torchopt
        >>> optimizer = cautious(torchopt.sgd(1.0, momentum=0.9))
        >>> p = torch.zeros(2)
        >>> state = optimizer.init(p)
        >>> _, state = optimizer.update(torch.tensor([1.0, 1.0]), state)
        >>> optimizer.update(torch.tensor([1.0, -0.5]), state)[0]  # the sum is 1.9, 0.4
        tensor([-1.9000,  0.0000])
    """
    require_transformation(inner, "cautious(inner)")
    return Cautious(inner, maximize).pair()
