# SPDX-License-Identifier: Apache-2.0
"""The rows by `torchopt.inner_loop`, eager and compiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import torchopt
from benchmarks.torchopt.meta_steps.rows import HEADS, MOVES, OPTIONS, in_single, numbers, serve

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def mlp(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the outputs of a network with tanh between its layers."""
    count = len(p) // 2
    for i in range(count):
        x = x @ p[f"w{i}"] + p[f"b{i}"]
        x = x if i == count - 1 else torch.tanh(x)
    return x


def classify(p: dict[str, Tensor], batch: Any) -> Tensor:
    """Return the cross-entropy of a network."""
    return functional.cross_entropy(mlp(p, batch[0]), batch[1])


def conv4(p: dict[str, Tensor], batch: Any) -> Tensor:
    """Return the cross-entropy of four convolutions."""
    x = batch[0]
    for i in range(4):
        x = functional.avg_pool2d(torch.relu(functional.conv2d(x, p[f"k{i}"], padding=1)), 2)
    return functional.cross_entropy(x.flatten(1) @ p["w0"] + p["b0"], batch[1])


def reward(p: dict[str, Tensor], batch: Any) -> Tensor:
    """Return minus the expected reward of a walk."""
    transition, rewards = batch
    policy = torch.softmax(p["logits"], -1)
    value = torch.zeros(10)
    for _ in range(MOVES):
        value = (policy * (rewards + transition @ value)).sum(-1)
    return -value[0]


def learned(p: dict[str, Tensor], batch: Any, meta: dict[str, Tensor]) -> Tensor:
    """Return a loss that is a network of output and target."""
    return mlp(meta, torch.stack([mlp(p, batch[0])[:, 0], batch[1]], 1)).square().mean()


def squares(p: dict[str, Tensor], batch: Any) -> Tensor:
    """Return the mean square error."""
    return (mlp(p, batch[0])[:, 0] - batch[1]).square().mean()


def norm(x: Tensor) -> Tensor:
    """Return the layer norm without parameters."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


def transformer(p: dict[str, Tensor], batch: Any) -> Tensor:
    """Return the cross-entropy of six causal blocks."""
    x = p["embed"][batch[0]]
    n, t, d = x.shape
    hidden = torch.ones(t, t, dtype=torch.bool).tril().logical_not()
    for i in range(6):
        heads = (norm(x) @ p[f"qkv{i}"]).view(n, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = heads[0], heads[1], heads[2]
        scores = (q @ k.mT / (d // HEADS) ** 0.5).masked_fill(hidden, float("-inf"))
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d) @ p[f"proj{i}"]
        x = x + torch.tanh(norm(x) @ p[f"up{i}"]) @ p[f"down{i}"]
    return functional.cross_entropy((norm(x) @ p["out"]).flatten(0, 1), batch[1].flatten())


LOSSES = {
    "maml": (classify, classify),
    "task": (classify, classify),
    "conv": (conv4, conv4),
    "rl": (reward, reward),
    "learned": (learned, squares),
    "transformer": (transformer, transformer),
}


def make(row: dict[str, Any], way: str) -> Callable[[], Any]:
    """Return a function that returns the meta-gradient."""
    way = "compile" if way == "again" else way
    kind = row["kind"]
    values = in_single(numbers(kind), torch.as_tensor)
    inner_loss, outer_loss = LOSSES[kind]
    params = {k: x.requires_grad_() for k, x in values["params"].items()}
    meta = {k: x.requires_grad_() for k, x in values.get("meta", {}).items()}
    rate = torch.tensor(row["lr"], requires_grad=kind == "task")
    many = kind in ("maml", "conv", "rl")
    inner = torchopt.inner_loop(
        inner_loss,
        getattr(torchopt, row["optimizer"]),
        steps=row["steps"],
        tasks=(None, 0) if many else None,
        execute=way,
        unroll=row.get("unroll", 1) if way == "compile" else 1,
    )

    def outside(params: dict[str, Tensor], batch: Any) -> Tensor:
        if many:
            return torch.func.vmap(outer_loss)(params, batch).mean()
        return outer_loss(params, batch)

    outer = torchopt.second_order.compile(outside) if way == "compile" else outside
    wanted = list(meta.values()) or [*params.values(), *([rate] if kind == "task" else [])]

    def step() -> Any:
        more = (meta,) if meta else ()
        hypers = {"lr": rate if kind == "task" else row["lr"], **OPTIONS[row["optimizer"]]}
        result = inner(params, values["inner"], *more, **hypers)
        return torch.autograd.grad(outer(result.params, values["outer"]), wanted)

    return step


if __name__ == "__main__":
    serve(make)
