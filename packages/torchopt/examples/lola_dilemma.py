# SPDX-License-Identifier: Apache-2.0
"""Teach two selfish agents to cooperate: LOLA on the iterated prisoner's dilemma.

Each agent's policy has five numbers: the probabilities of cooperating at the first move and after
each of the four outcomes CC, CD, DC, DD of the last move. The reward of a move is -2 if both defect
and -1 if both cooperate. A learning-aware agent maximises its value after the opponent's next
learning steps, and differentiates through them:

    theta_1 <- theta_1 + lr_out * grad_1 V_1(theta_1, theta_2 + lr_in * grad_2 V_2)

Two versions:

* exact: the discounted value of two such policies is a linear solve, V = (1 - gamma) p0' (I -
  gamma P)^-1 r, so nothing is sampled. Many pairs of agents learn side by side under `vmap`.
* DiCE: values are estimated from played games. The magic box exp(sum log pi - stop(sum log pi)) has
  the value one and derivatives of all orders that are those of the expectation, so the opponent's
  sampled learning step can be differentiated; `MetaSGD` takes that step on a copy of the opponent.

Naive learners (no look-ahead) end in defection, at -2; agents with look-ahead find tit for tat and
cooperate, at about -1.

References:
    J. Foerster, R. Chen, M. Al-Shedivat, S. Whiteson, P. Abbeel, I. Mordatch, Learning with
    Opponent-Learning Awareness, AAMAS 2018, table 3, https://arxiv.org/abs/1709.04326
    J. Foerster, G. Farquhar, M. Al-Shedivat, T. Rocktaeschel, E. Xing, S. Whiteson, DiCE: The
    Infinitely Differentiable Monte Carlo Estimator, ICML 2018, https://arxiv.org/abs/1802.05098

Run `python lola_dilemma.py` (about two minutes) or with `--smoke`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import flat_table, mean_and_half_width, plot_curves, progress, run_example
from torch import Tensor, nn
from torch.func import grad, vmap

import torchopt

# Reward of the first agent after CC, CD, DC, DD; its own move comes first.
REWARD = torch.tensor([-1.0, -3.0, 0.0, -2.0])
# What the other agent sees when we see 0: nothing, 1: CC, 2: CD, 3: DC, 4: DD.
SWAPPED = torch.tensor([0, 1, 3, 2, 4])


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        exact_steps: Learning steps of the exact version.
        pairs: Pairs of agents that learn in the exact version.
        exact_lr_in: Size of the opponent's look-ahead step, exact version.
        exact_lr_out: Size of a learning step, exact version.
        gamma: Discount per move.
        dice_steps: Learning steps of the sampled version.
        games: Games played at once for an estimate.
        moves: Moves of a game.
        dice_lr_in: Size of the opponent's look-ahead step, sampled version.
        dice_lr_out: Size of a learning step, sampled version.
        look_aheads: Numbers of look-ahead steps that are compared.
        seed: Seed of all random numbers.
    """

    exact_steps: int = 150
    pairs: int = 200
    exact_lr_in: float = 75.0
    exact_lr_out: float = 25.0
    gamma: float = 0.96
    dice_steps: int = 100
    games: int = 512
    moves: int = 100
    dice_lr_in: float = 0.3
    dice_lr_out: float = 0.2
    look_aheads: tuple[int, ...] = (0, 1, 2)
    seed: int = 0


PRESETS = {
    "full": Config(),
    "smoke": Config(exact_steps=10, pairs=5, dice_steps=2, games=8, moves=10, look_aheads=(0, 1)),
}
PAPER = {0: -1.98, 1: -1.04}  # LOLA, table 3, exact: reward of a move; naive and look-ahead


