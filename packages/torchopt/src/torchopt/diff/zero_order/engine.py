# SPDX-License-Identifier: Apache-2.0
"""The zero-order engine: functions whose gradient is estimated from their values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.engine import Engine
from torchopt.diff.explicit.loop import InnerResult
from torchopt.diff.problem import require_verify
from torchopt.diff.verify import Verify, VerifyReport, checked
from torchopt.diff.zero_order.call import Call, scalar
from torchopt.diff.zero_order.directions import (
    Directions,
    as_directions,
    draw_seed,
)
from torchopt.diff.zero_order.error_bars import GradientEstimate
from torchopt.diff.zero_order.estimators import Estimator, as_estimator
from torchopt.diff.zero_order.evaluate import (
    Sampling,
    estimate_leaves,
    evaluate_range,
)
from torchopt.diff.zero_order.evaluator import Evaluator
from torchopt.diff.zero_order.inner import run_inner
from torchopt.diff.zero_order.layout import as_real
from torchopt.diff.zero_order.precision import (
    require_sigma,
)
from torchopt.diff.zero_order.refusals import require_plain
from torchopt.tree import tree_leaves
from torchopt.tree_function import uncompiled
from torchopt.typing import Samplable, SampleFunc

__all__ = ["ZeroOrder"]


@dataclass(frozen=True, eq=False)
class ZeroOrder(Engine):
    """The zero-order engine: estimates gradients from function values only.

    Calling it with a function returns a function with the same values whose reverse-mode derivative
    is the estimate. See `zero_order` for the fields.

    For an inner problem, set the fields `loss`, `optimizer`, `steps`, `tasks` and `verify`, which
    are those of `torchopt.inner_loop`, or use `over`. The engine is then called like an inner loop
    and returns an `InnerResult`. All differentiated floating-point tensors are perturbed together,
    and the whole loop runs for each perturbed point. `params` and `losses` of the result have
    derivatives; `state` and `aux` are constants.

    Attributes:
        report: The results of `verify`.

    Raises:
        TypeError: As for `zero_order`.
        ValueError: As for `zero_order`.

    Example:
        >>> from torchopt.diff.zero_order.directions import Gaussian
        >>> _ = torch.manual_seed(0)
        >>> engine = ZeroOrder(Gaussian(), "antithetic", num_samples=2000, sigma=0.1)
        >>> result = engine.estimate(lambda x: (x ** 2).sum(), torch.tensor([1.0, -3.0]))
        >>> bool(((result.gradient - torch.tensor([2.0, -6.0])).abs()
        ...       < 4 * result.standard_error).all())
        True
        >>> result.evaluations
        4000
    """

    distribution: SampleFunc | Samplable | Directions
    method: str | Estimator = "naive"
    argnums: int | tuple[int, ...] = (0,)
    num_samples: int = 1
    sigma: float = 1.0
    has_aux: bool = False
    vector_output: bool = False
    generator: torch.Generator | None = None
    chunk_size: int | None = None
    vectorized: bool | None = None
    loss: Callable[..., Any] | None = None
    optimizer: Any = None
    steps: int = 1
    tasks: Any = None
    verify: Verify | None = None
    directions: Directions = field(init=False)
    estimator: Estimator = field(init=False)
    report: VerifyReport = field(init=False, default_factory=VerifyReport, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "directions", as_directions(self.distribution))
        object.__setattr__(self, "estimator", as_estimator(self.method))
        for name in ("num_samples", "chunk_size"):
            value = getattr(self, name)
            if value is None and name == "chunk_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}`: expected an integer of at least 1, got {value!r}.")
        require_sigma(self.sigma)
        require_verify(self.verify, Verify)
        argnums = self.argnums if isinstance(self.argnums, (tuple, list)) else (self.argnums,)
        integers = all(isinstance(i, int) and not isinstance(i, bool) for i in argnums)
        if not argnums or not integers or len(set(argnums)) != len(argnums):
            raise ValueError(
                "`argnums`: expected one or more different positions, an integer or a tuple of "
                f"integers, got {self.argnums!r}."
            )
        argnums = tuple(argnums)
        object.__setattr__(self, "argnums", argnums)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return a function with an estimated derivative; for an inner problem, run it."""
        if self.loss is None:
            return self.decorated(*args, **kwargs)
        return checked(self, args, kwargs)

    def run_inner(self, *args: Any, **kwargs: Any) -> InnerResult:
        """Run the inner loop without the checks of `verify`."""
        return run_inner(self, args, kwargs)

    def decorated(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return `fn` with an estimated derivative."""
        if not callable(fn):
            raise TypeError(
                "zero_order(distribution, ...): expected a function to decorate, got "
                f"{type(fn).__name__}; with a decorator write @zero_order(distribution, ...)"
            )
        evaluator = Evaluator(self.vectorized)

        @functools.wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return self.run(fn, evaluator, args, kwargs)

        return wrapper

    @uncompiled
    def run(
        self,
        fn: Callable[..., Any],
        evaluator: Evaluator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        perturbed: Callable[..., Any] | None = None,
        scratch: tuple[Tensor, ...] = (),
    ) -> Any:
        """Return `fn(*args, **kwargs)` with an estimated derivative.

        Args:
            fn: The function.
            evaluator: Evaluates it at perturbed points; remembers whether vmap works for it.
            args: Positional arguments.
            kwargs: Keyword arguments.
            perturbed: Called instead of `fn` at perturbed points, with a tuple of copies of
                `scratch` before the arguments. None: `fn` itself.
            scratch: Tensors that `perturbed` may overwrite.
        """
        return Call(self, fn, evaluator, args, kwargs, perturbed, scratch).apply()

    def _sampling(
        self, evaluator: Evaluator, seed: int, call: Call, scratch: tuple[Tensor, ...] = ()
    ) -> Sampling:
        return Sampling(
            self.directions,
            self.estimator,
            self.num_samples,
            self.sigma,
            seed,
            evaluator,
            self.chunk_size,
            scratch,
            sum(x.numel() for x in (*call.constants, *scratch)),
            call.draws_outside,
        )

    @uncompiled
    @torch.no_grad()
    def estimate(
        self,
        fn: Callable[..., Any],
        *args: Any,
        seed: int | None = None,
        surrogate: Any = None,
        with_error: bool = True,
        **kwargs: Any,
    ) -> GradientEstimate:
        """Return the estimated gradient of `fn(*args, **kwargs)` with its error bars.

        Args:
            fn: Returns a 0-dim loss; with `has_aux`, a pair of the loss and anything.
            *args: Positional arguments; those at `argnums` are differentiated.
            seed: Determines the directions; None: drawn from `generator`.
            surrogate: A cheap, possibly wrong gradient, a tree like `gradient`, used as a control
                variate: it changes the variance of the estimate but not its mean. It needs an
                estimator that is linear in the losses (not a shaped one) and directions of known
                covariance.
            with_error: Whether to estimate the standard error, which takes a second sum over the
                directions.
            **kwargs: Keyword arguments, which are not differentiated.

        Returns:
            Trees like the differentiated argument, or a tuple of such trees if there are several
            `argnums`; leaves that are not floating-point or complex tensors are None.

        Raises:
            ValueError: `surrogate` would change the mean, or has another shape.
            TypeError: The loss is complex.
        """
        require_plain(args, "ZeroOrder")
        seed = draw_seed(self.generator) if seed is None else seed
        call, loss, leaves, sampling = self._prepare(fn, seed, args, kwargs)
        hints = None
        if surrogate is not None:
            parts = (surrogate,) if len(call.specs) == 1 else tuple(surrogate)
            hints = [as_real(x) for part in parts for x in tree_leaves(part)]
            if [x.shape for x in hints] != [x.shape for x in leaves]:
                raise ValueError(
                    f"`surrogate`: expected leaves of shapes {[list(x.shape) for x in leaves]}, "
                    f"got {[list(x.shape) for x in hints]}."
                )
        with call.running():
            result = estimate_leaves(loss, leaves, sampling, surrogate=hints, with_error=with_error)
        return call.named(result)

    @uncompiled
    @torch.no_grad()
    def losses(
        self,
        fn: Callable[..., Any],
        *args: Any,
        seed: int,
        start: int = 0,
        stop: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the losses of some of the directions: one worker's share of `estimate`.

        Workers exchange only the seed and these numbers; each regenerates the directions in
        `combine`.

        Args:
            fn: As in `estimate`.
            *args: As in `estimate`.
            seed: Determines the directions.
            start: First direction; a multiple of the size of a block of coupled directions.
            stop: One past the last direction; None: `num_samples`.
            **kwargs: As in `estimate`.

        Returns:
            `[stop - start, K]`, one column for each offset of the estimator.

        Raises:
            ValueError: The range is not within `num_samples`, or does not begin at a block.
        """
        call, loss, leaves, sampling = self._prepare(fn, seed, args, kwargs)
        stop = self.num_samples if stop is None else stop
        coupled = sampling.coupled(leaves)
        if not 0 <= start < stop <= self.num_samples or start % coupled:
            raise ValueError(
                f"`start`, `stop`: expected 0 <= start < stop <= num_samples={self.num_samples} "
                f"and start a multiple of {coupled}, got {start} and {stop}."
            )
        with call.running():
            return evaluate_range(loss, leaves, sampling, start, stop)

    @uncompiled
    @torch.no_grad()
    def center(self, fn: Callable[..., Any], *args: Any, seed: int, **kwargs: Any) -> Tensor:
        """Return the loss at the point itself, 0-dim, which `combine` needs for `forward`."""
        call, loss, leaves, sampling = self._prepare(fn, seed, args, kwargs)
        with call.running():
            return sampling.center(loss, leaves)

    @uncompiled
    @torch.no_grad()
    def combine(
        self,
        losses: Tensor,
        *args: Any,
        seed: int,
        center: Tensor | None = None,
        with_error: bool = True,
    ) -> GradientEstimate:
        """Return the estimate from the losses of all directions; see `losses`.

        Args:
            losses: `[N, K]`, the workers' shares in order.
            *args: The positional arguments of the function, for the shapes of its parameters.
            seed: The seed of `losses`.
            center: The result of `center`, if the estimator uses it.
            with_error: Whether to estimate the standard error.

        Raises:
            ValueError: `losses` is not `[N, K]`, or `center` is missing.

        Example:
            >>> from torchopt.diff.zero_order.directions import Gaussian
            >>> engine = ZeroOrder(Gaussian(), "antithetic", num_samples=10, sigma=0.1)
            >>> f, x = lambda x: (x ** 2).sum(), torch.tensor([1.0, -3.0])
            >>> shares = [engine.losses(f, x, seed=7, start=i, stop=i + 5) for i in (0, 5)]
            >>> together = engine.combine(torch.cat(shares), x, seed=7)
            >>> torch.allclose(together.gradient, engine.estimate(f, x, seed=7).gradient)
            True
        """
        expected = (self.num_samples, len(self.estimator.offsets))
        if losses.shape != expected:
            raise ValueError(
                f"`losses`: expected shape {list(expected)} (directions, offsets), "
                f"got {list(losses.shape)}."
            )
        if self.estimator.uses_center and center is None:
            raise ValueError(
                f"`center`: {self.estimator.name} expected the loss at the point, got None; "
                "pass engine.center(...)."
            )
        call, loss, leaves, sampling = self._prepare(_nothing, seed, args, {})
        result = estimate_leaves(
            loss, leaves, sampling, losses=losses, center=center, with_error=with_error
        )
        return call.named(result)

    def _prepare(
        self, fn: Callable[..., Any], seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Call, Callable[..., Tensor], list[Tensor], Sampling]:
        require_plain(args, "ZeroOrder")
        evaluator = Evaluator(self.vectorized)
        call = Call(self, fn, evaluator, args, kwargs)
        call.begin()

        def loss(*point: Tensor) -> Tensor:
            call.reset()
            return scalar(call.evaluate(point, call.constants)[0])

        leaves = [x.detach() for x in call.leaves]
        if fn is not _nothing:
            call.warn_of_lost_perturbations(leaves)
        return call, loss, leaves, self._sampling(evaluator, seed, call)


def _nothing(*args: Any) -> None:
    raise AssertionError("combine() evaluates nothing")
