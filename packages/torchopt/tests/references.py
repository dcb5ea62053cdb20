# SPDX-License-Identifier: Apache-2.0
"""Optimizers that torch.optim does not have, written from their papers, one parameter at a time.

They are oracles for the tests: plain loops without a graph, in the notation of the papers, with the
interface of `torch.optim.Optimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., None]


class Reference:
    """Calls `rule(p, g, memory, t, **settings)` for each parameter, t counted from 1 for each."""

    def __init__(self, rule: Rule, params: Iterable[Tensor], **settings: Any) -> None:
        self.rule = rule
        self.params = list(params)
        self.settings = settings
        self.memory: list[dict[str, Any]] = [{} for _ in self.params]
        self.steps = [0] * len(self.params)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for i, (p, memory) in enumerate(zip(self.params, self.memory)):
            if p.grad is not None:
                self.steps[i] += 1
                g = -p.grad if self.settings.get("maximize") else p.grad.clone()
                rest = {k: v for k, v in self.settings.items() if k != "maximize"}
                self.rule(p, g, memory, self.steps[i], **rest)


def twin(rule: Rule) -> Callable[..., Reference]:
    return lambda params, **settings: Reference(rule, params, **settings)


def start(memory: dict[str, Any], p: Tensor, *names: str) -> list[Tensor]:
    return [memory.setdefault(name, torch.zeros_like(p)) for name in names]


def lion(
    p: Tensor, g: Tensor, s: dict[str, Any], t: int, lr: float, betas: Any, weight_decay: float
) -> None:
    (m,) = start(s, p, "m")
    c = betas[0] * m + (1 - betas[0]) * g
    p.sub_(lr * (c.sign() + weight_decay * p))
    s["m"] = betas[1] * m + (1 - betas[1]) * g


def yogi(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
) -> None:
    g = g + weight_decay * p
    (m,) = start(s, p, "m")
    v = s.setdefault("v", torch.full_like(p, 1e-6))
    s["m"] = m = betas[0] * m + (1 - betas[0]) * g
    v = torch.where(v > g**2, v - (1 - betas[1]) * g**2, v + (1 - betas[1]) * g**2)
    s["v"] = v
    p.sub_(lr * m / (v.sqrt() + eps))


def adabelief(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
) -> None:
    m, v = start(s, p, "m", "v")
    s["m"] = m = m + (1 - betas[0]) * (g - m)
    s["v"] = v = betas[1] * v + (1 - betas[1]) * (g - m) ** 2 + eps
    direction = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)) ** 0.5 + eps)
    p.copy_(p * (1 - lr * weight_decay) - lr * direction)


def adan(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
) -> None:
    m, v, n = start(s, p, "m", "v", "n")
    before = s.get("g", g)
    b1, b2, b3 = betas
    s["m"] = m = b1 * m + (1 - b1) * g
    s["v"] = v = b2 * v + (1 - b2) * (g - before)
    s["n"] = n = b3 * n + (1 - b3) * (g + b2 * (g - before)) ** 2
    s["g"] = g
    direction = (m / (1 - b1**t) + b2 * v / (1 - b2**t)) / ((n / (1 - b3**t)).sqrt() + eps)
    p.copy_(p * (1 - lr * weight_decay) - lr * direction)


def adopt(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
) -> None:
    g = g + weight_decay * p
    if t == 1:
        s["v"], s["m"] = g * g, torch.zeros_like(p)
        return
    bound = (t - 1) ** 0.25
    scaled = (g / torch.clamp(s["v"].sqrt(), min=eps)).clamp(-bound, bound)
    s["m"] = betas[0] * s["m"] + (1 - betas[0]) * scaled
    p.sub_(lr * s["m"])
    s["v"] = betas[1] * s["v"] + (1 - betas[1]) * g * g


def lamb(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
) -> None:
    m, v = start(s, p, "m", "v")
    s["m"] = m = betas[0] * m + (1 - betas[0]) * g
    s["v"] = v = betas[1] * v + (1 - betas[1]) * g * g
    r = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps) + weight_decay * p
    w, u = p.norm().item(), r.norm().item()
    p.sub_(lr * (w / u if w > 0 and u > 0 else 1.0) * r)


def lars(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
) -> None:
    (v,) = start(s, p, "v")
    u = g + weight_decay * p
    w, n = p.norm().item(), u.norm().item()
    local = trust_coefficient * w / n if w > 0 and n > 0 else 1.0
    s["v"] = v = momentum * v + lr * local * u
    p.sub_(v)


def schedule_free_sgd(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    beta: float,
    weight_decay: float,
    warmup_steps: int,
) -> None:
    z, x = s.setdefault("z", p.clone()), s.setdefault("x", p.clone())
    gamma = lr * (min(1.0, t / warmup_steps) if warmup_steps else 1.0)
    s["sum"] = s.get("sum", 0.0) + gamma**2
    c = gamma**2 / s["sum"]
    s["z"] = z = z - gamma * g - gamma * weight_decay * p
    s["x"] = x = (1 - c) * x + c * z
    p.copy_((1 - beta) * z + beta * x)


def schedule_free_adamw(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
    warmup_steps: int,
) -> None:
    (v,) = start(s, p, "v")
    s["v"] = v = betas[1] * v + (1 - betas[1]) * g * g
    # Like the authors' package since release 1.3: the moment is corrected, not the step size.
    direction = g / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    schedule_free_sgd(p, direction, s, t, lr, betas[0], weight_decay, warmup_steps)


def schedule_free_radam(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
    sgd_phase: bool = False,
) -> None:
    z, x = s.setdefault("z", p.clone()), s.setdefault("x", p.clone())
    (v,) = start(s, p, "v")
    b1, b2 = betas
    s["v"] = v = b2 * v + (1 - b2) * g * g
    limit = 2 / (1 - b2) - 1
    rho = limit - 2 * t * b2**t / (1 - b2**t)
    gamma, direction = (lr if sgd_phase else 0.0), g
    if rho > 4:
        r2 = ((rho - 4) * (rho - 2) * limit) / ((limit - 4) * (limit - 2) * rho)
        gamma = lr * math.sqrt(r2)
        direction = g / ((v / (1 - b2**t)).sqrt() + eps)
    s["sum"] = s.get("sum", 0.0) + gamma**2
    c = gamma**2 / s["sum"] if s["sum"] else 0.0
    s["z"] = z = z - gamma * (direction + weight_decay * p)
    s["x"] = x = (1 - c) * x + c * z
    p.copy_((1 - b1) * z + b1 * x)


def shampoo(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    eps: float,
    update_every: int,
) -> None:
    g = g + weight_decay * p
    x = g.reshape(g.shape or (1,))
    order = x.ndim
    for i, n in enumerate(x.shape):
        rows = x.movedim(i, 0).reshape(n, -1) if x.numel() else x.new_zeros(n, 1)
        s[f"L{i}"] = s.get(f"L{i}", eps * torch.eye(n, dtype=p.dtype)) + rows @ rows.mT
        if (t - 1) % update_every == 0:
            values, vectors = torch.linalg.eigh(s[f"L{i}"])
            s[f"root{i}"] = (vectors * values ** (-1 / (2 * order))) @ vectors.mT
    u = x
    for i in range(order):
        u = torch.tensordot(u, s[f"root{i}"], dims=([0], [0]))  # each puts its dimension last
    (v,) = start(s, p, "v")
    s["v"] = v = momentum * v + u.reshape(g.shape)
    p.sub_(lr * v)


def sophia(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    rho: float,
    weight_decay: float,
    batch_size: float,
    update_every: int,
) -> None:
    m, h = start(s, p, "m", "h")
    s["m"] = m = betas[0] * m + (1 - betas[0]) * g
    if t % update_every == 1 or update_every == 1:
        s["h"] = h = betas[1] * h + (1 - betas[1]) * batch_size * g * g
    p.mul_(1 - lr * weight_decay)
    ratio = torch.clamp(m.abs() / torch.clamp(rho * h, min=1e-15), max=1.0)
    p.sub_(lr * m.sign() * ratio)


def muon(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    match_rms: bool,
    ns_steps: int,
) -> None:
    if p.ndim != 2:  # AdamW
        m, v = start(s, p, "m", "v")
        s["m"] = m = 0.9 * m + 0.1 * g
        s["v"] = v = 0.999 * v + 0.001 * g * g
        p.mul_(1 - lr * weight_decay)
        p.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
        return
    (m,) = start(s, p, "m")
    s["m"] = m = momentum * m + (1 - momentum) * g
    x = (1 - momentum) * g + momentum * m if nesterov else m
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    values = values / x.norm().clamp(min=1e-7)
    for _ in range(ns_steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    rows, columns = p.shape
    scale = 0.2 * max(rows, columns) ** 0.5 if match_rms else max(1.0, rows / columns) ** 0.5
    p.mul_(1 - lr * weight_decay)
    p.sub_(lr * scale * (u * values) @ v)


def signum(
    p: Tensor, g: Tensor, s: dict[str, Any], t: int, lr: float, momentum: float, weight_decay: float
) -> None:
    (m,) = start(s, p, "m")
    s["m"] = m = momentum * m + (1 - momentum) * g
    p.sub_(lr * (m.sign() + weight_decay * p))


def ademamix(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    alpha: float,
    eps: float,
    weight_decay: float,
    warmup_steps: int,
) -> None:
    m1, m2, v = start(s, p, "m1", "m2", "v")
    b1, b2, b3 = betas
    weight, decay = alpha, b3
    if warmup_steps:
        f = t / warmup_steps
        weight = min(f * alpha, alpha)
        num = math.log(b1) * math.log(b3)
        den = (1 - f) * math.log(b3) + f * math.log(b1)
        decay = min(math.exp(num / den), b3) if f < 1 else b3
    s["m1"] = m1 = b1 * m1 + (1 - b1) * g
    s["m2"] = m2 = decay * m2 + (1 - decay) * g
    s["v"] = v = b2 * v + (1 - b2) * g**2
    u = (m1 / (1 - b1**t) + weight * m2) / ((v / (1 - b2**t)).sqrt() + eps)
    p.sub_(lr * (u + weight_decay * p))


def mars(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    gamma: float,
    eps: float,
    weight_decay: float,
) -> None:
    m, v = start(s, p, "m", "v")
    c = g + gamma * betas[0] / (1 - betas[0]) * (g - s.get("g", g))
    c = c / max(1.0, c.norm().item())
    s["g"] = g
    s["m"] = m = betas[0] * m + (1 - betas[0]) * c
    s["v"] = v = betas[1] * v + (1 - betas[1]) * c**2
    u = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    p.sub_(lr * (u + weight_decay * p))


def soap(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
    shampoo_beta: float,
    update_every: int,
) -> None:
    m, v = start(s, p, "m", "v")
    turned = range(g.ndim) if g.ndim > 1 and g.numel() else ()

    def moments() -> None:
        for i in turned:
            rows = g.movedim(i, 0).reshape(g.shape[i], -1)
            old = s.get(f"L{i}", torch.zeros(g.shape[i], g.shape[i], dtype=p.dtype))
            s[f"L{i}"] = shampoo_beta * old + (1 - shampoo_beta) * rows @ rows.mT

    def turn() -> None:
        for i in turned:
            n, matrix = g.shape[i], s[f"L{i}"]
            basis = s.get(f"Q{i}", torch.eye(n, dtype=p.dtype))
            mean = matrix.trace().item() / n
            shifted = matrix / (mean or 1.0) + 1e-6 * torch.eye(n, dtype=p.dtype)
            columns: list[Tensor] = []  # Gram and Schmidt, twice
            for x in (shifted @ basis).unbind(1):
                for _ in range(2):
                    for y in columns:
                        x = x - (y @ x) * y
                columns.append(x / x.norm())
            s[f"Q{i}"] = torch.stack(columns, 1)

    def to(x: Tensor, back: bool) -> Tensor:
        for i in turned:
            q = s[f"Q{i}"] if back else s[f"Q{i}"].mT
            x = torch.tensordot(q, x, dims=([1], [i])).movedim(0, i)
        return x

    moments()
    if t == 1:
        turn()
    s["m"] = m = betas[0] * m + (1 - betas[0]) * g
    s["v"] = v = betas[1] * v + (1 - betas[1]) * to(g, False) ** 2
    u = (to(m, False) / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    p.sub_(lr * (to(u, True) + weight_decay * p))
    if t > 1 and (t - 1) % update_every == 0:
        turn()


def psgd(
    p: Tensor,
    g: Tensor,
    s: dict[str, Any],
    t: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    precondition_lr: float,
    initial_scale: float,
    seed: int,
    max_size: int = 1024,
) -> None:
    rows, columns = (g.shape[0] if g.shape else 1), math.prod(g.shape[1:])
    x = g.reshape(rows, columns).double()
    full = [g.ndim > 1 and n <= max_size for n in (rows, columns)]
    s["m"] = m = momentum * s.get("m", torch.zeros_like(p)) + (1 - momentum) * g
    if not g.numel():
        return
    for name, n in (("Q", rows), ("R", columns)):
        s.setdefault(name, initial_scale**0.5 * torch.eye(n, dtype=torch.float64))
    q, r = s["Q"], s["R"]
    probe = []
    for index in range(rows * columns):
        h = index + (t + 65537 * seed) * 0x1F123BB5
        for factor in (0x45D9F3B, 0x45D9F3B, 0x2C1B3C6D):
            h = ((h ^ (h >> 16)) % 2**32) * factor % 2**32
        probe.append(-1.0 if h >> 15 & 1 else 1.0)
    v = torch.tensor(probe, dtype=torch.float64).reshape(rows, columns)
    a, b = q @ x @ r.mT, torch.linalg.inv(q).mT @ v @ torch.linalg.inv(r)
    for name, slope, whole in (
        ("Q", a @ a.mT - b @ b.mT, full[0]),
        ("R", a.mT @ a - b.mT @ b, full[1]),
    ):
        slope = slope.triu() if whole else slope.diag().diag()
        s[name] = s[name] - precondition_lr / slope.abs().max() * slope @ s[name]
    q, r = s["Q"], s["R"]
    u = q.mT @ q @ (m / (1 - momentum**t)).reshape(rows, columns).double() @ r.mT @ r
    p.sub_(lr * (u.reshape(p.shape).to(p.dtype) + weight_decay * p))


class Prodigy(Reference):
    """Algorithm 4 of the paper, for all parameters together."""

    def __init__(self, params: Iterable[Tensor], **settings: Any) -> None:
        super().__init__(lambda *_: None, params, **settings)
        self.start = [p.detach().clone() for p in self.params]
        self.d, self.r = settings.get("d0", 1e-6), 0.0

    @torch.no_grad()
    def step(self) -> None:
        h = self.settings
        (b1, b2), lr, d = h["betas"], h["lr"], self.d
        sign, root, total = -1.0 if h.get("maximize") else 1.0, h["betas"][1] ** 0.5, 0.0
        self.r *= root
        for p, first, memory in zip(self.params, self.start, self.memory):
            if p.grad is None:
                continue
            g = sign * p.grad
            m, v, s = start(memory, p, "m", "v", "s")
            self.r += (1 - root) * lr * d * d * float((g * (first - p)).sum())
            memory["s"] = s = root * s + (1 - root) * lr * d * d * g
            memory["m"] = m = b1 * m + (1 - b1) * d * g
            memory["v"] = v = b2 * v + (1 - b2) * d * d * g * g
            total += float(s.abs().sum())
            p.sub_(lr * d * (m / (v.sqrt() + d * h["eps"]) + h["weight_decay"] * p))
        growth = h.get("growth_rate") or math.inf
        self.d = max(d, min(self.r / total, growth * d)) if total else d
