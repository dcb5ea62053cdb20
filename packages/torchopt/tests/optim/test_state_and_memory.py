# SPDX-License-Identifier: Apache-2.0
"""How far graphs reach, what memory they hold, and how states are named, saved and pickled."""

from __future__ import annotations

import gc
import io
import pickle
from typing import Any

import pytest
import torch
from optimizers import ROWS
from torch import Tensor, nn

import torchopt
from torchopt.optim import TorchOptimizer
from torchopt.optim.as_torch import AsTorch


class Quadratic(nn.Module):
    """Loss 1/2 h x^2, whose SGD step is the multiplication with 1 - lr h."""

    def __init__(self, h: float = 0.7) -> None:
        super().__init__()
        self.h = h
        self.x = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def loss(self) -> Tensor:
        return 0.5 * self.h * self.x**2


def live_tensors() -> int:
    gc.collect()
    # By type: asking an object for its __class__ makes some of torch's own warn.
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_first_order_treats_gradients_as_constants() -> None:
    net = Quadratic()
    start, lr = net.x, torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    optimizer = torchopt.MetaSGD(net, lr=lr, first_order=True)
    for _ in range(3):
        optimizer.step(net.loss())
    d_start, d_lr = torch.autograd.grad(net.x, (start, lr))
    assert d_start.item() == 1.0  # exactly differentiated it is (1 - 0.07)^3
    factor = 1 - 0.1 * 0.7
    assert d_lr.item() == pytest.approx(-0.7 * 2.0 * (1 + factor + factor**2), rel=1e-14)


def test_detach_every_bounds_how_far_a_meta_gradient_reaches() -> None:
    net = Quadratic()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = net.x
    optimizer = torchopt.MetaSGD(net, lr=lr, detach_every=3)
    for _ in range(3):
        optimizer.step(net.loss())
    cut = net.x
    assert cut.is_leaf
    assert cut.requires_grad
    for _ in range(2):
        optimizer.step(net.loss())
    d_cut, d_lr = torch.autograd.grad(net.x, (cut, lr), retain_graph=True)
    factor = 1 - 0.1 * 0.7
    assert d_cut.item() == pytest.approx(factor**2, rel=1e-14)
    x3 = 2.0 * factor**3
    assert d_lr.item() == pytest.approx(-0.7 * x3 * 2 * factor, rel=1e-14)
    assert torch.autograd.grad(net.x, start, allow_unused=True) == (None,)
    with pytest.raises(ValueError, match="detach_every: expected a positive integer or None"):
        torchopt.MetaSGD(net, lr=0.1, detach_every=0)


@pytest.mark.parametrize(("mode", "name"), [("no_grad", "adamax"), ("truncated", "adam")])
def test_memory_is_flat_over_a_thousand_steps(mode: str, name: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    optimizer = ROWS[name].meta(net, lr=1e-3)
    optimizer.detach_every = 4 if mode == "truncated" else None
    counts = []
    for step in range(1000):
        loss = net(x).pow(3).mean()
        with torch.set_grad_enabled(mode != "no_grad"):
            optimizer.step(loss)
        del loss
        if step in (3, 499, 999):
            counts.append(live_tensors())
    # Never more; fewer where leftovers of other tests went in the meantime.
    assert counts[0] >= counts[1] >= counts[2]
    # Step 1000 ends a window: no graph is left that could hold tensors Python does not see.
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())
    state = torchopt.pytree.tree_leaves(optimizer.state_dict())
    assert all(x.grad_fn is None for x in state if isinstance(x, Tensor))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", [*sorted(ROWS), "lookahead", "sam"])
def test_functional_steps_under_no_grad_leave_no_graph(name: str, inplace: bool) -> None:
    wrapped = {"lookahead": torchopt.transform.lookahead, "sam": torchopt.transform.sam}
    row = ROWS.get(name, ROWS["sgd"])
    optimizer = wrapped.get(name, lambda inner: inner)(row.functional(**row.settings[-1]))
    p = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        state = optimizer.init((p,))
    for _ in range(3):
        grads = torch.autograd.grad((p**3).sum(), (p,))
        with torch.no_grad():
            updates, state = optimizer.update(grads, state, params=(p,), inplace=inplace)
            torchopt.apply_updates((p,), updates)
    leaves = torchopt.pytree.tree_leaves((updates, state))
    assert not any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
    assert p.is_leaf


