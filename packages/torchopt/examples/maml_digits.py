# SPDX-License-Identifier: Apache-2.0
"""Learn to read a secret code of digits from one example of each: MAML and first-order MAML.

Every task is a code: a random assignment of ten labels to the ten digits. A learner sees one
labelled image of each digit (10-way, 1-shot) and has to label new images. Model-agnostic
meta-learning trains the initial parameters so that a few gradient steps on those ten images
suffice:

    meta-loss(theta) = mean over tasks of query_loss(theta - alpha * grad support_loss(theta) - ...)

MAML differentiates through the inner steps; the first-order variant treats the inner gradients as
constants. The inner loop of all tasks of a meta-step is one program, `torchopt.inner_loop` with
`tasks=`: it is traced once and then run as straight-line code. At the end the same meta-step is
timed eager, traced and compiled.

Meta-training and meta-testing share nothing but the ten shapes: they use different images, and
different codes (even permutations for training, odd ones for testing). Before adaptation no learner
can know the code, so accuracy is 1/10. The control trains the same network from scratch on the same
ten images, with the optimizer, step size and number of steps that work best for it on separate
validation tasks.

Data: the 1797 images of 8 x 8 pixels that scikit-learn ships (E. Alpaydin, C. Kaynak, Optical
Recognition of Handwritten Digits, UCI, 1998).

References:
    C. Finn, P. Abbeel, S. Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks, ICML 2017, https://arxiv.org/abs/1703.03400

Run `python maml_digits.py --quick` (below a minute) or without `--quick` (below four minutes).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from example_tools import mean_and_half_width, progress
from torch import Tensor, nn
from torch.func import functional_call, vmap

import torchopt

Params = dict[str, Tensor]
NUM_DIGITS = 10


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        meta_steps: Outer steps of each method.
        tasks_per_step: Tasks averaged in one outer step.
        queries: Query images of each digit in a task.
        inner_steps: Gradient steps of the adaptation.
        inner_lr: Step size of the adaptation.
        outer_lr: Step size of Adam on the initial parameters.
        width: Units of the two hidden layers.
        test_tasks: Meta-test tasks.
        validation_tasks: Tasks on which the control is tuned.
        timed: Ways of running the inner loop that are timed.
        seed: Seed of all random numbers.
    """

    meta_steps: int = 1500
    tasks_per_step: int = 16
    queries: int = 5
    inner_steps: int = 3
    inner_lr: float = 0.4
    outer_lr: float = 2e-3
    width: int = 64
    test_tasks: int = 400
    validation_tasks: int = 50
    timed: tuple[str, ...] = ("eager", "trace", "compile")
    seed: int = 0


PRESETS = {
    "full": Config(),
    "quick": Config(meta_steps=600, tasks_per_step=16, test_tasks=200, validation_tasks=25),
    "smoke": Config(
        meta_steps=4, tasks_per_step=4, test_tasks=8, validation_tasks=4, timed=("eager", "trace")
    ),
}

# (optimizer, step size, steps) that the control may choose from.
CONTROL_GRID = (
    ("sgd", 0.1, 100),
    ("sgd", 0.3, 50),
    ("sgd", 0.3, 150),
    ("sgd", 1.0, 50),
    ("adam", 0.001, 150),
    ("adam", 0.003, 50),
    ("adam", 0.003, 150),
    ("adam", 0.01, 50),
    ("adam", 0.03, 50),
)


@dataclass(frozen=True)
class Tasks:
    """A batch of tasks.

    Attributes:
        support: `[tasks, 10, 64]`, one image of each digit.
        support_labels: `[tasks, 10]`.
        query: `[tasks, 10 * queries, 64]`.
        query_labels: `[tasks, 10 * queries]`.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the four tensors."""
        return self.support, self.support_labels, self.query, self.query_labels


