# SPDX-License-Identifier: Apache-2.0
"""Check one engine against another by computing some of the gradients twice."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.diff.engine import Engine
from torchopt.diff.problem import InnerCall
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import GradientMismatchError, warn_caller
from torchopt.torch_internals import in_forward_mode, is_batched_by_old_vmap
from torchopt.tree import tree_flatten, tree_unflatten
from torchopt.tree_function import apply_sweep, is_transforming

__all__ = ["Verification", "Verify", "VerifyReport", "checked"]

LOGGER = logging.getLogger("torchopt.diff.verify")


class Verification(NamedTuple):
    """The comparison of one gradient with that of the other engine.

    Attributes:
        call: The number of the call, counted from 0.
        cosine: The cosine between the two gradients, over all differentiated tensors together.
        relative_error: The norm of the difference divided by the norm of the other engine's
            gradient.

    Example:
        >>> from torchopt.diff import Verification
        >>> Verification(call=0, cosine=0.999, relative_error=0.02).relative_error
        0.02
    """

    call: int
    cosine: float
    relative_error: float


@dataclass
class VerifyReport:
    """The results of the checks of an inner loop.

    Attributes:
        calls: The number of calls in grad mode. A call that is due for a check but has nothing to
            differentiate does not count; the next one is checked instead.
        checks: The last thousand comparisons.
        differences: With `derivative="differences"`, the largest estimated relative error of the
            products with second derivatives in each of the last thousand backward passes.

    Example:
        >>> from torchopt.diff import Verification, VerifyReport
        >>> report = VerifyReport()
        >>> report.checks.append(Verification(call=0, cosine=0.999, relative_error=0.02))
        >>> report.worst
        0.02
    """

    calls: int = 0
    checks: deque[Verification] = field(default_factory=lambda: deque(maxlen=1000))
    differences: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    @property
    def worst(self) -> float:
        """The largest relative error among `checks`; NaN if there are none."""
        return max((c.relative_error for c in self.checks), default=math.nan)


@dataclass(frozen=True)
class Verify:
    """Check some of the gradients of an inner loop by another engine.

    The first gradient that is pulled back through a checked call is computed again by the other
    engine, from the same arguments, random numbers and cotangents. The first call is checked, then
    calls at regular intervals.

    Attributes:
        other: An engine, such as `Implicit(solve=CG())`, or any function with the arguments and
            results of the inner loop.
        rate: The share of the calls that are checked, in (0, 1].
        limit: The largest relative error, >= 0; above it `backward()` raises. None: no limit.

    Raises:
        GradientMismatchError: In `backward()`: the two gradients differ by more than `limit`.
        TypeError: `other` is neither an engine nor a function.
        ValueError: `rate` or `limit` is out of its range.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff import Implicit, Verify
        >>> def loss(w, x):
        ...     return ((w - x) ** 2).sum()
        >>> inner = torchopt.inner_loop(
        ...     loss, torchopt.sgd(0.4), steps=10, verify=Verify(Implicit(), rate=1.0, limit=1e-3)
        ... )
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> inner(torch.zeros(2), x).params.sum().backward()
        >>> len(inner.report.checks), inner.report.worst < 1e-5
        (1, True)
    """

    other: Engine | Callable[..., Any]
    rate: float = 0.01
    limit: float | None = 0.1

    def __post_init__(self) -> None:
        """Check the fields."""
        if not callable(self.other):
            raise TypeError(
                "Verify: other: expected an engine or a function with the arguments of the inner "
                f"loop, got {type(self.other).__name__}."
            )
        if not 0 < self.rate <= 1:
            raise ValueError(f"Verify: rate: expected a share in (0, 1], got {self.rate}.")
        if self.limit is not None and not self.limit >= 0:
            raise ValueError(f"Verify: limit: expected a number >= 0 or None, got {self.limit}.")

    def is_due(self, call: int) -> bool:
        """Return whether a call is checked; the first one is."""
        return call == 0 or math.floor(call * self.rate) > math.floor((call - 1) * self.rate)

    def bound(self, value: Any) -> Callable[..., Any]:
        """Return the other engine for the problem of `value`."""
        if isinstance(self.other, Engine) and self.other.loss is None:
            other: Callable[..., Any] = self.other.over(
                value.loss, value.optimizer, steps=value.steps, tasks=value.tasks
            )
            return other
        found: Callable[..., Any] = self.other
        return found


def checked(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of an inner loop, with a check of its gradient if one is due.

    Args:
        value: An engine over a problem, with `verify`, `report` and `run_inner`.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
    """
    if value.loss is None:
        raise TypeError(
            f"{type(value).__name__}: expected an engine over an inner problem, got one without; "
            "pass loss, optimizer and steps, or call engine.over(loss, optimizer, steps=...)."
        )
    verify, report = value.verify, value.report
    if verify is None or not torch.is_grad_enabled():
        return value.run_inner(*args, **kwargs)
    number = report.calls
    if not verify.is_due(number):  # most calls: no check
        report.calls += 1
        return value.run_inner(*args, **kwargs)
    inner = InnerCall(value, args, kwargs)
    if not inner.wanted:
        return value.run_inner(*args, **kwargs)  # the next call is checked instead
    report.calls += 1
    if is_transforming() or in_forward_mode():
        warn_caller(
            "Verify: expected a call outside of torch.func transforms and forward mode, got one "
            "inside; its gradient is not checked. Use tasks= instead of vmap, and backward()."
        )
        return value.run_inner(*args, **kwargs)
    return _Check(value, inner, number).run()


