# SPDX-License-Identifier: Apache-2.0
"""The explicit engine against the loop that is unrolled by hand: peak bytes and processor time.

The inner problem is that of a language model, a transformer of equal blocks on random tokens, with
Adam in float64. The outer loss is half the square of the adapted parameters, so that all memory and
time is that of the inner loop, and the gradient is that in the initial parameters. Every gradient
is first compared with that of the unrolled loop.

    python -m benchmarks.engines.explicit           # twenty minutes; writes engines_explicit.json
    python -m benchmarks.engines.explicit 12 4 8    # 12 blocks, 4 steps, 8 sequences; prints only
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import torchopt
from benchmarks.harness.program import add_options, finish
from benchmarks.harness.results import new_result
from torchopt.diff import Explicit
from torchopt.diff.explicit.memory import CountBytes

Params = dict[str, Tensor]
WIDTH, HEADS, LENGTH, WORDS = 64, 4, 96, 64
# Without a large eps the second derivatives of Adam divide by gradients that are rounding alone.
RATE, EPS = 1e-3, 1e-3
# Blocks, steps, sequences.
SIZES = [(6, 4, 8), (12, 4, 8), (24, 4, 8), (12, 4, 24), (2, 1, 2), (2, 8, 2), (2, 64, 2)]
WAYS = {
    "everything": Explicit(),
    "states": Explicit(keep="steps"),
    "mixed, blocks again": Explicit(derivative="mixed"),
    "mixed, blocks again, states": Explicit(derivative="mixed", keep="steps"),
    "mixed, compiled blocks": Explicit(derivative="mixed", execute="blocks"),
}
COMPILED = {"mixed, compiled blocks"}  # whose programs allocate out of sight of a dispatch mode


class Block(nn.Module):
    """A causal block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Return the activations after the block, `[sequences, length, width]`."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0)
        q, k, v = heads.transpose(-3, -2)
        weights = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(-3, -2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model."""

    hidden: Tensor

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)
        self.register_buffer("hidden", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next words, `[sequences, length, words]`."""
        x = self.words(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x, self.hidden)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Problem:
    """An inner problem, and the meta-gradient by any way."""

    def __init__(self, blocks: int, steps: int, sequences: int) -> None:
        torch.manual_seed(0)
        self.net, self.steps = Transformer(blocks).double(), steps
        self.tokens = torch.randint(WORDS, (sequences, LENGTH + 1))
        self.start = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.optimizer = torchopt.adam(RATE, eps=EPS)

    def loss(self, params: Params, tokens: Tensor) -> Tensor:
        """Return the cross-entropy."""
        logits = torchopt.params.functional_call(self.net, params, (tokens[:, :-1],))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def unrolled(self, params: Params) -> Params:
        """Return the parameters after the loop that is written by hand."""
        state = self.optimizer.init(params)
        for _ in range(self.steps):
            value = self.loss(params, self.tokens)
            found = torch.autograd.grad(value, list(params.values()), create_graph=True)
            grads = dict(zip(params, found))
            updates, state = self.optimizer.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return params

    def by(self, engine: Explicit) -> Callable[[Params], Params]:
        """Return the same by an engine."""
        loop = engine.over(self.loss, self.optimizer, steps=self.steps)
        return lambda params: loop(params, self.tokens).params

    def gradient(self, adapted: Callable[[Params], Params]) -> tuple[Tensor, ...]:
        """Return the gradient in the initial parameters."""
        params = {name: p.clone().requires_grad_() for name, p in self.start.items()}
        total = sum((p**2).sum() for p in adapted(params).values()) / 2
        assert isinstance(total, Tensor)
        return torch.autograd.grad(total, list(params.values()))


def norm(tensors: tuple[Tensor, ...]) -> float:
    """Return the norm of all together."""
    return float(torch.cat([x.flatten() for x in tensors]).norm())


def allocated(problem: Problem, adapted: Callable[[Params], Params]) -> int:
    """Return the peak of what torch's allocator gives out for a gradient, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        problem.gradient(adapted)
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


def compared(blocks: int, steps: int, sequences: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for the unrolled loop and for each engine; the calls are interleaved."""
    problem = Problem(blocks, steps, sequences)
    calls = {"unrolled by hand": problem.unrolled}
    calls |= {name: problem.by(engine) for name, engine in WAYS.items()}
    rows, expected = [], problem.gradient(problem.unrolled)
    for name, call in calls.items():
        if name in COMPILED:
            problem.gradient(call)  # what is measured is not the compiler
        gc.collect()
        with CountBytes() as count:
            found = problem.gradient(call)
        seen = allocated(problem, call) if name in COMPILED else 0
        peak = max(count.peak, seen)
        apart = norm(tuple(x - y for x, y in zip(found, expected))) / norm(expected)
        assert apart < 1e-10, f"{name}: off by {apart}"
        row: dict[str, Any] = {"engine": name, "blocks": blocks, "steps": steps}
        rows.append(row | {"tokens": sequences * LENGTH, "error": apart, "peak": peak})
        del found
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.process_time()
            problem.gradient(call)
            times[name].append(time.process_time() - started)
    return [
        {**row, "seconds": min(t), "median": sorted(t)[len(t) // 2]}
        for row, t in zip(rows, times.values())
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure the sizes, print the figures, and store them if all sizes were measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("size", type=int, nargs="*", help="blocks, steps, sequences")
    add_options(parser, "engines_explicit")
    options = parser.parse_args(arguments)
    if len(options.size) not in (0, 3):
        parser.error(f"expected blocks, steps and sequences, or nothing; got {options.size}")
    torch.set_num_threads(1)
    sizes = [tuple(options.size)] if options.size else SIZES[4:5] if options.quick else SIZES
    result = new_result("engines_explicit", {}, {})
    rows: list[dict[str, Any]] = []
    for size in sizes:
        found = compared(*size, 1 if options.quick else 5)
        for row in found:
            peak, seconds = row["peak"], row["seconds"]
            print(
                f"{row['blocks']:2} blocks {row['steps']:2} steps {row['engine']:30} "
                f"{peak / 2**20:8.1f} MiB  1/{found[0]['peak'] / peak:.2f}  "
                f"{seconds:7.3f} s  {seconds / found[0]['seconds']:.2f}  error {row['error']:.0e}"
            )
        rows += found
    if options.quick or options.size:
        return 0
    versions = {"torch": torch.__version__, "torchopt": torchopt.__version__}
    return finish(result | {"versions": versions, "rows": rows}, options)


if __name__ == "__main__":
    sys.exit(main())
