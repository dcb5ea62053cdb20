# SPDX-License-Identifier: Apache-2.0
"""Time optimizer steps on the CPU: torchopt's kernels against torch.optim and plain torch.

Run it from the root of the repository: python -m benchmarks.torchopt.cpu_kernels [--threads N]

All rivals run in one process, in turns, with the same malloc settings: freed memory is kept, so
that nobody is timed by page faults. OpenMP threads sleep instead of spinning. Both are read when a
process starts, so this program starts itself anew with them. Answers are checked before anything is
timed. Reported: the median of the repetitions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.harness.machine import describe_machine
from benchmarks.harness.process import KEEP_MEMORY

SIZES = {
    "10 x 1M": [(1000, 1000)] * 10,
    "1000 x 1k": [(1000,)] * 1000,
    "MLP, 6 tensors": [(64, 32), (64,), (64, 64), (64,), (10, 64), (10,)],
}
ENVIRONMENT = {**KEEP_MEMORY, "OMP_WAIT_POLICY": "passive"}


def median_ms(rivals: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return the median time of each rival in milliseconds, the rivals taking turns."""
    for run in rivals.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < 7:
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def print_table(title: str, times: dict[str, float], base: str) -> None:
    """Print times, and how often each of them holds the time of `base`."""
    print(f"\n{title}")
    for name, value in times.items():
        print(f"  {name:34s} {value:10.4f} ms   {value / times[base]:7.2f} x {base}")


def main() -> None:
    """Check, time and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each table")
    arguments = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):
        command = [sys.executable, "-m", "benchmarks.torchopt.cpu_kernels", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})

    import torch

    import torchopt
    from torchopt.alias.fused import with_backend

    torch.set_num_threads(arguments.threads)
    print("machine:", describe_machine())
    print(f"torch {torch.__version__}, {arguments.threads} threads, {ENVIRONMENT}")

    def make(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        return params

    for label, shapes in SIZES.items():
        twins = {
            "torchopt native": lambda p: torchopt.Adam(p, lr=1e-3),
            "torch fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
            "torch foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
            "torch for-loop": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=False),
        }
        sets = {name: make(shapes) for name in twins}
        steps = {name: twins[name](params).step for name, params in sets.items()}
        for step in steps.values():
            step()
        for params in sets.values():
            torch.testing.assert_close(params, sets["torch fused"], rtol=1e-5, atol=1e-6)
        times = median_ms(steps, arguments.seconds)
        print_table(f"Adam in place, {label}", times, "torchopt native")

        elements = sum(p.numel() for p in sets["torch fused"])
        a, b, c = (torch.zeros(elements) for _ in range(3))
        triad = median_ms({"triad": partial(torch.add, a, b, alpha=2.0, out=c)}, 0.5)["triad"]
        print(
            f"  {28e-6 * elements / times['torchopt native']:.1f} GB/s of 28 B an element; "
            f"triad of as many elements, 12 B each: {12e-6 * elements / triad:.1f} GB/s"
        )

        params = [p.detach() for p in sets["torch fused"]]
        base = torchopt.adam(1e-3)

        def functional(backend: Any, params: Any = params, base: Any = base) -> Callable[[], Any]:
            t = with_backend(base, backend)
            state = t.init(params)
            grads = [p.sin() for p in params]
            return lambda: t.update(grads, state, inplace=False)

        times = median_ms({b: functional(b) for b in ("native", "reference")}, arguments.seconds)
        print_table(f"Adam functional, not differentiated, {label}", times, "native")

        def differentiated(
            backend: Any, params: Any = params, base: Any = base
        ) -> Callable[[], Any]:
            t = with_backend(base, backend)
            state = t.init(params)
            grads = [p.sin().requires_grad_() for p in params]
            ones = [torch.ones_like(p) for p in params]

            def run() -> Any:
                return torch.autograd.grad(t.update(grads, state, inplace=False)[0], grads, ones)

            return run

        runs = {b: differentiated(b) for b in ("native", "reference")}
        torch.testing.assert_close(runs["native"](), runs["reference"](), rtol=1e-3, atol=1e-4)
        times = median_ms(runs, arguments.seconds)
        print_table(f"Adam forward and backward, {label}", times, "native")


if __name__ == "__main__":
    main()