@dataclass(frozen=True)
class _Gate:
    """The identity, which shows the gradients of its inputs."""

    show: Callable[[Sequence[Tensor | None]], None]

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach().clone() for x in inputs)

    def pull_back(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        self.show(cotangents)
        return cotangents


class _Check:
    """One checked call: waits for the gradients of the inputs, then computes them again.

    The graph of the result refers to it, so it refers to no tensor of that graph.
    """

    def __init__(self, value: Any, inner: InnerCall, number: int) -> None:
        self._value, self._inner, self._number = value, inner, number
        seen = Surroundings(value.loss, inner.wanted, beside=(value.optimizer, value.verify.other))
        self._seen = seen.retaken()
        self._points = [x.detach().clone() for x in inner.wanted]
        self._cotangents: dict[int, Tensor] = {}
        self._other = value.verify.bound(value)
        is_bound = self._other is not value.verify.other
        self._trail: list[Any] | None = [] if is_bound and self._other.follows else None
        self._is_done = False

    def run(self) -> Any:
        """Return the result of the call."""
        aliases = apply_sweep(_Gate(self._compare), *self._inner.wanted)
        result = self._inner.run(aliases, self._value, self._trail)
        leaves, spec = tree_flatten(result, none_is_leaf=True)
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and x.requires_grad:
                leaves[i] = x.view_as(x)
                leaves[i].register_hook(self._keeper(i))
        return tree_unflatten(spec, leaves)

    def _keeper(self, i: int) -> Callable[[Tensor], None]:
        def keep(cotangent: Tensor) -> None:
            if not (is_transforming() or is_batched_by_old_vmap(cotangent)):
                self._cotangents[i] = cotangent.detach()

        return keep

    def _compare(self, found: Sequence[Tensor | None]) -> None:
        cotangents, self._cotangents = self._cotangents, {}
        pairs = [(i, g.detach()) for i, g in enumerate(found) if g is not None]
        if self._is_done or not pairs:
            return
        if is_transforming():
            warn_caller(
                "Verify: expected a backward pass for one gradient, got one for a batch, as with "
                "is_grads_batched=True; it is not checked. Take one gradient before it."
            )
            return
        if not cotangents:
            return
        # A second derivative also comes here, but not with these cotangents.
        self._is_done = True
        with torch.enable_grad(), self._seen.replayed():
            points = [x.clone().requires_grad_() for x in self._points]
            result = self._inner.run(points, self._other, self._trail)
            leaves, _ = tree_flatten(result, none_is_leaf=True)
            outputs = [(leaves[i], c) for i, c in cotangents.items() if leaves[i].requires_grad]
            expected = [
                torch.zeros_like(points[i]) if g is None else g
                for (i, _), g in zip(pairs, self._again(outputs, [points[i] for i, _ in pairs]))
            ]
        self._record(_vector([g for _, g in pairs]), _vector(expected))

    @staticmethod
    def _again(outputs: list[tuple[Tensor, Tensor]], points: list[Tensor]) -> tuple[Any, ...]:
        if not outputs:
            return (None,) * len(points)
        values, cotangents = zip(*outputs)
        return torch.autograd.grad(values, points, cotangents, allow_unused=True)

    def _record(self, found: Tensor, expected: Tensor) -> None:
        sizes, verify = found.norm() * expected.norm(), self._value.verify
        difference = (found - expected).norm()
        zero = not bool(difference)
        error = 0.0 if zero else float(difference / expected.norm())
        cosine = 1.0 if zero else float(torch.dot(found, expected) / sizes)
        self._value.report.checks.append(Verification(self._number, cosine, error))
        LOGGER.info("call %d: cosine %.6f, relative error %.2e", self._number, cosine, error)
        if verify.limit is not None and not error <= verify.limit:
            raise GradientMismatchError(
                f"inner_loop: verify: expected a relative error of at most {verify.limit}, got "
                f"{error:.3g} (cosine {cosine:.3g}) between {type(self._value).__name__} and "
                f"{type(verify.other).__name__} in call {self._number}. Check the assumptions of "
                "both (convergence, number of samples), or set limit=."
            )


def _vector(tensors: list[Tensor]) -> Tensor:
    real = [torch.view_as_real(x) if x.is_complex() else x for x in tensors]
    return torch.cat([x.detach().reshape(-1).double() for x in real])
