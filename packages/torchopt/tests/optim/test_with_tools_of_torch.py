# SPDX-License-Identifier: Apache-2.0
"""The classes under tools that torch has for its own optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from optimizers import ROWS
from torch import Tensor, nn

import torchopt
from torchopt import transform
from torchopt.optim import TorchOptimizer
from torchopt.optim.param_group import ParamGroup
from torchopt.optimizers.learned import learned_lstm, learned_mlp, lstm_weights, mlp_weights

DOUBLE = torch.float64


def start(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (2,)]
    return [torch.randn(s, generator=generator, dtype=DOUBLE).requires_grad_() for s in shapes]


def loss_of(params: list[Tensor], step: int) -> Tensor:
    w, b = params
    x = torch.linspace(-1.0, 1.0 + step, 12, dtype=DOUBLE).reshape(4, 3)
    return torch.tanh(x @ w + b).square().mean()


def scaled_run(make: Any, bad: int | None, clip: bool) -> tuple[list[Tensor], float]:
    """Take six steps by a GradScaler, one of them with an infinite gradient."""
    params = start()
    optimizer = make(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(loss_of(params, step)).backward()
        if step == bad:
            assert params[0].grad is not None
            params[0].grad[0, 0] = float("inf")
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 0.1)
        scaler.step(optimizer)
        scaler.update()
    return params, scaler.get_scale()


def run_by_hand(make: Any, bad: int | None, clip: bool) -> list[Tensor]:
    params = start()
    optimizer = make(params)
    for step in range(6):
        if step == bad:
            continue
        optimizer.zero_grad()
        loss_of(params, step).backward()
        if clip:
            nn.utils.clip_grad_norm_(params, 0.1)
        optimizer.step()
    return params


@pytest.mark.parametrize("name", sorted(ROWS))
@pytest.mark.parametrize("bad", [None, 3])
def test_a_scaler_steps_with_unscaled_gradients_and_skips_infinite_ones(
    name: str, bad: int | None
) -> None:
    row = ROWS[name]
    for clip in (False, True):

        def make(params: list[Tensor]) -> Any:
            return row.classic(params, **row.settings[0])

        got, scale = scaled_run(make, bad, clip)
        # The scale is a power of two, so that scaled gradients are exact.
        torch.testing.assert_close(got, run_by_hand(make, bad, clip), rtol=0, atol=0)
        assert scale == {None: 64.0, 3: 16.0}[bad]
        assert not torch.equal(got[0], start()[0])


@pytest.mark.parametrize("bad", [None, 3])
def test_a_scaler_does_what_it_does_with_optimizers_of_torch(bad: int | None) -> None:
    for ours, theirs in (
        (torchopt.Adam, torch.optim.Adam),
        (torchopt.AdamW, torch.optim.AdamW),
        (torchopt.SGD, torch.optim.SGD),
    ):
        got, expected = (
            scaled_run(lambda params, make=make: make(params, lr=0.1), bad, True)
            for make in (ours, theirs)
        )
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_scaler_visits_every_group_and_says_when_it_is_called_twice() -> None:
    p, q = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = torchopt.SGD([p], lr=1.0)
    optimizer.add_param_group({"q": q}, impl=torchopt.sgd(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((p + q).sum()).backward()
    scaler.unscale_(optimizer)
    assert [x.grad.tolist() for x in (p, q) if x.grad is not None] == [[1.0, 1.0], [1.0, 1.0]]
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [0.0, 0.0]
    assert q.tolist() == [0.5, 0.5]


def test_a_scaler_unscales_sparse_gradients() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    with torch.no_grad():
        table.weight.zero_()
    optimizer = torchopt.SGD(table.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(table(torch.tensor([1, 1, 3])).sum()).backward()
    scaler.step(optimizer)
    assert table.weight.tolist() == [[0.0, 0.0], [-2.0, -2.0], [0.0, 0.0], [-1.0, -1.0]]


def test_a_meta_optimizer_has_no_groups_for_a_scaler() -> None:
    net = nn.Linear(1, 1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(1, 1))).backward()
    with pytest.raises(AttributeError, match="no attribute 'param_groups'; to change a hyper"):
        scaler.step(torchopt.MetaSGD(net, lr=0.1))


def test_groups_are_tuples_and_have_themselves_as_params() -> None:
    params = {"b": torch.ones(1), "a": torch.zeros(2)}
    optimizer = torchopt.Adam(params, lr=0.1)
    (group,) = optimizer.param_groups
    assert isinstance(group, tuple)
    assert group["params"] is group
    assert group == (params["a"], params["b"])
    assert group[0] is params["a"]
    assert group[-1] is params["b"]
    assert group[:1] == (params["a"],)
    assert [id(x) for x in torchopt.pytree.tree_leaves(optimizer.param_groups)] == [
        id(params["a"]),
        id(params["b"]),
    ]
    with pytest.raises(KeyError, match="expected the key 'params', got 'lr'.*TorchOptimizer"):
        group["lr"]
    with pytest.raises(TypeError, match="expected the key 'params', got 'lr'.*TorchOptimizer"):
        group["lr"] = 0.5
    for again in (copy.deepcopy(group), copy.copy(group), pickle.loads(pickle.dumps(group))):
        assert type(again) is ParamGroup
        torch.testing.assert_close(tuple(again), tuple(group))


def loaded(value: Any) -> Any:
    """Return what torch.load reads by default, which is tensors and classes known to be safe."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


