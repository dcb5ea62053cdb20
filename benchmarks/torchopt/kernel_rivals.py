# SPDX-License-Identifier: Apache-2.0
"""What the kernel benchmarks of both devices share: rivals, clocks, counts of operations."""

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
from torchopt.alias.fused import Backend, with_backend

Run = Callable[[], Any]

# Bytes an element of float32 that Adam moves at least. In place it reads p, g, mu, nu and writes p,
# mu, nu. Out of place it reads g, mu, nu and writes the update, mu, nu. The derivative reads g, mu,
# nu and three cotangents, and writes three.
IN_PLACE_BYTES = 28
FUNCTIONAL_BYTES = 24
BACKWARD_BYTES = 36

BACKENDS: tuple[Backend, ...] = ("native", "reference")
IN_PLACE: dict[str, Callable[[list[Tensor]], Any]] = {
    "torchopt native": lambda p: torchopt.Adam(p, lr=1e-3),
    "torch fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "torch foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
}


@dataclass(frozen=True)
class Times:
    """Seconds of one run: the least and the median of all samples."""

    least: float
    median: float


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
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(samples.values()))) < 5:
        for name, run in rivals.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(numbers[name]):
                run()
            synchronize()
            samples[name].append((time.perf_counter() - start) / numbers[name])
    return {name: Times(min(x), statistics.median(x)) for name, x in samples.items()}


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
    """Return one step of Adam by each rival; they took one, and its results agree.

    Raises:
        AssertionError: They do not.
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
        for got, want in zip(params, sets["torch fused"]):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    return steps


def functional(params: Sequence[Tensor], backend: Backend) -> Run:
    """Return one functional step of Adam that nothing differentiates."""
    plain = [p.detach() for p in params]
    t = with_backend(torchopt.adam(1e-3), backend)
    state = t.init(plain)
    grads = [p.sin() for p in plain]
    return lambda: t.update(grads, state, inplace=False)


def differentiated(params: Sequence[Tensor], backend: Backend) -> Run:
    """Return one functional step of Adam and the derivative of its sum by the gradients."""
    plain = [p.detach() for p in params]
    t = with_backend(torchopt.adam(1e-3), backend)
    state = t.init(plain)
    grads = [p.sin().requires_grad_() for p in plain]
    ones = [torch.ones_like(p) for p in plain]
    return lambda: torch.autograd.grad(t.update(grads, state, inplace=False)[0], grads, ones)


def check_differentiated(params: Sequence[Tensor]) -> None:
    """Raise unless both backends agree where the derivative is not mostly rounding."""
    got, want = (differentiated(params, b)() for b in BACKENDS)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _native_calls() -> Iterator[list[int]]:
    """Count calls of kernels."""
    calls = [0]
    run = _C.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return run(*args, **kwargs)

    _C.run = counted
    try:
        yield calls
    finally:
        _C.run = run


def count_operations(run: Run) -> int:
    """Return the operations of torch and the kernels that one run on the CPU launches."""
    with _native_calls() as calls, _Counter() as counter:
        run()
    total: int = counter.count + calls[0]
    return total
