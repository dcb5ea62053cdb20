# SPDX-License-Identifier: Apache-2.0
"""Learn how far to look ahead: a discount for every state, by meta-gradients.

An agent walks through states 1, 2, ..., 10. Odd states pay 0.1 (signal), even states a random
reward of mean 0 and deviation 1 (noise). It learns values from a batch of walks, by one step
towards the return in which each state s has its own discount,

    G_t = R_{t+1} + gamma(S_{t+1}) G_{t+1},      v' = v + alpha * mean (G_t - v(S_t)) grad v(S_t),

and the values are judged on new walks by the undiscounted return. That error is differentiated with
respect to the discounts, through the step, because G_t depends on them.

Looking past a noisy reward adds variance, but includes later rewards. Meta-gradients find
discounts near one in signal states and near zero in noise states.

References:
    Z. Xu, H. van Hasselt, D. Silver, Meta-Gradient Reinforcement Learning, NeurIPS 2018, section
    2 and the first illustration, https://arxiv.org/abs/1805.09801

Deviations: the walks of a batch are simulated at once; several agents learn side by side under
`vmap`, and the tables show their mean.

Run `python meta_gradient_discount.py` (below a minute) or with `--smoke`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import flat_table, plot_curves, progress, run_example
from torch import Tensor
from torch.func import grad, vmap

import torchopt

NUM_STATES = 10
SIGNAL = torch.arange(1, NUM_STATES + 1) % 2 == 1


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        meta_steps: Updates of the discounts.
        agents: Number of agents that learn in parallel; the results are their means.
        walks: Walks of a batch; one batch is for the step of the values, one for the outer loss.
        inner_lr: Step size of the values.
        outer_lr: Step size of Adam on the logits of the discounts.
        reset: Probability, at each meta-step, that the values of an agent are reset to zero: the
            discounts matter only while there is something to learn.
        seed: Seed of all random numbers.
    """

    meta_steps: int = 3000
    agents: int = 32
    walks: int = 2
    inner_lr: float = 0.5
    outer_lr: float = 0.03
    reset: float = 0.1
    seed: int = 0


PRESETS = {"full": Config(), "smoke": Config(meta_steps=40, agents=4)}


def walk(config: Config, generator: torch.Generator) -> Tensor:
    """Return the rewards of a batch of walks for every agent, `[agents, walks, states]`."""
    noise = torch.randn(config.agents, config.walks, NUM_STATES, generator=generator)
    return torch.where(SIGNAL, torch.tensor(0.1), noise)


def returns(rewards: Tensor, discounts: Tensor) -> Tensor:
    """Return G of every state, `[walks, states]`; the discount is that of the next state."""
    total = torch.zeros(len(rewards))
    collected: list[Tensor] = []
    for state in reversed(range(NUM_STATES)):
        ahead = discounts[state + 1] * total if state + 1 < NUM_STATES else 0.0
        total = rewards[:, state] + ahead
        collected.append(total)
    return torch.stack(collected[::-1], dim=1)


def value_loss(values: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
    """Return half the squared distance of the values from the returns, averaged over walks."""
    return 0.5 * ((returns(rewards, discounts) - values) ** 2).mean(0).sum()


def meta_loss(logits: Tensor, values: Tensor, batch: Tensor, judge: Tensor, lr: float) -> Any:
    """Return the undiscounted error of the values after one step, and those values."""
    inner = torchopt.sgd(lr)
    g = grad(value_loss)(values, batch, torch.sigmoid(logits))
    update, _ = inner.update(g, inner.init(values), params=values, inplace=False)
    stepped = torchopt.apply_updates(values, update, inplace=False)
    return value_loss(stepped, judge, torch.ones(NUM_STATES)), stepped


def run(config: Config, out: Path) -> dict[str, Any]:
    """Learn the discounts."""
    generator = torch.Generator().manual_seed(config.seed)
    logits = torch.zeros(config.agents, NUM_STATES)
    values = torch.zeros(config.agents, NUM_STATES)
    outer = torchopt.adam(config.outer_lr)
    state = outer.init(logits)
    gradient = vmap(
        grad(lambda *args: meta_loss(*args, config.inner_lr), has_aux=True),
        randomness="error",
    )
    curves: dict[str, list[tuple[int, float]]] = {"signal states": [], "noise states": []}
    with progress(config.meta_steps, "discounts") as bar:
        for step in range(config.meta_steps + 1):
            gamma = torch.sigmoid(logits)[:, 1:]  # no walk enters state 1
            curves["signal states"].append((step, gamma[:, SIGNAL[1:]].mean().item()))
            curves["noise states"].append((step, gamma[:, ~SIGNAL[1:]].mean().item()))
            if step == config.meta_steps:
                break
            again = torch.rand(config.agents, 1, generator=generator) < config.reset
            values = torch.where(again, torch.zeros(()), values)
            g, values = gradient(logits, values, walk(config, generator), walk(config, generator))
            updates, state = outer.update(g, state, params=logits, inplace=False)
            logits = torchopt.apply_updates(logits, updates, inplace=False)
            bar.update()
    plot_curves(
        curves,
        out / "meta_gradient_discount.png",
        xlabel="meta-step",
        ylabel="discount",
        title="Learned discounts, mean over agents",
        ylim=(0, 1),
    )
    return {
        "discounts": torch.sigmoid(logits).mean(0).tolist(),
        "judged": judge_discounts(torch.sigmoid(logits).mean(0), config, generator),
    }


def judge_discounts(
    learned: Tensor, config: Config, generator: torch.Generator
) -> dict[str, float]:
    """Return the error of the values after one step from zero, for several discounts."""
    truth = SIGNAL.float().mul(0.1).flip(0).cumsum(0).flip(0)
    rewards = torch.cat([walk(config, generator) for _ in range(50)])
    choices = {
        "gamma = 0": torch.zeros(NUM_STATES),
        "gamma = 0.9": torch.full((NUM_STATES,), 0.9),
        "gamma = 1": torch.ones(NUM_STATES),
        "learned gamma(s)": learned,
        "1 in signal states, 0 in noise states": SIGNAL.float(),
    }

    def error(discounts: Tensor, batch: Tensor) -> Tensor:
        start = torch.zeros(NUM_STATES)
        stepped = start - config.inner_lr * grad(value_loss)(start, batch, discounts)
        return ((stepped - truth) ** 2).sum()

    return {
        name: vmap(lambda batch, d=discounts: error(d, batch))(rewards).mean().item()
        for name, discounts in choices.items()
    }


def report(results: dict[str, Any]) -> bool:
    """Print the discounts and return whether they tell signal from noise."""
    rows = [["entering state", *(str(s) for s in range(2, NUM_STATES + 1))]]
    rows.append(["pays", *("0.1" if SIGNAL[s] else "noise" for s in range(1, NUM_STATES))])
    rows.append(["learned discount", *(f"{g:.2f}" for g in results["discounts"][1:])])
    print(flat_table(rows))
    print("\nsquared error of all values after one step from zero")
    print(flat_table([[name, f"{error:.3f}"] for name, error in results["judged"].items()]))
    gamma = torch.tensor(results["discounts"])
    signal, noise = gamma[SIGNAL][1:], gamma[~SIGNAL]
    print(f"mean discount {signal.mean():.2f} in signal states, {noise.mean():.2f} in noise states")
    judged = results["judged"]
    return bool(
        signal.mean() > 0.8
        and noise.max() < 0.3
        and all(judged["learned gamma(s)"] < judged[f"gamma = {g}"] for g in ("0", "0.9", "1"))
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when the discounts do not tell signal from noise."""
    return run_example(__doc__, "meta_gradient_discount", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
