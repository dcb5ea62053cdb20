# SPDX-License-Identifier: Apache-2.0
"""Adapt a policy to a new decision process from twenty walks: MAML for reinforcement learning.

A world is a random Markov decision process: 10 states, 5 actions, transition probabilities drawn
from a flat Dirichlet distribution, and a mean reward for every state and action drawn from N(1, 1);
rewards have unit noise. In a new world the agent walks twenty times ten moves with the policy it
has, takes policy-gradient steps, and is judged by the reward of walks with the adapted policy.

    theta' = theta + alpha o grad J_sampled(theta)        from walks in that world, for each step
    maximise over theta and alpha the mean over worlds of J(theta')

The gradient of J is estimated with the log-probabilities of the sampled moves; so is the outer one,
and it is differentiated through the inner steps. There is one alpha for each step and state.

Before adaptation the best expected reward is that of the mean world, 10 in ten moves, whatever the
policy: any reward above that is due to adaptation. All states are alike before the first walk, so
the initial policy matters little and the step sizes matter much. Controls: a uniform policy that
takes the same steps with the best of a grid of step sizes, tried in 500 worlds each; and the
optimal policy of each world, by dynamic programming.

References:
    C. Finn, P. Abbeel, S. Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks, ICML 2017, section 5.3 and algorithm 3, https://arxiv.org/abs/1703.03400
    Y. Duan, J. Schulman, X. Chen, P. Bartlett, I. Sutskever, P. Abbeel, RL^2: Fast Reinforcement
    Learning via Slow Reinforcement Learning, 2016, section 3.2, https://arxiv.org/abs/1611.02779

Deviations: a table of logits instead of a network; mean rewards left at each move are the baseline.

Run `python maml_rl.py` (about a minute) or with `--smoke`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import flat_table, mean_and_half_width, plot_curves, progress, run_example
from torch import Tensor

import torchopt

NUM_STATES, NUM_ACTIONS = 10, 5


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        meta_steps: Updates of theta and alpha.
        worlds: Worlds of a meta-step.
        walks: Walks of an inner step, in each world.
        moves: Moves of a walk.
        inner_steps: Policy-gradient steps in a new world.
        alpha: Initial value of the step sizes.
        outer_lr: Step size of Adam.
        test_worlds: Worlds of the final test.
        seed: Seed of all random numbers.
    """

    meta_steps: int = 600
    worlds: int = 80
    walks: int = 20
    moves: int = 10
    inner_steps: int = 3
    alpha: float = 1.0
    outer_lr: float = 0.05
    test_worlds: int = 500
    seed: int = 0


PRESETS = {"full": Config(), "smoke": Config(meta_steps=3, worlds=4, test_worlds=20)}
CONTROL_ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True)
class Worlds:
    """A batch of decision processes.

    Attributes:
        transition: `[worlds, states, actions, states]`, probabilities of the next state.
        reward: `[worlds, states, actions]`, means.
    """

    transition: Tensor
    reward: Tensor

    @classmethod
    def draw(cls, number: int, generator: torch.Generator) -> Worlds:
        """Return random worlds."""
        shape = (number, NUM_STATES, NUM_ACTIONS, NUM_STATES)
        # Normalised exponential variables have the flat Dirichlet distribution.
        weights = -torch.rand(shape, generator=generator).clamp(min=1e-9).log()
        reward = 1 + torch.randn(shape[:3], generator=generator)
        return cls(weights / weights.sum(-1, keepdim=True), reward)

    def optimal(self, moves: int) -> Tensor:
        """Return the largest expected reward of a walk in each world."""
        value = torch.zeros(self.reward.shape[:2])
        for _ in range(moves):
            ahead = torch.einsum("wsat,wt->wsa", self.transition, value)
            value = (self.reward + ahead).amax(-1)
        return value[:, 0]

    def expected(self, logits: Tensor, moves: int) -> Tensor:
        """Return the exact expected reward of a walk with these policies, `[worlds]`."""
        policy = torch.softmax(logits, -1)
        value = torch.zeros(self.reward.shape[:2])
        for _ in range(moves):
            ahead = torch.einsum("wsat,wt->wsa", self.transition, value)
            value = (policy * (self.reward + ahead)).sum(-1)
        return value[:, 0]


def sampled_objective(
    worlds: Worlds, logits: Tensor, config: Config, generator: torch.Generator
) -> Tensor:
    """Return the policy-gradient objective of each world from sampled walks, `[worlds]`.

    Only its gradient has a meaning: it estimates that of the expected reward of a walk.
    """
    number = len(logits)
    log_policy = torch.log_softmax(logits, -1)
    world = torch.arange(number).unsqueeze(1).expand(number, config.walks)
    state = torch.zeros(number, config.walks, dtype=torch.long)
    log_probabilities, rewards = [], []
    with torch.no_grad():
        cumulative = log_policy.exp().cumsum(-1)
        next_cumulative = worlds.transition.cumsum(-1)
    for _ in range(config.moves):
        coins = torch.rand(2, number, config.walks, 1, generator=generator)
        noise = torch.randn(number, config.walks, generator=generator)
        action = (coins[0] > cumulative[world, state]).sum(-1).clamp(max=NUM_ACTIONS - 1)
        log_probabilities.append(log_policy[world, state, action])
        rewards.append(worlds.reward[world, state, action] + noise)
        arrival = next_cumulative[world, state, action]
        state = (coins[1] > arrival).sum(-1).clamp(max=NUM_STATES - 1)
    to_come = torch.stack(rewards).flip(0).cumsum(0).flip(0)
    advantage = to_come - to_come.mean(-1, keepdim=True)
    return (torch.stack(log_probabilities) * advantage).sum(0).mean(-1)


