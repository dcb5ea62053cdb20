# SPDX-License-Identifier: Apache-2.0
"""The iMAML example: smoke run, and its meta-gradient against dense linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, hessian


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("imaml_digits")


def test_smoke_run_writes_one_table(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert list(results["methods"]) == [
        "MAML, 3 steps",
        "MAML, 8 steps",
        "iMAML, 8 steps",
        "iMAML as a module, 8 steps",
    ]
    for row in results["methods"].values():
        assert row["peak_mib_long"] >= row["peak_mib"] > 0.1
        assert 0 <= row["accuracy"][0] <= 1


def small_tasks(example: ModuleType) -> Any:
    drawn = example.TaskSampler("train", 1).draw(2, 2)
    images = (drawn.support.double()[..., ::8], drawn.query.double()[..., ::8])
    return example.Tasks(images[0], drawn.support_labels, images[1], drawn.query_labels)


class Linear:
    """A learner whose loss is convex: the proximal problem has one solution."""

    def __init__(self) -> None:
        self.net = torch.nn.Linear(8, 10).double()

    def loss(self, params: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = functional_call(self.net, params, (images,))
        return torch.nn.functional.cross_entropy(logits, labels)


def test_meta_gradient_is_that_of_the_proximal_problem(example: ModuleType) -> None:
    config = replace(example.Config(), lam=0.3, inner_lr=0.5, cg_steps=90)
    learner = Linear()
    tasks = small_tasks(example)
    adapt = example.implicit(learner, config, 150)
    theta = {k: 0.1 * torch.randn_like(p) for k, p in learner.net.named_parameters()}
    images, labels = tasks.support[0], tasks.support_labels[0]
    query = (tasks.query[0], tasks.query_labels[0])
    found = grad(lambda theta: learner.loss(adapt(theta, images, labels), *query))(theta)

    # (I + H / lam)^-1 times the gradient of the query loss at the adapted parameters.
    phi = {k: x.detach() for k, x in adapt(theta, images, labels).items()}
    H = hessian(learner.loss)(phi, images, labels)
    names = list(phi)
    sizes = [phi[k].numel() for k in names]
    dense = torch.cat(
        [torch.cat([H[a][b].reshape(phi[a].numel(), -1) for b in names], 1) for a in names]
    )
    outer = grad(learner.loss)(phi, *query)
    right = torch.cat([outer[k].reshape(-1) for k in names])
    expected = torch.linalg.solve(torch.eye(len(right)).double() + dense / config.lam, right)
    for name, part in zip(names, expected.split(sizes)):
        torch.testing.assert_close(found[name].reshape(-1), part, rtol=1e-7, atol=1e-9)


def test_memory_does_not_grow_with_the_inner_steps(example: ModuleType) -> None:
    learner = example.Learner(16)
    tasks = example.TaskSampler("train", 1).draw(2, 1)
    peaks = {}
    for steps in (5, 40):
        config = replace(example.PRESETS["smoke"], width=16)
        for name, adapt in (
            ("implicit", example.implicit(learner, config, steps)),
            ("explicit", example.explicit(learner, 0.4, steps)),
        ):
            trainer = example.MetaTrainer(learner, adapt, config)
            peaks[name, steps] = example.peak_mib(trainer, tasks)
    assert peaks["implicit", 40] < 1.05 * peaks["implicit", 5]
    assert peaks["explicit", 40] > 3 * peaks["explicit", 5]


def test_the_module_has_the_meta_gradient_of_the_functions(example: ModuleType) -> None:
    config = replace(example.PRESETS["smoke"], width=16)
    learner = example.Learner(16)
    learner.net.double()
    tasks = example.TaskSampler("train", 1).draw(3, 2)
    tasks = example.Tasks(*(x.double() if x.is_floating_point() else x for x in tasks.tensors()))
    functions = example.MetaTrainer(learner, example.implicit(learner, config, 8), config)
    module = example.ModuleTrainer(learner, config, 8)
    slopes = []
    for trainer in (functions, module):
        loss, accuracy = trainer.query(trainer.params, tasks)
        assert loss.shape == accuracy.shape == (3,)
        slopes.append(torch.autograd.grad(loss.mean(), list(trainer.params.values())))
    for found, expected in zip(*slopes):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
