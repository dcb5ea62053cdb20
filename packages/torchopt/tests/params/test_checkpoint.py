# SPDX-License-Identifier: Apache-2.0
"""Modules that recompute activations behave, with other tensors, as if they did not."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpointed import DOUBLE, MODULES, Blocks, batch, loss_of, make, run
from optimizers import ROWS, Row
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchopt
from torchopt import pytree
from torchopt.errors import NotDifferentiableError
from torchopt.nn import reparametrize
from torchopt.params import functional_call

# "plain": checkpoints with use_reentrant=False
MODES = (None, "plain")


def other_weights(net: nn.Module, seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=DOUBLE).requires_grad_()
        for name, p in net.named_parameters()
    }


def agree(results: list[Any]) -> None:
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    assert max(x.abs().max() for x in results[0]) > 1e-4


@pytest.mark.parametrize("name", sorted(MODULES))
def test_functional_calls_are_twice_differentiable_after_the_weights_are_gone(name: str) -> None:
    results = []
    x, y = batch()
    for mode in MODES:
        net = make(name, mode)
        before = {n: b.clone() for n, b in net.named_buffers()}
        weights = other_weights(net)
        torch.manual_seed(0)
        first = loss_of(functional_call(net, weights, (x,)), y)
        # Another call, and other values in the module, before the derivative.
        second = loss_of(functional_call(net, other_weights(net, 8), (x,)), y)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(-3)
        after = {n: b.clone() for n, b in net.named_buffers()}
        grads = torch.autograd.grad(first, list(weights.values()), create_graph=True)
        results.append(list(grads))
        if name != "selective":  # torch recomputes it once
            scalar = sum((g.sin().sum() for g in grads), second * 0)
            results[-1] += torch.autograd.grad(scalar, list(weights.values()))
        assert all(torch.equal(b, after[n]) for n, b in net.named_buffers())
        assert all(not torch.equal(after[n], b) for n, b in before.items())
    agree(results)


def test_two_checkpoints_of_one_layer_with_other_weights_in_one_graph() -> None:
    results = []
    x, y = batch()
    for mode in MODES:
        net = make("blocks", mode)
        one, two = other_weights(net, 1), other_weights(net, 2)
        out = functional_call(net, one, (x,)) * functional_call(net, two, (x,)) + net(x)
        leaves = [*one.values(), *two.values(), *net.parameters()]
        results.append(torch.autograd.grad(loss_of(out, y), leaves))
    agree(results)


class Inside(Blocks):
    """Calls itself with other weights, inside and around a checkpoint."""

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth == 0:
            return super().forward(x)

        def other(y: Tensor) -> Tensor:
            weights = {"a.weight": self.a.weight.sin(), "b.bias": self.b.bias * 2}
            inner = functional_call(self, weights, (y, depth - 1))
            return torch.tanh(inner) + self.b(torch.tanh(self.a(y)))

        return run(self.mode, other, x)


@pytest.mark.parametrize("called", [False, True])
def test_a_module_that_calls_itself_with_other_weights(called: bool) -> None:
    results = []
    x, y = batch()
    for mode in MODES:
        torch.manual_seed(0)
        net = Inside(mode).double()
        weights = other_weights(net)
        out = functional_call(net, weights, (x,)) if called else net(x)
        leaves = list(weights.values()) if called else list(net.parameters())
        grads = torch.autograd.grad(loss_of(out, y), leaves, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.sum() for g in grads), leaves)])
    agree(results)


class Fails(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        raise ValueError("refused")


def test_a_failed_call_leaves_no_trace() -> None:
    torch.manual_seed(0)
    net = Fails().double()
    own = dict(net.named_parameters())
    x, _ = batch()
    for _ in range(2):
        with pytest.raises(ValueError, match="^refused$"):
            functional_call(net, other_weights(net), (x,))
        with (
            pytest.raises(ValueError, match="^refused$"),
            reparametrize(net, other_weights(net)),
        ):
            net(x)
    assert all(p is own[n] for n, p in net.named_parameters())
    x.requires_grad_()
    out = checkpoint(net.a, x, use_reentrant=False).sin().sum()
    expected = torch.autograd.grad(net.a(x).sin().sum(), [x, *net.a.parameters()])
    assert all(
        torch.equal(g, e)
        for g, e in zip(torch.autograd.grad(out, [x, *net.a.parameters()]), expected)
    )


def test_calls_in_threads_do_not_see_each_other() -> None:
    net = make("nested", "plain")
    x, y = batch()
    barrier = threading.Barrier(3, timeout=60)
    found: dict[int, list[Tensor]] = {}

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            barrier.wait()
            out = self.net(x)
            barrier.wait()
            return out

    waits = Waits()

    def work(seed: int) -> None:
        weights = other_weights(waits, seed)
        for _ in range(3):
            loss = loss_of(functional_call(waits, weights, (x,)), y)
            barrier.wait()
            found[seed] = list(torch.autograd.grad(loss, list(weights.values())))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    own = list(net.parameters())
    for _ in range(9):
        barrier.wait()
        assert all(p is q for p, q in zip(net.parameters(), own))
    for thread in threads:
        thread.join()
    plain = make("nested", None)
    for seed in (1, 2):
        weights = {n.removeprefix("net."): w for n, w in other_weights(waits, seed).items()}
        loss = loss_of(functional_call(plain, weights, (x,)), y)
        torch.testing.assert_close(
            found[seed], list(torch.autograd.grad(loss, list(weights.values())))
        )


class Streams(Blocks):
    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for _ in range(3):
            x = torch.tanh(self.b(torch.tanh(self.a(x)))).repeat(1, 2)[:, :3]
            factor = yield x
            x = x * (1 if factor is None else factor)
        return "end"


def test_a_module_that_yields_keeps_the_weights_of_its_call() -> None:
    torch.manual_seed(0)
    net = Streams().double()
    x, _ = batch()
    one, two = other_weights(net, 1), other_weights(net, 2)
    expected = []
    for weights in (one, two):
        with reparametrize(net, weights):
            expected.append(list(net(x)))
    first, second = (functional_call(net, weights, (x,)) for weights in (one, two))
    for index, (a, b) in enumerate(zip(first, second)):
        assert torch.equal(a, expected[0][index])
        assert torch.equal(b, expected[1][index])
    steps = functional_call(net, one, (x,))
    next(steps)
    with reparametrize(net, one):
        scaled = net(x)
        next(scaled)
        assert torch.equal(steps.send(2.0), scaled.send(2.0))
    steps.close()
    assert all(p.grad_fn is None for p in net.parameters())


def test_blocks_left_in_another_order_leave_nothing() -> None:
    net = make("blocks", None)
    own = dict(net.named_parameters())
    first, second = (
        reparametrize(net, other_weights(net, 1)),
        reparametrize(net, other_weights(net)),
    )
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert net.a.weight is not own["a.weight"]
    second.__exit__(None, None, None)
    assert all(p is own[n] for n, p in net.named_parameters())


@pytest.mark.parametrize("name", ["blocks", "whole", "direct", "nested", "sequential", "counted"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpoints_are_refused_where_a_gradient_is_lost(name: str, graph: bool) -> None:
    net = make(name, "reentrant")
    weights = other_weights(net)
    x, y = batch()
    x.requires_grad_(graph)
    with pytest.raises(NotDifferentiableError, match="use_reentrant=True.*use_reentrant=False"):
        functional_call(net, weights, (x,))
    with torch.no_grad():
        got = functional_call(net, weights, (x,))
    assert torch.equal(got, functional_call(make(name, None), weights, (x,)))
    x.requires_grad_()
    loss_of(net(x), y).backward()  # outside a call nothing is refused
    plain = make(name, None)
    loss_of(plain(x), y).backward()
    torch.testing.assert_close(
        [p.grad for p in net.parameters()], [p.grad for p in plain.parameters()]
    )


def test_a_write_into_a_recomputed_tensor_is_noticed() -> None:
    net = make("blocks", "plain")
    weights = other_weights(net)
    x, y = batch()
    loss = loss_of(functional_call(net, weights, (x,)), y)
    with torch.no_grad():
        weights["a.weight"].mul_(2)
    with pytest.raises(NotDifferentiableError, match="Linear's 'weight' was written in place"):
        loss.backward()


def test_attributes_that_are_tensors() -> None:
    net = Blocks().double()
    net.scale = torch.full((), 2.0, dtype=DOUBLE)
    net.forward = lambda x: run(net.mode, lambda y: net.a(y) * net.scale, x)  # type: ignore[method-assign]
    x, _ = batch()
    got = functional_call(net, {"scale": torch.full((), 6.0, dtype=DOUBLE)}, (x,))
    torch.testing.assert_close(got, 3 * net(x))
    assert net.scale.item() == 2
    net.mode = "plain"
    with pytest.raises(NotDifferentiableError, match=r"\['scale'\] are neither.*register them"):
        functional_call(net, {"scale": torch.ones(()), **other_weights(net)}, (x,))
    assert net.scale.item() == 2
    assert torch.autograd.grad(net(x).sum(), net.a.weight)[0].shape == (4, 3)


def test_buffers_that_the_module_replaces_are_returned() -> None:
    net = make("normalised", None)
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    x, _ = batch()
    functional_call(net, buffers, (x,))
    assert buffers["count"].item() == 1
    assert buffers["norm.num_batches_tracked"].item() == 1
    assert net.count.item() == 0


def test_names_that_cannot_be_replaced_are_refused() -> None:
    net = make("parametrized", None)
    x, _ = batch()
    with pytest.raises(KeyError, match=r"a.weight is computed.*parametrizations.weight.original"):
        functional_call(net, {"a.weight": torch.ones(4, 3)}, (x,))
    with pytest.raises(KeyError, match="c.weight: Parametrized has no sub-module 'c'"):
        functional_call(net, {"c.weight": torch.ones(4, 3)}, (x,))
    with pytest.raises(TypeError, match="b.bias: expected a tensor, got float"):
        functional_call(net, {"b.bias": 1.0}, (x,))  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="cannot be exchanged; expected a module that is"):
        functional_call(torch.jit.script(nn.Linear(3, 2)), {"bias": torch.ones(2)}, (x.float(),))
    tied = make("tied", None)
    with pytest.raises(ValueError, match="are tied and got different tensors"):
        functional_call(tied, {"a.weight": torch.ones(3, 3), "b.weight": torch.ones(3, 3)}, (x,))


def test_watched_modules_are_copied_pickled_and_flattened_like_others() -> None:
    net = make("blocks", None)
    with reparametrize(net, other_weights(net)):
        inside = dict(net.a._parameters)
        assert {**net.a._parameters}["weight"] is inside["weight"] is net.a.weight
        assert net.a._parameters.get("weight") is net.a._parameters.copy()["weight"]
    assert inside["weight"] is not net.a.weight
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin.a._parameters) is dict
        assert torch.equal(twin.a.weight, net.a.weight)
    leaves, spec = pytree.tree_flatten(net.a._parameters)
    assert leaves[1] is net.a.weight
    assert pytree.tree_unflatten(spec, leaves) == dict(net.a._parameters)


# torch can differentiate selective checkpoints only once, and says so.
@pytest.mark.parametrize("name", sorted(set(MODULES) - {"selective"}))
def test_meta_optimizers_over_two_tasks_recovered_before_the_backward_pass(name: str) -> None:
    results, statistics = [], []
    x, y = batch()
    for mode in MODES:
        net = make(name, mode)
        start = list(net.parameters())
        torch.manual_seed(0)
        snapshot = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        total = torch.zeros((), dtype=DOUBLE)
        for target in (y, -y):
            inner = torchopt.MetaAdam(net, lr=0.1, eps=1e-2)
            for _ in range(2):
                inner.step(loss_of(net(x), target))
                total = total + loss_of(net(x), -target)
            torchopt.recover_state_dict(net, snapshot)
        results.append(torch.autograd.grad(total, start))
        statistics.append([b.clone() for b in net.buffers()])
    agree(results)
    torch.testing.assert_close(statistics[1], statistics[0])


@pytest.mark.parametrize("row", ROWS.values(), ids=sorted(ROWS))
def test_every_meta_and_functional_optimizer(row: Row) -> None:
    settings: dict[str, Any] = row.settings[-1]
    results = []
    x, y = batch()
    for mode in MODES:
        net = make("nested", mode)
        start = list(net.parameters())
        snapshot = torchopt.extract_state_dict(net, by="reference")
        inner = row.meta(net, **settings)
        for _ in range(2):
            inner.step(loss_of(net(x), y))
        total = loss_of(net(x), y)
        torchopt.recover_state_dict(net, snapshot)
        functional = torchopt.FuncOptimizer(row.functional(**settings))
        params: Any = dict(net.named_parameters())
        for _ in range(2):
            params = functional.step(loss_of(functional_call(net, params, (x,)), y), params)
        total = total + loss_of(functional_call(net, params, (x,)), -y)
        results.append(torch.autograd.grad(total, start))
    agree(results)


def test_an_inner_loop_that_is_recomputed_itself() -> None:
    results = []
    x, y = batch()
    for mode in MODES:
        net = make("nested", None)
        start = list(net.parameters())
        snapshot = torchopt.extract_state_dict(net, by="reference")

        def adapted(y: Tensor, net: nn.Module = net) -> Tensor:
            inner = torchopt.MetaAdam(net, lr=0.1, eps=1e-2)
            for _ in range(2):
                inner.step(loss_of(net(x), y))
            return loss_of(net(x), -y)

        losses = []
        for target in (y, -y):
            losses.append(run(mode, adapted, target))
            torchopt.recover_state_dict(net, snapshot)
        results.append(torch.autograd.grad(sum(losses), start))
        assert all(p is q for p, q in zip(net.parameters(), start))
    agree(results)


@pytest.mark.parametrize("name", ["blocks", "whole", "direct", "nested", "sequential", "tied"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_meta_optimizers_refuse_reentrant_checkpoints_in_the_first_step(
    name: str, graph: bool
) -> None:
    x, y = batch()
    net = make(name, "reentrant")
    inner = torchopt.MetaSGD(net, lr=0.1)
    own = list(net.parameters())
    with pytest.raises(NotDifferentiableError, match="use_reentrant=True.*use_reentrant=False"):
        inner.step(loss_of(net(x.clone().requires_grad_(graph)), y))
    assert all(p is q for p, q in zip(net.parameters(), own))
    # Training without the optimizer works before and after.
    loss_of(net(x.clone().requires_grad_()), y).backward()
    net.mode = None
    if graph:
        inner.step(loss_of(net(x), y))
        net.mode = "reentrant"
        with pytest.raises(NotDifferentiableError, match="fast weights"):
            net(x.clone().requires_grad_())
        with torch.no_grad():
            net(x)


def test_a_loss_from_before_the_optimizer_was_made() -> None:
    results = []
    x, y = batch()
    for mode in MODES:
        net = make("blocks", mode)
        start = list(net.parameters())
        loss = loss_of(net(x), y)
        torchopt.MetaSGD(net, lr=0.3).step(loss)
        results.append(torch.autograd.grad(loss_of(net(x), y), start))
    agree(results)


class Proximal(torchopt.nn.ImplicitMetaGradientModule):
    """Solved in closed form: halfway between its meta-parameters and the input."""

    def __init__(self, meta: nn.Module, mode: Any, inside: bool = False) -> None:
        super().__init__()
        self.meta = meta
        self.net = make("nested", mode)
        self.inside = inside

    def objective(self, shift: Tensor) -> Tensor:
        pairs = list(zip(self.net.parameters(), self.meta.parameters()))
        extra = self.net(batch()[0]).sum() * 0 if self.inside else 0
        near = sum(((p - q).square().sum() for p, q in pairs), torch.zeros((), dtype=DOUBLE))
        return near + sum((p - shift).square().sum() for p, _ in pairs) + extra

    def solve(self, shift: Tensor) -> Proximal:
        with torch.no_grad():
            for p, q in zip(self.net.parameters(), self.meta.parameters()):
                p.copy_((q + shift) / 2)
        return self


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_implicit_modules_solved_twice_before_the_backward_pass() -> None:
    results = []
    x, y = batch()
    for mode in MODES:
        meta = make("nested", None)
        module = Proximal(meta, mode)
        total = torch.zeros((), dtype=DOUBLE)
        for shift in (0.1, 0.7):
            total = total + loss_of(module.solve(torch.tensor(shift).double()).net(x), y)
        results.append(torch.autograd.grad(total, list(meta.parameters())))
    agree(results)
    with pytest.raises(NotDifferentiableError, match="inside a transform of torch.func"):
        Proximal(make("nested", None), "plain", inside=True).solve(torch.ones(()).double())
    reentrant = Proximal(make("nested", None), "reentrant").solve(torch.ones(()).double())
    with pytest.raises(NotDifferentiableError, match="use_reentrant=False"):
        reentrant.net(x.requires_grad_())


def test_values_loaded_into_a_solved_module_have_no_gradient() -> None:
    x, y = batch()
    meta = make("nested", None)
    module = Proximal(meta, None).solve(torch.ones(()).double())
    module.load_state_dict(Proximal(meta, None).state_dict())
    assert all(p.is_leaf for p in module.parameters())
    assert torch.equal(module.net(x), make("nested", None)(x))
    loss = loss_of(module.solve(torch.ones(()).double()).net(x), y)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, list(meta.parameters())))


class Estimated(torchopt.nn.ZeroOrderGradientModule, method="antithetic", vectorized=False):
    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.net = make("nested", mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sum()

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.randn(sample_shape, dtype=DOUBLE)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_zero_order_modules_evaluate_with_their_perturbations() -> None:
    results = []
    x, _ = batch()
    for mode in (None, "plain", "reentrant"):
        module = Estimated(mode)
        torch.manual_seed(0)
        loss = module(x.clone().requires_grad_())
        torch.manual_seed(1)
        results.append(torch.autograd.grad(loss, list(module.parameters())))
    agree(results[:2])
    agree(results[::2])