LSTM = lstm_weights(hidden=2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
MLP = mlp_weights((2,), dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
WRAPPED = {
    "accumulate": lambda: transform.accumulate(torchopt.adam(0.1), 2),
    "add_noise": lambda: torchopt.chain(transform.add_noise(), torchopt.sgd(0.1)),
    "apply_if_finite": lambda: transform.apply_if_finite(torchopt.adam(0.1)),
    "cautious": lambda: transform.cautious(torchopt.adam(0.1)),
    "compensated": lambda: transform.compensated(torchopt.adam(0.1)),
    "ema": lambda: torchopt.chain(torchopt.sgd(0.1), transform.ema(0.9)),
    "galore": lambda: transform.galore(torchopt.adam(0.1), rank=1),
    "in_8_bits": lambda: transform.in_8_bits(torchopt.adam(0.1), min_size=1),
    "inject_hyperparams": lambda: transform.inject_hyperparams(torchopt.adam)(lr=0.1),
    "learned_lstm": lambda: learned_lstm(LSTM),
    "learned_mlp": lambda: learned_mlp(MLP),
    "lookahead": lambda: transform.lookahead(torchopt.adam(0.1)),
    "masked": lambda: transform.masked(torchopt.adam(0.1), [True, False]),
    "partition": lambda: transform.partition(
        {"a": torchopt.adam(0.1), "b": torchopt.radam(0.1)}, ["a", "b"]
    ),
    "sam": lambda: transform.sam(torchopt.adam(0.1)),
    "schedule": lambda: torchopt.adam(torchopt.schedule.polynomial_schedule(0.1, 0.0, 1.0, 9)),
}


@pytest.mark.parametrize("name", [*sorted(ROWS), *sorted(WRAPPED)])
def test_a_state_dict_is_read_by_torch_load_and_goes_on(name: str) -> None:
    def make(params: list[Tensor]) -> Any:
        if name in WRAPPED:
            return torchopt.Optimizer(params, WRAPPED[name]())
        return ROWS[name].classic(params, **ROWS[name].settings[0])

    first = start()
    optimizer = make(first)
    fresh = loaded(optimizer.state_dict())
    assert [type(x) for x in fresh] == [torchopt.base.UninitializedState]

    def step(optimizer: Any, params: list[Tensor], number: int) -> None:
        torch.manual_seed(number)  # of add_noise
        optimizer.zero_grad()
        loss_of(params, number).backward()
        optimizer.step()

    for number in range(3):
        step(optimizer, first, number)
    second = [p.detach().clone().requires_grad_() for p in first]
    other = make(second)
    other.load_state_dict(loaded(optimizer.state_dict()))
    for number in range(3, 6):
        step(optimizer, first, number)
        step(other, second, number)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_other_states_are_read_by_torch_load() -> None:
    net = nn.Linear(2, 1)
    meta = torchopt.MetaRAdam(net, lr=0.1)
    meta.step(net(torch.ones(1, 2)).sum())
    (state,) = loaded(meta.state_dict())
    assert type(state[0]) is type(meta.state_groups[0][0])
    functional = torchopt.FuncOptimizer(torchopt.adamax(0.1))
    w = torch.ones(2, requires_grad=True)
    functional.step(w.sum(), w)
    again = torchopt.FuncOptimizer(torchopt.adamax(0.1))
    again.load_state_dict(loaded(functional.state_dict()))
    expected, got = (o.step(w.square().sum(), w) for o in (functional, again))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["module", "part", "optimizer"])
def test_a_copy_of_fast_weights_is_refused_with_what_to_do(how: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    start = torchopt.extract_state_dict(net)
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    copied = {"module": net, "part": net[0], "optimizer": optimizer}[how]
    copy.deepcopy(copied)  # before the first step there is no graph
    optimizer.step(net(torch.ones(1, 2)).sum())
    with pytest.raises(
        RuntimeError, match=r"fast weight '(weight|bias)' of Linear.*module_clone.*recover_state"
    ):
        copy.deepcopy(copied)
    for by in ("copy", "deepcopy"):
        clone = torchopt.module_clone(net, by=by)
        torch.testing.assert_close(clone[0].weight, net[0].weight, rtol=0, atol=0)
    torchopt.recover_state_dict(net, start)
    again = copy.deepcopy(net)
    assert again[0].weight is not net[0].weight
    torch.testing.assert_close(list(again.parameters()), list(net.parameters()), rtol=0, atol=0)


def test_a_copy_keeps_tied_weights_tied() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    torchopt.MetaSGD(net, lr=0.1)
    again = copy.deepcopy(net)
    assert again[1].weight is again[0].weight
    assert again[0].weight is not net[0].weight
    assert isinstance(again[0].weight, nn.Parameter)


@pytest.mark.parametrize("how", ["replaced", "exchanged", "added", "removed"])
@pytest.mark.parametrize("name", ["adam", "muon", "prodigy"])
def test_a_list_of_parameters_that_changed_is_refused_as_the_state_is_of_others(
    name: str, how: str
) -> None:
    params = [torch.ones(2, 2, requires_grad=True) for _ in range(3)]
    optimizer = TorchOptimizer(params[:2], ROWS[name].functional, **ROWS[name].settings[0])

    def step() -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    held = optimizer.param_groups[0]["params"]
    step()
    changed = {
        "replaced": [params[0], params[2]],
        "exchanged": [params[1], params[0]],
        "added": params,
        "removed": params[:1],
    }[how]
    held[:] = changed
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\] changed since.*add_param"):
        step()
    torch.testing.assert_close(params, before, rtol=0, atol=0)
    held[:] = params[:2]
    for again in (optimizer, pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        again.step()  # copies of the parameters are theirs
    assert not torch.equal(params[0], before[0])


def test_groups_added_or_removed_by_hand_are_refused() -> None:
    p, q = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = torchopt.Adam([p], lr=0.1)
    optimizer.add_param_group([q])
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    for groups in (optimizer.param_groups[1:], [*optimizer.param_groups, (torch.ones(1),)], []):
        held, optimizer.param_groups = optimizer.param_groups, groups
        with pytest.raises(ValueError, match=r"the 2 groups that have a state, got [013] in param"):
            optimizer.step()
        optimizer.param_groups = held
    assert p.tolist() == q.tolist() == [1.0, 1.0]
    optimizer.step()
    assert p.tolist() == q.tolist()
    assert p.tolist() != [1.0, 1.0]
