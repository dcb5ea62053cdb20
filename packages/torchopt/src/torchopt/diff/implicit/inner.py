# SPDX-License-Identifier: Apache-2.0
"""The implicit engine for inner problems: the inner loop is a solver of ∇loss = 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from torchopt.diff.closure import captured
from torchopt.diff.differences import Differences, Judge
from torchopt.diff.engine import Engine
from torchopt.diff.explicit.loop import Explicit, InnerResult
from torchopt.diff.implicit.certificate import GradientReport
from torchopt.diff.implicit.root import ImplicitEngine
from torchopt.diff.implicit.slope import slope
from torchopt.diff.problem import over_tasks, require_verify
from torchopt.diff.verify import Verify, VerifyReport, checked
from torchopt.errors import NotDifferentiableError
from torchopt.linear_solve.auto import Auto
from torchopt.torch_internals import is_wrapped
from torchopt.tree import is_smooth, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torchopt.tree_function import is_differentiated, uncompiled

__all__ = ["Adaptation", "Implicit"]


@dataclass(frozen=True)
class Adaptation:
    """Replace the inverse Hessian by the derivative of the optimizer's update (SAMA).

    Pass it as `solve=` of `Implicit`. For a cotangent v the gradient is then

        B' (du/dg)' v,    B = ∂g/∂θ,

    where u(g) is the next update of the optimizer after the loop, from its state there, g is the
    gradient of the loss, and B its mixed second derivatives. A step of the optimizer takes the
    place of a Newton step. For SGD this is T1-T2. With `derivative=Differences(gradients=2)` no
    second derivatives are computed. Not available for `tasks` or `vmap`.

    The implementation of the authors, `betty/hypergradient/sama.py`, uses the last update instead
    of the next one, Adam without bias correction, and SGD without its learning rate. For B at the
    beginning of the last step use `torchopt.inner_loop(..., window=1)`.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff import Differences, Implicit
        >>> from torchopt.diff.implicit import Adaptation
        >>> inner = Implicit(
        ...     lambda w, x: ((w - x) ** 2).sum(), torchopt.sgd(0.1), steps=20,
        ...     solve=Adaptation(), derivative=Differences(gradients=2),
        ... )
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> inner(torch.zeros(2).double(), x).params.sum().backward()
        >>> x.grad.round(decimals=6)  # 2 * 0.1 of the exact 1
        tensor([0.2000, 0.2000], dtype=torch.float64)

    References:
        S. K. Choe, S. V. Mehta, H. Ahn, W. Neiswanger, P. Xie, E. Strubell, E. Xing, Making
        Scalable Meta Learning Practical, NeurIPS 2023, https://arxiv.org/abs/2310.05674
    """

    def __call__(self, matvec: Callable[[Any], Any], b: Any) -> Any:
        """Raise, because outside an inner problem there is no optimizer.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "Adaptation: expected to be `solve=` of Implicit over an inner problem, whose "
            "optimizer it uses; got an equation without one. Use a solver of torchopt.linear_solve."
        )

    @staticmethod
    def of(optimizer: Any, gradient: Any, state: Any, params: Any) -> Callable[..., Any]:
        """Return the map (matvec, b) -> -(du/dg)' b.

        Raises:
            NotDifferentiableError: Inside a vmap.
        """
        if any(isinstance(x, Tensor) and is_wrapped(x) for x in tree_leaves((gradient, state))):
            raise NotDifferentiableError(
                "Adaptation: expected one inner problem, got a batch of them under vmap or tasks; "
                "loop over them, or use inner_loop(window=1)."
            )

        def solved(matvec: Callable[[Any], Any], b: Any) -> Any:
            leaves, form = tree_flatten(gradient)

            def update(leaves: Sequence[Tensor]) -> Any:
                slope = tree_unflatten(form, leaves)
                return tree_leaves(optimizer.update(slope, state, params=params, inplace=False)[0])

            pull = torch.func.vjp(update, leaves)[1]
            return tree_unflatten(form, list(map(torch.neg, pull(tree_leaves(b))[0])))

        return solved


