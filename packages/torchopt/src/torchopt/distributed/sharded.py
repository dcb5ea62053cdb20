# SPDX-License-Identifier: Apache-2.0
"""Zero-order estimates by several processes that exchange seeds and losses, never tensors.

A direction is determined by a seed, so every rank can generate every direction. Each rank evaluates
its share of the losses, and the ranks exchange them, 8 bytes for each evaluation. Then every rank
has all coefficients and adds up the same gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import draw_seed
from torchopt.diff.zero_order.engine import ZeroOrder
from torchopt.diff.zero_order.evaluator import Evaluator, Points
from torchopt.distributed.group import Group, share_of
from torchopt.distributed.raised import Raised
from torchopt.distributed.session import DEFAULT_TIMEOUT
from torchopt.distributed.signature import agree, kinds_of
from torchopt.tree import tree_leaves

__all__ = ["ShardedEvaluator", "zero_order"]


@dataclass
class ShardedEvaluator(Evaluator):
    """Evaluates this rank's share of the points and receives the losses at the others.

    Attributes:
        vectorized: As in `Evaluator`.
        group: The ranks that share the points.
        timeout: Seconds that the evaluation of a share may take.
    """

    group: Group = field(default_factory=Group)
    timeout: float = DEFAULT_TIMEOUT

    def __call__(
        self,
        fn: Callable[..., Tensor],
        points: Points,
        scratch: Sequence[Tensor],
        seed: int,
        *,
        outside: bool = True,
    ) -> Tensor:
        """Return the values of `fn` at the points, `[n]`, the same on every rank."""
        if self.group.size == 1 or points.count < self.group.size:  # every rank evaluates all
            return super().__call__(fn, points, scratch, seed, outside=outside)
        own, each = share_of(points.count, self.group.rank, self.group.size), points.each
        n, mine = points.count * each, slice(own.start * each, own.stop * each)
        name = f"evaluations {mine.start + 1} to {mine.stop} of {n}"
        error, part = None, torch.empty(0)
        try:
            with self.group.task(name, self.timeout):
                share = points.part(own.start, own.stop)
                part = super().__call__(fn, share, scratch, seed, outside=outside)
        except Exception as raised:
            error = Raised(raised, self.group.world_rank, name)
        if agree(self.group, f"an estimate by {n} losses", numbers=[float(error is not None)])[0]:
            for other in self.group.gather_objects(error, "the sum of losses"):
                if other is not None:
                    raise other.as_error()
        row = torch.zeros((n, *part.shape[1:]), dtype=torch.float64, device=self.group.device)
        row[mine] = part.double()
        return self.group.sum_(row, "the sum of losses", self.timeout).to(part)


def zero_order(
    engine: ZeroOrder, *, group: Any = None, timeout: float = DEFAULT_TIMEOUT
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that estimates gradients by `engine` on all ranks together.

    All ranks call the decorated function with the same arguments. The estimate is the one that
    the engine computes in one process, from the same directions and coefficients. The ranks
    exchange only the seed, once for each call, and the losses.

    Args:
        engine: A value of `torchopt.diff.zero_order.ZeroOrder`.
        group: A process group of torch.distributed; None: the world.
        timeout: Seconds that the evaluations of one rank may take.

    Raises:
        RuntimeError: The world was opened for remote calls.
        WorkerError: From the call: the function raised, on any rank; raised on every rank. Or the
            ranks call it with different tensors, or not all of them call it.

    Example:
        >>> from torchopt.diff.zero_order import Gaussian, ZeroOrder
        >>> engine = ZeroOrder(Gaussian(), "antithetic", num_samples=500, sigma=0.1)
        >>> x = torch.tensor([1.0, -3.0], requires_grad=True)
        >>> zero_order(engine)(lambda x: (x ** 2).sum())(x).backward()
        >>> bool((x.grad - 2 * x).norm() < 1.0)
        True
    """
    ranks = Group(group, timeout)

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        evaluator = ShardedEvaluator(engine.vectorized, ranks, timeout)

        @functools.wraps(fn)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with ranks.turn():
                tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                agree(ranks, "a zero-order estimate", {"arguments": kinds_of(tensors)})
                seed = torch.tensor(draw_seed(engine.generator), device=ranks.device)
                generator = torch.Generator().manual_seed(int(ranks.broadcast_(seed)))
                return replace(engine, generator=generator).run(fn, evaluator, args, kwargs)

        return wrapped

    decorate.group = ranks  # type: ignore[attr-defined]
    return decorate