def values(own: Tensor, other: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the discounted mean reward of a move for both agents, exactly.

    Args:
        own: `[5]`, logits of cooperation at the first move and after CC, CD, DC, DD.
        other: The same for the other agent, whose CD is our DC.
        gamma: Discount.
    """
    first, after = torch.sigmoid(own[0]), torch.sigmoid(own[1:])
    swapped = other[SWAPPED]
    other_first, other_after = torch.sigmoid(swapped[0]), torch.sigmoid(swapped[1:])

    def outcomes(p: Tensor, q: Tensor) -> Tensor:
        return torch.stack([p * q, p * (1 - q), (1 - p) * q, (1 - p) * (1 - q)], -1)

    transition = outcomes(after, other_after)  # [4, 4], from the last outcome to the next
    identity = torch.eye(4, dtype=own.dtype)
    rewards = torch.stack([REWARD, REWARD[SWAPPED[1:] - 1]], -1).to(own.dtype)
    totals = torch.linalg.solve(identity - gamma * transition, rewards)
    means = (1 - gamma) * outcomes(first, other_first) @ totals
    return means[0], means[1]


def exact_gradient(own: Tensor, other: Tensor, look_ahead: int, config: Config) -> Tensor:
    """Return the gradient of our value after the opponent's look-ahead steps."""
    optimizer = torchopt.sgd(config.exact_lr_in, maximize=True)

    def value_after(own: Tensor) -> Tensor:
        imagined = other
        state = optimizer.init(imagined)
        for _ in range(look_ahead):
            g = grad(lambda y: values(y, own, config.gamma)[0])(imagined)
            update, state = optimizer.update(g, state, params=imagined, inplace=False)
            imagined = torchopt.apply_updates(imagined, update, inplace=False)
        return values(own, imagined, config.gamma)[0]

    return grad(value_after)(own)


def learn_exact(look_ahead: int, config: Config) -> tuple[list[tuple[int, float]], Tensor, Tensor]:
    """Return the curve of mean rewards, and the final rewards and policies of all pairs."""
    generator = torch.Generator().manual_seed(config.seed)
    agents = torch.randn(2, config.pairs, 5, generator=generator)
    gradient = vmap(lambda own, other: exact_gradient(own, other, look_ahead, config))
    evaluate = vmap(lambda own, other: torch.stack(values(own, other, config.gamma)).mean())
    outer = torchopt.sgd(config.exact_lr_out, maximize=True)
    state = outer.init(agents)
    curve = []
    with progress(config.exact_steps, f"exact, look-ahead {look_ahead}") as bar:
        for step in range(config.exact_steps):
            curve.append((step, evaluate(agents[0], agents[1]).mean().item()))
            both = torch.stack([gradient(agents[0], agents[1]), gradient(agents[1], agents[0])])
            updates, state = outer.update(both, state, params=agents, inplace=False)
            agents = torchopt.apply_updates(agents, updates, inplace=False)
            bar.update()
    rewards = evaluate(agents[0], agents[1])
    curve.append((config.exact_steps, rewards.mean().item()))
    return curve, rewards, torch.sigmoid(agents)


class Agent(nn.Module):
    """Logits of cooperation at the first move and after CC, CD, DC, DD, one's own move first."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(5))


def play(
    own: Tensor, other: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Play games and return log-probabilities of the moves of both, and rewards of both.

    Each is `[moves, games]`; moves are sampled, log-probabilities can be differentiated.
    """
    seen = torch.zeros(config.games, dtype=torch.long)  # by us: 0 at first, then 1 + outcome
    log_own, log_other, rewards, other_rewards = [], [], [], []
    for _ in range(config.moves):
        ours, theirs = own[seen], other[SWAPPED[seen]]
        coins = torch.rand(2, config.games, generator=generator)
        with torch.no_grad():
            defect = coins[0] > torch.sigmoid(ours)
            other_defect = coins[1] > torch.sigmoid(theirs)
            outcome = 2 * defect.long() + other_defect.long()
            seen = 1 + outcome
            rewards.append(REWARD[outcome])
            other_rewards.append(REWARD[SWAPPED[seen] - 1])
        log_own.append(-nn.functional.softplus(torch.where(defect, ours, -ours)))
        log_other.append(-nn.functional.softplus(torch.where(other_defect, theirs, -theirs)))
    return (
        torch.stack(log_own),
        torch.stack(log_other),
        torch.stack(rewards),
        torch.stack(other_rewards),
    )


def dice_objective(log_own: Tensor, log_other: Tensor, rewards: Tensor, gamma: float) -> Tensor:
    """Return minus the mean discounted reward as a DiCE objective, with a baseline (equation 12).

    Its value is that of the sampled games; its derivatives of every order estimate those of the
    expectation.
    """

    def magic_box(x: Tensor) -> Tensor:
        return torch.exp(x - x.detach())

    moves = len(rewards)
    discounts = gamma ** torch.arange(moves).unsqueeze(1)
    discounted = discounts * rewards
    both = log_own + log_other
    total = (magic_box(both.cumsum(0)) * discounted).sum(0).mean()
    # The baseline of a move is the mean reward from it on over all games.
    baseline = discounted.flip(0).cumsum(0).flip(0).mean(1, keepdim=True)
    control = ((1 - magic_box(both)) * baseline).sum(0).mean()
    return -(total + control)


def dice_gradient(
    own: Agent, other: Agent, look_ahead: int, config: Config, generator: torch.Generator
) -> Tensor:
    """Return the gradient of our loss after the opponent's look-ahead steps."""
    imagined = Agent()
    imagined.load_state_dict(other.state_dict())
    inner = torchopt.MetaSGD(imagined, lr=config.dice_lr_in)
    for _ in range(look_ahead):
        log_theirs, log_ours, rewards, _ = play(imagined.logits, own.logits, config, generator)
        inner.step(dice_objective(log_theirs, log_ours, rewards, config.gamma))
    log_ours, log_theirs, rewards, _ = play(own.logits, imagined.logits, config, generator)
    loss = dice_objective(log_ours, log_theirs, rewards, config.gamma)
    return torch.autograd.grad(loss, own.logits)[0]


def learn_sampled(look_ahead: int, config: Config) -> tuple[list[tuple[int, float]], Tensor]:
    """Return the curve of mean rewards of a move, and the final policies."""
    generator = torch.Generator().manual_seed(config.seed)
    agents = [Agent(), Agent()]
    outers = [torchopt.SGD(agent.parameters(), lr=config.dice_lr_out) for agent in agents]
    curve = []
    with progress(config.dice_steps, f"DiCE, look-ahead {look_ahead}") as bar:
        for step in range(config.dice_steps + 1):
            with torch.no_grad():
                games = play(agents[0].logits, agents[1].logits, config, generator)
            curve.append((step, torch.stack(games[2:]).mean().item()))
            if step == config.dice_steps:
                break
            grads = [
                dice_gradient(agents[i], agents[1 - i], look_ahead, config, generator)
                for i in (0, 1)
            ]
            for agent, g, outer in zip(agents, grads, outers):
                agent.logits.grad = g
                outer.step()
            bar.update()
    policies = torch.sigmoid(torch.stack([agent.logits.detach() for agent in agents]))
    return curve, policies


def run(config: Config, out: Path) -> dict[str, Any]:
    """Let agents learn with each look-ahead, exactly and from games."""
    exact: dict[str, Any] = {}
    sampled: dict[str, Any] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for look_ahead in config.look_aheads:
        label = f"exact, look-ahead {look_ahead}"
        curves[label], rewards, policies = learn_exact(look_ahead, config)
        exact[str(look_ahead)] = {
            "reward": mean_and_half_width(rewards),
            "cooperating_pairs": (rewards > -1.2).float().mean().item(),
            # tit for tat: cooperates after CC and DC (the other cooperated), defects otherwise
            "cooperates": policies.mean((0, 1)).tolist(),
        }
    for look_ahead in config.look_aheads:
        label = f"DiCE, look-ahead {look_ahead}"
        curves[label], policies = learn_sampled(look_ahead, config)
        last = [reward for _, reward in curves[label][-10:]]
        sampled[str(look_ahead)] = {
            "reward": sum(last) / len(last),
            "best": max(reward for _, reward in curves[label]),
            "cooperates": policies.mean(0).tolist(),
        }
    plot_curves(
        curves,
        out / "lola_dilemma.png",
        xlabel="learning step",
        ylabel="reward of a move",
        title="Iterated prisoner's dilemma",
        ylim=(-2.1, -0.9),
    )
    return {"exact": exact, "sampled": sampled}


def report(results: dict[str, Any]) -> bool:
    """Print rewards and policies, and return whether look-ahead made agents cooperate."""
    head = ["", "reward", "best", "pairs that cooperate", "paper"]
    rows = [[*head, "P(C) first", "CC", "CD", "DC", "DD"]]
    for look_ahead, row in results["exact"].items():
        mean, half = row["reward"]
        paper = PAPER.get(int(look_ahead), "")
        cells = [f"{mean:.3f} ± {half:.3f}", "", f"{100 * row['cooperating_pairs']:.0f} %"]
        chances = [f"{p:.2f}" for p in row["cooperates"]]
        rows.append([f"exact, look-ahead {look_ahead}", *cells, str(paper), *chances])
    for look_ahead, row in results["sampled"].items():
        cells = [f"{row['reward']:.3f}", f"{row['best']:.3f}", "", ""]
        chances = [f"{p:.2f}" for p in row["cooperates"]]
        rows.append([f"DiCE, look-ahead {look_ahead}", *cells, *chances])
    print(flat_table(rows))
    exact, sampled = results["exact"], results["sampled"]
    aware = [look_ahead for look_ahead in exact if look_ahead != "0"]
    return bool(
        exact["0"]["reward"][0] < -1.8
        and exact["1"]["reward"][0] > -1.2
        and sampled["0"]["reward"] < -1.8
        and all(sampled[look_ahead]["best"] > -1.4 for look_ahead in aware)
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when agents did not learn to cooperate."""
    return run_example(__doc__, "lola_dilemma", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