def test_steps_without_a_graph_have_the_values_of_steps_with_one() -> None:
    results = []
    for grad in (True, False):
        torch.manual_seed(0)
        net = nn.Linear(3, 1).double()
        optimizer = torchopt.MetaAdam(net, lr=0.1)
        func = torchopt.FuncOptimizer(torchopt.adam(0.1))
        params: Any = dict(nn.Linear(3, 1).double().named_parameters())
        for _ in range(5):
            loss = (net(torch.ones(1, 3, dtype=torch.float64)) - 1).pow(2).sum()
            func_loss = (params["weight"].sum() + params["bias"] - 1).pow(2).sum()
            with torch.set_grad_enabled(grad):
                optimizer.step(loss)
                params = func.step(func_loss, params)
        assert net.weight.is_leaf == params["weight"].is_leaf == (not grad)
        results.append([net.weight.detach(), params["weight"].detach(), params["bias"].detach()])
    for with_graph, without in zip(*results):
        assert torch.equal(with_graph, without)


def test_running_statistics_come_back_and_do_not_join_the_graph() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    x = torch.randn(8, 2, dtype=torch.float64)
    start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    for _ in range(3):
        optimizer.step(net(x).pow(3).sum())
    assert net[1].num_batches_tracked.item() == 3
    assert net[1].running_mean.grad_fn is None
    assert torch.autograd.grad(net(x).pow(3).sum(), start.params[0]["weight"])[0].abs().sum() > 0
    torchopt.recover_state_dict(net, start)
    assert net[1].num_batches_tracked.item() == 0
    assert net[1].running_mean.abs().sum().item() == 0.0


def test_groups_have_their_own_hyper_parameters() -> None:
    first, second = Quadratic(), Quadratic()
    meta = torchopt.MetaSGD(first, lr=0.1)
    meta.add_param_group(second, impl=torchopt.sgd(0.5, momentum=0.9))
    starts = (first.x, second.x)
    meta.step(first.loss() + second.loss())
    grads = torch.autograd.grad(first.x + second.x, starts)
    assert [g.item() for g in grads] == pytest.approx([1 - 0.07, 1 - 0.35], rel=1e-14)
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    classic = torchopt.SGD([a], lr=0.1)
    classic.add_param_group([b], impl=torchopt.sgd(0.5))
    (a.sum() + b.sum()).backward()
    classic.step()
    assert a.item() == pytest.approx(0.9)
    assert b.item() == pytest.approx(0.5)


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def trained(make: Any, steps: int = 3) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    optimizer = make(net)
    for _ in range(steps):
        with torch.no_grad():
            x = torch.ones(1, 2, dtype=torch.float64)
        loss = net(x).pow(2).sum()
        with torch.no_grad():
            optimizer.step(loss)
    return net, optimizer


@pytest.mark.parametrize("name", sorted(ROWS))
def test_named_states_survive_a_weights_only_file(name: str) -> None:
    row = ROWS[name]
    settings = row.settings[-1]
    net, optimizer = trained(lambda module: row.meta(module, **settings))
    saved = saved_and_loaded(optimizer.named_state_dict())
    assert saved["version"] == 1
    assert saved["groups"][0]["params"] == ["0.bias", "0.weight", "2.bias", "2.weight"]
    twin_net, twin = trained(lambda module: row.meta(module, **settings), steps=0)
    twin_net.load_state_dict(net.state_dict())
    twin.load_named_state_dict(saved)
    for module, stepper in ((net, optimizer), (twin_net, twin)):
        stepper.step(module(torch.ones(1, 2, dtype=torch.float64)).pow(2).sum())
    for p, q in zip(net.parameters(), twin_net.parameters()):
        assert torch.equal(p, q)


def test_named_states_name_transformations_and_parameters() -> None:
    params = {"w": torch.ones(2, requires_grad=True), "b": [torch.ones(1, requires_grad=True)]}
    optimizer = torchopt.Adam(params, lr=0.1)
    (params["w"].sum() + params["b"][0].sum()).backward()
    optimizer.step()
    (group,) = optimizer.named_state_dict()["groups"]
    assert sorted(group["params"]) == ["b.0", "w"]
    assert sorted(group["state"]) == [
        f"ScaleByAdamState.{field}.{name}"
        for field in ("count", "mu", "nu")
        for name in ("b.0", "w")
    ]
    func = torchopt.FuncOptimizer(torchopt.adam(0.1))
    func.load_named_state_dict(optimizer.named_state_dict(), params)
    assert torch.equal(func.optim_state[0].mu[0], optimizer.state_dict()[0][0].mu[0])


def test_named_states_load_across_stages_without_a_state() -> None:
    _, plain = trained(lambda net: torchopt.MetaAdam(net, lr=0.1))
    _, decayed = trained(lambda net: torchopt.MetaAdam(net, lr=0.1, weight_decay=0.1), steps=0)
    decayed.load_named_state_dict(plain.named_state_dict())
    assert torch.equal(decayed.state_groups[0][1].mu[0], plain.state_groups[0][0].mu[0])


