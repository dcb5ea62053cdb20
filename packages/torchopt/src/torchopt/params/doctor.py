# SPDX-License-Identifier: Apache-2.0
"""Compare the derivatives of a loss with finite differences, operation by operation.

With the parameters on a line θ(ε) = θ + ε v, every intermediate value, every gradient that flows
back and the gradient of the loss itself become functions of ε. Each is projected on fixed random
weights. The derivative of the projection is computed by reverse mode, by forward mode and by
central differences. The first value whose derivative disagrees with its difference quotient
identifies the operation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.params.lineage import graph_nodes
from torchopt.params.recording import (
    Double,
    NotJudgedError,
    Watch,
    arguments_from,
    as_real,
    is_recorded,
    node_name,
    projection,
)
from torchopt.torch_internals import forward_mode
from torchopt.tree import is_smooth, tree_flatten, tree_unflatten

__all__ = ["Disagreement", "Line", "SecondDerivatives", "is_varied"]

_STEPS = (1e-6, 1e-7)  # of the central differences, in units of the parameters


@dataclasses.dataclass(frozen=True)
class SecondDerivatives:
    """One product u · H v with the Hessian H of a loss, computed in three ways.

    Attributes:
        reverse: From reverse over reverse mode, as in a meta-gradient.
        forward: From forward over reverse mode; None if it was not requested, or if torch refuses
            it, which a warning reports.
        difference: From central differences of the gradient; None if they could not be computed,
            which a warning reports.
        uncertainty: The absolute difference between two central differences whose steps differ by
            a factor of ten.
    """

    reverse: float
    forward: float | None
    difference: float | None
    uncertainty: float


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """The first value whose derivative disagrees with its difference quotient."""

    operation: str
    order: str  # "first" or "second": which derivative of the operation is wrong
    checkpointed: bool
    derivative: float
    difference: float


class Line:
    """A loss along a line of parameters near those given.

    Args:
        loss: A function of the tree of parameters that returns a 0-dim tensor.
        params: The tree of parameters. The line starts at a point that is a hundredth of their
            size away from them, so that a value of exactly zero is not at the kink of an
            activation.
        seed: The seed of the random start, direction v and weights u.

    Raises:
        NotJudgedError: The loss fails in float64, is not finite, or changes from call to call.
    """

    def __init__(
        self,
        loss: Callable[[Any], Tensor],
        params: Any,
        seed: int = 0,
    ) -> None:
        self.loss = loss
        self.leaves, self.spec = tree_flatten(params)
        generator = torch.Generator().manual_seed(seed)

        def noise(x: Tensor) -> Tensor:
            scale = float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0
            drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu")
            return (drawn * (scale or 1.0)).to(x.device)

        self.moved = list(map(is_varied, self.leaves))
        floats = [as_real(x.detach()) for x in itertools.compress(self.leaves, self.moved)]
        self.start = [x.detach().double() + 0.01 * noise(x) for x in floats]
        self.direction = [noise(x) for x in floats]
        self.weights = [noise(x) for x in floats]
        self.devices = sorted({x.device.index for x in floats if x.device.type == "cuda"})
        self.held: list[list[Tensor]] | None = None
        self._differences: list[tuple[float, float]] | None = None
        self._epsilon = torch.zeros((), dtype=torch.float64, device="cpu", requires_grad=True)
        self._base = self._run(0.0, graph=True)
        self.held = self._base.held
        self._check_repeats()

    def _at(self, points: Sequence[Tensor], graph: bool) -> Watch:
        moved = iter(points)
        leaves = [_like(x, next(moved)) if m else x for x, m in zip(self.leaves, self.moved)]
        watch = Watch(points, self.held)
        standard = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.random.fork_rng(devices=self.devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the user's own call has already shown them
                torch.manual_seed(0)
                with watch:
                    value = self.loss(tree_unflatten(self.spec, leaves))
                self._back(value, points, watch, graph)
        finally:
            torch.set_default_dtype(standard)
        return watch

    def _back(self, value: Tensor, points: Sequence[Tensor], watch: Watch, graph: bool) -> None:
        watch.add("the loss", "first", [value])

        def hook(node: Any) -> Callable[..., None]:
            def record(given: Sequence[Tensor | None], _: Any) -> None:
                kept = [x for x in given if x is not None and is_recorded(x)]
                if kept:
                    watch.add(node_name(node), "second", kept)

            return record

        with contextlib.ExitStack() as hooks:
            for node in graph_nodes([value]):
                hooks.callback(node.register_hook(hook(node)).remove)
            grads = self._grad(value, points, create_graph=graph)
        products = [(u * g).sum() for u, g in zip(self.weights, grads) if g is not None]
        watch.add("the gradient", "second", [torch.stack(products).sum()])

    def _grad(
        self,
        value: Tensor,
        inputs: Sequence[Tensor],
        *,
        create_graph: bool = False,
        retain_graph: bool | None = None,
    ) -> Sequence[Tensor | None]:
        def double(_: Any) -> None:
            # Checkpoints run their forward pass again here, where autograd has removed the mode.
            # Autograd restores the previous modes at the end of each node.
            mode = Double()
            mode.__enter__()  # type: ignore[no-untyped-call]

        with contextlib.ExitStack() as hooks:
            for node in graph_nodes([value]):
                hooks.callback(node.register_prehook(double).remove)
            return torch.autograd.grad(
                value,
                inputs,
                create_graph=create_graph,
                retain_graph=retain_graph,
                allow_unused=True,
            )

    def _run(self, step: float, *, graph: bool) -> Watch:
        moved = self._epsilon + step
        points = [x + moved.to(x.device) * d for x, d in zip(self.start, self.direction)]
        try:
            return self._at(points, graph)
        except NotJudgedError:
            raise
        except Exception as error:
            raise NotJudgedError(
                f"in float64 and at nearby parameters it raises {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}"
            ) from error

    def _check_repeats(self) -> None:
        again = self._run(0.0, graph=False)
        self._check_path(again)
        for first, second in zip(self._base.records, again.records):
            a, b = first.number(), second.number()
            if not math.isfinite(a):
                raise NotJudgedError(f"{first.name} is not finite at nearby parameters")
            if abs(a - b) > 1e-9 * max(first.size, second.size):
                raise NotJudgedError(f"{first.name} gives another value at each call")

    def _check_path(self, run: Watch) -> None:
        if [r.name for r in run.records] != [r.name for r in self._base.records]:
            raise NotJudgedError("the loss takes another path at nearby parameters")
        for found, first in zip(run.records, self._base.records):
            if found.infinite != first.infinite:
                raise NotJudgedError(f"{first.name} is not finite at nearby parameters")

    def differences(self) -> list[tuple[float, float]]:
        """Return, for each record, its difference quotient along the line and the error of it."""
        if self._differences is None:
            slopes = []
            for step in _STEPS:
                up, down = (self._run(s, graph=False) for s in (step, -step))
                self._check_path(up)
                self._check_path(down)
                slopes.append(
                    [
                        (a.number() - b.number()) / (2 * step)
                        for a, b in zip(up.records, down.records)
                    ]
                )
            self._differences = [(fine, abs(fine - coarse)) for coarse, fine in zip(*slopes)]
        return self._differences

    def reverse(self, index: int) -> float:
        """Return the derivative of one record along the line, from reverse mode."""
        value = self._base.records[index].value
        if not value.requires_grad:
            return 0.0
        (slope,) = self._grad(value, (self._epsilon,), retain_graph=True)
        return 0.0 if slope is None else float(slope.detach())

    def forward(self) -> list[float]:
        """Return the derivatives of all records along the line, from forward mode."""
        with forward_mode():
            points = [
                forward_ad.make_dual(x, d) + 0 * self._epsilon.to(x.device)
                for x, d in zip(self.start, self.direction)
            ]
            watch = self._at(points, graph=True)
            self._check_path(watch)
            tangents = [forward_ad.unpack_dual(r.value).tangent for r in watch.records]
            return [0.0 if t is None else float(t.detach()) for t in tangents]

    def _disagrees(self, index: int, slope: float) -> bool:
        difference, error = self.differences()[index]
        record = self._base.records[index]
        allowed = 10 * error + 1e-6 * max(abs(slope), abs(difference), record.size)
        return abs(slope - difference) > allowed

    def _ends(self) -> tuple[int, int]:
        names = [r.name for r in self._base.records]
        return names.index("the loss"), len(names) - 1

    def disagreement(self, slopes: Sequence[float] | None = None) -> Disagreement | None:
        """Return the first record that disagrees with its difference quotient, or None.

        Intermediate records are compared only if the loss or its gradient disagrees.

        Args:
            slopes: The derivatives of all records; by default those from reverse mode.
        """

        def slope(i: int) -> float:
            return self.reverse(i) if slopes is None else slopes[i]

        if not any(self._disagrees(i, slope(i)) for i in self._ends()):
            return None
        for i, record in enumerate(self._base.records):
            found = slope(i)
            if self._disagrees(i, found):
                names = [n for n, f, given in record.inside if _is_wrong_inside(f, given)]
                return Disagreement(
                    names[0] if names else record.name,
                    "second" if names else record.order,
                    record.checkpointed,
                    found,
                    self.differences()[i][0],
                )
        raise AssertionError("unreachable")  # pragma: no cover

    def summary(self, slopes: Sequence[float] | None) -> SecondDerivatives:
        """Return the product u · H v from each of the three ways."""
        last = self._ends()[1]
        difference, error = self.differences()[last]
        forward = None if slopes is None else slopes[last]
        return SecondDerivatives(self.reverse(last), forward, difference, error)


def is_varied(x: Any) -> bool:
    """Return whether a leaf of the parameters is differentiated."""
    return is_smooth(x) and x.requires_grad


def _like(x: Tensor, real: Tensor) -> Tensor:
    """Return a real tensor as a complex one if `x` is complex."""
    return torch.view_as_complex(real) if x.is_complex() else real


def _is_wrong_inside(func: Callable[..., Any], given: Any) -> bool:
    """Return whether reverse over forward mode of one call is wrong, on random arguments."""
    leaves, spec = tree_flatten(given)
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu")

    moved = [isinstance(x, Tensor) and x.is_floating_point() for x in leaves]
    given = list(itertools.compress(leaves, moved))
    points, directions, others = ([drawn(x) for x in given] for _ in "123")

    def tangent(step: Tensor | float) -> Any:
        with forward_mode():
            duals = (
                forward_ad.make_dual(x + step * d, o) for x, d, o in zip(points, directions, others)
            )
            args, kwargs = arguments_from(
                spec, [next(duals) if m else x for x, m in zip(leaves, moved)]
            )
            outs = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
            found = [forward_ad.unpack_dual(x).tangent for x in outs]
            return sum((t * projection(t, i)).sum() for i, t in enumerate(found) if t is not None)

    try:
        step = torch.zeros((), dtype=torch.float64, device="cpu", requires_grad=True)
        value = tangent(step)
        if not isinstance(value, Tensor) or not value.requires_grad:
            return False
        slope = float(torch.autograd.grad(value, step)[0])
        fine, coarse = ((float(tangent(h)) - float(tangent(-h))) / (2 * h) for h in (1e-6, 1e-5))
    except Exception:
        return False
    return abs(slope - fine) > 10 * abs(fine - coarse) + 1e-4 * max(abs(slope), abs(fine))
