# SPDX-License-Identifier: Apache-2.0
"""The rows by jax and optax, jitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.torchopt.meta_steps.rows import HEADS, MOVES, OPTIONS, in_single, numbers, serve

crossing = optax.softmax_cross_entropy_with_integer_labels


def mlp(p: Any, x: Any) -> Any:
    """Return the outputs of a network with tanh between its layers."""
    count = len(p) // 2
    for i in range(count):
        x = x @ p[f"w{i}"] + p[f"b{i}"]
        x = x if i == count - 1 else jnp.tanh(x)
    return x


def classify(p: Any, batch: Any) -> Any:
    """Return the cross-entropy of a network."""
    return crossing(mlp(p, batch[0]), batch[1]).mean()


def conv4(p: Any, batch: Any) -> Any:
    """Return the cross-entropy of four convolutions."""
    x = batch[0]
    for i in range(4):
        x = jax.nn.relu(jax.lax.conv(x, p[f"k{i}"], (1, 1), "SAME"))
        a, b = x.shape[2] // 2, x.shape[3] // 2
        x = x[:, :, : 2 * a, : 2 * b].reshape(*x.shape[:2], a, 2, b, 2).mean((3, 5))
    return crossing(x.reshape(len(x), -1) @ p["w0"] + p["b0"], batch[1]).mean()


def reward(p: Any, batch: Any) -> Any:
    """Return minus the expected reward of a walk."""
    transition, rewards = batch
    policy = jax.nn.softmax(p["logits"], -1)
    value = jnp.zeros(10)
    for _ in range(MOVES):
        value = (policy * (rewards + transition @ value)).sum(-1)
    return -value[0]


def learned(p: Any, batch: Any, meta: Any) -> Any:
    """Return a loss that is a network of output and target."""
    return (mlp(meta, jnp.stack([mlp(p, batch[0])[:, 0], batch[1]], 1)) ** 2).mean()


def squares(p: Any, batch: Any) -> Any:
    """Return the mean square error."""
    return ((mlp(p, batch[0])[:, 0] - batch[1]) ** 2).mean()


def norm(x: Any) -> Any:
    """Return the layer norm without parameters."""
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def transformer(p: Any, batch: Any) -> Any:
    """Return the cross-entropy of six causal blocks."""
    x = p["embed"][batch[0]]
    n, t, d = x.shape
    seen = jnp.tril(jnp.ones((t, t), bool))
    for i in range(6):
        heads = (norm(x) @ p[f"qkv{i}"]).reshape(n, t, 3, HEADS, d // HEADS)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)
        scores = jnp.where(seen, q @ k.swapaxes(-1, -2) / (d // HEADS) ** 0.5, -jnp.inf)
        mixed = (jax.nn.softmax(scores, -1) @ v).transpose(0, 2, 1, 3).reshape(n, t, d)
        x = x + mixed @ p[f"proj{i}"]
        x = x + jnp.tanh(norm(x) @ p[f"up{i}"]) @ p[f"down{i}"]
    return crossing(norm(x) @ p["out"], batch[1]).mean()


LOSSES = {
    "maml": (classify, classify),
    "task": (classify, classify),
    "conv": (conv4, conv4),
    "rl": (reward, reward),
    "learned": (learned, squares),
    "transformer": (transformer, transformer),
}
UNROLLED = 10  # longer loops are a scan


def make(row: dict[str, Any], way: str) -> Callable[[], Any]:
    """Return a function that returns the meta-gradient."""
    kind, steps = row["kind"], row["steps"]
    values = in_single(numbers(kind), jnp.asarray)
    inner_loss, outer_loss = LOSSES[kind]
    many = kind in ("maml", "conv", "rl")

    def task(params: Any, rate: Any, meta: Any, inner: Any, outer: Any) -> Any:
        optimizer = getattr(optax, row["optimizer"])(rate, **OPTIONS[row["optimizer"]])
        more = (meta,) if meta else ()

        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            grads = jax.grad(inner_loss)(params, inner, *more)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        if steps > UNROLLED:
            carry, _ = jax.lax.scan(step, carry, None, length=steps)
        else:
            for _ in range(steps):
                carry, _ = step(carry, None)
        return outer_loss(carry[0], outer)

    def total(params: Any, rate: Any, meta: Any) -> Any:
        if many:
            axes = (None, None, None, 0, 0)
            mapped = jax.vmap(task, axes)(params, rate, meta, values["inner"], values["outer"])
            return mapped.mean()
        return task(params, rate, meta, values["inner"], values["outer"])

    wanted = {"task": (0, 1), "learned": (2,)}.get(kind, (0,))
    gradient = jax.jit(jax.grad(total, wanted))
    rate, params, meta = jnp.float32(row["lr"]), values["params"], values.get("meta", {})
    order = list(meta or params)

    def step() -> Any:
        found = jax.block_until_ready(gradient(params, rate, meta))
        return [found[0][k] for k in order] + list(found[1:])

    return step


if __name__ == "__main__":
    serve(make)
