# SPDX-License-Identifier: Apache-2.0
"""Hyper-parameters as tensors in the state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import Driver, GradientTransformation, needs_tree

__all__ = ["InjectHyperparamsState", "inject_hyperparams"]


class InjectHyperparamsState(NamedTuple):
    """`hyperparams`: tensors by name; `steps`: steps so far; `inner_state`."""

    hyperparams: Any
    steps: int
    inner_state: Any


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_injected(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(_is_injected(v) for v in value)
    return _is_number(value) or isinstance(value, Tensor)


def _is_count(parameter: inspect.Parameter) -> bool:
    return parameter.annotation in (int, int | None, "int", "int | None")


def _tensors(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_tensors(v) for v in value)
    if isinstance(value, Tensor):
        return value
    # On the CPU, whatever the default device is: such a number fits parameters on any device.
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class InjectHyperparams(Driver):
    """Makes the transformation anew in each step, from the hyper-parameters in the state."""

    make: Callable[..., GradientTransformation]
    injected: dict[str, Any]
    schedules: dict[str, Callable[[Any], Any]]
    static: dict[str, Any]

    def _made(
        self, values: dict[str, Any], count: int
    ) -> tuple[dict[str, Any], GradientTransformation]:
        """Return the hyper-parameters after `count` steps, and what `make` returns for them."""
        values |= {name: _tensors(schedule(count)) for name, schedule in self.schedules.items()}
        return values, self.make(**self.static, **values)

    def _first(self) -> tuple[dict[str, Any], GradientTransformation]:
        return self._made({name: _tensors(value) for name, value in self.injected.items()}, 0)

    @property
    def needs_tree(self) -> bool:
        """Whether the transformation needs trees, as masks do."""
        return needs_tree(self._first()[1])

    def init(self, params: Any) -> InjectHyperparamsState:
        hyperparams, inner = self._first()
        return InjectHyperparamsState(hyperparams, 0, inner.init(params))

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        hyperparams, inner = self._made(dict(state.hyperparams), state.steps)
        stepped, inner_state = inner.update(
            updates, state.inner_state, params=params, inplace=inplace
        )
        return stepped, InjectHyperparamsState(hyperparams, state.steps + 1, inner_state)


def inject_hyperparams(
    make: Callable[..., GradientTransformation], *, static: str | Iterable[str] = ()
) -> Callable[..., GradientTransformation]:
    """Return `make` with its hyper-parameters moved into the state, as tensors.

    In the state they can be read, replaced between steps, saved, batched by vmap, and learned: a
    tensor that requires a gradient in their place gets a meta-gradient.

    Args:
        make: A function that returns a transformation, such as `torchopt.adam`.
        static: The names of arguments that are not moved, or one name.

    Returns:
        A function with the arguments of `make`. Of the arguments of a call, numbers, tensors and
        tuples of them are moved to `state.hyperparams` (numbers as 0-dim float64 tensors).
        Functions are schedules, evaluated at the number of previous steps. Bools, strings, None,
        arguments that `make` declares as `int`, such as a number of iterations, and those named in
        `static` are not moved.

    Raises:
        TypeError: `make` is not a function; from the function returned: an unknown argument, or a
            name in `static` that is not one.

    Example:
        >>> import torchopt
        >>> optimizer = inject_hyperparams(torchopt.sgd)(lr=0.1)
        >>> params = torch.tensor([1.0])
        >>> state = optimizer.init(params)
        >>> lr = torch.tensor(0.5, requires_grad=True)
        >>> state = state._replace(hyperparams=state.hyperparams | {"lr": lr})
        >>> updates, state = optimizer.update(torch.tensor([2.0]), state, inplace=False)
        >>> updates.detach(), torch.autograd.grad(updates.sum(), lr)
        (tensor([-1.]), (tensor(-2.),))
    """
    if not callable(make):
        raise TypeError(
            "inject_hyperparams(make): expected a function such as torchopt.adam, got "
            f"{type(make).__name__}; write inject_hyperparams(torchopt.adam)(lr=0.1)"
        )
    fixed = {static} if isinstance(static, str) else frozenset(static)

    def injected(*args: Any, **kwargs: Any) -> GradientTransformation:
        signature = inspect.signature(make)
        values = signature.bind(*args, **kwargs).arguments
        arguments = dict(signature.parameters)
        rest_of = [n for n, p in arguments.items() if p.kind is p.VAR_KEYWORD]
        for name in rest_of:
            values |= values.pop(name, {})
        unknown = sorted(fixed - arguments.keys())
        if unknown and not rest_of:
            raise TypeError(
                f"inject_hyperparams(make, static=...): expected arguments of make, "
                f"{', '.join(arguments)}, got {unknown[0]!r}"
            )
        kept = fixed | {n for n, p in arguments.items() if _is_count(p)}
        numbers = {n: v for n, v in values.items() if n not in kept and _is_injected(v)}
        schedules = {
            n: v
            for n, v in values.items()
            if n not in kept and callable(v) and not isinstance(v, Tensor)
        }
        rest = {n: v for n, v in values.items() if n not in numbers and n not in schedules}
        injecting = InjectHyperparams(make, numbers, schedules, rest)
        at_start = {n: schedule(0) for n, schedule in schedules.items()}
        # Tensors are not checked: this call raises for numbers that are out of range.
        make(**values | at_start)
        return injecting.pair()

    return injected
