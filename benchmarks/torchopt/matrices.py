# SPDX-License-Identifier: Apache-2.0
"""Time the optimizers of matrices on the 126 matrices of a transformer with 12 blocks.

    python -m benchmarks.torchopt.matrices                 # all widths; 1 and 2 threads
    python -m benchmarks.torchopt.matrices --width 64 --threads 1
    python -m benchmarks.torchopt.matrices --json benchmarks/results/matrices.json

Adafactor is compared with that of torch (foreach) on 6 to 5000 tensors.

Each optimizer is compared with the same formula in plain torch, one matrix after the other: that is
what torchopt computed before it took matrices of equal shape together. Answers are compared before
they are timed; rounds alternate, and a figure is the minimum.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchopt

LR, MOMENTUM, EPS = 0.01, 0.95, 1e-4
A, B, C = 3.4445, -4.7750, 2.0315


def shapes(width: int) -> list[tuple[int, int]]:
    """Return the matrices of a decoder: in each block two attentions with four matrices and a
    network with two, and before and after the blocks six embeddings and heads.
    """
    block = [(width, width)] * 8 + [(4 * width, width), (width, 4 * width)]
    return [(256, width)] * 4 + [(64, width)] * 2 + block * 12


def one_by_one_muon(params: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
    """Return a step of Muon on one matrix after the other."""
    traces = [torch.zeros_like(p) for p in params]

    def step() -> None:
        for p, g, t in zip(params, grads, traces):
            small = (1 - MOMENTUM) * g
            t.mul_(MOMENTUM).add_(small)
            u = small + MOMENTUM * t
            rows, columns = u.shape
            x = u if rows <= columns else u.mT
            x = x / x.square().sum().sqrt().clamp(min=1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = A * x + (B * gram + C * gram @ gram) @ x
            u = (x if rows <= columns else x.mT) * math.sqrt(max(1.0, rows / columns))
            p.sub_(LR * u)

    return step


def one_by_one_shampoo(params: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
    """Return a step of Shampoo on one matrix after the other, roots by fifty products."""
    kept = [[EPS * torch.eye(n, dtype=torch.float64) for n in p.shape] for p in params]

    def step() -> None:
        for p, g, sides in zip(params, grads, kept):
            x = g.double()
            sides[0] += x @ x.mT
            sides[1] += x.mT @ x
            left, right = map(_newton_root, sides)
            p.sub_(LR * (left @ x @ right).to(p.dtype))

    return step


def _newton_root(a: Tensor) -> Tensor:
    identity = torch.eye(len(a), dtype=a.dtype)
    a = a + 2.2e-16 * len(a) * a.trace() * identity
    z = 5 / (2 * a.square().sum().sqrt())
    m, x = a * z, identity * z**0.25
    for _ in range(50):
        t = (5 * identity - m) / 4
        x = x @ t
        m = torch.linalg.matrix_power(t, 4) @ m
    return x


def torch_muon(params: list[Tensor], grads: list[Tensor]) -> Callable[[], None] | None:
    """Return a step of torch's Muon, whose iteration is in bfloat16; None where torch has none."""
    make = getattr(torch.optim, "Muon", None)
    if make is None:
        return None
    leaves = [torch.nn.Parameter(p) for p in params]
    for p, g in zip(leaves, grads):
        p.grad = g
    step: Callable[[], None] = make(leaves, lr=LR, momentum=MOMENTUM, weight_decay=0.0).step
    return step


def ours(make: Callable[..., Any], **settings: Any) -> Callable[..., Callable[[], None]]:
    """Return a step of torchopt, in place."""

    def prepare(params: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
        for p, g in zip(params, grads):
            p.grad = g
        step: Callable[[], None] = make(params, lr=LR, **settings).step
        return step

    return prepare


CASES: dict[str, dict[str, Callable[..., Any]]] = {
    "muon": {
        "together": ours(torchopt.Muon, momentum=MOMENTUM, weight_decay=0.0),
        "one by one": one_by_one_muon,
        "torch.optim.Muon": torch_muon,
    },
    "shampoo": {
        "together": ours(torchopt.Shampoo, eps=EPS),
        "one by one": one_by_one_shampoo,
    },
}


def measure(case: str, width: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a step of each rival."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in shapes(width)]
    grads = [torch.randn(s, generator=generator) for s in shapes(width)]
    steps, ends = {}, {}
    for name, prepare in CASES[case].items():
        params = [p.clone() for p in start]
        step = prepare(params, [g.clone() for g in grads])
        if step is not None:
            step()
            steps[name], ends[name] = step, params
    for x, y in zip(ends["together"], ends["one by one"]):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    best = dict.fromkeys(steps, math.inf)
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - begin)
    return {name: 1e3 * seconds for name, seconds in best.items()}


TENSORS = ((6, (64, 64)), (100, (64, 64)), (1000, (32, 32)), (5000, (16, 16)), (1000, (100,)))


def measure_adafactor(count: int, shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Return the milliseconds of a step of torchopt and of torch, one after the other: their
    tensors do not fit into the caches together.
    """
    generator = torch.Generator().manual_seed(0)
    start, grads = (
        [torch.randn(shape, generator=generator) for _ in range(count)] for _ in range(2)
    )
    best, ends = {}, {}
    for name in ("together", "torch.optim"):
        params = [p.clone().requires_grad_() for p in start]
        for p, g in zip(params, grads):
            p.grad = g
        if name == "together":
            step: Callable[[], Any] = torchopt.Adafactor(params, lr=LR).step
        else:
            step = torch.optim.Adafactor(params, lr=LR, foreach=True).step
        step()
        ends[name] = [p.detach().clone() for p in params]
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        best[name] = 1e3 * min(seconds)
    for x, y in zip(*ends.values()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    return best


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, action="append", help="columns of the matrices")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--case", choices=sorted(CASES), action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to store the figures")
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def show(case: str, size: str, threads: int, own: float, other: float, theirs: float) -> None:
        texts = (f"{x:.2f}" if x else "-" for x in (own, other, other and other / own, theirs))
        print(f"| {case} | {size} | {threads} | {' | '.join(texts)} |", flush=True)
        found = {"ms": own, "one_by_one_ms": other, "torch_ms": theirs}
        rows.append({"optimizer": case, "size": size, "threads": threads, **found})

    print("| optimizer | size | threads | ms a step | one by one | ratio | torch.optim |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for threads in chosen.threads or (1, 2):
        torch.set_num_threads(threads)
        for case in chosen.case or CASES:
            for width in chosen.width or (16, 32, 64, 128):
                ms = measure(case, width, chosen.rounds)
                theirs = ms.get("torch.optim.Muon", 0.0)
                show(case, f"width {width}", threads, ms["together"], ms["one by one"], theirs)
        for count, shape in () if chosen.case else TENSORS:
            ms = measure_adafactor(count, shape, chosen.rounds)
            size = f"{count} of {shape}"
            show("adafactor", size, threads, ms["together"], 0.0, ms["torch.optim"])
    if chosen.json:
        about = {"torch": torch.__version__, "machine": platform.processor(), "rows": rows}
        chosen.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