@dataclass(frozen=True)
class Implicit(Engine):
    """The implicit engine: differentiates the minimum that an inner loop converges to.

    The loop runs without a graph. Its result is treated as a root of ∇loss(params, batch, *meta)
    and differentiated with respect to the floating-point tensors of `batch` and `meta`. A minimum
    depends neither on the start of the loop nor on its path. So the initial parameters and the
    state get no gradient, hyper-parameters that require a gradient are refused, and `losses`,
    `state` and `aux` of the result are constants.

    T1-T2 approximates the Hessian by I / alpha, where alpha is the learning rate:
    `Implicit(solve=Neumann(0, alpha=alpha, rtol=1.0))` gives -alpha B' v for a cotangent v and the
    mixed second derivatives B. Its error is that of a Neumann series with one term. With
    `derivative=Differences(gradients=2)` it is the approximation of DARTS. SAMA uses the derivative
    of the optimizer's update instead of -alpha:
    `Implicit(solve=Adaptation(), derivative=Differences(gradients=2))`.

    Attributes:
        loss: As in `torchopt.inner_loop`; None for an engine without a problem, see `over`.
        optimizer: As in `torchopt.inner_loop`.
        steps: As in `torchopt.inner_loop`.
        solve: The solver of the linear system, as in `torchopt.diff.implicit.custom_root`; None:
            `torchopt.linear_solve.Auto`.
        positive_definite: Whether the Hessian of the loss is positive definite.
        polish: The number of Newton corrections of the loop's result, >= 0.
        tol: The largest norm of the gradient that counts as solved; None: it is not computed.
        on_fail: What to do above `tol`: "raise", "warn", "unroll" or "ignore".
        certificate: Called with a `GradientReport` for every gradient.
        tasks: As in `torchopt.inner_loop`.
        verify: As in `torchopt.inner_loop`.
        derivative: How products with the Hessian are computed. `"reverse"`: by autograd.
            `"differences"`, or a `Differences`: from four, or two, gradients, for losses whose
            operations have no second derivative; then only a first derivative in reverse mode is
            available, without tasks.
        report: The results of `verify`, and the estimated errors of differences.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff import Implicit
        >>> def loss(w, x, penalty):
        ...     return ((w - x) ** 2).sum() + penalty * (w**2).sum()
        >>> inner = Implicit(loss, torchopt.sgd(0.2), steps=60)
        >>> penalty = torch.tensor(1.0, requires_grad=True)
        >>> inner(torch.zeros(1), torch.tensor([4.0]), penalty).params.sum().backward()
        >>> penalty.grad  # w = x / (1 + penalty)
        tensor(-1.)

    References:
        J. Luketina et al., Scalable Gradient-Based Tuning of Continuous Regularization
        Hyperparameters, ICML 2016, https://arxiv.org/abs/1511.06727 (T1-T2)

    """

    loss: Callable[..., Any] | None = None
    optimizer: Any = None
    steps: int = 1
    solve: Callable[..., Any] | None = None
    positive_definite: bool = False
    polish: int = 0
    tol: float | None = None
    on_fail: Literal["raise", "warn", "unroll", "ignore"] = "warn"
    certificate: Callable[[GradientReport], Any] | None = None
    tasks: Sequence[Any] | None = None
    verify: Verify | None = None
    derivative: str | Differences = "reverse"
    report: VerifyReport = field(
        init=False, default_factory=VerifyReport, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Check the fields."""
        Explicit(self.loss, self.optimizer, self.steps, tasks=self.tasks)
        if self.derivative not in ("reverse", "differences") and self._differences is None:
            raise ValueError(
                "Implicit: derivative: expected 'reverse', 'differences' or a Differences, got "
                f"{self.derivative!r}."
            )
        self.rule(_nothing)
        if isinstance(self.solve, Adaptation) and self.tasks is not None:
            raise ValueError(
                "Implicit: tasks: expected none with solve=Adaptation(); loop over them."
            )
        require_verify(self.verify, Verify)

    @property
    def _differences(self) -> Differences | None:
        if isinstance(self.derivative, Differences):
            return self.derivative
        return Differences() if self.derivative == "differences" else None

    def rule(self, optimality: Callable[..., Any], **options: Any) -> ImplicitEngine:
        """Return the engine for solvers of an equation, whose argument 1 is differentiated."""
        given: dict[str, Any] = {
            "solve": Auto(on_fail="warn") if self.solve is None else self.solve,
            "positive_definite": self.positive_definite,
            "polish": self.polish,
            "tol": self.tol,
            "on_fail": self.on_fail,
            "report": self.certificate,
        }
        return ImplicitEngine(optimality, (1,), **{**given, **options})

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> InnerResult:
        """Run the loop: `(params, batch, *meta, state=None, **hypers)`.

        Raises:
            NotDifferentiableError: The loss uses a tensor that requires a gradient and is not an
                argument.
            ValueError: `batches` were given; the equation has only one batch.
        """
        found: InnerResult = checked(self, args, kwargs)
        return found

    def run_inner(
        self,
        params: Any,
        batch: Any = None,
        *meta: Any,
        batches: Any = None,
        state: Any = None,
        **hypers: Any,
    ) -> InnerResult:
        """Run the loop without the checks of `verify`."""
        if batches is not None:
            raise ValueError(
                "Implicit: batches: expected one batch for all steps, because the solution is that "
                "of one equation, got batches; pass batch=, or use another engine."
            )
        self._refuse(hypers)
        state = tree_map(_constant, state)

        def one(state: Any, params: Any, batch: Any, *meta: Any) -> Any:
            return tuple(self._solved(params, (batch, *meta), state, hypers))

        if self.tasks is None:
            return InnerResult(*one(state, params, batch, *meta))
        return InnerResult(*over_tasks(one, self.tasks, (params, batch, *meta), state))

    def _refuse(self, hypers: dict[str, Any]) -> None:
        held = [(f"`{name}`", x) for name, x in hypers.items()]
        inside = captured(self.optimizer, Tensor)
        held += [(f"a tensor of the optimizer ({name})", x) for name, x in inside]
        for name, x in held:
            if is_smooth(x) and is_differentiated(x):
                raise NotDifferentiableError(
                    f"Implicit: expected hyper-parameters without a gradient, got {name} that "
                    "requires one: the minimum does not depend on how it is found. Detach it, or "
                    "use Explicit."
                )

    def _solved(
        self, params: Any, arguments: tuple[Any, ...], state: Any, hypers: dict[str, Any]
    ) -> InnerResult:
        # Differences need only first derivatives.
        derivative = "reverse" if self._differences is None else "first_order"
        loop, loss = Explicit(self.loss, self.optimizer, self.steps, derivative), self.loss
        assert loss is not None
        leaves, spec = tree_flatten(arguments, none_is_leaf=True)
        smooth = [is_smooth(x) for x in leaves]
        chosen = [x for x, flag in zip(leaves, smooth) if flag]
        others = [x for x, flag in zip(leaves, smooth) if not flag]

        def filled(chosen: Sequence[Tensor], others: Sequence[Any]) -> tuple[Any, ...]:
            first: Any = iter(chosen)
            second: Any = iter(others)
            found: Any = tree_unflatten(spec, [next(first if f else second) for f in smooth])
            return tuple(found)

        differences = self._differences

        def by_differences(x: Any, chosen: Any, others: Any) -> Any:
            leaves, form = tree_flatten(x)
            count = len(leaves)

            def objective(tensors: Sequence[Tensor]) -> Tensor:
                found = loss(
                    tree_unflatten(form, tensors[:count]), *filled(tensors[count:], others)
                )
                value: Tensor = found[0] if isinstance(found, tuple) else found
                return value

            judge = Judge(differences or Differences(), self.report)
            return tree_unflatten(form, slope(objective, [*leaves, *chosen], count, judge))

        def optimality(x: Any, chosen: Any, others: Any) -> Any:
            leaves, form = tree_flatten(x)  # torch's trees have leaves of None

            def objective(leaves: Sequence[Tensor]) -> Tensor:
                found = loss(tree_unflatten(form, leaves), *filled(chosen, others))
                value: Tensor = found[0] if isinstance(found, tuple) else found
                return value

            return tree_unflatten(form, torch.func.grad(objective)(leaves))

        adapted: list[Any] = []
        options: dict[str, Any] = {}
        if isinstance(self.solve, Adaptation):
            options["solve"] = lambda matvec, b: adapted[0](matvec, b)

        def solve(start: Any, chosen: Any, others: Any) -> Any:
            found = loop.run_inner(start, *filled(chosen, others), state=state, **hypers)
            if options:
                optimizer = self.optimizer(**hypers) if hypers else self.optimizer
                slope = optimality(found.params, chosen, others)
                adapted[:] = [Adaptation.of(optimizer, slope, found.state, found.params)]
            return found.params, (found.state, found.losses, found.aux)

        engine = self.rule(
            optimality if differences is None else by_differences,
            symmetric=True,
            has_aux=True,
            where="Implicit",
            remedy="Pass it after the batch, as a further argument of the loss, or detach it.",
            **options,
        )
        start = tree_map(_constant, params)
        # If nothing is differentiated, the engine is still needed under vmap.
        solution, (state, losses, aux) = engine(solve)(start, chosen or [torch.empty(0)], others)
        return InnerResult(solution, state, losses, aux)


def _constant(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _nothing(*args: Any) -> None:
    raise AssertionError("no equation")
