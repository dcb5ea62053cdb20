# SPDX-License-Identifier: Apache-2.0
"""What the user does to parameters: sharing, hooks, and writes in the middle of an inner loop."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import ROWS, Row
from torch import Tensor, nn

import torchopt
from torchopt.errors import NotDifferentiableError

DOUBLE = torch.float64
rows = pytest.mark.parametrize("row", ROWS.values(), ids=sorted(ROWS))


def make_net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, generator=generator, dtype=DOUBLE)
    return x, torch.randn(6, 2, generator=generator, dtype=DOUBLE)


def loss_of(net: nn.Module, sign: float = 1.0) -> Tensor:
    x, y = batch()
    return ((net(x) - sign * y) ** 2).mean()


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


# --- a parameter that is reached twice ------------------------------------------------------------


def two_heads() -> tuple[nn.Linear, nn.Module, nn.Module]:
    torch.manual_seed(1)
    encoder = nn.Linear(3, 4).double()
    one, two = (nn.Sequential(encoder, nn.Linear(4, 2).double()) for _ in range(2))
    return encoder, one, two


@rows
def test_modules_with_a_common_part_are_stepped_as_one_module(row: Row) -> None:
    settings: dict[str, Any] = row.settings[-1]
    results = []
    for together in (True, False):
        encoder, one, two = two_heads()
        start = list(encoder.parameters())
        if together:
            inner = row.meta(nn.ModuleList([one, two]), **settings)
        else:
            inner = row.meta(one, **settings)
            inner.add_param_group(two)
        for _ in range(2):
            inner.step(loss_of(one) + loss_of(two))
        assert one[0].weight is two[0].weight
        results.append(torch.autograd.grad(loss_of(one) + loss_of(two), start))
        assert not torch.equal(encoder.weight, start[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_a_weight_that_two_modules_tie_is_stepped_once_and_stays_tied() -> None:
    one, two = make_net(), make_net()
    two[0].weight = one[0].weight
    start = one[0].weight
    loss = loss_of(one) + loss_of(two)
    (g,) = torch.autograd.grad(loss, start, retain_graph=True)
    inner = torchopt.MetaSGD(one, lr=0.1)
    inner.add_param_group(two)
    inner.step(loss)
    torch.testing.assert_close(one[0].weight, start - 0.1 * g)
    assert one[0].weight is two[0].weight
    one.load_state_dict(make_net().state_dict())
    assert one[0].weight is two[0].weight is start
    assert two[0].bias.grad_fn is not None  # what was not loaded stays


def test_groups_that_would_step_a_parameter_twice_are_refused() -> None:
    encoder, one, two = two_heads()
    inner = torchopt.MetaSGD(one, lr=0.1)
    for module, impl in ((one, None), (encoder, None), (two, torchopt.adam(0.1))):
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter"):
            inner.add_param_group(module, impl=impl)
    assert len(inner.state_dict()) == 1
    inner.step(loss_of(one))


@rows
def test_classic_and_functional_optimizers_refuse_a_parameter_given_twice(row: Row) -> None:
    p, q = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    refused = pytest.raises(ValueError, match="some parameters appear in more than one")
    for tree in ([p, p], {"a": p, "b": [q, p]}):
        with refused:
            row.classic(tree, lr=0.1)
        functional = torchopt.FuncOptimizer(row.functional(lr=0.1))
        with refused:
            functional.step((p * q).sum(), tree)
    optimizer = row.classic([p], lr=0.1)
    with refused:
        optimizer.add_param_group({"a": q, "b": p})
    assert len(optimizer.param_groups) == len(optimizer.state_groups) == 1
    optimizer.add_param_group([q])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_adapter_refuses_a_parameter_given_twice() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torchopt.optim.TorchOptimizer([p], torchopt.sgd, lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    q = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="appear twice in one parameter group"):
        optimizer.add_param_group({"params": [q, q]})
    assert len(optimizer.param_groups) == 1


# --- hooks ----------------------------------------------------------------------------------------

MASK = torch.tensor([[1.0], [0.0], [0.0], [0.5]], dtype=DOUBLE)


def by_hand(row: Row, steps: int, hook: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    """Return the meta-gradient where the gradient of the first weight is changed in each step."""
    net = make_net()
    start = dict(net.named_parameters())
    functional = row.functional(**row.settings[-1])
    params: dict[str, Tensor] = dict(start)
    state = functional.init(tuple(params[n] for n in sorted(params)))
    x, y = batch()
    names = sorted(params)
    for step in range(steps):
        loss = ((torch.func.functional_call(net, params, (x,)) - y) ** 2).mean()
        grads = list(torch.autograd.grad(loss, [params[n] for n in names], create_graph=True))
        index = names.index("0.weight")
        grads[index] = hook(grads[index], step)
        tree = tuple(params[n] for n in names)
        updates, state = functional.update(tuple(grads), state, params=tree, inplace=False)
        params = dict(zip(names, torchopt.apply_updates(tree, updates, inplace=False)))
    loss = ((torch.func.functional_call(net, params, (x,)) + y) ** 2).mean()
    grads = list(torch.autograd.grad(loss, list(start.values())))
    return [hook(grads[0], steps), *grads[1:]]


@rows
def test_hooks_act_in_every_step_and_on_no_other_gradient(row: Row) -> None:
    def squash(g: Tensor) -> Tensor:
        return torch.tanh(g * 3) * MASK

    expected = by_hand(row, 3, lambda g, _: squash(g))
    for functional in (False, True):
        net = make_net()
        start = list(net.parameters())
        net[0].weight.register_hook(squash)
        net[0].weight.register_hook(lambda _: None)
        if not functional:
            inner = row.meta(net, **row.settings[-1])
            for _ in range(3):
                inner.step(loss_of(net))
            outer = loss_of(net, -1.0)
        else:
            optimizer = torchopt.FuncOptimizer(row.functional(**row.settings[-1]))
            x, y = batch()
            names = sorted(dict(net.named_parameters()))
            params: Any = {n: net.get_parameter(n) for n in names}
            for _ in range(3):
                out = torchopt.params.functional_call(net, params, (x,))
                params = optimizer.step(((out - y) ** 2).mean(), params)
            outer = ((torchopt.params.functional_call(net, params, (x,)) + y) ** 2).mean()
        got = torch.autograd.grad(outer, start)
        torch.testing.assert_close(list(got), expected, rtol=1e-10, atol=1e-12)


def test_hooks_that_come_and_go_between_steps() -> None:
    net = make_net()
    start = list(net.parameters())
    double = net[0].weight.register_hook(lambda g: 2 * g)
    inner = torchopt.MetaSGD(net, lr=0.1)
    inner.step(loss_of(net))
    mask = net[0].weight.register_hook(lambda g: g * MASK)  # on the fast weight
    inner.step(loss_of(net))
    double.remove()
    inner.step(loss_of(net))
    mask.remove()
    inner.step(loss_of(net))

    def hook(g: Tensor, step: int) -> Tensor:
        factors = (2, 2 * MASK, MASK, 1, 1)
        return g * factors[step]

    sgd = Row("sgd", torchopt.sgd, torchopt.SGD, torchopt.MetaSGD, torch.optim.SGD, ({"lr": 0.1},))
    expected = by_hand(sgd, 4, hook)
    got = torch.autograd.grad(loss_of(net, -1.0), start)
    torch.testing.assert_close(list(got), expected, rtol=1e-10, atol=1e-12)


def test_hooks_act_in_the_order_of_the_steps_that_they_were_registered_in() -> None:
    """Those of the parameter first, one after the other, then those of the fast weight."""
    net = make_net()
    start = list(net.parameters())
    shift = net[0].weight.register_hook(lambda g: g + 0.1)
    net[0].weight.register_hook(lambda g: 2 * g)
    inner = torchopt.MetaSGD(net, lr=0.1)
    inner.step(loss_of(net))
    last = net[0].weight.register_hook(lambda g: g * MASK + 0.2)  # on the fast weight
    inner.step(loss_of(net))
    shift.remove()
    inner.step(loss_of(net))
    last.remove()  # it would act on what flows through that weight in the meta-gradient, too

    def hook(g: Tensor, step: int) -> Tensor:
        doubled = 2 * (g + 0.1 if step < 2 else g)
        return doubled * MASK + 0.2 if step in (1, 2) else doubled

    sgd = Row("sgd", torchopt.sgd, torchopt.SGD, torchopt.MetaSGD, torch.optim.SGD, ({"lr": 0.1},))
    expected = by_hand(sgd, 3, hook)
    got = torch.autograd.grad(loss_of(net, -1.0), start)
    torch.testing.assert_close(list(got), expected, rtol=1e-10, atol=1e-12)


def masked_rows_move(net: nn.Module, steps: int = 2) -> bool:
    before = net[0].weight.detach().clone()
    inner = torchopt.MetaAdam(net, lr=0.1)
    for _ in range(steps):
        inner.step(loss_of(net))
    moved = (net[0].weight - before).abs().amax(1)
    assert moved[0] > 0.01
    return bool(moved[1:3].any())


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
def test_hooks_survive_snapshots_clones_and_copies_of_them(by: str) -> None:
    net = make_net()
    net[0].weight.register_hook(lambda g: g * MASK)
    snapshot = torchopt.extract_state_dict(net, by=by)
    for _ in range(2):
        assert not masked_rows_move(net)
        torchopt.recover_state_dict(net, snapshot)
    middle = torchopt.extract_state_dict(net, by=by)
    assert not masked_rows_move(net)
    torchopt.recover_state_dict(net, middle)
    assert not masked_rows_move(torchopt.module_clone(net, by=by))
    if by != "copy":
        torchopt.recover_state_dict(net, copy.deepcopy(snapshot))
        assert not masked_rows_move(net)


def test_copies_of_fast_weights_keep_the_hooks_of_the_parameter() -> None:
    net = make_net()
    net[0].weight.register_hook(lambda g: g * MASK)
    torchopt.MetaSGD(net, lr=0.1).step(loss_of(net))
    torchopt.stop_gradient(net)
    assert not masked_rows_move(copy.deepcopy(net))


def test_hooks_act_in_steps_without_a_graph_and_across_cuts() -> None:
    for options in ({}, {"first_order": True}, {"detach_every": 1}):
        net = make_net()
        net[0].weight.register_hook(lambda g: g * MASK)
        before = net[0].weight.detach().clone()
        inner = torchopt.MetaSGD(net, lr=0.1, **options)
        for _ in range(3):
            loss = loss_of(net)
            with torch.set_grad_enabled(bool(options)):
                inner.step(loss)
        assert not (net[0].weight - before)[1:3].any()
        assert (net[0].weight - before)[0].any()


def test_hooks_of_modules_act_in_every_step() -> None:
    net = make_net()
    before = net[0].weight.detach().clone()
    net[1].register_full_backward_hook(lambda *_: (torch.zeros(6, 4, dtype=DOUBLE),))
    inner = torchopt.MetaSGD(net, lr=0.1)
    for _ in range(2):
        inner.step(loss_of(net))
    assert torch.equal(net[0].weight, before)
    assert net[2].weight.grad_fn is not None


def test_hooks_after_accumulation_are_announced_as_idle() -> None:
    net = make_net()
    net[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    inner = torchopt.MetaSGD(net, lr=0.1)
    with pytest.warns(UserWarning, match=r"0.weight has hooks of register_post_acc.*do not act"):
        inner.step(loss_of(net))
    inner.step(loss_of(net))
    # Once for a parameter, also where the next task starts from it again.
    other = make_net()
    other[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    snapshot = torchopt.extract_state_dict(other)
    with pytest.warns(UserWarning, match="0.weight has hooks"):
        torchopt.MetaSGD(other, lr=0.1).step(loss_of(other))
    torchopt.recover_state_dict(other, snapshot)
    torchopt.MetaSGD(other, lr=0.1).step(loss_of(other))


def test_hooks_that_sum_meta_gradients_of_processes_are_not_idle(
    recwarn: pytest.WarningsRecorder,
) -> None:
    net = make_net()

    def accumulated(p: Tensor) -> None: ...

    accumulated.__module__ = "torchopt.distributed.buckets"
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(accumulated)
    torchopt.MetaSGD(net, lr=0.1).step(loss_of(net))
    assert not recwarn.list


def test_a_file_with_a_module_that_was_watched_does_not_need_torchopt() -> None:
    net = make_net()
    torchopt.MetaSGD(net, lr=0.1)
    data = pickle.dumps(net)
    assert b"torchopt" not in data
    again = pickle.loads(data)
    again.load_state_dict({name: x + 1 for name, x in net.state_dict().items()})
    assert all(torch.equal(p, q + 1) for p, q in zip(again.parameters(), net.parameters()))
    start = again[0].weight
    torchopt.MetaSGD(again, lr=0.1).step(loss_of(again))
    again.load_state_dict(net.state_dict())
    assert again[0].weight is start


# --- values that are written in the middle of an inner loop ---------------------------------------


def task(net: nn.Module, row: Row, start: list[Tensor], sign: float) -> list[Tensor]:
    inner = row.meta(net, **row.settings[-1])
    for _ in range(2):
        inner.step(loss_of(net, sign))
    return list(torch.autograd.grad(loss_of(net, -sign), start, retain_graph=True))


@rows
def test_a_task_starts_from_what_was_loaded(row: Row) -> None:
    net = make_net()
    start = list(net.parameters())
    other = {n: p.sin().detach() for n, p in net.state_dict().items()}
    fresh = make_net()
    fresh.load_state_dict(other)
    expected = task(fresh, row, list(fresh.parameters()), -1.0)
    task(net, row, start, 1.0)
    net.load_state_dict(other)
    assert all(p is q for p, q in zip(net.parameters(), start))
    torch.testing.assert_close(task(net, row, start, -1.0), expected, rtol=1e-12, atol=1e-14)
    net.load_state_dict(other, assign=True)
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    assert all(p is not q for p, q in zip(net.parameters(), start))
    start = list(net.parameters())
    torch.testing.assert_close(task(net, row, start, -1.0), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["no_grad", "detach_every", "stop_gradient", "copy"])
def test_loading_after_steps_of_another_kind(mode: str) -> None:
    net = make_net()
    start = list(net.parameters())
    saved = copy.deepcopy(net.state_dict())
    if mode == "copy":
        torchopt.recover_state_dict(net, torchopt.extract_state_dict(net, by="copy"))
    inner = torchopt.MetaSGD(net, lr=0.1, detach_every=1 if mode == "detach_every" else None)
    loss = loss_of(net)
    with torch.set_grad_enabled(mode != "no_grad"):
        inner.step(loss)
    if mode == "stop_gradient":
        torchopt.stop_gradient(net)
    held = list(net.parameters())
    net.load_state_dict(saved)
    kept = held if mode == "stop_gradient" else start
    assert all(p is q for p, q in zip(net.parameters(), kept))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), saved.values()))


def test_a_part_is_loaded_and_the_rest_stays() -> None:
    net = make_net()
    start = list(net.parameters())
    inner = torchopt.MetaSGD(net, lr=0.1)
    inner.step(loss_of(net))
    net[0].load_state_dict(make_net()[0].state_dict())
    assert net[0].weight is start[0]
    assert net[2].weight.grad_fn is not None
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict({"2.weight": torch.ones(1, 1)}, strict=False)
    assert net[2].weight.grad_fn is not None


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "copy_": lambda net: net[0].weight.copy_(torch.ones(4, 3)),
    "data": lambda net: setattr(net[0].weight, "data", torch.ones(4, 3, dtype=DOUBLE)),
    "init": lambda net: nn.init.zeros_(net[0].weight),
    "vector": lambda net: nn.utils.vector_to_parameters(torch.ones(26).double(), net.parameters()),
    "fill": lambda net: [p.fill_(0.5) for p in net.parameters()],
}


@pytest.mark.parametrize(
    ("row", "name"),
    [(row, "copy_") for row in ROWS.values()] + [(ROWS["adam"], name) for name in sorted(WRITES)],
)
def test_a_write_that_the_graph_does_not_show_is_refused(row: Row, name: str) -> None:
    net = make_net()
    snapshot = torchopt.extract_state_dict(net)
    inner = row.meta(net, **row.settings[-1])
    inner.step(loss_of(net))
    loss = loss_of(net)
    with torch.no_grad():
        WRITES[name](net)
    with pytest.raises(NotDifferentiableError, match=r"Linear.\w+ holds a fast weight whose value"):
        loss_of(net)
    with pytest.raises(NotDifferentiableError, match="expected recover_state_dict"):
        inner.step(loss)
    torchopt.recover_state_dict(net, snapshot)
    inner.step(loss_of(net))


def test_writes_that_count_as_they_are() -> None:
    net = make_net()
    start = list(net.parameters())
    inner = torchopt.MetaSGD(net, lr=0.1)
    with torch.no_grad():
        net[0].weight.mul_(0.5)  # a parameter
    inner.step(loss_of(net))
    net[0].weight.mul_(2.0)  # recorded
    results = [torch.autograd.grad(loss_of(net), start, retain_graph=True)]
    twin = make_net()
    twin.load_state_dict(dict(zip(twin.state_dict(), start)))
    own = list(twin.parameters())
    torchopt.MetaSGD(twin, lr=0.1).step(loss_of(twin))
    twin[0]._parameters["weight"] = twin[0].weight * 2
    results.append(torch.autograd.grad(loss_of(twin), own))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_module_that_is_converted_between_steps() -> None:
    net = make_net().float()
    start = list(net.parameters())
    inner = torchopt.MetaSGD(net, lr=0.1)
    x, y = (t.float() for t in batch())
    inner.step(((net(x) - y) ** 2).mean())
    net.double()
    assert net[0].weight.dtype is DOUBLE
    inner.step(loss_of(net))
    got = torch.autograd.grad(loss_of(net), start)
    reference = make_net()
    own = list(reference.parameters())
    exact = torchopt.MetaSGD(reference, lr=0.1)
    for _ in range(2):
        exact.step(loss_of(reference))
    expected = torch.autograd.grad(loss_of(reference), own)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_else_is_done_to_modules_between_steps() -> None:
    torch.manual_seed(0)
    results = []
    for touched in (False, True):
        net = nn.Sequential(make_net(), nn.BatchNorm1d(2).double())
        start = list(net.parameters())
        inner = torchopt.MetaAdam(net, lr=0.1)
        inner.step(loss_of(net))
        if touched:
            net.eval()
            net.state_dict()
            net.train()
            net.zero_grad()
            pickle.loads(pickle.dumps(net.state_dict()))
            net.apply(lambda _: None)
        inner.step(loss_of(net))
        net.eval()
        results.append(torch.autograd.grad(loss_of(net), start))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# --- snapshots ------------------------------------------------------------------------------------


def test_a_snapshot_of_other_shapes_is_refused_and_nothing_is_written() -> None:
    state = torchopt.extract_state_dict(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)))
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own = list(net.parameters())
    expected = r"'weight' of shape \(2, 2\) in the sub-module '1', got \(3, 2\)"
    with pytest.raises(ValueError, match=expected):
        torchopt.recover_state_dict(net, state)
    norm = torchopt.extract_state_dict(nn.BatchNorm1d(3, affine=False))
    with pytest.raises(ValueError, match=r"expected buffers 'running_mean' of shape \(2,\)"):
        torchopt.recover_state_dict(nn.BatchNorm1d(2, affine=False), norm)
    assert all(p is q for p, q in zip(net.parameters(), own))


def test_a_step_finds_what_was_changed_in_the_structure_since_the_last() -> None:
    net = make_net()
    inner = torchopt.MetaSGD(net, lr=0.1)
    inner.step(loss_of(net))
    bias, net[0].bias = net[0].bias, None
    with pytest.raises(ValueError, match="0.bias is gone"):
        inner.step(loss_of(net))
    net[0]._parameters["bias"] = bias
    inner.step(loss_of(net))
    net[0] = nn.Linear(3, 4).double()  # the same shapes
    inner.step(loss_of(net))
    assert net[0].weight.grad_fn is not None
    net[0].bias = nn.Parameter(torch.zeros(4, dtype=DOUBLE))
    net[2].bias = nn.Parameter(torch.zeros(2, dtype=DOUBLE))
    inner.step(loss_of(net))
    assert net[0].bias.grad_fn is not None
    both = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tied = torchopt.MetaSGD(both, lr=0.1)
    x = torch.ones(1, 2)
    tied.step(both[1](both[0](x)).sum())
    both[1]._parameters["weight"] = both[0].weight
    with pytest.raises(ValueError, match="1.weight is gone"):
        tied.step(both[1](both[0](x)).sum())


def test_the_optimizer_keeps_no_fast_weight_alive() -> None:
    net = make_net()
    snapshot = torchopt.extract_state_dict(net)
    inner = torchopt.MetaSGD(net, lr=0.1)
    for _ in range(2):
        inner.step(loss_of(net))
    held = weakref.ref(net[0].weight)
    torchopt.recover_state_dict(net, snapshot)
    assert held() is None
