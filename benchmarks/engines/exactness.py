# SPDX-License-Identifier: Apache-2.0
"""How far the explicit engine is from the loop that is unrolled by hand, for each of its settings.

A two-layer network in float64 takes four steps of Adam. The gradient of the adapted parameters, the
state and the losses is compared in the initial parameters, the data, a tensor of the loss and the
learning rate. The error is relative to the norm of all of them together. Each figure is the worst
over four windows: none, one step, three steps, and more than there are.

    python -m benchmarks.engines.exactness           # a minute
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torchopt
from torchopt.tree import tree_leaves

STEPS, TASKS = 4, 3
WINDOWS = (None, 1, 3, 9)
KEEPS = ("all", "steps", 1, 2, 3, "1MiB")
# How the tasks differ: in_dims of parameters, batch and scale.
KINDS: dict[str, Any] = {"one": None, "shared": (None, 0, None), "own": (0, 0, None)}
EXACT = 1e-12


class Setting(NamedTuple):
    """Settings of an inner loop besides its window and its tasks."""

    derivative: str
    keep: Any
    execute: str = "eager"


SETTINGS = [
    *itertools.starmap(Setting, itertools.product(("reverse", "mixed", "first_order"), KEEPS)),
    Setting("forward", "all"),
    *(Setting(d, k, "trace") for d in ("reverse", "mixed", "first_order") for k in KEEPS[:3]),
]


def loss(params: dict[str, Tensor], batch: Any, scale: Tensor) -> Tensor:
    """Return a smooth loss."""
    x, y = batch
    found: Tensor = ((torch.tanh(x @ params["w"] + params["b"]) * scale - y) ** 2).mean()
    return found


def problem(kind: str) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor, Tensor]:
    """Return parameters, batch, scale and learning rate, all of them to be differentiated."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    many = () if kind == "one" else (TASKS,)
    params = {"b": draw(3), "w": draw(4, 3)}
    if kind == "own":
        params = {k: torch.stack([x, 1.1 * x, 0.9 * x]) for k, x in params.items()}
    batch = draw(*many, 5, 4), draw(*many, 5, 3)
    found = params, batch, draw(3), torch.tensor(0.1, dtype=torch.float64)
    for x in tree_leaves(found):
        x.requires_grad_()
    return found


def optimizer(lr: Tensor) -> Any:
    """Return Adam; a smaller `eps` makes much of gradients that are rounding errors."""
    return torchopt.adam(lr, eps=1e-2)


def outer(params: Any, losses: Tensor, state: Any) -> Tensor:
    """Return a function of all results."""
    moments = [x for x in tree_leaves(state) if isinstance(x, Tensor) and x.is_floating_point()]
    total = losses.sin().sum() + sum(x.cos().sum() for x in (*tree_leaves(params), *moments))
    assert isinstance(total, Tensor)
    return total


def unrolled(
    params: Any, batch: Any, scale: Tensor, lr: Tensor, window: int | None, first_order: bool
) -> Tensor:
    """Return the outer loss after the loop that is written by hand."""
    step, first = optimizer(lr), 0 if window is None else max(0, STEPS - window)
    state, losses = step.init(params), []
    for t in range(STEPS):
        if first > 0 and t <= first:
            params = {k: x.detach().requires_grad_() for k, x in params.items()}
            state = torchopt.tree.tree_map(
                lambda x: x.detach() if isinstance(x, Tensor) else x, state
            )
        value = loss(params, batch, scale)
        found = torch.autograd.grad(value, list(params.values()), create_graph=True)
        if first_order:
            found = tuple(g.detach() for g in found)
        losses.append(value.detach() if t < first else value)
        updates, state = step.update(dict(zip(params, found)), state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return outer(params, torch.stack(losses), state)


def by_hand(kind: str, window: int | None, first_order: bool) -> list[Tensor]:
    """Return the gradient of the unrolled loop, added up over the tasks."""
    params, batch, scale, lr = problem(kind)
    totals = []
    for i in range(1 if kind == "one" else TASKS):
        own = {k: x[i] for k, x in params.items()} if kind == "own" else params
        data = batch if kind == "one" else tuple(x[i] for x in batch)
        totals.append(unrolled(own, data, scale, lr, window, first_order))
    return gradient(sum(totals[1:], totals[0]), (params, batch, scale, lr))


def gradient(total: Tensor, inputs: Any) -> list[Tensor]:
    """Return the gradient, with zeros where there is none."""
    return list(torch.autograd.grad(total, tree_leaves(inputs), materialize_grads=True))


def by_engine(setting: Setting, kind: str, window: int | None) -> list[Tensor]:
    """Return the gradient of the engine."""
    params, batch, scale, lr = problem(kind)
    inner = torchopt.inner_loop(
        loss, optimizer, steps=STEPS, window=window, tasks=KINDS[kind], **setting._asdict()
    )
    result = inner(params, batch, scale, lr=lr)
    total = outer(result.params, result.losses, result.state)
    return gradient(total, (params, batch, scale, lr))


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the relative error of all together."""
    both = [torch.cat([x.flatten() for x in tensors]) for tensors in (found, expected)]
    return float((both[0] - both[1]).norm() / both[1].norm())


def errors(setting: Setting) -> dict[str, float]:
    """Return the worst error over the windows, for each kind of tasks."""
    first_order = setting.derivative == "first_order"
    return {
        kind: max(
            apart(by_engine(setting, kind, window), by_hand(kind, window, first_order))
            for window in WINDOWS
        )
        for kind in KINDS
    }


def main() -> int:
    """Print the errors; fail if one is larger than rounding."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of forward mode, which says what it costs
    print(
        "| derivative, keep, execute | one task | tasks with shared parameters | with their own |"
    )
    print("|---|---:|---:|---:|")
    worst = 0.0
    for setting in SETTINGS:
        found = errors(setting)
        worst = max(worst, *found.values())
        row = " | ".join(f"{x:.0e}" for x in found.values())
        print(f"| {setting.derivative}, {setting.keep}, {setting.execute} | {row} |", flush=True)
    print(f"\nworst {worst:.1e}")
    return int(not worst <= EXACT)


if __name__ == "__main__":
    sys.exit(main())