def adapt(
    worlds: Worlds,
    theta: Tensor,
    alpha: Tensor,
    config: Config,
    generator: torch.Generator,
    *,
    create_graph: bool,
) -> list[Tensor]:
    """Return the policies of all worlds after 0, 1, ... steps, each `[worlds, states, actions]`."""
    policies = theta.expand(len(worlds.reward), NUM_STATES, NUM_ACTIONS)
    path = [policies]
    optimizer = torchopt.sgd(1.0, maximize=True)
    state = optimizer.init(policies)
    for step in range(config.inner_steps):
        if not create_graph:
            policies = policies.detach().requires_grad_()
        objective = sampled_objective(worlds, policies, config, generator).sum()
        (g,) = torch.autograd.grad(objective, policies, create_graph=create_graph)
        updates, state = optimizer.update(alpha[step] * g, state, params=policies, inplace=False)
        policies = torchopt.apply_updates(policies, updates, inplace=False)
        path.append(policies)
    return path


def meta_train(config: Config) -> tuple[Tensor, Tensor, list[tuple[int, float]]]:
    """Return theta, alpha, and the expected reward after adaptation during training."""
    generator = torch.Generator().manual_seed(config.seed)
    theta = torch.zeros(NUM_STATES, NUM_ACTIONS, requires_grad=True)
    log_alpha = torch.full((config.inner_steps, NUM_STATES, 1), config.alpha).log()
    log_alpha.requires_grad_()
    outer = torchopt.Adam([theta, log_alpha], lr=config.outer_lr)
    curve = []
    with progress(config.meta_steps, "MAML") as bar:
        for step in range(config.meta_steps):
            worlds = Worlds.draw(config.worlds, generator)
            path = adapt(worlds, theta, log_alpha.exp(), config, generator, create_graph=True)
            loss = -sampled_objective(worlds, path[-1], config, generator).mean()
            outer.zero_grad()
            loss.backward()
            outer.step()
            with torch.no_grad():
                curve.append((step, worlds.expected(path[-1], config.moves).mean().item()))
            bar.update()
    return theta.detach(), log_alpha.exp().detach(), curve


def run(config: Config, out: Path) -> dict[str, Any]:
    """Meta-train, tune the control, and test both in new worlds."""
    theta, alpha, curve = meta_train(config)
    generator = torch.Generator().manual_seed(config.seed + 1)
    validation = Worlds.draw(config.test_worlds, generator)
    test = Worlds.draw(config.test_worlds, generator)

    def rewards(worlds: Worlds, theta: Tensor, alpha: Tensor) -> list[Tensor]:
        path = adapt(worlds, theta, alpha, config, generator, create_graph=False)
        with torch.no_grad():
            return [worlds.expected(policies, config.moves) for policies in path]

    def uniform(worlds: Worlds, alpha: float) -> list[Tensor]:
        sizes = torch.full((config.inner_steps,), alpha)
        return rewards(worlds, torch.zeros(NUM_STATES, NUM_ACTIONS), sizes)

    best = max(CONTROL_ALPHAS, key=lambda alpha: uniform(validation, alpha)[-1].mean().item())
    judged = {
        "MAML": rewards(test, theta, alpha),
        "uniform start": uniform(test, best),
        "fixed step 0.1": uniform(test, 0.1),
    }
    results = {name: [mean_and_half_width(r) for r in path] for name, path in judged.items()}
    smooth = []
    for step in range(len(curve)):
        window = [reward for _, reward in curve[max(0, step - 15) : step + 1]]
        smooth.append((step, sum(window) / len(window)))
    level = results["uniform start"][-1][0]
    plot_curves(
        {
            "MAML, adapted": smooth,
            "uniform start, tuned step, adapted": [(0, level), (len(curve), level)],
            "before adaptation": [(0, results["MAML"][0][0]), (len(curve), results["MAML"][0][0])],
        },
        out / "maml_rl.png",
        xlabel="meta-step",
        ylabel="expected reward of ten moves",
        title="New worlds",
    )
    return {
        "rewards": results,
        "control_alpha": best,
        "alpha": [alpha.min().item(), alpha.mean().item(), alpha.max().item()],
        "optimal": test.optimal(config.moves).mean().item(),
    }


def report(results: dict[str, Any]) -> bool:
    """Print expected rewards and return whether adaptation helps more than the control's."""
    steps = results["config"]["inner_steps"]
    rows = [["expected reward of ten moves", *(f"{k} steps" for k in range(steps + 1))]]
    titles = {
        "MAML": "MAML",
        "uniform start": f"uniform start, alpha {results['control_alpha']} (best of a grid)",
        "fixed step 0.1": "uniform start, alpha 0.1",
    }
    for name, title in titles.items():
        rows.append([title, *(f"{m:.2f} ± {h:.2f}" for m, h in results["rewards"][name])])
    rows.append(["optimal policy", *[""] * steps, f"{results['optimal']:.2f}"])
    print(flat_table(rows))
    low, mean, high = results["alpha"]
    print(f"learned step sizes: {low:.2f} to {high:.2f}, mean {mean:.2f}")
    maml, control = results["rewards"]["MAML"], results["rewards"]["uniform start"]
    # MAML learns its step sizes; the control needed a grid.
    return bool(maml[-1][0] > maml[0][0] + 5.0 and maml[-1][0] > control[-1][0] - 0.25)


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when adaptation did not help."""
    return run_example(__doc__, "maml_rl", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
