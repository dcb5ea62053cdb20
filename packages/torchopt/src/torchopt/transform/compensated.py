# SPDX-License-Identifier: Apache-2.0
"""Keep the rounding error of parameters for the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation, require_transformation
from torchopt.precision import dense, widened
from torchopt.transform.base import Wrapper
from torchopt.transform.copies import exact_tensors, followed_start
from torchopt.transform.validate import require_params
from torchopt.tree import flatten_up_to, require_tensor_tree, tree_flatten, tree_map, tree_unflatten

__all__ = ["CompensatedState", "compensated"]


class CompensatedState(NamedTuple):
    """`rest`: the rounding errors so far, a tree like the parameters; `inner_state`."""

    rest: Any
    inner_state: Any


@dataclass(frozen=True)
class Compensated(Wrapper):
    """Adds the rounding error of the previous step to the updates of `inner`."""

    def init(self, params: Any) -> CompensatedState:
        """Return a rest of zero."""
        require_tensor_tree(params, "init(params): a parameter")
        rest = tree_map(lambda p: torch.zeros_like(p, requires_grad=False), params)
        state, origins = followed_start(self.inner, params)
        exact = exact_tensors(state)
        state = tree_map(lambda x: widened(x) if origins.of(x) or id(x) in exact else x, state)
        return CompensatedState(rest=rest, inner_state=state)

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Step `inner`, and return updates that can be added without rounding errors."""
        require_params(params, "compensated")
        grads, spec = tree_flatten(updates, none_is_leaf=True)
        values = flatten_up_to(spec, params, "params", spec_of="updates")
        rests = flatten_up_to(spec, state.rest, "state.rest")
        stepped, inner_state = self.inner.update(
            tree_unflatten(spec, [widened(g) for g in grads]),
            state.inner_state,
            params=params,
            inplace=inplace,
        )
        rows = [
            (u, rest) if u is None or p is None else _split(u, p, rest)
            for u, p, rest in zip(flatten_up_to(spec, stepped, "updates"), values, rests)
        ]
        out = tree_unflatten(spec, [u for u, _ in rows])
        return out, CompensatedState(tree_unflatten(spec, [r for _, r in rows]), inner_state)


def _split(u: Tensor, p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part of u + rest to add to `p`, in its dtype, and the remaining part."""
    wide, wanted = widened(p), dense(u) + widened(rest)
    taken = ((wide + wanted).to(p.dtype).to(wide.dtype) - wide).to(p.dtype)
    done = (wide + widened(taken)).to(p.dtype).to(wide.dtype) - wide
    return taken, (wanted - done).to(p.dtype)


def compensated(inner: GradientTransformation) -> GradientTransformation:
    r"""Return `inner` with Kahan's compensation for the rounding errors of parameters.

    .. math::
        y = u + c, \qquad p' = \mathrm{round}(p + y), \qquad c' = y - (p' - p)

    An update smaller than 1/512 of a bfloat16 parameter does not change it. The rounding error is
    kept in c, in the dtype of the parameter, and added to the next update. After any number of
    steps p + c is the sum of all updates, up to an error per step of 2^-16 for bfloat16 (2^-22 for
    float16) relative to the largest p, and p is that sum rounded once. `inner` computes in float32,
    and keeps copies of the parameters in float32, such as the iterates of schedule-free optimizers.

    The derivative is that of p + u without rounding. Use it as the last member of a chain, because
    c belongs to the updates that are added to the parameters.

    Args:
        inner: The optimizer.

    Raises:
        AssertionError: From `update`, when it is called without `params`.

    References:
        W. Kahan, Further Remarks on Reducing Truncation Errors, 1965.

        P. Zamirai et al., Revisiting BFloat16 Training, 2020, https://arxiv.org/abs/2010.06192,
        Algorithm 1.

    Example:
        >>> import torch, torchopt
        >>> sgd = torchopt.sgd(2**-10)
        >>> def after_512_steps(optimizer):
        ...     p = torch.ones(1, dtype=torch.bfloat16)
        ...     state = optimizer.init(p)
        ...     for _ in range(512):
        ...         u, state = optimizer.update(-torch.ones_like(p), state, params=p)
        ...         p = p + u
        ...     return p.item()
        >>> after_512_steps(sgd), after_512_steps(compensated(sgd))
        (1.0, 1.5)
    """
    require_transformation(inner, "compensated(inner)")
    return Compensated(inner).pair()
