# SPDX-License-Identifier: Apache-2.0
"""Rivals, clocks and counters of operations for the kernel benchmarks of both devices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchopt
from torchopt import _C
from torchopt.optimizers.native import Backend, with_backend

Run = Callable[[], Any]

# Bytes an element of float32 that Adam reads and writes at least. In place it reads p, g, mu, nu
# and writes p, mu, nu. Out of place it reads g, mu, nu and writes the update, mu, nu. The
# derivative reads g, mu, nu and three cotangents, and writes three; that of the update by the
# gradient alone reads one cotangent and writes one. Memory that is written without having been
# read is fetched by a CPU anyway: a triad (2 reads, 1 write) moves 16 bytes and not 12, a
# functional step 36. Fractions of the triad count neither.
IN_PLACE_BYTES = 28
FUNCTIONAL_BYTES = 24
BACKWARD_BYTES = 36
BACKWARD_OF_UPDATE_BYTES = 20

BACKENDS: tuple[Backend, ...] = ("native", "reference")
IN_PLACE: dict[str, Callable[[list[Tensor]], Any]] = {
    "torchopt native": lambda p: torchopt.Adam(p, lr=1e-3),
    "torch fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "torch foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
}


@dataclass(frozen=True)
class Times:
    """Seconds of one run.

    Attributes:
        least: The least of all samples of runs that followed a run of the same rival.
        median: Their median.
        cold: The least of the runs that followed those of the other rivals, which had the caches.
    """

    least: float
    median: float
    cold: float


def take_turns(
    rivals: dict[str, Run], seconds: float, synchronize: Callable[[], Any] = lambda: None
) -> dict[str, Times]:
    """Time the rivals in turns, in samples of at least two milliseconds, for `seconds` in all."""
    numbers = {}
    for name, run in rivals.items():
        run()
        run()
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        numbers[name] = max(1, min(1000, int(2e-3 / (time.perf_counter() - start + 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    cold = dict.fromkeys(rivals, float("inf"))
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(samples.values()))) < 5:
        for name, run in rivals.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            cold[name] = min(cold[name], time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(numbers[name]):
                run()
            synchronize()
            samples[name].append((time.perf_counter() - start) / numbers[name])
    return {name: Times(min(x), statistics.median(x), cold[name]) for name, x in samples.items()}


def make_parameters(
    shapes: Sequence[tuple[int, ...]], device: str, grads: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return seeded float32 parameters with gradients; those of other rivals are shared."""
    generator = torch.Generator(device).manual_seed(0)
    params = [torch.randn(s, generator=generator, device=device).requires_grad_() for s in shapes]
    for i, p in enumerate(params):
        p.grad = p.detach().sin() if grads is None else grads[i]
    return params


def in_place_rivals(shapes: Sequence[tuple[int, ...]], device: str) -> dict[str, Run]:
    """Return a step of Adam of each rival, after comparing their results.

    Raises:
        AssertionError: The results differ.
    """
    sets: dict[str, list[Tensor]] = {}
    grads: list[Tensor] | None = None
    steps: dict[str, Run] = {}
    for name, make in IN_PLACE.items():
        sets[name] = make_parameters(shapes, device, grads)
        grads = [p.grad for p in sets[name] if p.grad is not None]
        steps[name] = make(sets[name]).step
        steps[name]()
    for params in sets.values():
        for got, want in zip(params, sets["torch fused"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    return steps


def functional(params: Sequence[Tensor], backend: Backend) -> Run:
    """Return one functional step of Adam that nothing differentiates."""
    plain = [p.detach() for p in params]
    t = with_backend(torchopt.adam(1e-3), backend)
    state = t.init(plain)
    grads = [p.sin() for p in plain]
    return lambda: t.update(grads, state, inplace=False)


def _middle(params: Sequence[Tensor], t: Any) -> Any:
    """Return a state of a later step. At the first step, lr sign(g), all derivatives are zero."""
    first, *rest = t.init(params)
    moments = {"mu": [0.1 * p.cos() for p in params], "nu": [0.1 + p.square() for p in params]}
    return (first._replace(**moments), *rest)


def differentiated(params: Sequence[Tensor], backend: Backend) -> Run:
    """Return one functional step of Adam and the derivative of its sum by the gradients."""
    plain = [p.detach() for p in params]
    t = with_backend(torchopt.adam(1e-3), backend)
    state = _middle(plain, t)
    grads = [p.sin().requires_grad_() for p in plain]
    ones = [torch.ones_like(p) for p in plain]
    return lambda: torch.autograd.grad(t.update(grads, state, inplace=False)[0], grads, ones)


def differentiated_in_all(params: Sequence[Tensor], backend: Backend) -> Run:
    """Return one functional step of Adam with the derivatives of all outputs by all inputs.

    This is the cost of a step in the middle of an inner loop, whose moments depend on earlier steps
    and influence later ones.
    """
    plain = [p.detach() for p in params]
    t = with_backend(torchopt.adam(1e-3), backend)
    state = _middle(plain, t)
    grads = [p.sin().requires_grad_() for p in plain]
    mu, nu = ([x.requires_grad_() for x in moments] for moments in (state[0].mu, state[0].nu))
    ones = [torch.ones_like(p) for p in plain] * 3

    def run() -> Any:
        updates, (after, *_) = t.update(grads, state, inplace=False)
        return torch.autograd.grad([*updates, *after.mu, *after.nu], [*grads, *mu, *nu], ones)

    return run


def check_backends(params: Sequence[Tensor]) -> None:
    """Raise unless both backends agree.

    Each number takes some ten roundings of 6e-8. Differences of two terms may cancel: hence `atol`,
    which is 1e-5 of the largest numbers, lr for updates and their derivatives.
    """
    got, want = (functional(params, b)()[0] for b in BACKENDS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    for make in (differentiated, differentiated_in_all):
        got, want = (make(params, b)() for b in BACKENDS)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _native_calls() -> Iterator[list[int]]:
    """Count calls of the extension that compute something."""
    calls = [0]
    functions = {name: getattr(_C, name) for name in ("run", "fused_call", "successor")}

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            calls[0] += result is not None and result is not False
            return result

        return call

    for name, function in functions.items():
        setattr(_C, name, counted(function))
    try:
        yield calls
    finally:
        for name, function in functions.items():
            setattr(_C, name, function)


def count_operations(run: Run) -> int:
    """Return the operations of torch and the kernels that one run on the CPU launches."""
    with _native_calls() as calls, _Counter() as counter:
        run()
    total: int = counter.count + calls[0]
    return total
