# SPDX-License-Identifier: Apache-2.0
"""Learn hyper-parameters by gradients, compared with grid search: penalties and learning rates.

1. Penalties of a logistic regression on real data, by implicit differentiation:

       w(lambda) = argmin  mean log-loss(w) + 1/2 sum_j exp(lambda_group(j)) w_j^2
       minimise over lambda the log-loss of w(lambda) on held-out data, averaged over five folds

   The question is whether diabetes gets worse by more than the median in a year. Features are ten
   measurements, their squares and their 45 products; each of the three groups has a penalty. Grid
   search uses one penalty for all, because three would need the cube of the number of trials. The
   five regressions are solved together under `vmap`, by Newton steps that are not recorded.

2. A learning rate for every tensor of a network, and one momentum, by differentiating through all
   steps of training: the validation loss after training is minimised over them. Grid search tries
   one learning rate and momentum for all tensors.

Data: the diabetes table (442 x 10; B. Efron, T. Hastie, I. Johnstone, R. Tibshirani, 2004) and the
handwritten digits (E. Alpaydin, C. Kaynak, 1998), as scikit-learn ships them.

References:
    Y. Bengio, Gradient-Based Optimization of Hyperparameters, Neural Computation 2000
    F. Pedregosa, Hyperparameter Optimization with Approximate Gradient, ICML 2016,
    https://arxiv.org/abs/1602.02355
    D. Maclaurin, D. Duvenaud, R. Adams, Gradient-based Hyperparameter Optimization through
    Reversible Learning, ICML 2015, sections 3.1 and 3.3, https://arxiv.org/abs/1502.03492

Run `python hyperparameter_learning.py` (about a minute) or with `--smoke`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from example_tools import digits, flat_table, plot_curves, progress, run_example
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import torchopt
from torchopt.diff.implicit import custom_root
from torchopt.linear_solve import Cholesky

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        splits: Random splits of the table into training and test; results are their means.
        examples: Training rows, five folds.
        outer_steps: Gradient steps on the penalties.
        grid: Values of the single penalty that grid search tries.
        train_steps: Steps of the network.
        rate_steps: Gradient steps on the learning rates.
        seed: Seed of all random numbers.
    """

    splits: int = 10
    examples: int = 250
    outer_steps: int = 40
    grid: int = 25
    train_steps: int = 30
    rate_steps: int = 60
    seed: int = 0


PRESETS = {
    "full": Config(),
    "smoke": Config(splits=1, outer_steps=4, grid=4, train_steps=3, rate_steps=3),
}
FOLDS = 5


# Part 1: penalties of a regression


def log_loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean log-loss of a logistic regression; the last weight is the intercept."""
    return nn.functional.binary_cross_entropy_with_logits(x @ w[:-1] + w[-1], y)


GROUPS = torch.tensor([0] * 10 + [1] * 10 + [2] * 45)  # measurements, squares, products


def load_table() -> tuple[Tensor, Tensor]:
    """Return the features in the order of `GROUPS`, and whether the disease got worse."""
    from sklearn.datasets import load_diabetes

    table = load_diabetes()
    x = torch.tensor(table.data)
    x = x / x.std(0)
    left, right = torch.triu_indices(10, 10, offset=1)
    y = torch.tensor(table.target)
    return torch.cat([x, x**2, x[:, left] * x[:, right]], dim=1), (y > y.median()).double()


def spread(log_penalty: Tensor) -> Tensor:
    """Return the penalty of each feature from that of its group, or from one for all."""
    return log_penalty.exp()[GROUPS] if len(log_penalty) > 1 else log_penalty.exp().expand(65)


def penalised(w: Tensor, log_penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the objective of the regression."""
    return log_loss(w, x, y) + 0.5 * (spread(log_penalty) * w[:-1] ** 2).sum()