class TaskSampler:
    """Draws tasks from one part of the images and one half of the codes.

    Args:
        split: `"train"`, `"validation"` or `"test"`. Training and validation use even codes,
            testing odd ones; the images of the three do not overlap.
        seed: Seed of the random draws.
    """

    SPLITS: ClassVar[dict[str, tuple[float, float]]] = {
        "train": (0.0, 0.55),
        "validation": (0.55, 0.7),
        "test": (0.7, 1.0),
    }

    def __init__(self, split: str, seed: int) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
        images = (images - 0.305) / 0.376  # mean and deviation of all pixels
        labels = torch.tensor(digits.target)
        start, stop = self.SPLITS[split]
        self.images = []
        for digit in range(NUM_DIGITS):
            own = images[labels == digit]
            self.images.append(own[int(start * len(own)) : int(stop * len(own))])
        self.odd = split == "test"
        self.generator = torch.Generator().manual_seed(seed)

    def code(self) -> Tensor:
        """Return a random permutation of the ten labels, of this sampler's parity."""
        code = torch.randperm(NUM_DIGITS, generator=self.generator)
        if is_odd(code.tolist()) != self.odd:
            code[[0, 1]] = code[[1, 0]]
        return code

    def draw(self, num_tasks: int, queries: int) -> Tasks:
        """Return `num_tasks` tasks with one support image and `queries` query images of each
        digit.
        """
        support, query, codes = [], [], []
        for _ in range(num_tasks):
            chosen = [
                own[torch.randperm(len(own), generator=self.generator)[: 1 + queries]]
                for own in self.images
            ]
            support.append(torch.stack([images[0] for images in chosen]))
            query.append(torch.cat([images[1:] for images in chosen]))
            codes.append(self.code())
        code = torch.stack(codes)
        return Tasks(
            torch.stack(support), code, torch.stack(query), code.repeat_interleave(queries, dim=1)
        )


def is_odd(permutation: list[int]) -> bool:
    """Return the parity of a permutation.

    >>> is_odd([1, 0, 2]), is_odd([1, 2, 0])
    (True, False)
    """
    inversions = sum(
        permutation[i] > permutation[j]
        for i in range(len(permutation))
        for j in range(i + 1, len(permutation))
    )
    return inversions % 2 == 1