def test_bad_named_states_are_refused_with_the_names() -> None:
    _, adam = trained(lambda net: torchopt.MetaAdam(net, lr=0.1))
    _, sgd = trained(lambda net: torchopt.MetaSGD(net, lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match=r"missing \[TraceState.trace.0.bias.*left over \[ScaleBy"):
        sgd.load_named_state_dict(adam.named_state_dict())
    with pytest.raises(ValueError, match="states in tuples are for load_state_dict"):
        adam.load_named_state_dict(adam.state_dict())
    other = torchopt.MetaAdam(nn.Linear(2, 3), lr=0.1)
    with pytest.raises(ValueError, match=r"for other parameters: missing \[bias, weight\]"):
        other.load_named_state_dict(adam.named_state_dict())
    newer = {**adam.named_state_dict(), "version": 99}
    with pytest.raises(ValueError, match="expected version 1, got 99"):
        adam.load_named_state_dict(newer)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_optimizers_are_pickled_with_their_state(name: str) -> None:
    row = ROWS[name]
    net, optimizer = trained(lambda module: row.meta(module, **row.settings[-1]))
    twin_net, twin = pickle.loads(pickle.dumps((net, optimizer)))
    for module, stepper in ((net, optimizer), (twin_net, twin)):
        stepper.step(module(torch.ones(1, 2, dtype=torch.float64)).pow(2).sum())
    for p, q in zip(net.parameters(), twin_net.parameters()):
        assert torch.equal(p, q)
    func = torchopt.FuncOptimizer(row.functional(**row.settings[-1]))
    assert pickle.loads(pickle.dumps(func)).optim_state == func.optim_state


def test_adapter_equals_torch_with_scheduler_groups_and_hooks() -> None:
    def run(make: Any) -> tuple[list[Tensor], list[str]]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2).double()
        groups = [{"params": [net.weight]}, {"params": [net.bias], "lr": 0.3, "weight_decay": 0.1}]
        optimizer = make(groups)
        assert isinstance(optimizer, torch.optim.Optimizer)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[0.1, 0.3], total_steps=12, cycle_momentum=False
        )
        called: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
        optimizer.register_step_post_hook(lambda *_: called.append("post"))
        for step in range(10):
            optimizer.zero_grad()
            net(torch.ones(1, 3, dtype=torch.float64)).pow(2).sum().backward()
            optimizer.step()
            scheduler.step()
            if step == 4:
                saved = saved_and_loaded(optimizer.state_dict())
                optimizer.load_state_dict(saved)
            if step == 6:
                optimizer.param_groups[0]["weight_decay"] = 0.2
        return [p.detach() for p in net.parameters()], called

    got, called = run(
        lambda groups: TorchOptimizer(groups, torchopt.adam, lr=0.1, weight_decay=0.0)
    )
    expected, _ = run(lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.0))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert called == ["pre", "post"] * 10


def test_adapter_works_with_the_gradient_scaler_and_closures() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = TorchOptimizer([w], torchopt.sgd, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(w.sum()).backward()
    assert w.grad is not None
    assert w.grad.tolist() == [8.0, 8.0]
    scaler.step(optimizer)
    scaler.update()
    assert w.tolist() == [0.5, 0.5]
    optimizer.zero_grad()
    scaler.scale(w.sum() * float("inf")).backward()
    scaler.step(optimizer)  # skipped: the gradients are not finite
    assert w.tolist() == [0.5, 0.5]
    assert optimizer.step(lambda: torch.tensor(3.0)).item() == 3.0
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.param_groups[0]["lr"] == 0.5
    with pytest.raises(TypeError, match="unexpected keyword argument 'momntum'"):
        TorchOptimizer([w], torchopt.sgd, lr=0.1, momntum=0.9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'betas'"):
        TorchOptimizer([{"params": [w], "betas": (0.9, 0.9)}], torchopt.sgd, lr=0.1)


@pytest.mark.parametrize("field", ["mu", "nu"])
def test_a_parameter_whose_path_begins_like_a_field_has_its_own_state_for_torch(field: str) -> None:
    params: Any = {"w": torch.ones(2, requires_grad=True)}
    params[field] = {"w": torch.ones(3, requires_grad=True)}
    first, second = torchopt.Adam(params, lr=0.1), torchopt.Adam(params, lr=0.1)
    (params["w"].sum() + 2 * params[field]["w"].sum()).backward()
    first.step()
    shown = AsTorch(first)
    for p in (params["w"], params[field]["w"]):
        assert shown.state[p].keys() == {
            f"ScaleByAdamState.{name}" for name in ("mu", "nu", "count")
        }
        assert shown.state[p]["ScaleByAdamState.mu"].shape == p.shape
    AsTorch(second).load_state_dict(shown.state_dict())
    want, got = (o.named_state_dict()["groups"][0]["state"] for o in (first, second))
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())
