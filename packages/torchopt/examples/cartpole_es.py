# SPDX-License-Identifier: Apache-2.0
"""Balance a pole by evolution strategies, without derivatives of the environment.

A network of one hidden layer sees the four numbers of gymnasium's CartPole-v1 (position, speed,
angle, angular speed) and pushes the cart left or right. The return of an episode, at most 500, is a
step function of the weights. Each generation draws directions z_i, plays one episode with each of
theta + sigma z_i and theta - sigma z_i, all at once in one vectorised environment, replaces the
returns by their centred ranks u, and gives

    g = 1 / (2 sigma N) sum_i (u_i+ - u_i-) z_i

to Adam. A seed and the returns determine g: `ZeroOrder.combine` regenerates the directions. Workers
on many machines could share the work in this way.

The task counts as solved when 100 new episodes reach 475 on average, five tests in a row. The plot
shows the return of the current weights on new episodes against the number of episodes played.

References:
    T. Salimans, J. Ho, X. Chen, S. Sidor, I. Sutskever, Evolution Strategies as a Scalable
    Alternative to Reinforcement Learning, 2017, https://arxiv.org/abs/1703.03864
    A. Barto, R. Sutton, C. Anderson, Neuronlike adaptive elements that can solve difficult learning
    control problems, IEEE Transactions on Systems, Man, and Cybernetics 13, 1983 (the task).

Run `python cartpole_es.py` (about a minute for five seeds; needs `gymnasium`, which is in
`pip install torchopt[examples]`), or with `--smoke` (seconds).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import flat_table, plot_curves, progress, run_example
from torch import Tensor

import torchopt
from torchopt.diff.zero_order import Gaussian, ZeroOrder, estimators

Params = dict[str, Tensor]
LONGEST = 500  # steps of an episode
SOLVED = 475.0


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        generations: Largest number of generations.
        num_pairs: Antithetic pairs in each generation, of two episodes each.
        sigma: Size of the perturbation.
        lr: Step size of Adam.
        width: Hidden units.
        test_episodes: New episodes in a test of the current weights.
        test_every: Generations between such tests.
        target: Mean return to reach.
        stay: Number of successive tests at the target after which a run stops.
        runs: Number of runs, each with new weights and environments.
        seed: Seed of the first run; the next runs use the next numbers.
    """

    generations: int = 150
    num_pairs: int = 16
    sigma: float = 0.1
    lr: float = 0.05
    width: int = 16
    test_episodes: int = 100
    test_every: int = 1
    target: float = SOLVED
    stay: int = 5
    runs: int = 5
    seed: int = 0


PRESETS = {
    "full": Config(),
    "smoke": Config(generations=60, test_every=5, target=150.0, stay=1, runs=1),
}


class Worlds:
    """Many cart-poles at once."""

    def __init__(self, count: int, seed: int) -> None:
        import gymnasium

        self.count = count
        self.env = gymnasium.make_vec(
            "CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point"
        )
        self.env.reset(seed=seed)

    def play(self, policy: Any) -> Tensor:
        """Return the returns `[count]` of one episode each.

        Args:
            policy: From observations `[count, 4]` to actions `[count]`, 0 or 1.
        """
        observations, _ = self.env.reset()
        returns = torch.zeros(self.count)
        alive = torch.ones(self.count, dtype=torch.bool)
        for _ in range(LONGEST):
            actions = policy(torch.from_numpy(observations))
            observations, rewards, over, out_of_time, _ = self.env.step(actions.numpy())
            returns += torch.where(alive, torch.as_tensor(rewards, dtype=torch.float32), 0.0)
            alive &= ~torch.as_tensor(over | out_of_time)
            if not alive.any():
                break
        return returns


def fresh_params(width: int, generator: torch.Generator) -> Params:
    """Return the weights of a network with one hidden layer."""
    return {
        "w1": torch.randn(4, width, generator=generator) / 2,
        "b1": torch.zeros(width),
        "w2": torch.randn(width, generator=generator) / width**0.5,
    }