class Learner:
    """The network and its adaptation."""

    def __init__(self, width: int) -> None:
        self.net = nn.Sequential(
            nn.Linear(64, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, NUM_DIGITS),
        )

    def fresh_params(self, seed: int) -> Params:
        """Return newly initialised parameters."""
        torch.manual_seed(seed)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def loss(self, params: Params, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(functional_call(self.net, params, (images,)), labels)

    def adapt(
        self,
        params: Params,
        images: Tensor,
        labels: Tensor,
        optimizer: Any,
        steps: int,
        *,
        first_order: bool,
    ) -> Params:
        """Return the parameters after `steps` steps on one task, as a function of the initial
        ones.
        """
        if not steps:
            return params
        derivative = "first_order" if first_order else "reverse"
        inner = torchopt.inner_loop(self.loss, optimizer, steps=steps, derivative=derivative)
        adapted: Params = inner(params, images, labels).params
        return adapted

    def query(self, params: Params, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy."""
        logits = functional_call(self.net, params, (images,))
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return nn.functional.cross_entropy(logits, labels), accuracy

    def evaluate(self, params: Params, tasks: Tasks, optimizer: Any, steps: int) -> Tensor:
        """Return the query accuracy on each task after `steps` steps, `[tasks]`."""

        def accuracy(*task: Tensor) -> Tensor:
            adapted = self.adapt(params, task[0], task[1], optimizer, steps, first_order=True)
            return self.query(adapted, task[2], task[3])[1]

        with torch.no_grad():
            return vmap(accuracy)(*tasks.tensors())


class MetaTrainer:
    """MAML on one set of initial parameters.

    Args:
        learner: The network.
        config: Settings.
        first_order: Treat the inner gradients as constants.
        execute: How the inner loop runs: `"eager"`, `"trace"` or `"compile"`.
    """

    def __init__(
        self, learner: Learner, config: Config, *, first_order: bool, execute: str = "eager"
    ) -> None:
        self.learner = learner
        self.config = config
        self.inner = torchopt.sgd(config.inner_lr)
        start = learner.fresh_params(config.seed)
        self.params = {name: p.requires_grad_() for name, p in start.items()}
        self.outer = torchopt.Adam(self.params.values(), lr=config.outer_lr)
        self.adapt = torchopt.inner_loop(
            lambda params, support: learner.loss(params, *support),
            self.inner,
            steps=config.inner_steps,
            derivative="first_order" if first_order else "reverse",
            tasks=(None, 0),  # one set of parameters, a support set for each task
            execute=execute,
        )

    def meta_loss(self, tasks: Tasks) -> Tensor:
        """Return the query loss after adaptation, averaged over tasks."""
        adapted = self.adapt(self.params, (tasks.support, tasks.support_labels)).params
        losses, _ = vmap(self.learner.query)(adapted, tasks.query, tasks.query_labels)
        return losses.mean()

    def step(self, tasks: Tasks) -> float:
        """Take one outer step and return the meta-loss."""
        loss = self.meta_loss(tasks)
        self.outer.zero_grad()
        loss.backward()
        self.outer.step()
        return loss.item()

    def test_accuracy(self, tasks: Tasks, steps: int) -> Tensor:
        """Return the accuracy on each task after `steps` inner steps."""
        params = {name: p.detach() for name, p in self.params.items()}
        return self.learner.evaluate(params, tasks, self.inner, steps)


def tune_control(learner: Learner, config: Config) -> tuple[str, float, int]:
    """Return the setting of the control that is best on validation tasks."""
    tasks = TaskSampler("validation", config.seed + 2).draw(config.validation_tasks, config.queries)
    best, best_accuracy = CONTROL_GRID[0], -1.0
    with progress(len(CONTROL_GRID), "tune from-scratch") as bar:
        for name, lr, steps in CONTROL_GRID:
            accuracy = scratch_accuracy(learner, config, tasks, (name, lr, steps)).mean().item()
            if accuracy > best_accuracy:
                best, best_accuracy = (name, lr, steps), accuracy
            bar.update()
    return best


def scratch_accuracy(
    learner: Learner, config: Config, tasks: Tasks, setting: tuple[str, float, int]
) -> Tensor:
    """Return the accuracy on each task of the network trained from scratch on the task's support
    images.
    """
    name, lr, steps = setting
    optimizer = {"sgd": torchopt.sgd, "adam": torchopt.adam}[name](lr)
    return learner.evaluate(learner.fresh_params(config.seed + 3), tasks, optimizer, steps)


def train(
    trainer: MetaTrainer, label: str, test_tasks: Tasks
) -> tuple[list[tuple[int, float]], float]:
    """Meta-train and return the learning curve and the median seconds of a meta-step."""
    config = trainer.config
    sampler = TaskSampler("train", config.seed + 1)
    few = Tasks(*(x[: min(50, config.test_tasks)] for x in test_tasks.tensors()))
    every = max(1, config.meta_steps // 12)
    curve, seconds = [], []
    with progress(config.meta_steps, label) as bar:
        for step in range(config.meta_steps + 1):
            if step % every == 0 or step == config.meta_steps:
                accuracy = trainer.test_accuracy(few, config.inner_steps).mean().item()
                curve.append((step, accuracy))
                bar.set_postfix(accuracy=f"{accuracy:.3f}")
            if step == config.meta_steps:
                break
            tasks = sampler.draw(config.tasks_per_step, config.queries)
            start = time.perf_counter()
            trainer.step(tasks)
            seconds.append(time.perf_counter() - start)
            bar.update()
    return curve, sorted(seconds)[len(seconds) // 2]


def step_times(learner: Learner, config: Config, repeats: int = 20) -> dict[str, Any]:
    """Return the time of a meta-step of MAML for each way of running the inner loop.

    For each of `config.timed`, this is the milliseconds of the fastest of `repeats` steps and the
    seconds of the first one, or the reason why it does not run here.
    """
    sampler = TaskSampler("train", config.seed + 4)
    batches = [sampler.draw(config.tasks_per_step, config.queries) for _ in range(repeats)]
    found: dict[str, Any] = {}
    for execute in config.timed:
        trainer = MetaTrainer(learner, config, first_order=False, execute=execute)
        seconds = []
        try:
            for tasks in batches:
                start = time.perf_counter()
                trainer.step(tasks)
                seconds.append(time.perf_counter() - start)
        except torchopt.errors.CompilerError:
            found[execute] = "needs a C++ compiler"
        else:
            found[execute] = {"ms": 1e3 * min(seconds), "first_call_s": seconds[0]}
    return found


def plot(curves: dict[str, list[tuple[int, float]]], scratch: float, path: Path) -> None:
    """Write the learning curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for label, curve in curves.items():
        axes.plot(*zip(*curve), marker="o", markersize=3, label=f"{label}, adapted")
    axes.axhline(scratch, color="grey", linestyle="--", label="from scratch, tuned")
    axes.axhline(1 / NUM_DIGITS, color="grey", linestyle=":", label="before adaptation (chance)")
    axes.set(
        xlabel="meta-step",
        ylabel="accuracy on meta-test tasks",
        title="10-way 1-shot codes of digits",
        ylim=(0, 1),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def run(config: Config, out: Path) -> dict[str, Any]:
    """Run the whole comparison and return the results."""
    started = time.perf_counter()
    learner = Learner(config.width)
    test_tasks = TaskSampler("test", config.seed + 5).draw(config.test_tasks, config.queries)
    methods: dict[str, Any] = {}
    curves = {}
    for label, first_order in (("MAML", False), ("first-order MAML", True)):
        trainer = MetaTrainer(learner, config, first_order=first_order, execute="trace")
        curves[label], seconds = train(trainer, label, test_tasks)
        before = mean_and_half_width(trainer.test_accuracy(test_tasks, 0))
        after = mean_and_half_width(trainer.test_accuracy(test_tasks, config.inner_steps))
        methods[label] = {
            "required_margin": 0.0 if first_order else 0.15,
            "before": before,
            "after": after,
            "meta_step_ms": 1e3 * seconds,
            "curve": curves[label],
        }
    setting = tune_control(learner, config)
    scratch = mean_and_half_width(scratch_accuracy(learner, config, test_tasks, setting))
    out.mkdir(parents=True, exist_ok=True)
    plot(curves, scratch[0], out / "maml_digits.png")
    results = {
        "config": asdict(config),
        "methods": methods,
        "step_times": step_times(learner, config),
        "scratch": {
            "after": scratch,
            "optimizer": setting[0],
            "lr": setting[1],
            "steps": setting[2],
        },
        "seconds": time.perf_counter() - started,
        "torch": torch.__version__,
        "torchopt": torchopt.__version__,
        "threads": torch.get_num_threads(),
    }
    (out / "maml_digits.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def percent(mean_and_half: tuple[float, float]) -> str:
    """Return an accuracy with its interval."""
    return f"{100 * mean_and_half[0]:5.1f} ± {100 * mean_and_half[1]:.1f} %"


def timed(execute: str, found: Any) -> str:
    """Return the time of a meta-step in words."""
    name = {"eager": "eager", "trace": "traced", "compile": "compiled"}[execute]
    if isinstance(found, str):
        return f"{name}: {found}"
    return f"{name} {found['ms']:.1f} ms (the first {found['first_call_s']:.1f} s)"


def report(results: dict[str, Any], out: Path) -> bool:
    """Print the table and return whether meta-learning worked.

    It did if every method is 40 points above its unadapted start, MAML is 15 points above the
    control, and the first-order variant, which learns more slowly, is above the control.
    """
    config, scratch = results["config"], results["scratch"]
    print(
        f"\n10-way 1-shot codes of digits; accuracy on {config['test_tasks']} meta-test tasks "
        "(unseen images, unseen codes), mean and 95 % interval over tasks"
    )
    print(f"{'':24}{'unadapted':>16}{'adapted':>16}{'ms/meta-step':>14}")
    for label, row in results["methods"].items():
        print(
            f"{label:24}{percent(row['before']):>16}{percent(row['after']):>16}"
            f"{row['meta_step_ms']:14.1f}"
        )
    print(f"{'from scratch, tuned':24}{'':>16}{percent(scratch['after']):>16}")
    print(
        f"adaptation: {config['inner_steps']} steps of SGD({config['inner_lr']}); from scratch: "
        f"{scratch['steps']} steps of {scratch['optimizer']}({scratch['lr']})"
    )
    print(f"a meta-step of MAML: {', '.join(map(timed, *zip(*results['step_times'].items())))}")
    learned = True
    for label, row in results["methods"].items():
        over_scratch = row["after"][0] - scratch["after"][0]
        over_start = row["after"][0] - row["before"][0]
        learned &= over_scratch > row["required_margin"] and over_start > 0.4
        print(
            f"{label}: {100 * over_start:+.1f} points over its unadapted start, "
            f"{100 * over_scratch:+.1f} points over training from scratch"
        )
    print(
        f"{results['seconds']:.0f} s; wrote {out / 'maml_digits.png'} and "
        f"{out / 'maml_digits.json'}"
    )
    return learned


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when it did not learn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="below a minute")
    size.add_argument("--smoke", action="store_true", help="a few seconds; too short to learn")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="where to write (default: out)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    preset = "smoke" if options.smoke else "quick" if options.quick else "full"
    threads = torch.get_num_threads()
    # The tensors are small: a second thread saves nothing, and on a busy machine waiting for it
    # takes ten times as long.
    torch.set_num_threads(1)
    try:
        results = run(replace(PRESETS[preset], seed=options.seed), options.out)
    finally:
        torch.set_num_threads(threads)
    learned = report(results, options.out)
    if options.smoke:
        print("smoke run: too short to learn, not judged")
        return 0
    print(
        "learned" if learned else "FAILED TO LEARN: expected both methods far above both controls"
    )
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