@custom_root(grad(penalised), argnums=1, solve=Cholesky(), symmetric=True, positive_definite=True)
def fit(start: Tensor, log_penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the weights of the regression, by damped Newton steps."""
    w = start
    ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    curvature_of_penalty = nn.functional.pad(spread(log_penalty), (0, 1))
    for _ in range(25):
        p = torch.sigmoid(ones @ w)
        hessian = (ones * (p * (1 - p)).unsqueeze(1)).mT @ ones / len(y)
        hessian = hessian + torch.diag(curvature_of_penalty)
        step = torch.linalg.solve(hessian, grad(penalised)(w, log_penalty, x, y))
        w = w - step / (1 + step.norm() / 10)  # damped where the quadratic model is poor
    return w


def fold_losses(log_penalty: Tensor, folds: tuple[Tensor, ...]) -> Tensor:
    """Return the held-out loss of each fold, as a function of the penalties."""

    def held_out(x: Tensor, y: Tensor, x_out: Tensor, y_out: Tensor) -> Tensor:
        start = torch.zeros(x.shape[1] + 1, dtype=x.dtype)
        return log_loss(fit(start, log_penalty, x, y), x_out, y_out)

    return vmap(held_out)(*folds)


def make_folds(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Return x, y of the kept and of the held-out rows of each fold, stacked."""
    held = torch.arange(len(y)).view(FOLDS, -1)
    kept = torch.stack([torch.cat([held[j] for j in range(FOLDS) if j != i]) for i in range(FOLDS)])
    return x[kept], y[kept], x[held], y[held]


def learn_penalties(folds: tuple[Tensor, ...], start: float, config: Config) -> Tensor:
    """Return the logarithms of the penalties of the groups, starting from the best single one."""
    log_penalty = torch.full((3,), start, dtype=torch.float64)
    optimizer = torchopt.adam(0.2)
    state = optimizer.init(log_penalty)
    gradient = grad(lambda value: fold_losses(value, folds).mean())
    for _ in range(config.outer_steps):
        update, state = optimizer.update(gradient(log_penalty), state, inplace=False)
        log_penalty = torchopt.apply_updates(log_penalty, update, inplace=False)
    return log_penalty


def penalties(config: Config) -> dict[str, Any]:
    """Compare one penalty from a grid with learned ones."""
    x_all, y_all = load_table()
    found: dict[str, list[list[float]]] = {"grid search": [], "learned": []}
    learned_penalties = []
    with progress(config.splits, "penalties") as bar:
        for split in range(config.splits):
            generator = torch.Generator().manual_seed(1000 * config.seed + split)
            order = torch.randperm(len(y_all), generator=generator)
            train, test = order[: config.examples], order[config.examples :]
            mean, deviation = x_all[train].mean(0), x_all[train].std(0)
            x, y = (x_all - mean) / deviation, y_all
            folds = make_folds(x[train], y[train])
            grid = torch.linspace(math.log(1e-5), math.log(1e1), config.grid, dtype=torch.float64)
            losses = torch.stack([fold_losses(g.expand(1), folds).mean() for g in grid.unbind()])
            best = grid[losses.argmin()].item()
            chosen = {
                "grid search": torch.full((1,), best, dtype=torch.float64),
                "learned": learn_penalties(folds, best, config),
            }
            learned_penalties.append(chosen["learned"])
            for name, log_penalty in chosen.items():
                start = torch.zeros(x.shape[1] + 1, dtype=torch.float64)
                w = fit(start, log_penalty, x[train], y[train])
                wrong = ((x[test] @ w[:-1] + w[-1] > 0).double() != y[test]).double().mean()
                found[name].append(
                    [
                        fold_losses(log_penalty, folds).mean().item(),
                        log_loss(w, x[test], y[test]).item(),
                        wrong.item(),
                    ]
                )
            bar.update()
    results: dict[str, Any] = {
        name: dict(zip(("held_out", "test", "error"), torch.tensor(rows).mean(0).tolist()))
        for name, rows in found.items()
    }
    results["learned"]["penalties"] = torch.stack(learned_penalties).mean(0).exp().tolist()
    return results


# Part 2: a learning rate for every tensor


NET = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def network_loss(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    images, labels = batch
    return nn.functional.cross_entropy(functional_call(NET, params, (images,)), labels)


def sgd_with_rates(log_rates: Tensor, momentum: Tensor) -> torchopt.GradientTransformation:
    """Return SGD with a learning rate for every tensor, and one momentum (a logit)."""
    rules = [torchopt.sgd(rate, momentum=torch.sigmoid(momentum)) for rate in log_rates.exp()]
    return torchopt.transform.partition(
        dict(enumerate(rules)), lambda params: dict(zip(params, range(len(rules))))
    )


def rates(config: Config) -> dict[str, Any]:
    """Compare one learning rate and momentum from a grid with learned ones."""
    images, labels = digits()
    parts = {"train": slice(0, 600), "validation": slice(600, 1200), "test": slice(1200, None)}
    data = {name: (images[part], labels[part]) for name, part in parts.items()}
    torch.manual_seed(config.seed)
    for layer in NET:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    start = {name: p.detach().clone() for name, p in NET.named_parameters()}

    training = torchopt.inner_loop(network_loss, sgd_with_rates, steps=config.train_steps)

    def trained(log_rates: Tensor, momentum: Tensor) -> Params:
        found = training(start, data["train"], log_rates=log_rates, momentum=momentum)
        return cast("Params", found.params)

    def validation(log_rates: Tensor, momentum: Tensor) -> Tensor:
        return network_loss(trained(log_rates, momentum), data["validation"])

    number = len(start)
    trials = [(r, m) for r in (0.03, 0.1, 0.2, 0.4, 0.8, 1.6) for m in (0.0, 0.5, 0.8, 0.9, 0.95)]
    results: dict[str, Any] = {}

    def judge(log_rates: Tensor, momentum: Tensor) -> dict[str, Any]:
        params = trained(log_rates, momentum)
        logits = functional_call(NET, params, (data["test"][0],))
        return {
            "held_out": validation(log_rates, momentum).item(),
            "test": network_loss(params, data["test"]).item(),
            "error": (logits.argmax(-1) != data["test"][1]).float().mean().item(),
            "rates": dict(zip(start, log_rates.exp().tolist())),
            "momentum": torch.sigmoid(momentum).item(),
        }

    best, best_loss = None, math.inf
    with progress(len(trials), "grid of rates") as bar, torch.no_grad():
        for rate, m in trials[:: max(1, len(trials) // config.rate_steps)]:
            # a logit of -20 is a momentum of 2e-9
            logit = torch.logit(torch.tensor(max(m, 2e-9)))
            point = (torch.full((number,), math.log(rate)), logit)
            loss = validation(*point).item()
            if loss < best_loss:
                best, best_loss = point, loss
            bar.update()
    assert best is not None
    results["grid search"] = judge(*best)
    hypers = (torch.full((number,), math.log(0.1)), torch.tensor(0.0))  # knows nothing of the grid
    optimizer = torchopt.adam(0.15)
    state = optimizer.init(hypers)
    curve = []
    with progress(config.rate_steps, "learned rates") as bar:
        for step in range(config.rate_steps):
            at = [x.detach().requires_grad_() for x in hypers]
            g = torch.autograd.grad(validation(*at), at)
            update, state = optimizer.update(g, state, inplace=False)
            hypers = torchopt.apply_updates(hypers, update, inplace=False)
            if step % 5 == 4 or step == config.rate_steps - 1:
                curve.append((step + 1, validation(*hypers).item()))
            bar.update()
    results["learned"] = judge(*hypers)
    results["curve"] = curve
    return results


def run(config: Config, out: Path) -> dict[str, Any]:
    """Run both parts."""
    found = {"penalties": penalties(config), "rates": rates(config)}
    learned = found["rates"].pop("curve")
    level = found["rates"]["grid search"]["held_out"]
    plot_curves(
        {"learned rates": learned, "grid search": [(0, level), (learned[-1][0], level)]},
        out / "hyperparameter_learning.png",
        xlabel="gradient step on the learning rates",
        ylabel="validation loss after training",
        title="A learning rate for every tensor",
        yscale="log",
    )
    return found


def report(results: dict[str, Any]) -> bool:
    """Print losses and return whether learned hyper-parameters beat those of the grid."""
    rows = [["", "held-out loss", "test loss", "test error"]]
    for part, title in (("penalties", "penalty"), ("rates", "learning rate")):
        for name in ("grid search", "learned"):
            row = results[part][name]
            rows.append(
                [
                    f"{title}: {name}",
                    f"{row['held_out']:.4f}",
                    f"{row['test']:.4f}",
                    f"{100 * row['error']:.2f} %",
                ]
            )
    print(flat_table(rows))
    measured, squares, products = results["penalties"]["learned"]["penalties"]
    print(f"penalties: measurements {measured:.2g}, squares {squares:.2g}, products {products:.2g}")
    learned = results["rates"]["learned"]
    listed = ", ".join(f"{name} {rate:.2f}" for name, rate in learned["rates"].items())
    print(f"learned rates: {listed}; momentum {learned['momentum']:.2f}")
    return all(
        results[part]["learned"][key] < results[part]["grid search"][key]
        for part in ("penalties", "rates")
        for key in ("held_out", "test")
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when the grid was better."""
    return run_example(__doc__, "hyperparameter_learning", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
