# SPDX-License-Identifier: Apache-2.0
"""The published torchopt 0.7.3, written for the published optree, runs on this optree.

The tests run where that wheel is installed; ``nox -s clients`` installs it in a separate
environment.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

import optree

PUBLISHED = "0.7.3"


def _installed_torchopt() -> str:
    try:
        return importlib.metadata.version("torchopt")
    except importlib.metadata.PackageNotFoundError:
        return "none"


if _installed_torchopt() != PUBLISHED:
    pytest.skip(
        f"needs torchopt {PUBLISHED}, found {_installed_torchopt()}: nox -s clients",
        allow_module_level=True,
    )

import torch  # noqa: E402

import torchopt  # noqa: E402

LR, MOMENTUM, STEPS = 0.1, 0.9, 3


@pytest.fixture
def data() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return x, x.sum(dim=1, keepdim=True).square()


def linear(seed: int) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 1, dtype=torch.float64)


def test_torchopt_uses_this_optree() -> None:
    assert torchopt.__version__ == PUBLISHED
    assert hasattr(optree, "GLOBAL_NAMESPACE"), "expected this optree, not the published one"
    assert torchopt.pytree.tree_map is optree.tree_map


def test_pytree_module_has_every_public_name() -> None:
    assert set(optree.__all__) <= set(vars(torchopt.pytree))


def test_gradient_through_steps_of_meta_sgd(data: tuple[Any, Any]) -> None:
    x, y = data

    def loss_of(prediction: Any, scale: Any) -> Any:
        return (scale * (prediction - y).square()).mean()

    net = linear(1)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torchopt.MetaSGD(net, lr=LR, momentum=MOMENTUM)
    for _ in range(STEPS):
        optimizer.step(loss_of(net(x), scale))
    (gradient,) = torch.autograd.grad((net(x) - y).square().mean(), scale)

    # The same steps in plain PyTorch: v <- momentum v + g, w <- w - lr v.
    reference = linear(1)
    weights = [parameter for _, parameter in sorted(reference.named_parameters())]
    velocities = [torch.zeros_like(weight) for weight in weights]
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for _ in range(STEPS):
        bias, weight = weights
        loss = loss_of(x @ weight.T + bias, scale)
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        velocities = [MOMENTUM * v + slope for v, slope in zip(velocities, slopes)]
        weights = [w - LR * v for w, v in zip(weights, velocities)]
    bias, weight = weights
    (expected,) = torch.autograd.grad((x @ weight.T + bias - y).square().mean(), scale)
    assert abs(expected.item()) > 1e-3
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_functional_adam_equals_the_one_of_torch(data: tuple[Any, Any]) -> None:
    x, y = data
    params = {
        "layers": [
            torch.full((3, 2), 0.1, dtype=torch.float64, requires_grad=True),
            (torch.full((2, 1), -0.3, dtype=torch.float64, requires_grad=True), None),
        ],
    }

    def loss_of(tree: Any) -> Any:
        first, (second, _) = tree["layers"]
        return ((x @ first).tanh() @ second - y).square().mean()

    leaves = [leaf.detach().clone().requires_grad_() for leaf in optree.tree_leaves(params)]
    spec = optree.tree_structure(params)
    reference = torch.optim.Adam(leaves, lr=0.01)
    adam = torchopt.adam(lr=0.01)
    state = adam.init(params)
    for _ in range(STEPS):
        slopes = torch.autograd.grad(loss_of(params), optree.tree_leaves(params))
        updates, state = adam.update(optree.tree_unflatten(spec, slopes), state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        params = optree.tree_map(lambda p: p.detach().requires_grad_(), params)

        reference.zero_grad()
        loss_of(optree.tree_unflatten(spec, leaves)).backward()
        reference.step()
    assert optree.tree_structure(params) == spec
    for ours, theirs in zip(optree.tree_leaves(params), leaves):
        # torchopt 0.7.3 computes the bias correction in float32, whose epsilon is 1.2e-7. The
        # STEPS updates of 0.01 differ relatively by a few times 1e-7, for parameters above 0.1.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_snapshots_of_a_meta_optimizer(data: tuple[Any, Any]) -> None:
    x, y = data
    net = linear(2)
    optimizer = torchopt.MetaAdam(net, lr=LR)
    net_before = torchopt.extract_state_dict(net, by="copy", enable_visual=False)
    optimizer_before = torchopt.extract_state_dict(optimizer, by="copy")
    weight = net.weight.detach().clone()

    optimizer.step((net(x) - y).square().mean())
    assert not torch.equal(net.weight, weight)
    torchopt.recover_state_dict(net, net_before)
    torchopt.recover_state_dict(optimizer, optimizer_before)
    assert torch.equal(net.weight, weight)
