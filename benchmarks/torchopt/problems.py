# SPDX-License-Identifier: Apache-2.0
"""Sets of parameters, models and a plain Adam, the same for every rival."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn

LR, B1, B2, EPS = 1e-3, 0.9, 0.999, 1e-8


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of the 161 parameters of a ResNet-50 for 1000 classes."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            for out, into, kernel in (
                (width, inputs, 1),
                (width, width, 3),
                (4 * width, width, 1),
            ):
                shapes += [(out, into, kernel, kernel), (out,), (out,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer_shapes(blocks: int = 12, width: int = 128) -> list[tuple[int, ...]]:
    """Return the shapes of a transformer's parameters: 12 for each block."""
    block: list[tuple[int, ...]] = [
        (3 * width, width), (3 * width,), (width, width), (width,),
        (4 * width, width), (4 * width,), (width, 4 * width), (width,),
        (width,), (width,), (width,), (width,),
    ]  # fmt: skip
    return [(256, width), (64, width), *(block * blocks), (width,), (width,)]


def many(count: int) -> list[tuple[int, ...]]:
    """Return `count` vectors of 1000 elements."""
    return [(1000,)] * count


SETS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "6 x 1k": lambda: many(6),
    "50 x 1k": lambda: many(50),
    "500 x 1k": lambda: many(500),
    "5000 x 1k": lambda: many(5000),
    "ResNet-50": resnet50_shapes,
    "transformer, 12 blocks": transformer_shapes,
}


def matrix_shapes(width: int) -> list[tuple[int, ...]]:
    """Return the shapes of the 126 matrices of a decoder with 12 blocks.

    A block has two attentions with four matrices and a network with two; there are six embeddings
    and heads.
    """
    block = [(width, width)] * 8 + [(4 * width, width), (width, 4 * width)]
    return [(256, width)] * 4 + [(64, width)] * 2 + block * 12


MATRICES = {f"126 matrices, width {w}": w for w in (16, 32, 64, 128)}
"""From the name of a set of matrices to the width of its model."""


def make_set(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return seeded parameters and gradients of a row of `SETS` or `MATRICES`."""
    generator = torch.Generator().manual_seed(0)
    shapes = matrix_shapes(MATRICES[name]) if name in MATRICES else SETS[name]()
    params = [torch.randn(s, generator=generator) for s in shapes]
    return params, [torch.randn(s, generator=generator) for s in shapes]


def first_gradients(grads: list[Tensor]) -> list[Tensor]:
    """Return gradients for a step before the timed one: Adam's first step has derivative zero."""
    return [0.5 * g.flip(0) for g in grads]


def plain_adam(
    params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor], step: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the next parameters and moments, one tensor after the other, differentiably.

    This is the usual code of hand-written inner loops.
    """
    c1, c2 = 1 - B1**step, 1 - B2**step
    out: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for p, g, m, v in zip(params, grads, mu, nu):
        m = m * B1 + g * (1 - B1)
        v = v * B2 + g * g * (1 - B2)
        out[0].append(p - LR * (m / c1) / ((v / c2).sqrt() + EPS))
        out[1].append(m)
        out[2].append(v)
    return out


def plain_second_step(params: list[Tensor], grads: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Return a function that makes the parameters after the second of two steps from `params`."""
    zeros = [torch.zeros_like(p) for p in params]
    first = first_gradients([g.detach() for g in grads])
    _, mu, nu = plain_adam(params, first, zeros, zeros, 1)
    return lambda: plain_adam(params, grads, mu, nu, 2)[0]


class Conv4(nn.Module):
    """Four blocks of convolution, normalisation over the batch and pooling, as in MAML.

    It uses GELU, and no biases before the normalisation, which would cancel them: gradients that
    are exactly zero make the meta-gradients of a plain Adam, and of the published package, NaN.
    """

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (1, channels, channels, channels):
            layers += [
                nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels, track_running_stats=False),
                nn.GELU(),
                nn.MaxPool2d(2),
            ]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, 5] of pictures [n, 1, 16, 16]."""
        logits: Tensor = self.layers(x)
        return logits


class SmallTransformer(nn.Module):
    """Two blocks with plain softmax attention, which can be differentiated twice."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [n, 5] of tokens [n, length]."""
        x = self.embed(tokens)
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](x)).chunk(3, dim=-1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
            x = x + block["out"]((weights @ v).transpose(1, 2).flatten(2))
            x = x + block["down"](torch.nn.functional.gelu(block["up"](block["norm2"](x))))
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


def make_model(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a seeded model with inputs and labels of a task of 5 classes."""
    torch.manual_seed(0)
    labels = torch.arange(20) % 5
    if name == "MLP":
        model: nn.Module = nn.Sequential(
            nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)
        )
        return model, torch.randn(20, 32), labels
    if name == "conv4":
        return Conv4(), torch.randn(20, 1, 16, 16), labels
    return SmallTransformer(), torch.randint(0, 20, (20, 16)), labels


MODELS = ("MLP", "conv4", "transformer, 2 blocks")


def plain_meta_gradient(name: str, steps: int) -> Callable[[], list[Tensor]]:
    """Return a function that differentiates through `steps` steps of `plain_adam`."""
    model, x, y = make_model(name)
    names = [key for key, _ in model.named_parameters()]
    start = [p for _, p in model.named_parameters()]

    def loss(params: list[Tensor]) -> Tensor:
        logits = torch.func.functional_call(model, dict(zip(names, params)), (x,))
        value: Tensor = nn.functional.cross_entropy(logits, y)
        return value

    def run() -> list[Tensor]:
        params: list[Tensor] = list(start)
        mu = [torch.zeros_like(p) for p in params]
        nu = [torch.zeros_like(p) for p in params]
        for step in range(1, steps + 1):
            grads = torch.autograd.grad(loss(params), params, create_graph=True)
            params, mu, nu = plain_adam(params, list(grads), mu, nu, step)
        return list(torch.autograd.grad(loss(params), start))

    return run


def module_meta_gradient(
    name: str, steps: int, make: Callable[[nn.Module], Any]
) -> Callable[[], list[Tensor]]:
    """Return the same with a meta-optimizer that steps the module itself."""
    model, x, y = make_model(name)
    start = list(model.parameters())
    containers = [(m, dict(m._parameters)) for m in model.modules()]

    def run() -> list[Tensor]:
        for module, values in containers:
            module._parameters.update(values)
        optimizer = make(model)
        for _ in range(steps):
            optimizer.step(nn.functional.cross_entropy(model(x), y))
        return list(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), start))

    return run
