# SPDX-License-Identifier: Apache-2.0
"""Functions whose gradient is estimated from their values.

One long file: the engine as a value, the one call of it that autograd sees, and the decorator.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.call_state import CallState
from torchopt.diff.closure import captured, hidden_inputs
from torchopt.diff.zero_order.directions import (
    Directions,
    as_directions,
    common_draws,
    draw_seed,
)
from torchopt.diff.zero_order.error_bars import GradientEstimate
from torchopt.diff.zero_order.estimators import ESTIMATORS, Estimator, as_estimator
from torchopt.diff.zero_order.evaluate import (
    Evaluator,
    LeafEstimate,
    Sampling,
    combine_losses,
    estimate_leaves,
    evaluate_range,
    second_derivative,
)
from torchopt.diff.zero_order.layout import as_real, as_stored, is_perturbed
from torchopt.diff.zero_order.precision import (
    accumulator,
    require_sigma,
    warn_of_lost_perturbations,
    widened,
)
from torchopt.errors import NotDifferentiableError
from torchopt.tree import PyTreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torchopt.tree_function import (
    Operation,
    apply_operation,
    is_batched,
    is_differentiated,
    is_transforming,
)
from torchopt.typing import Samplable, SampleFunc

__all__ = ["ZeroOrder", "zero_order"]


@dataclass(frozen=True, eq=False)
class ZeroOrder:
    """The zero-order engine: estimates gradients from function values alone.

    Calling it on a function returns a function with the same values whose reverse-mode derivative
    is the estimate. See `zero_order` for the fields.

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
    directions: Directions = field(init=False)
    estimator: Estimator = field(init=False)

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
        argnums = self.argnums if isinstance(self.argnums, (tuple, list)) else (self.argnums,)
        integers = all(isinstance(i, int) and not isinstance(i, bool) for i in argnums)
        if not argnums or not integers or len(set(argnums)) != len(argnums):
            raise ValueError(
                "`argnums`: expected one or more different positions, an integer or a tuple of "
                f"integers, got {self.argnums!r}."
            )
        argnums = tuple(argnums)
        object.__setattr__(self, "argnums", argnums)

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return `fn` with an estimated derivative."""
        evaluator = Evaluator(self.vectorized)

        @functools.wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return self.run(fn, evaluator, args, kwargs)

        return wrapper

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
            evaluator: Evaluates it at perturbed points; remembers whether vmap takes it.
            args: Positional arguments.
            kwargs: Keyword arguments.
            perturbed: Stands in for `fn` at perturbed points; takes a tuple of copies of `scratch`
                in front of the arguments. None: `fn` itself.
            scratch: Tensors that `perturbed` may overwrite.
        """
        if torch.compiler.is_compiling():
            # The estimate is a loop over chunks around vmap with generators of its own: the
            # compiler leaves it out of its graph. (Decorating with `disable` at definition would
            # import the whole compiler with this module.)
            apply: Callable[..., Any] = torch.compiler.disable(self._run)
        else:
            apply = self._run
        return apply(fn, evaluator, args, kwargs, perturbed, scratch)

    def _run(self, fn: Callable[..., Any], evaluator: Evaluator, *rest: Any) -> Any:
        return _Call(self, fn, evaluator, *rest).apply()

    def _sampling(
        self, evaluator: Evaluator, seed: int, call: _Call, scratch: tuple[Tensor, ...] = ()
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
        )

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
            fn: Returns a 0-dim loss (with `has_aux`, a pair of it and anything).
            *args: Positional arguments; those at `argnums` are differentiated.
            seed: Names the directions; None: drawn from `generator`.
            surrogate: A cheap, possibly wrong gradient, a tree like `gradient`, used as a control
                variate: it changes the variance of the estimate and not its mean. That needs an
                estimator linear in the losses (not a shaped one) and directions of known
                covariance.
            with_error: Whether to estimate the standard error: a second sum over the directions.
            **kwargs: Not differentiated.

        Returns:
            Trees like the differentiated argument, or a tuple of such trees if there are several
            `argnums`; None in place of what is no floating-point or complex tensor.

        Raises:
            ValueError: `surrogate` would change the mean, or has another shape.
            TypeError: The loss is complex.
        """
        _require_plain(args)
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

        Workers exchange the seed and these numbers only; each regenerates the directions in
        `combine`.

        Args:
            fn: As in `estimate`.
            *args: As in `estimate`.
            seed: Names the directions.
            start: First direction; a multiple of the size of a block of coupled directions.
            stop: One past the last direction; None: `num_samples`.
            **kwargs: As in `estimate`.

        Returns:
            `[stop - start, K]`, a column for each offset of the estimator.

        Raises:
            ValueError: The range is not one of blocks within `num_samples`.
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

    @torch.no_grad()
    def center(self, fn: Callable[..., Any], *args: Any, seed: int, **kwargs: Any) -> Tensor:
        """Return the loss at the point itself, which `combine` needs for `forward`."""
        call, loss, leaves, sampling = self._prepare(fn, seed, args, kwargs)
        with call.running():
            return sampling.center(loss, leaves)

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
            seed: That of `losses`.
            center: That of `center`, if the estimator uses it.
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
        call, _, leaves, sampling = self._prepare(_nothing, seed, args, {})
        return call.named(combine_losses(losses, center, leaves, sampling, with_error=with_error))

    def _prepare(
        self, fn: Callable[..., Any], seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Call, Callable[..., Tensor], list[Tensor], Sampling]:
        _require_plain(args)
        evaluator = Evaluator(self.vectorized)
        call = _Call(self, fn, evaluator, args, kwargs)
        call.begin()

        def loss(*point: Tensor) -> Tensor:
            call.reset()
            return _scalar(call.evaluate(point, call.constants)[0])

        leaves = [x.detach() for x in call.leaves]
        if fn is not _nothing:
            call.warn_of_lost_perturbations(leaves)
        return call, loss, leaves, self._sampling(evaluator, seed, call)


def _require_plain(args: Any) -> None:
    if any(isinstance(x, Tensor) and is_batched(x) for x in tree_leaves(args)):
        raise RuntimeError(
            "ZeroOrder: estimates, losses and centers are made of plain tensors, got arguments "
            "inside of a vmap. Loop over the points, or differentiate the decorated function: "
            "torch.func.vmap(torch.func.grad(engine(fn)))."
        )


def _nothing(*args: Any) -> None:
    raise AssertionError("combine() evaluates nothing")


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError("`output` must be a tensor.")
    return output


def _scalar(output: Any) -> Tensor:
    tensor = _tensor(output)
    if tensor.ndim != 0:
        raise RuntimeError("`output` must be a scalar tensor.")
    return tensor


class _Call:
    """One call of a decorated function: arguments taken apart, and the operation made of them."""

    def __init__(
        self,
        engine: ZeroOrder,
        fn: Callable[..., Any],
        evaluator: Evaluator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        perturbed: Callable[..., Any] | None = None,
        scratch: tuple[Tensor, ...] = (),
    ) -> None:
        self.engine = engine
        self.fn = fn
        self.evaluator = evaluator
        self.perturbed = perturbed
        self.scratch = scratch
        self.seed: int | None = None
        # Whether a derivative may be asked for, and the mode in which the function runs.
        self.graph = torch.is_grad_enabled()
        self.state: CallState | None = None
        self.overwritten: dict[int, Tensor | None] = {}
        self.complex_output = False
        self.aux_spec: PyTreeSpec | None = None
        self.aux_leaves: list[Any] = []
        assert isinstance(engine.argnums, tuple)
        count = len(args)
        for i in engine.argnums:
            if not -count <= i < count:
                raise ValueError(
                    f"`argnums`: expected positions of the {count} positional arguments, got {i}. "
                    "Pass differentiated arguments by position."
                )
        argnums = [i % count for i in engine.argnums]
        if len(set(argnums)) != len(argnums):
            raise ValueError(
                f"`argnums`: expected different positions of the {count} positional arguments, got "
                f"{engine.argnums}."
            )
        self.flat: list[Any]
        self.flat, self.spec = tree_flatten((args, kwargs))
        self.leaves: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.slots: list[tuple[int, int]] = []  # (position in flat, index into leaves/constants)
        self.constant_slots: list[tuple[int, int]] = []
        parts = [tree_flatten(arg) for arg in args]
        ends = [0]
        for leaves, _ in parts:
            ends.append(ends[-1] + len(leaves))
        wanted = {k for i in argnums for k in range(ends[i], ends[i + 1])}
        self.specs = [(parts[i][1], range(ends[i], ends[i + 1])) for i in argnums]
        for k, leaf in enumerate(self.flat):
            if not isinstance(leaf, Tensor):
                continue
            if k in wanted and is_perturbed(leaf):
                self.slots.append((k, len(self.leaves)))
                self.leaves.append(as_real(leaf))
            else:
                self.constant_slots.append((k, len(self.constants)))
                self.constants.append(leaf)
        if not self.leaves:
            raise ValueError(
                f"`argnums`: expected floating-point tensors in the arguments at {engine.argnums}, "
                "found none."
            )

    def begin(self) -> None:
        """Remember what the function finds now."""
        leaves = (self.flat[k] for k, _ in self.slots)
        given = [*leaves, *self.scratch, *(self.constants if self.graph else ())]
        self.state = CallState(self.fn, given, self.constants)

    def reset(self) -> None:
        """Let the function find what it found when the call began."""
        if self.state is not None:
            self.state.reset()

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the function may run again: it leaves no trace."""
        return contextlib.nullcontext() if self.state is None else self.state.held()

    def name(self, leaf: int) -> str:
        """Return the place of a differentiated leaf, such as `$[0]['w']`."""
        k = self.slots[leaf][0]
        return self.spec.accessors()[k][1:].codify("$")

    def warn_of_lost_perturbations(self, leaves: Sequence[Tensor]) -> None:
        """Warn of weights whose numbers are too far apart for sigma."""
        normal = self.engine.directions.standard_normal
        warn_of_lost_perturbations(leaves, self.engine.sigma, normal, self.name)

    def evaluate(
        self,
        leaves: Sequence[Tensor],
        constants: Sequence[Tensor],
        scratch: tuple[Tensor, ...] | None = None,
    ) -> tuple[Any, Any]:
        """Return output and aux of the function at other tensors; with `scratch`, at perturbed
        ones.
        """
        flat: list[Any] = list(self.flat)
        for k, i in self.slots:
            flat[k] = as_stored(leaves[i], self.flat[k])
        for k, i in self.constant_slots:
            flat[k] = constants[i]
        arguments: Any = tree_unflatten(self.spec, flat)
        args, kwargs = arguments
        with torch.set_grad_enabled(self.graph):
            if self.perturbed is not None and scratch is not None:
                result = self.perturbed(scratch, *args, **kwargs)
            else:
                result = self.fn(*args, **kwargs)
        if not self.engine.has_aux:
            return result, None
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "has_aux=True: expected the function to return a pair (output, aux), got "
                f"{type(result).__name__}."
            )
        return result

    def tree(self, leaves: Sequence[Tensor]) -> Any:
        """Return leaves as the tree of the differentiated arguments."""
        flat: list[Any] = list(self.flat)
        for k, i in self.slots:
            flat[k] = as_stored(leaves[i], self.flat[k])
        for k, _ in self.constant_slots:
            flat[k] = None
        trees = tuple(tree_unflatten(spec, [flat[k] for k in part]) for spec, part in self.specs)
        return trees[0] if len(trees) == 1 else trees

    def named(self, result: LeafEstimate) -> GradientEstimate:
        """Return an estimate as trees of the differentiated arguments."""
        error = result.standard_error
        return GradientEstimate(
            self.tree(result.gradient),
            None if error is None else self.tree(error),
            result.effective_sample_size,
            result.evaluations,
        )

    def apply(self) -> Any:
        """Return what the function returns, with the estimate as its derivative."""
        self.graph = self.graph or is_transforming()
        if is_transforming():
            self.require_arguments_of_transforms()
        operation = Operation(
            self.forward, None, _no_forward_mode, len(self.leaves), self.gradient_operation
        )
        output, *aux = apply_operation(operation, *self.leaves, *self.constants)
        if self.complex_output:
            output = torch.view_as_complex(output)
        if not self.engine.has_aux:
            return output
        assert self.aux_spec is not None
        tensors = iter(aux)
        leaves = [
            next(tensors).detach() if isinstance(leaf, Tensor) else leaf for leaf in self.aux_leaves
        ]
        return output, tree_unflatten(self.aux_spec, leaves)

    def require_arguments_of_transforms(self) -> None:
        """Raise if the function can reach a tensor that an enclosing transform differentiates."""
        given = {id(x) for x in self.flat}
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        _require_no_names(
            name
            for name, x in captured(self.fn, Tensor)
            if id(x) not in given and wrapped(x) and is_differentiated(x)
        )

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Evaluate at the point itself, and settle which directions the backward pass uses."""
        n = len(self.leaves)
        if self.seed is None:
            # Once for each call: the entries of a vmapped call share their directions.
            self.seed = draw_seed(self.engine.generator)
            if self.graph:
                self.begin()
                self.warn_of_lost_perturbations(tensors[:n])
        else:
            self.reset()
        given = [x.detach() for x in tensors]
        copies = [_copy(x) for x in given] if self.graph else given
        versions = [_version(x) for x in given]
        with common_draws(self.sampling().inner_seed, given):
            output, aux = self.evaluate(given[:n], given[n:])
        overwritten = {k: x for k, x in enumerate(copies) if _version(given[k]) != versions[k]}
        if self.overwritten and overwritten:
            overwritten = dict.fromkeys(overwritten)  # which entry of a vmap is asked for?
        self.overwritten.update(overwritten)
        if self.state is not None:
            self.state.settle()
        output = _tensor(output) if self.engine.vector_output else _scalar(output)
        if self.graph:
            names = hidden_inputs(output, given, self.fn)
            _require_no_names(name for name in names if not name.startswith("a tensor of"))
        self.aux_leaves, self.aux_spec = tree_flatten(aux)
        extra = (leaf for leaf in self.aux_leaves if isinstance(leaf, Tensor))
        # Copies: an output must not be an input, or a view of one.
        return tuple(x.detach().clone() for x in (self.differentiable(output), *extra))

    def differentiable(self, output: Tensor) -> Tensor:
        """Return an output in a dtype that autograd differentiates: real and floating-point."""
        self.complex_output = output.is_complex()
        if output.is_complex() or output.is_floating_point():
            return as_real(output)
        dtype = torch.float32
        for x in self.leaves:
            dtype = torch.promote_types(dtype, x.dtype)
        return output.to(dtype)

    def constants_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the arguments that are not differentiated as the function found them, as copies
        where it writes into them.
        """
        n, m = len(self.leaves), len(self.constants)
        constants = list(tensors[len(tensors) - m :]) if m else []
        for k in range(n, n + m):
            if k in self.overwritten:
                constants[k - n] = self._before(k).clone()
        return constants

    def point_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the differentiated leaves as the function found them."""
        return [
            self._before(k) if k in self.overwritten else x
            for k, x in enumerate(tensors[: len(self.leaves)])
        ]

    def _before(self, k: int) -> Tensor:
        copy = self.overwritten[k]
        if copy is None:
            raise NotDifferentiableError(
                "zero-order estimation: the function overwrites one of its arguments, in a call "
                "under vmap or of a size for which no copy is kept, so that the backward pass "
                "cannot see what the forward pass saw. Clone the argument inside the function."
            )
        return copy

    def gradient_operation(self, outputs: int) -> Operation:
        """Return the operation from leaves and cotangents of the outputs to the gradient."""
        n = len(self.leaves)

        def second(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self.second(n, outputs, *tensors)

        def derivative(cotangents: int) -> Operation:
            return Operation(second, None, _no_third_derivative, n + outputs + cotangents)

        return Operation(self.backward, None, _no_forward_mode, n + outputs, derivative)

    def backward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return cotangent' J, estimated: the gradient of the scalar <cotangent, output>."""
        n = len(self.leaves)
        leaves, cotangent = self.point_of(tensors), tensors[n]
        _require_one_cotangent(cotangent)
        output = self.output(tensors)

        def product(*point: Tensor) -> Tensor:
            value = widened(output(*point))
            return (value * cotangent.to(accumulator(cotangent.dtype))).sum()

        # Of a 0-dim loss, the estimate is multiplied: one of shaped losses is linear in the
        # cotangent as well.
        loss, scale = (product, None) if cotangent.ndim else (output, cotangent)
        with self.running():
            result = estimate_leaves(loss, leaves, self.sampling(), scale=scale)
        return tuple(result.gradient)

    def output(self, tensors: Sequence[Tensor]) -> Callable[..., Tensor]:
        """Return the function from leaves and scratch to its output, real, in the state that the
        forward pass found.
        """
        n = len(self.leaves)

        def output(*point: Tensor) -> Tensor:
            self.reset()
            constants = self.constants_of(tensors)
            return as_real(_tensor(self.evaluate(point[:n], constants, point[n:])[0]).detach())

        return output

    def second(self, n: int, outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the derivative of `backward` for leaves and cotangents, in a direction."""
        _require_second_derivative(self.engine)
        leaves, cotangent, rest = self.point_of(tensors), tensors[n], tensors[n + 1 : n + outputs]
        tangents = tensors[n + outputs : 2 * n + outputs]
        output = self.output(tensors)
        with self.running():
            product, along = second_derivative(output, leaves, cotangent, tangents, self.sampling())
        return (*product, along, *(torch.zeros_like(x) for x in rest))

    def sampling(self) -> Sampling:
        """Return where this call is evaluated."""
        assert self.seed is not None
        return self.engine._sampling(self.evaluator, self.seed, self, self.scratch)


# Entries of an argument beyond which no copy is made before the function runs.
_COPIED = 2**24


def _copy(x: Tensor) -> Tensor | None:
    return x.clone() if x.numel() <= _COPIED else None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _require_one_cotangent(cotangent: Tensor) -> None:
    # torch's batched backward passes have a kind of vmap of their own.
    of_legacy_vmap = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)
    if of_legacy_vmap(cotangent) or is_batched(cotangent):
        raise NotDifferentiableError(
            "zero-order estimation: expected one cotangent at a time, got a batch of them "
            "(is_grads_batched=True or vectorize=True). Use torch.func.jacrev, torch.func.vmap "
            "over torch.func.vjp, or a loop."
        )


def _require_no_names(names: Iterable[str]) -> None:
    """Raise if the function depends on tensors that the estimate would leave out."""
    found = list(dict.fromkeys(names))
    if not found:
        return
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    raise NotDifferentiableError(
        f"zero-order estimation: the function depends on {shown}: not among the arguments at "
        "argnums, but a gradient is required there; it would silently be zero. Pass them as "
        "arguments and name these in argnums, or detach them."
    )


def _require_second_derivative(engine: ZeroOrder) -> None:
    if engine.estimator.curvature is None or not engine.directions.standard_normal:
        known = ", ".join(name for name, e in ESTIMATORS.items() if e.curvature is not None)
        raise NotDifferentiableError(
            f"zero-order estimation: a second derivative is defined for one of the methods {known} "
            "and standard normal directions (torch.distributions.Normal(0.0, 1.0), torch.randn, "
            f"Gaussian(), Orthogonal(), Sobol()), got {engine.estimator.name} and "
            f"{engine.directions!r}. Choose among these, or drop create_graph=True."
        )


def _no_forward_mode(*tensors: Tensor) -> tuple[Tensor, ...]:
    raise NotDifferentiableError(
        "zero-order estimation: expected a reverse-mode derivative, got a request for a "
        "forward-mode one. Use reverse mode: torch.func.vjp for torch.func.jvp, "
        "torch.func.jacrev(torch.func.jacrev(f)) for torch.func.hessian(f)."
    )


def _no_third_derivative(*tensors: Tensor) -> tuple[Tensor, ...]:
    raise NotDifferentiableError(
        "zero-order estimation: expected a first or second derivative, got a request for a third "
        "one. Estimate a derivative of the outer function instead."
    )


def zero_order(
    distribution: SampleFunc | Samplable | Directions,
    method: str | Estimator = "naive",
    argnums: int | tuple[int, ...] = (0,),
    num_samples: int = 1,
    sigma: float = 1.0,
    *,
    has_aux: bool = False,
    vector_output: bool = False,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    vectorized: bool | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that gives a function a gradient estimated from its values.

    With directions z_i from `distribution`, of mean 0 and covariance I, the gradient is

        naive       1 / (sigma N)   sum_i f(theta + sigma z_i) z_i
        forward     1 / (sigma N)   sum_i (f(theta + sigma z_i) - f(theta)) z_i
        antithetic  1 / (2 sigma N) sum_i (f(theta + sigma z_i) - f(theta - sigma z_i)) z_i

    or that of any other estimator of `torchopt.diff.zero_order.estimators`. For linear f with
    gradient a and Gaussian z, an antithetic pair has mean a and covariance norm(a)^2 I + a a'.

    The function runs once in the forward pass, where the seed of the directions is drawn: the
    backward pass gives the same gradient however often it runs. It evaluates the function in chunks
    by `torch.func.vmap` and regenerates directions instead of storing them. Random draws inside the
    function (dropout) are common to a call, its forward and its backward pass; they are those of
    torch's, Python's and numpy's generators.

    A backward pass belongs to its call. It evaluates the function with the buffers, training flags,
    numbers (counters) and random generators that the function found in the forward pass, in its
    arguments and in what it reaches by closure, and puts back what was there before: only the
    forward pass has side effects. What cannot be put back is refused.

    Second derivatives (`create_graph=True`) are those of the smoothed function
    E f(theta + sigma z), estimated by Stein's identity from as many evaluations again, along with
    the derivative in the cotangent. They need standard normal directions and one of the methods
    naive, forward, antithetic, central and leave_one_out; their variance is larger by about
    D / sigma^2.

    Under `torch.compile` the estimate is left out of the graph: the compiler breaks the graph
    before and after the call, so `fullgraph=True` raises. The estimators as pure functions of
    losses and noise, and an optimizer step on an estimate, compile as one graph.

    Args:
        distribution: An object with a method `sample(shape)` or a callable `f(shape)`, called with
            the shape of each tensor and drawing from torch's generators; or a source of
            `torchopt.diff.zero_order.directions`, such as `Gaussian()`. Spherically symmetric with
            unit variance.
        method: `"naive"`, `"forward"`, `"antithetic"`, another name of
            `torchopt.diff.zero_order.estimators.ESTIMATORS`, or an `Estimator`.
        argnums: Positions of the differentiated arguments, trees of floating-point or complex
            tensors. No other argument gets a gradient. A complex leaf is perturbed as a pair of
            real numbers, and `distribution` is asked for `[*shape, 2]`.
        num_samples: N >= 1, number of directions.
        sigma: > 0, size of the perturbation, in the units of the parameters.
        has_aux: The function returns `(output, aux)`; aux comes back detached.
        vector_output: The output is a tensor of any shape. The estimate is then the
            vector-Jacobian product: the gradient of the inner product of cotangent and output.
        generator: Where the seed is drawn, in the forward pass; default: torch's CPU generator.
        chunk_size: Directions evaluated at once; None: as many as keep the perturbed points and
            tensor arguments within 2**21 entries. Results depend on it by rounding alone. Smaller
            chunks for functions with large intermediate results.
        vectorized: True: by vmap, or raise. False: in a loop. None: by vmap, or, with one warning,
            in a loop.

    Returns:
        A decorator. The decorated function takes any arguments, keywords too; its value is that of
        the function, of a floating-point dtype where the function returns an integer or a bool.
        It can be used in `torch.autograd`, `torch.func.grad`, `vjp` and `vmap` (one
        call for each entry, with common directions).

    Raises:
        TypeError: `distribution` is neither callable nor has `sample`; the output is no tensor.
        RuntimeError: The output is not 0-dim and `vector_output` is False.
        ValueError: Another option is out of its range.
        NotDifferentiableError: A forward-mode derivative was asked for, a third one, or a second
            one where it is not defined; the function depends on tensors that require a gradient and
            are not among its arguments; or what the forward pass found is gone.
        UserWarning: As a warning: sigma is below the resolution of a weight.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> @zero_order(torch.distributions.Normal(0.0, 1.0), "forward", num_samples=10_000)
        ... def f(x):
        ...     return (3.0 * x + 10.0).sum()
        >>> x = torch.zeros(2, requires_grad=True)
        >>> f(x).backward()
        >>> bool((x.grad - 3.0).abs().max() < 0.25)
        True

    References:
        Y. Nesterov, V. Spokoiny, Random Gradient-Free Minimization of Convex Functions, Foundations
        of Computational Mathematics 17, 2017.
    """
    return ZeroOrder(
        distribution,
        method,
        argnums,
        num_samples,
        sigma,
        has_aux=has_aux,
        vector_output=vector_output,
        generator=generator,
        chunk_size=chunk_size,
        vectorized=vectorized,
    )
