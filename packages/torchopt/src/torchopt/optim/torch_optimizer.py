# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations as a torch.optim.Optimizer, for learning-rate schedulers and others."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import required

from torchopt import alias
from torchopt.base import GradientTransformation, UninitializedState, require_transformation
from torchopt.optim.named_state import FORMAT, Group, filled, load_named_state, named_state, walk
from torchopt.optim.states import StepLock
from torchopt.shown import shown
from torchopt.transform.base import LeafRule
from torchopt.update import add_, writable

__all__ = ["TorchOptimizer"]


class TorchOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that steps with a gradient transformation.

    Schedulers of `torch.optim.lr_scheduler`, `torch.amp.GradScaler`, hooks and other code that
    expects a `torch.optim.Optimizer` work with it. Each parameter group has its own
    hyper-parameters in its dictionary: those that the signature of `make` names. A change there
    takes effect in the next step. If it adds a stage, such as a momentum, that stage starts then.
    Other entries of a group are ignored, so that schedulers can keep their notes there.

    A step that raises has changed neither parameters nor states. Threads that share an optimizer
    step one after the other.

    Args:
        params: Tensors, pairs (name, tensor), or dictionaries with `"params"` and hyper-parameters
            of that group.
        make: Returns the transformation for hyper-parameters, such as `torchopt.adam`. If it
            accepts any keyword, its hyper-parameters are those given here and those of the
            optimizers of `torchopt`.
        hyper_parameters: Arguments of `make` for all groups.

    Raises:
        TypeError: An unknown hyper-parameter, one of another optimizer in a group, or `make`
            returns no gradient transformation.
        ValueError: A hyper-parameter out of range.

    Example:
        >>> import torchopt
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = TorchOptimizer([w], torchopt.sgd, lr=1.0)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        >>> for _ in range(2):
        ...     w.grad = torch.ones(1)
        ...     optimizer.step()
        ...     scheduler.step()
        >>> w.detach()
        tensor([-0.5000])
    """

    def __init__(
        self,
        params: Any,
        make: Callable[..., GradientTransformation],
        **hyper_parameters: Any,
    ) -> None:
        if isinstance(params, nn.Module):
            raise TypeError(
                "TorchOptimizer(params, make): expected tensors to optimize, got a module "
                f"({type(params).__name__}); pass module.parameters()"
            )
        is_class = isinstance(make, type) and not issubclass(make, GradientTransformation)
        if is_class or not callable(make):
            raise TypeError(
                "TorchOptimizer(params, make): expected a function of hyper-parameters, got "
                f"{shown(make)}; pass the function and its arguments, such as torchopt.adam, "
                "lr=0.1, or lambda lr: torchopt.chain(...)"
            )
        self.make = make
        self._keywords = _keywords(make)
        self._states: list[Any] = []
        self._made: list[tuple[dict[str, Any], GradientTransformation]] = []
        # For each group, the states of stages that a hyper-parameter has switched off, by name.
        self._left: list[dict[str, Any]] = []
        # For each group, the parameters that its state is of.
        self._owners: list[list[Tensor]] = []
        self._lock = StepLock()
        defaults = _defaults(make) | hyper_parameters
        if required not in defaults.values() or not hyper_parameters.keys() <= defaults.keys():
            made = make(**hyper_parameters)
            require_transformation(made, "TorchOptimizer(params, make)", duck=False)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: a dictionary with `"params"` and the hyper-parameters of the group."""
        for name in param_group if isinstance(param_group, dict) else ():
            if name in _known_hypers() and not self._takes(name):
                raise TypeError(
                    f"add_param_group: {getattr(self.make, '__name__', self.make)}() got an "
                    f"unexpected keyword argument {name!r}, a hyper-parameter of other optimizers; "
                    "leave it out of the group, or rename it if it is only a note."
                )
        values = {**self.defaults, **param_group}
        made = None
        if not any(value is required for value in values.values()):
            made = self._make(values)  # raises before the group is there
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len({id(p) for p in params}) != len(params):
            self.param_groups.pop()
            raise ValueError(
                "some parameters appear twice in one parameter group; expected each parameter once"
            )
        assert made is not None  # torch refuses what is missing
        self._made.append(made)
        self._states.append(UninitializedState())
        self._left.append({})
        self._owners.append([])

    def _takes(self, name: str) -> bool:
        """Return whether an entry of a group is a hyper-parameter; the others are notes."""
        if name in ("params", "param_names"):
            return False
        names, any_name = self._keywords
        given = name in self.defaults or name in _known_hypers()
        return name in names or (any_name and given)

    def _make(self, group: dict[str, Any]) -> tuple[dict[str, Any], GradientTransformation]:
        """Return the hyper-parameters of a group and the transformation made from them."""
        hyper = {name: value for name, value in group.items() if self._takes(name)}
        made = self.make(**hyper)
        require_transformation(made, "TorchOptimizer(params, make)", duck=False)
        # A list may be written to between two steps.
        return {k: list(x) if isinstance(x, list) else x for k, x in hyper.items()}, made

    def _transformation(self, index: int) -> GradientTransformation:
        """Return the transformation of a group for its current hyper-parameters."""
        group = self.param_groups[index]
        hyper, made = self._made[index]
        if _same(hyper, {name: value for name, value in group.items() if self._takes(name)}):
            return made
        new = self._make(group)
        if _stages(new[1]) != _stages(made):
            self._carry_over(index, new[1])
        self._made[index] = new
        return new[1]

    def _carry_over(self, index: int, made: GradientTransformation) -> None:
        """Keep the states of stages that `made` has too; initialize those that are new."""
        if isinstance(self._states[index], UninitializedState):
            return
        names, params = _numbered(self.param_groups[index])
        present = dict(walk(self._states[index], names))
        saved = {**self._left[index], **_dampened_and_not(present), **present}
        template = made.init(params)
        self._states[index] = filled(template, names, saved, params, "step()")
        kept = {name for name, _ in walk(template, names)}
        self._left[index] = {name: value for name, value in saved.items() if name not in kept}

    def _group(self, index: int) -> Group:
        made = self._transformation(index)  # which may change the state
        return made, self._states[index], *_numbered(self.param_groups[index])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._lock:
            steps = []
            for index in range(len(self.param_groups)):
                made = self._transformation(index)
                params: list[Tensor] = self.param_groups[index]["params"]
                state = self._states[index]
                if isinstance(state, UninitializedState):
                    state = made.init(params)
                else:
                    self._require_same(index, params)
                updates, state = made.update(
                    [p.grad for p in params], state, params=params, inplace=False
                )
                steps.append((writable(params, updates), state))
            # Nothing is changed before it is known that every group can step.
            for updates, _ in steps:
                add_(*updates)
            self._states = [state for _, state in steps]
            self._owners = [list(group["params"]) for group in self.param_groups]
        return loss

    def _require_same(self, index: int, params: Sequence[Tensor]) -> None:
        """Raise ValueError if the list of a group has other parameters than its state."""
        known = self._owners[index]
        if len(params) != len(known) or any(map(operator.is_not, params, known)):
            raise ValueError(
                f"step(): the parameters in param_groups[{index}]['params'] changed since the last "
                f"step ({len(known)} before, {len(params)} now), and the state is that of those "
                "before; expected the same tensors. Add new ones with add_param_group, write new "
                "values into a parameter, or make a new optimizer."
            )

    @property  # type: ignore[override]  # by name, not by parameter
    def state(self) -> dict[str, Any]:
        """The states, named and versioned; see `Optimizer.named_state_dict`.

        Later steps do not change what was returned.
        """
        with self._lock, torch.no_grad():
            return named_state([self._group(i) for i in range(len(self._states))])

    @state.setter
    def state(self, value: Any) -> None:
        """Do nothing: torch.optim's constructor makes an empty state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of `state_dict`; moments are cast to the dtypes of the parameters.

        Raises:
            ValueError: The groups or parameters differ, or the state is that of another optimizer;
                nothing is loaded then.
        """
        with self._lock, torch.no_grad():
            super().load_state_dict(state_dict)

    def _load(self, groups: list[dict[str, Any]], saved: dict[Any, Any]) -> None:
        """Load groups and states, or raise."""
        for group in groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        made = [self._make(group) for group in groups]
        states: list[Any] = [UninitializedState()] * len(groups)
        if saved.get("format") == FORMAT:
            entries = [(impl, None, *_numbered(g)) for (_, impl), g in zip(made, groups)]
            states = load_named_state(saved, entries)
        elif saved:
            raise ValueError(
                "load_state_dict: expected the state of a TorchOptimizer (format "
                f"{FORMAT!r}), got one for {len(saved)} parameters, as torch.optim saves it; "
                "load its 'param_groups' with an empty 'state' to start with new moments."
            )
        super().__setstate__({"param_groups": groups})
        self._made, self._states, self._left = made, states, [{} for _ in groups]
        self._owners = [list(group["params"]) for group in groups]

    def __getstate__(self) -> dict[str, Any]:
        own = {n: vars(self)[n] for n in ("make", "_states", "_made", "_left", "_owners")}
        return {"defaults": self.defaults, "param_groups": self.param_groups, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch.optim's load_state_dict calls this too, with groups and states alone.
        if "make" not in state:
            self._load(state["param_groups"], state["state"])
            return
        super().__setstate__(
            {"_owners": [list(g["params"]) for g in state["param_groups"]], **state}
        )
        self._keywords = _keywords(self.make)
        self._lock = StepLock()


def _numbered(group: dict[str, Any]) -> tuple[list[str], list[Tensor]]:
    """Return the parameters of a group after their names, which are numbers."""
    params: list[Tensor] = group["params"]
    return [str(i) for i in range(len(params))], params


@functools.cache
def _known_hypers() -> frozenset[str]:
    """Return the hyper-parameters of all optimizers of torchopt."""
    makers = (getattr(alias, name) for name in alias.__all__)
    return frozenset(name for make in makers for name in inspect.signature(make).parameters)


def _keywords(make: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """Return the keywords of `make`, and whether it takes any other."""
    parameters = _parameters(make)
    named = (p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return frozenset(named), any(p.kind is p.VAR_KEYWORD for p in parameters)


def _defaults(make: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults in the signature of `make`; `required` where there is none."""
    names, _ = _keywords(make)
    return {
        p.name: required if p.default is p.empty else p.default
        for p in _parameters(make)
        if p.name in names
    }


def _parameters(make: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(make).parameters.values())
    except ValueError:  # a function of an extension may have none
        return [inspect.Parameter("hyper_parameters", inspect.Parameter.VAR_KEYWORD)]


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether hyper-parameters are equal. Tensors count as different: they may change."""
    return first.keys() == second.keys() and not any(
        isinstance(first[k], Tensor)
        or isinstance(second[k], Tensor)
        or (first[k] is not second[k] and first[k] != second[k])
        for k in first
    )


def _dampened_and_not(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a momentum under its names with and without dampening."""
    found: dict[str, Any] = {}
    for name, trace in saved.items():
        kind, field, label = (*name.split(".", 2), "", "")[:3]
        if field != "trace" or trace is None:
            continue
        if kind == "TraceState":
            found[f"Dampened{name}"] = trace
            begun = trace.any().to(torch.int64)  # the very first gradient is not dampened
            found[f"DampenedTraceState.count.{label}"] = begun
        elif kind == "DampenedTraceState":
            found[f"TraceState.trace.{label}"] = trace
    return found


def _stages(made: GradientTransformation) -> tuple[Any, ...]:
    """Return the kinds of the stages of a transformation, which determine its states, in order."""

    def kinds(value: Any) -> Iterator[Any]:
        if isinstance(value, GradientTransformation):
            owner = getattr(value.update, "__self__", None)
            if owner is None:
                yield getattr(value.update, "__qualname__", type(value.update))
            else:
                yield from kinds(owner)
        elif isinstance(value, LeafRule):
            yield type(value)
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield from kinds(item)
        elif isinstance(value, dict):
            yield from kinds([x for item in value.items() for x in item])
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield type(value)
            yield from kinds([getattr(value, field.name) for field in dataclasses.fields(value)])

    return tuple(kinds(made))
