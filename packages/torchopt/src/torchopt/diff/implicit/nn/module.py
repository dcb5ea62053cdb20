# SPDX-License-Identifier: Apache-2.0
"""Modules whose parameters are the solution of an inner problem."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from torchopt.diff.implicit.certificate import GradientReport
from torchopt.diff.implicit.nn.meta_module import MetaGradientModule
from torchopt.diff.implicit.nn.stateless import reparametrize, swap_state
from torchopt.diff.implicit.root import ImplicitEngine
from torchopt.diff.surroundings import fresh_buffers
from torchopt.linear_solve.auto import Auto
from torchopt.params.lineage import descend
from torchopt.params.load import start_from_what_is_loaded
from torchopt.params.swap import places_of
from torchopt.tree import is_smooth, tree_flatten, tree_leaves, tree_unflatten
from torchopt.tree_function import is_differentiated, is_tracked, uncompiled
from torchopt.typing import LinearSolver

__all__ = [
    "ImplicitMetaGradientModule",
    "enable_implicit_gradients",
    "make_optimality_from_objective",
]

WRAPPED = "_torchopt_implicit_gradients"


class ImplicitMetaGradientModule(MetaGradientModule, metaclass=abc.ABCMeta):
    """A module whose parameters solve an inner problem that depends on its meta-parameters.

    A subclass implements `solve`, which changes the parameters until they solve the problem, and
    either `objective`, which the solution minimizes, or `optimality`, which is zero at the
    solution. After `module.solve(...)` the parameters are tensors with an implicit gradient with
    respect to the meta-parameters. Compute the loss of the outer problem from them.

    `solve` runs outside any graph, and the parameters are leaves, so any optimizer of
    torch.optim or torchopt can update them, inside `torch.enable_grad()`. It may be called any
    number of times; each call starts from the values that the last one left. Parameters that
    require no gradient are frozen: they are constants of the inner problem and do not change.
    Arguments of `solve` that require a gradient also get one.

    A derivative belongs to one call of `solve`. It uses the buffers, training flags, attributes and
    random numbers as they were at the end of `solve`, whatever has changed in the module since, and
    computing it does not change the module.

    Subclass keywords:
        linear_solve: The solver of the linear system of the gradient: a solver of
            `torchopt.linear_solve`, or a function of (matvec, b). The default is that of
            `custom_root`.
        polish: The number of Newton corrections of the parameters after `solve`, >= 0.
        tol: The largest ‖optimality‖₂ after `solve`; None: it is not computed.
        on_fail: What to do above `tol` or with NaN: "raise" or "warn" (default). "unroll" is not
            available, because `solve` changes the parameters in place.
        report: Called with a `GradientReport` for every gradient.

    Raises:
        TypeError: For the definition of a subclass: it has neither `objective` nor `optimality`, or
            one of them is not an ordinary method.
        ValueError: For the definition of a subclass: `on_fail` is unknown.
        RuntimeError: In `solve`: no parameter requires a gradient, or there are neither
            meta-parameters nor arguments that do.
        NotDifferentiableError: In `solve`: `optimality` depends on another tensor that requires a
            gradient.
        OptimalityError: In `solve`: ‖optimality‖₂ is above `tol`, and `on_fail` is "raise".

    Example:
        >>> import torch
        >>> class Proximal(ImplicitMetaGradientModule):
        ...     def __init__(self, center):
        ...         super().__init__()
        ...         self.center = center  # a meta-parameter: it was given, and requires a gradient
        ...         self.w = torch.nn.Parameter(torch.zeros(()))
        ...     def objective(self, target):
        ...         return (self.w - target) ** 2 + 0.5 * (self.w - self.center) ** 2
        ...     def solve(self, target):
        ...         with torch.no_grad():
        ...             self.w.copy_((2 * target + self.center) / 3)
        ...         return self
        >>> center = torch.tensor(1.0, requires_grad=True)
        >>> Proximal(center).solve(torch.tensor(4.0)).w.backward()
        >>> center.grad
        tensor(0.3333)
    """

    _custom_optimality: ClassVar[bool] = False
    _custom_objective: ClassVar[bool] = False
    linear_solve: ClassVar[LinearSolver | None] = None
    _engine_options: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(
        cls,
        linear_solve: LinearSolver | None = None,
        *,
        polish: int | None = None,
        tol: float | None = None,
        on_fail: Literal["raise", "warn"] | None = None,
        report: Callable[[GradientReport], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if on_fail not in (None, "raise", "warn"):
            raise ValueError(f"on_fail: expected 'raise' or 'warn', got {on_fail!r}")
        given = {"polish": polish, "tol": tol, "on_fail": on_fail, "report": report}
        options = {name: value for name, value in given.items() if value is not None}
        cls._engine_options = {**cls._engine_options, **options}
        if linear_solve is not None:
            # A plain function in the class would become a method.
            cls.linear_solve = staticmethod(linear_solve)
        for name in ("optimality", "objective"):
            _check_method(cls, name)
        # The nearest definition counts: an objective below an inherited optimality replaces it.
        for base in cls.__mro__:
            if base is ImplicitMetaGradientModule:
                raise TypeError(
                    "ImplicitMetaGradientModule requires either an optimality() method or an "
                    "objective() method"
                )
            written = vars(base).get("optimality")
            has_optimality = written is not None and not hasattr(written, WRAPPED)
            has_objective = "objective" in vars(base)
            if has_optimality or has_objective:
                break
        cls._custom_optimality = has_optimality
        cls._custom_objective = has_objective
        if not has_optimality and "optimality" not in vars(cls):
            make_optimality_from_objective(cls)
        if "solve" in vars(cls) and not getattr(cls.solve, "__isabstractmethod__", False):
            enable_implicit_gradients(cls)

    @abc.abstractmethod
    def solve(self, *inputs: Any, **kwargs: Any) -> Any:
        """Change the parameters until they solve the inner problem; usually return self.

        Parameters in the returned tree become those of the solution; its other tensors are
        constants.
        """
        raise NotImplementedError

    def optimality(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return a residual that is zero at the solution: a tensor for each of `parameters()`."""
        raise NotImplementedError

    def objective(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Return the 0-dim tensor that the solution minimizes."""
        raise NotImplementedError


def _check_method(cls: type, name: str) -> None:
    method = inspect.getattr_static(cls, name)
    if isinstance(method, staticmethod):
        raise TypeError(f"method {name}() must not be a staticmethod.")
    if isinstance(method, classmethod):
        raise TypeError(f"method {name}() must not be a classmethod.")
    if not callable(method):
        raise TypeError(f"method {name}() must be callable.")


def make_optimality_from_objective(
    cls: type[ImplicitMetaGradientModule],
) -> type[ImplicitMetaGradientModule]:
    """Set the optimality function of a class to the gradient of `objective` by the parameters.

    Raises:
        TypeError: The class has no objective.
    """
    if getattr(cls, "objective", None) in (None, ImplicitMetaGradientModule.objective):
        raise TypeError("The objective function is not defined.")

    def optimality(self: ImplicitMetaGradientModule, *inputs: Any, **kwargs: Any) -> Any:
        names, params = zip(*_unknowns(self).items())

        def objective(tensors: tuple[Tensor, ...]) -> Tensor:
            state = _everywhere(self, names, tensors)
            with fresh_buffers(_family(self)), reparametrize(self, state):
                return self.objective(*inputs, **kwargs)

        return torch.func.grad(objective)(params)

    setattr(optimality, WRAPPED, True)
    cls.optimality = optimality  # type: ignore[method-assign]
    return cls


def _unknowns(module: ImplicitMetaGradientModule) -> dict[str, Tensor]:
    """Return the unknowns of the inner problem by name: the parameters that are not frozen."""
    names = module.__dict__.get("_unknown_names")
    named = module.named_parameters()
    return {k: p for k, p in named if (p.requires_grad if names is None else k in names)}


def _family(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and its sub-modules, including meta-modules."""
    for inner in module.modules():
        yield inner
        for meta in vars(inner).get("_meta_modules", {}).values():
            if meta is not None:
                yield from _family(meta)


def _ties(named: Iterable[tuple[str, Tensor]]) -> list[list[str]]:
    """Return all names of each tensor, in the order of the tensors."""
    found: dict[int, list[str]] = {}
    for name, x in named:
        found.setdefault(id(x), []).append(name)
    return list(found.values())


def _everywhere(module: nn.Module, names: Sequence[str], tensors: Iterable[Any]) -> dict[str, Any]:
    """Return the tensors by name, under all names that their parameters have."""
    ties = {each[0]: each for each in _ties(module.named_parameters(remove_duplicate=False))}
    return {alias: x for name, x in zip(names, tensors) for alias in ties[name]}


def _leaf(module: ImplicitMetaGradientModule, name: str, param: Tensor) -> Tensor:
    """Return a leaf with the value of a parameter: itself, or the leaf of an earlier call."""
    if param.is_leaf:
        return param
    leaves: dict[str, Tensor] = module.__dict__.get("_solver_leaves", {})
    leaf = leaves.get(name)
    if leaf is None or leaf.shape != param.shape or leaf.dtype != param.dtype:
        return nn.Parameter(param.detach().clone())
    with torch.no_grad():
        leaf.copy_(param)
    return leaf


class _Arguments:
    """The arguments of one call of `solve`, split into differentiated ones and others."""

    def __init__(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._spec = tree_flatten((inputs, kwargs))
        self._smooth = [is_smooth(x) and is_differentiated(x) for x in leaves]
        self.chosen = [x for x, flag in zip(leaves, self._smooth) if flag]
        self.others = [x for x, flag in zip(leaves, self._smooth) if not flag]

    def filled(self, chosen: Iterable[Any], others: Iterable[Any]) -> Any:
        """Return (inputs, kwargs) with these leaves."""
        first, second = iter(chosen), iter(others)
        return tree_unflatten(self._spec, [next(first if s else second) for s in self._smooth])


def _solve(
    module: ImplicitMetaGradientModule,
    user_solve: Callable[..., Any],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    named = _unknowns(module)
    if not named:
        raise RuntimeError(
            "The module has no parameters. Assign at least one that requires a gradient, which the "
            "inner problem is solved for."
        )
    given = _Arguments(inputs, kwargs)
    named_meta = dict(module.named_meta_parameters())
    if not named_meta and not given.chosen:
        raise RuntimeError(
            "The module has no meta-parameters. Pass tensors that require a gradient, or modules "
            "in training mode, to the constructor, and assign them to attributes."
        )
    names, meta_names = tuple(named), _ties(module._all_meta_parameters(recurse=True))
    leaves = {name: _leaf(module, name, param) for name, param in named.items()}
    frozen = {k: p for k, p in module.named_parameters() if k not in named}

    returned: dict[int, int | None] = {}  # which leaves of the value are parameters

    def everywhere(tensors: Iterable[Any]) -> dict[str, Any]:
        return _everywhere(module, names, tensors)

    def meta_everywhere(tensors: Iterable[Any]) -> dict[str, Any]:
        return {alias: x for ties, x in zip(meta_names, tensors) for alias in ties}

    def solver_fn(start: Any, theta: Any, others: Any) -> Any:
        inputs, kwargs = given.filled(theta[1], others)
        swap_state(module, everywhere(leaves.values()))
        with reparametrize(module, meta_everywhere(theta[0])):
            value = user_solve(module, *inputs, **kwargs)
        current = dict(module.named_parameters(remove_duplicate=False))
        places = {id(current[name]): i for i, name in enumerate(names)}
        returned.update({k: places.get(id(x)) for k, x in enumerate(tree_leaves(value))})
        return tuple(current[name] for name in names), value

    def optimality_fn(x: Any, theta: Any, others: Any) -> Any:
        inputs, kwargs = given.filled(theta[1], others)
        state = {**_everywhere(module, tuple(frozen), frozen.values()), **everywhere(x)}
        state.update(meta_everywhere(theta[0]))
        with reparametrize(module, state):
            value = module.optimality(*inputs, **kwargs)
        value = (value,) if isinstance(value, Tensor) else tuple(value)
        if len(value) == len(names) + len(frozen):  # one for each parameter, frozen or not
            places = [k for k, _ in module.named_parameters()]
            value = tuple(v for k, v in zip(places, value) if k in named)
        return value

    engine = ImplicitEngine(
        optimality_fn,
        (1,),
        has_aux=True,
        solve=Auto(on_fail="warn") if module.linear_solve is None else module.linear_solve,
        symmetric=not module._custom_optimality,
        where=f"{type(module).__name__}.solve",
        remedy="Pass it to the constructor and assign it to an attribute, or detach it.",
        **module._engine_options,
    )
    theta = (tuple(named_meta.values()), given.chosen)
    before = everywhere(named.values())
    object.__setattr__(module, "_unknown_names", frozenset(names))
    try:
        solution, value = engine(solver_fn)(tuple(leaves.values()), theta, given.others)
    except BaseException:
        swap_state(module, before)
        raise
    finally:
        object.__delattr__(module, "_unknown_names")
    object.__setattr__(module, "_solver_leaves", leaves)
    differentiable = any(map(is_tracked, solution))
    if not differentiable:
        solution = _kept(leaves.values(), solution)
    swap_state(module, everywhere(solution))
    if differentiable:
        start_from_what_is_loaded(module.modules())
        for name, x in zip(names, solution):
            descend(leaves[name], x, places_of(module, name))
    parts, spec = tree_flatten(value)
    places = (returned.get(k) for k in range(len(parts)))
    return tree_unflatten(spec, [x if i is None else solution[i] for x, i in zip(parts, places)])


@torch.no_grad()
def _kept(leaves: Iterable[Tensor], solution: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return the parameters with the values of a solution, which has no derivative."""
    return tuple(leaf.copy_(x) for leaf, x in zip(leaves, solution))


def enable_implicit_gradients(
    cls: type[ImplicitMetaGradientModule],
) -> type[ImplicitMetaGradientModule]:
    """Make the `solve` of a class differentiable; subclasses that define one call this.

    Raises:
        TypeError: `solve` already is differentiable.
    """
    user_solve = cls.solve
    if hasattr(user_solve, WRAPPED):
        raise TypeError("Implicit gradients are already enabled for the `solve` method.")

    @functools.wraps(user_solve)
    @uncompiled
    def solve(self: ImplicitMetaGradientModule, *inputs: Any, **kwargs: Any) -> Any:
        if self.__dict__.get("_solving", False):
            return user_solve(self, *inputs, **kwargs)  # super().solve() of a subclass
        object.__setattr__(self, "_solving", True)
        try:
            return _solve(self, user_solve, inputs, kwargs)
        finally:
            object.__setattr__(self, "_solving", False)

    setattr(solve, WRAPPED, True)
    cls.solve = solve  # type: ignore[method-assign]
    return cls
