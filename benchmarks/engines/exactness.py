# SPDX-License-Identifier: Apache-2.0
"""How far the explicit engine is from the loop that is unrolled by hand, for each of its settings.

A small network in float64 takes four steps of Adam. The gradient of the adapted parameters, the
state and the losses is compared in the initial parameters, the data, a tensor of the loss and the
learning rate. The error is relative to the norm of all of them together. Each figure is the worst
over four windows: none, one step, three steps, and more than there are. In the rows "blocks" the
network is a stack of equal blocks, which mixed mode computes again.

    python -m benchmarks.engines.exactness                  # three minutes
    python -m benchmarks.engines.exactness forward trace    # only the rows with all of these words
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torchopt
from torchopt.tree import tree_leaves

STEPS, TASKS = 4, 3
WINDOWS = (None, 1, 3, 9)
KEEPS = ("all", "steps", 1, 2, 3, "1MiB")
# How the tasks differ: in_dims of parameters, batch and scale.
KINDS: dict[str, Any] = {"one": None, "shared": (None, 0, None), "own": (0, 0, None)}
EXACT = 1e-12


class Setting(NamedTuple):
    """Settings of an inner loop besides its window and its tasks, and whether it has blocks."""

    derivative: str
    keep: Any
    execute: str = "eager"
    blocks: bool = False

    def __str__(self) -> str:
        """Return the settings as the table shows them."""
        stacked = ", blocks" if self.blocks and self.execute != "blocks" else ""
        return f"{self.derivative}, {self.keep}, {self.execute}{stacked}"


DERIVATIVES = ("reverse", "mixed", "first_order", "forward")
SETTINGS = [
    *itertools.starmap(Setting, itertools.product(DERIVATIVES, KEEPS, ("eager", "trace"))),
    *(Setting("mixed", keep, "eager", True) for keep in KEEPS),
    *(Setting("mixed", keep, "blocks", True) for keep in KEEPS if keep != "1MiB"),
]


class Stack(nn.Module):
    """A stack of two equal blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations of the last block."""
        for block in self.blocks:
            x = block(x)
        return x


STACK = Stack().double()


def loss(params: dict[str, Tensor], batch: Any, scale: Tensor) -> Tensor:
    """Return a smooth loss of a layer."""
    x, y = batch
    found: Tensor = ((torch.tanh(x @ params["w"] + params["b"]) * scale - y) ** 2).mean()
    return found


def loss_of_blocks(params: dict[str, Tensor], batch: Any, scale: Tensor) -> Tensor:
    """Return a smooth loss of the stack."""
    x, y = batch
    out = torchopt.params.functional_call(STACK, params, (x,))
    found: Tensor = ((out * scale - y) ** 2).mean()
    return found


def problem(
    kind: str, *, blocks: bool = False
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor, Tensor]:
    """Return parameters, batch, scale and learning rate, all of them to be differentiated."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    many = () if kind == "one" else (TASKS,)
    names = dict(STACK.named_parameters()) if blocks else {"b": draw(2), "w": draw(2, 2)}
    params = {name: draw(*x.shape) for name, x in names.items()}
    if kind == "own":
        params = {k: torch.stack([x, 1.1 * x, 0.9 * x]) for k, x in params.items()}
    batch = draw(*many, 3, 2), draw(*many, 3, 2)
    found = params, batch, draw(2), torch.tensor(0.1, dtype=torch.float64)
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
    function: Any,
    params: Any,
    batch: Any,
    scale: Tensor,
    lr: Tensor,
    window: int | None,
    first_order: bool,
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
        value = function(params, batch, scale)
        found = torch.autograd.grad(value, list(params.values()), create_graph=True)
        if first_order:
            found = tuple(g.detach() for g in found)
        losses.append(value.detach() if t < first else value)
        updates, state = step.update(dict(zip(params, found)), state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return outer(params, torch.stack(losses), state)


@functools.cache
def by_hand(
    kind: str, window: int | None, *, first_order: bool, blocks: bool = False
) -> list[Tensor]:
    """Return the gradient of the unrolled loop, added up over the tasks."""
    params, batch, scale, lr = problem(kind, blocks=blocks)
    function = loss_of_blocks if blocks else loss
    totals = []
    for i in range(1 if kind == "one" else TASKS):
        own = {k: x[i] for k, x in params.items()} if kind == "own" else params
        data = batch if kind == "one" else tuple(x[i] for x in batch)
        totals.append(unrolled(function, own, data, scale, lr, window, first_order))
    return gradient(sum(totals[1:], totals[0]), (params, batch, scale, lr))


def gradient(total: Tensor, inputs: Any) -> list[Tensor]:
    """Return the gradient, with zeros where there is none."""
    return list(torch.autograd.grad(total, tree_leaves(inputs), materialize_grads=True))


def by_engine(setting: Setting, kind: str, window: int | None) -> list[Tensor]:
    """Return the gradient of the engine."""
    params, batch, scale, lr = problem(kind, blocks=setting.blocks)
    inner = torchopt.inner_loop(
        loss_of_blocks if setting.blocks else loss,
        optimizer,
        steps=STEPS,
        derivative=setting.derivative,
        keep=setting.keep,
        execute=setting.execute,
        window=window,
        tasks=KINDS[kind],
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
            apart(
                by_engine(setting, kind, window),
                by_hand(kind, window, first_order=first_order, blocks=setting.blocks),
            )
            for window in WINDOWS
        )
        for kind in KINDS
        if kind == "one" or setting.execute != "blocks"  # which takes one task
    }


def main(words: Sequence[str] = ()) -> int:
    """Print the errors; fail if one is larger than rounding."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of forward mode, which says what it costs
    settings = [s for s in SETTINGS if set(words) <= set(str(s).split(", "))]
    print(
        "| derivative, keep, execute | one task | tasks with shared parameters | with their own |"
    )
    print("|---|---:|---:|---:|")
    worst = 0.0
    for setting in settings:
        found = errors(setting)
        worst = max(worst, *found.values())
        row = " | ".join(f"{found[k]:.0e}" if k in found else "" for k in KINDS)
        print(f"| {setting} | {row} |", flush=True)
    print(f"\n{len(settings) * len(WINDOWS)} settings with their windows, worst {worst:.1e}")
    return int(not (settings and worst <= EXACT))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