def push_right(params: Params, observation: Tensor) -> Tensor:
    """Return 1 to push the cart right, 0 to push it left, for one observation or a batch."""
    hidden = torch.tanh(observation @ params["w1"] + params["b1"])
    return (hidden @ params["w2"] > 0).long()


def population(params: Params, noise: Params, sigma: float) -> Params:
    """Return the weights of all particles, those at +z before those at -z."""
    return {
        name: torch.cat([p + sigma * noise[name], p - sigma * noise[name]])
        for name, p in params.items()
    }


def solved(curve: list[tuple[int, float]], config: Config) -> bool:
    """Return whether the last tests all reached the target."""
    last = curve[-config.stay :]
    return len(last) == config.stay and all(score >= config.target for _, score in last)


def learn(config: Config, seed: int, bar: Any) -> dict[str, Any]:
    """Learn from one seed until the task is solved, and return the curve."""
    generator = torch.Generator().manual_seed(seed)
    params = fresh_params(config.width, generator)
    directions = Gaussian()
    engine = ZeroOrder(
        directions,
        estimators.shaped(estimators.antithetic),
        num_samples=config.num_pairs,
        sigma=config.sigma,
    )
    optimizer = torchopt.adam(config.lr)
    state = optimizer.init(params)
    worlds = Worlds(2 * config.num_pairs, seed)
    test_worlds = Worlds(config.test_episodes, seed + 1_000_000)
    batched = torch.func.vmap(push_right)
    started, episodes, curve = time.perf_counter(), 0, []
    for generation in range(config.generations + 1):
        if generation % config.test_every == 0 or generation == config.generations:
            score = test_worlds.play(lambda x, p=params: push_right(p, x)).mean().item()
            curve.append((episodes, score))
            bar.set_postfix_str(f"seed {seed}, return {score:.0f}")
            if solved(curve, config):
                bar.update(config.generations - generation)
                break
        if generation == config.generations:
            break
        noise_seed = int(torch.randint(2**62, (), generator=generator))
        drawn = directions.draw(list(params.values()), noise_seed, 0, config.num_pairs)
        particles = population(params, dict(zip(params, drawn)), config.sigma)
        returns = worlds.play(lambda x, p=particles: batched(p, x))
        episodes += len(returns)
        losses = -returns.reshape(2, config.num_pairs).T  # [pair, sign]
        gradient = engine.combine(losses, params, seed=noise_seed, with_error=False).gradient
        updates, state = optimizer.update(gradient, state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        bar.update()
    return {
        "seed": seed,
        "curve": curve,
        "episodes": episodes,
        "seconds": time.perf_counter() - started,
        "solved": solved(curve, config),
    }


def run(config: Config, out: Path) -> dict[str, Any]:
    """Learn from each seed, draw the curves, and return the results."""
    runs = []
    with progress(config.generations * config.runs, "cart-pole") as bar:
        for seed in range(config.seed, config.seed + config.runs):
            runs.append(learn(config, seed, bar))
    plot_curves(
        {f"seed {one['seed']}: {one['seconds']:.0f} s": one["curve"] for one in runs},
        out / "cartpole_es.png",
        xlabel="episodes played",
        ylabel=f"mean return of {config.test_episodes} new episodes",
        title=f"CartPole-v1 by evolution strategies, target {config.target:.0f}",
        ylim=(0, 1.05 * LONGEST),
    )
    return {"runs": runs}


def report(results: dict[str, Any]) -> bool:
    """Print a row for each seed, and return whether all reached the target."""
    rows = [["seed", "episodes", "seconds", "return"]]
    for one in results["runs"]:
        numbers = (f"{one['episodes']}", f"{one['seconds']:.1f}", f"{one['curve'][-1][1]:.1f}")
        rows.append([str(one["seed"]), *numbers])
    print(flat_table(rows))
    return all(one["solved"] for one in results["runs"])


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when a seed did not reach the target."""
    return run_example(__doc__, "cartpole_es", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
