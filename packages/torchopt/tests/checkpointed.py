# SPDX-License-Identifier: Apache-2.0
"""One row for each way in which a module recomputes its activations.

A row is a module that takes `mode`. None runs it without recomputation, and every mode must give
the same result and derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

DOUBLE = torch.float64


def run(mode: Any, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call `function`, recomputed in the backward pass unless `mode` is None."""
    if mode is None:
        return function(*args)
    return checkpoint(function, *args, use_reentrant=mode == "reentrant", **options)


class Blocks(nn.Module):
    """Layers that are each called inside a checkpoint."""

    def __init__(self, mode: Any = None) -> None:
        super().__init__()
        self.mode = mode
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.options: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = run(self.mode, lambda y: torch.tanh(self.a(torch.sin(y))), x, **self.options)
        return torch.tanh(run(self.mode, lambda y: torch.cos(self.b(y)), h, **self.options))


class Whole(Blocks):
    """The whole forward pass inside one checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        return run(self.mode, lambda y: torch.tanh(self.b(torch.tanh(self.a(y)))), x)


class Direct(Blocks):
    """Parameters that are read without a call of their module, some outside the checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        outside = self.b.bias

        def inside(y: Tensor) -> Tensor:
            h = torch.tanh(functional.linear(y, self.a.weight, dict(self.a._parameters)["bias"]))
            return functional.linear(h, *[p.exp() for p in [*self.b.parameters()][:1]], outside)

        return torch.tanh(run(self.mode, inside, x))


class Nested(Blocks):
    """A checkpoint inside a checkpoint that reads nothing itself."""

    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return torch.tanh(self.a(y.sin()))

        def outer(y: Tensor) -> Tensor:
            return torch.tanh(run(self.mode, inner, y.cos()))

        def outermost(y: Tensor) -> Tensor:
            return self.b(run(self.mode, outer, y)).sin()

        return torch.cos(run(self.mode, outermost, x))


class Sequential(nn.Module):
    """`checkpoint_sequential`."""

    def __init__(self, mode: Any = None) -> None:
        super().__init__()
        self.mode = mode
        self.layers = nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is None:
            return self.layers(x)
        return checkpoint_sequential(self.layers, 3, x, use_reentrant=self.mode == "reentrant")


class Selective(Blocks):
    """Products are saved, everything else is recomputed."""

    def __init__(self, mode: Any = None) -> None:
        super().__init__(mode)

        def policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
            keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        if mode == "plain":
            self.options = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}


class Late(Blocks):
    """Recomputed until its end, without early stopping."""

    def __init__(self, mode: Any = None) -> None:
        super().__init__(mode)
        self.options = {"early_stop": False} if mode == "plain" else {}


class Normalised(nn.Module):
    """Running statistics, updated once per forward pass."""

    def __init__(self, mode: Any = None) -> None:
        super().__init__()
        self.mode = mode
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        def block(y: Tensor) -> Tensor:
            self.count = self.count + 1
            return torch.tanh(self.b(torch.tanh(self.norm(self.a(y)))) / (1 + self.count))

        return run(self.mode, block, x)


class Tied(nn.Module):
    """One weight, used inside and outside the checkpoint."""

    def __init__(self, mode: Any = None) -> None:
        super().__init__()
        self.mode = mode
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(run(self.mode, lambda y: torch.tanh(self.a(y)), x))))


class Parametrized(nn.Module):
    """A weight that is computed from others inside the checkpoint."""

    def __init__(self, mode: Any = None) -> None:
        super().__init__()
        self.mode = mode
        self.a, self.b = weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(run(self.mode, lambda y: torch.tanh(self.a(y)), x).tanh())


class Recurrent(nn.Module):
    """A layer with a list of its weights."""

    def __init__(self, mode: Any = None) -> None:
        super().__init__()
        self.mode = mode
        self.a, self.b = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(run(self.mode, lambda y: torch.tanh(self.a(y)[0]), x[None])[0])


class Dropped(Blocks):
    """Dropout, with the same draws in the recomputation."""

    def forward(self, x: Tensor) -> Tensor:
        def block(y: Tensor) -> Tensor:
            return torch.tanh(self.b(functional.dropout(torch.tanh(self.a(y)), 0.4)))

        return run(self.mode, block, x)


class Counted(Blocks):
    """A parameter list, keyword arguments and a loop of checkpoints over one layer."""

    def __init__(self, mode: Any = None) -> None:
        super().__init__(mode)
        self.list = nn.ParameterList([torch.ones(4) * 0.3, torch.ones(4) * 0.7])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        for index in range(2):
            h = run(self.mode, lambda y, i=index: torch.sin(y * self.list[i] + y.mean()), h)
        return self.b(h)


MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "blocks": Blocks,
    "whole": Whole,
    "direct": Direct,
    "nested": Nested,
    "sequential": Sequential,
    "selective": Selective,
    "late": Late,
    "normalised": Normalised,
    "tied": Tied,
    "parametrized": Parametrized,
    "recurrent": Recurrent,
    "dropped": Dropped,
    "counted": Counted,
}


def make(name: str, mode: Any) -> nn.Module:
    """Return the module of a row, with the same values for each mode."""
    torch.manual_seed(3)
    return MODULES[name](mode).double()


def batch() -> tuple[Tensor, Tensor]:
    """Return inputs and targets."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 3, generator=generator, dtype=DOUBLE)
    return x, torch.randn(6, 2, generator=generator, dtype=DOUBLE)


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    """Return a loss whose derivatives of all orders are not zero."""
    return (out - y).pow(2).mean() + out.sin().mean()
