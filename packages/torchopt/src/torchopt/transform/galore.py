# SPDX-License-Identifier: Apache-2.0
"""Step matrices in a low-dimensional subspace of their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation, require_transformation
from torchopt.precision import dense, widened, without_autocast
from torchopt.transform.base import Wrapper
from torchopt.transform.leaf_rule import as_of_now
from torchopt.transform.validate import check
from torchopt.tree import flatten_up_to, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torchopt.tree_function import is_traced, is_transforming

__all__ = ["GaloreState", "galore"]


class GaloreState(NamedTuple):
    """`steps`: number of steps; `bases`: basis of each matrix, None for others; `inner_state`."""

    steps: int
    bases: Any
    inner_state: Any

    @staticmethod
    def exact_fields() -> tuple[str, ...]:
        """Return the fields that `in_8_bits` leaves as they are."""
        return ("bases",)


@dataclass(frozen=True)
class Galore(Wrapper):
    """Projects matrices into their subspaces for `inner`, and its updates back."""

    rank: int
    update_every: int
    scale: float | Tensor

    def _is_projected(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim == 2 and min(x.shape) > self.rank

    def init(self, params: Any) -> GaloreState:
        """Return the state of `inner` for projected matrices."""
        leaves, spec = tree_flatten(params, none_is_leaf=True)

        def start(value: Any) -> Any:
            small = [value(self._cut(p)) if self._is_projected(p) else p for p in leaves]
            return self.inner.init(tree_unflatten(spec, small))

        state = start(torch.zeros_like)
        if not (is_traced() or is_transforming()):
            pairs = zip(tree_leaves(state), tree_leaves(start(torch.ones_like)))
            read = [(x, y) for x, y in pairs if isinstance(x, Tensor) and not x.is_meta]
            if not all(torch.equal(x, y) for x, y in read):
                raise ValueError(
                    "galore(inner, rank): expected an optimizer whose state starts without the "
                    "parameters, which have no place in the subspaces yet; got one that keeps "
                    "them. Put it around galore instead"
                )
        return GaloreState(0, tree_map(lambda p: None, params, none_is_leaf=True), state)

    def _cut(self, p: Tensor) -> Tensor:
        return p.detach()[: self.rank] if p.shape[0] <= p.shape[1] else p.detach()[:, : self.rank]

    @without_autocast()
    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Step `inner` in the subspaces."""
        grads, spec = tree_flatten(tree_map(dense, updates), none_is_leaf=True)
        bases = flatten_up_to(spec, state.bases, "state.bases")
        values = None if params is None else flatten_up_to(spec, params, "params")
        refresh = state.steps % self.update_every == 0
        for i, g in enumerate(grads):
            if self._is_projected(g) and (refresh or bases[i] is None):
                bases[i] = self._basis(g)
        inner_updates, inner_state = self.inner.update(
            tree_unflatten(spec, list(map(self._into, grads, bases))),
            state.inner_state,
            params=None
            if values is None
            else tree_unflatten(spec, list(map(self._into, values, bases))),
            inplace=inplace,
        )
        out = [
            u if u is None or q is None else self._back(u, q)
            for u, q in zip(flatten_up_to(spec, inner_updates, "updates"), bases)
        ]
        new = GaloreState(state.steps + 1, tree_unflatten(spec, bases), inner_state)
        return tree_unflatten(spec, out), new

    def _basis(self, g: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(widened(g), full_matrices=False)
        q: Tensor = u[:, : self.rank] if g.shape[0] <= g.shape[1] else vh[: self.rank].mH
        return q.to(g.dtype).contiguous()

    def _into(self, x: Any, q: Any) -> Any:
        if x is None or q is None:
            return x
        if x.is_complex() == q.is_complex():  # a parameter may be wider than its gradient
            q = q.to(x.dtype)
        return q.mH @ x if x.shape[0] <= x.shape[1] else x @ q

    def _back(self, u: Tensor, q: Tensor) -> Tensor:
        back = u @ q.mH if u.shape[1] == q.shape[1] else q @ u
        scaled: Tensor = back * as_of_now(self.scale)
        return scaled.to(u.dtype)


def galore(
    inner: GradientTransformation,
    rank: int,
    update_every: int = 200,
    scale: float | Tensor = 0.25,
) -> GradientTransformation:
    r"""Return `inner` on matrices projected to the subspace of their first singular vectors.

    .. math::
        G = U S V^T, \quad Q = U_{:, :r}, \quad u = \alpha\, Q\, \mathrm{inner}(Q^T G)

    for a matrix with at most as many rows as columns. For others, Q holds right singular vectors
    and acts from the right. Q is kept for `update_every` steps. When it changes, the state of
    `inner` stays as it is, as in the paper. Other tensors, and matrices with at most r rows or
    columns, are passed to `inner` unchanged. `inner` gets Q^T p for a parameter p, so that weight
    decay in it decays only that part. To decay all of p, wrap the direction alone:
    `chain(galore(scale_by_adam(), rank=8), add_decayed_weights(0.1), scale(-1e-3))`.

    The derivative is exact, also through Q, wherever the singular values of the gradient are
    distinct. Where two coincide (which includes two zeros, as in gradients of low rank), singular
    vectors have no derivative, and the result is NaN or infinite.

    Args:
        inner: An optimizer whose initial state does not depend on the parameters.
        rank: r, the dimension of the subspaces, >= 1.
        update_every: Number of steps between changes of the subspace, >= 1.
        scale: alpha, >= 0; a tensor is differentiated.

    Raises:
        ValueError: A value is out of range; from `init`, if the state of `inner` contains
            parameters.

    References:
        J. Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, 2024,
        https://arxiv.org/abs/2403.03507, Algorithm 2.

    Example:
        >>> import torch, torchopt
        >>> optimizer = galore(torchopt.sgd(1.0), rank=1, scale=1.0)
        >>> g = torch.diag(torch.tensor([3.0, 2.0]))
        >>> optimizer.update(g, optimizer.init(g))[0].abs()
        tensor([[3., 0.],
                [0., 0.]])
    """
    check(rank, "an integer >= 1", "rank value")
    check(update_every, "an integer >= 1", "update_every value")
    check(scale, "a number >= 0", "scale value")
    require_transformation(inner, "galore(inner, rank)")
    return Galore(inner, rank, update_every, scale).pair()
