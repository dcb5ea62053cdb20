# SPDX-License-Identifier: Apache-2.0
"""Tensors that do not belong together raise a sentence that says what and where."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import ROWS
from torch import nn

import torchopt
from torchopt import alias, transform
from torchopt.errors import MismatchError, NotDifferentiableError
from torchopt.optimizers.native import with_backend
from torchopt.pytree import tree_leaves
from torchopt.transform import accumulate, inject_hyperparams, lookahead

OPTIMIZERS = {
    "sgd": torchopt.sgd(0.1),
    "momentum": torchopt.sgd(0.1, momentum=0.9),
    "adam": torchopt.adam(),
    "adam with decay": torchopt.adam(weight_decay=0.1),
    "chain": torchopt.chain(torchopt.transform.trace(0.9), torchopt.sgd(0.1)),
    "lion": torchopt.alias.lion(),
}


def stepped(optimizer: Any, params: Any, grads: Any, state: Any = None) -> Any:
    state = optimizer.init(params) if state is None else state
    updates, _ = optimizer.update(grads, state, params=params, inplace=False)
    return torchopt.apply_updates(params, updates, inplace=False)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_gradient_of_another_shape_or_device(name: str) -> None:
    optimizer = OPTIMIZERS[name]
    params = {"fc": [torch.ones(1), torch.ones(2)]}
    for wrong, reason in (
        (torch.ones(3), r"expected shape \((2|3),\), got \((2|3),\)"),
        (torch.ones(2, device="meta"), "expected a tensor on (cpu|meta), got one on (cpu|meta)"),
    ):
        with pytest.raises(MismatchError, match=rf"at \$\['fc'\]\[1\]: .*{reason}") as caught:
            stepped(optimizer, params, {"fc": [torch.ones(1), wrong]})
        assert caught.value.leaf == 1
        assert isinstance(caught.value, ValueError)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.leaf, again.reason) == (1, caught.value.reason)


BROADCAST = ((), (1,), (2,), (1, 2), (3, 1), (4, 3, 2))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_shapes_that_torch_would_broadcast(shape: tuple[int, ...], inplace: bool) -> None:
    w = torch.ones(3, 2, dtype=torch.float64)
    params, wrong = {"fc1": {"bias": w}}, {"fc1": {"bias": torch.ones(shape, dtype=w.dtype)}}
    got = re.escape(f"expected shape (3, 2), got {shape}")
    where = r"at \$\['fc1'\]\['bias'\]: "
    with pytest.raises(MismatchError, match=rf"{where}apply_updates.*{got}; updates are not broad"):
        torchopt.apply_updates(params, wrong, inplace=inplace)
    with pytest.raises(MismatchError, match=rf"{where}apply_updates.*{got}"):
        torch.func.vmap(lambda u: torchopt.apply_updates(params, u, inplace=False))(
            {"fc1": {"bias": torch.ones(5, *shape, dtype=w.dtype)}}
        )
    reverse = re.escape(f"expected shape {shape}, got (3, 2)")
    for row in ROWS.values():
        optimizer = row.functional(**row.settings[-1])
        state = optimizer.init(params)
        if len(tree_leaves(state)) == 0:
            continue
        for backend in ("auto", "reference"):
            with pytest.raises(MismatchError, match=rf"{where}.*({got}|{reverse}|Shampoo)"):
                with_backend(optimizer, backend).update(
                    wrong, state, params=params, inplace=inplace
                )
    assert torch.equal(w, torch.ones_like(w))


def test_shapes_that_wrappers_would_broadcast() -> None:
    params = {"fc1": {"bias": torch.ones(3, 2)}}
    small = {"fc1": {"bias": torch.ones(2)}}
    collecting = accumulate(torchopt.sgd(0.1), 2)
    _, state = collecting.update(params, collecting.init(params), params=params)
    with pytest.raises(
        MismatchError, match=r"at \$\['fc1'\]\['bias'\]: accumulate: a gradient like"
    ):
        collecting.update(small, state, params=params)
    looking = lookahead(torchopt.sgd(0.1), 1)
    with pytest.raises(MismatchError, match=r"lookahead: a gradient like the parameter: expected"):
        looking.update(small, looking.init(params), params=params)
    with pytest.raises(MismatchError, match=r"lookahead: slow weights like the parameter: expec"):
        looking.update(params, looking.init(small), params=params)
    lamb = torchopt.alias.lamb()
    with pytest.raises(MismatchError, match=r"at \$\['fc1'\]\['bias'\]: a gradient like the param"):
        lamb.update(params, lamb.init(params), params=small)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", sorted(set(ROWS) - {"muon"}))  # it looks at the parameters
def test_a_leaf_without_a_state_takes_no_step(name: str, backend: Any, inplace: bool) -> None:
    row = ROWS[name]
    optimizer = with_backend(row.functional(**row.settings[-1]), backend)
    g = torch.ones(3, 2, dtype=torch.float64)
    if not tree_leaves(optimizer.init((g,))):
        pytest.skip("without a state")
    for others in ((), (g,)):
        state, given = optimizer.init((None, *others)), (g, *others)
        updates, _ = optimizer.update(given, state, params=given, inplace=inplace)
        assert updates[0] is None


def test_weight_decay_of_a_missing_parameter_is_refused() -> None:
    decay = torchopt.sgd(0.1, weight_decay=0.1)
    g = torch.ones(2)
    for params in ((None,), (None, g)):
        with pytest.raises(MismatchError, match=r"at \$\[0\]: .*params\): a parameter: .*got None"):
            decay.update((g,) * len(params), decay.init(params), params=params)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_trees_without_tensors(name: str) -> None:
    for settings in ROWS[name].settings[:1]:
        for inplace in (False, True):
            optimizer = ROWS[name].functional(**settings)
            updates, _ = optimizer.update({}, optimizer.init({}), params={}, inplace=inplace)
            assert updates == {}
            assert torchopt.apply_updates({}, {}, inplace=inplace) == {}


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"sgd"}))
def test_the_state_of_other_parameters(name: str) -> None:
    optimizer = OPTIMIZERS[name]
    params = {"w": torch.ones(2)}
    with pytest.raises(MismatchError, match=r"the state `(mu|trace)` was made for another tensor"):
        stepped(optimizer, params, params, optimizer.init({"w": torch.ones(3)}))
    more = {"w": torch.ones(2), "x": torch.ones(1)}
    with pytest.raises(ValueError, match=r"expected a state for 1 leaves|expected a tree like"):
        stepped(optimizer, params, params, optimizer.init(more))


def test_trees_that_differ_name_the_keys() -> None:
    one, two = {"w": torch.ones(2)}, {"w": torch.ones(2), "b": torch.ones(1)}
    for params, grads, wanted in ((one, two, "without"), (two, one, "with")):
        with pytest.raises(ValueError, match=rf"expected updates like .* a dict {wanted} 'b', got"):
            stepped(torchopt.adam(), params, grads)
        with pytest.raises(ValueError, match=r"apply_updates\(params, updates\): expected a tree"):
            torchopt.apply_updates(params, grads)


def test_trees_that_differ_name_the_place() -> None:
    params = {"layers": [{"w": torch.ones(2)} for _ in range(100)]}
    grads = {"layers": [{"w": torch.ones(2)} for _ in range(99)] + [{"v": torch.ones(2)}]}
    with pytest.raises(ValueError, match=r"at \$\['layers'\]\[99\]: .* without 'w'") as caught:
        torchopt.apply_updates(params, grads)
    assert len(str(caught.value)) < 300  # not the whole structure


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"sgd"}))
def test_integer_gradients_are_refused(name: str) -> None:
    optimizer = OPTIMIZERS[name]
    params = {"w": torch.ones(2), "counts": [torch.ones(2, dtype=torch.int64)]}
    state = optimizer.init(params)
    with pytest.raises(MismatchError, match=r"at \$\['counts'\]\[0\]: .* got torch\.int64"):
        stepped(optimizer, params, params, state)
    grads = {"w": torch.ones(2), "counts": [None]}
    updates, _ = optimizer.update(grads, state, params=params, inplace=False)
    assert updates["counts"] == [None]


def test_hyper_parameters_that_are_not_numbers() -> None:
    for make in (torchopt.adam, torchopt.sgd, torchopt.rmsprop):
        with pytest.raises(TypeError, match=r"learning rate: expected a number .* '0\.1' \(str\)"):
            make(lr="0.1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="beta parameter at index 0: expected a number .* None"):
        torchopt.adam(betas=(None, 0.9))  # type: ignore[arg-type]
    assert torchopt.adam(lr=np.float32(0.1)).init({}) is not None  # type: ignore[arg-type]


TUPLES = [
    (name, parameter)
    for name in alias.__all__
    for parameter in inspect.signature(getattr(alias, name)).parameters.values()
    if isinstance(parameter.default, tuple)
]


@pytest.mark.parametrize(("name", "parameter"), TUPLES, ids=lambda x: getattr(x, "name", x))
def test_a_tuple_of_hyper_parameters_has_its_length(name: str, parameter: Any) -> None:
    make, size = getattr(alias, name), len(parameter.default)
    said = f"Invalid {parameter.name}: expected {size} numbers or 0-dim tensors, got"
    for wrong in (0.9, None, "ab"):
        with pytest.raises(TypeError, match=said):
            make(**{parameter.name: wrong})
    for wrong in ((0.5,), (0.5,) * (size + 1), torch.tensor(0.5)):
        with pytest.raises(ValueError, match=said):
            make(**{parameter.name: wrong})


def test_a_tensor_of_betas_is_differentiated() -> None:
    betas = torch.tensor([0.5, 0.75], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        optimizer = torchopt.adam(0.1, betas=betas)  # type: ignore[arg-type]
    found, expected = [], []
    for used, grads in ((optimizer, found), (torchopt.adam(0.1, tuple(betas)), expected)):
        params = torch.ones(2, dtype=torch.float64)
        state = used.init(params)
        for g in (params, 3 * params):
            updates, state = used.update(g, state, inplace=False)
        grads.append(torch.autograd.grad(updates.sum(), betas)[0])
    assert torch.equal(found[0], expected[0])
    assert bool(found[0].all())


FIXED_STEPS = [
    "adafactor",
    "asgd",
    "prodigy",
    "rprop",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
]
"""The optimizers whose rules read the step size."""


@pytest.mark.parametrize("name", FIXED_STEPS)
def test_a_schedule_where_there_is_none_is_refused_and_can_be_injected(name: str) -> None:
    make, schedule = getattr(alias, name), torchopt.schedule.linear_schedule(0.1, 0.0, 4)
    with pytest.raises(TypeError, match="got a function .*; a schedule goes here with .*inject"):
        make(schedule)
    grads = params = {"w": torch.tensor([1.0, -2.0])}
    injected, plain = inject_hyperparams(make)(lr=schedule), make(lr=0.1)
    found, _ = injected.update(grads, injected.init(params), params=params, inplace=False)
    expected, _ = plain.update(grads, plain.init(params), params=params, inplace=False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", sorted(alias.__all__))
def test_steps_on_the_meta_device_give_shapes(name: str, inplace: bool) -> None:
    make = getattr(alias, name)
    schedule = torchopt.schedule.linear_schedule(0.1, 0.0, 4)
    rates = [0.1, torch.tensor(0.1), *([] if name in FIXED_STEPS else [schedule])]
    for rate in rates:
        params = {"w": torch.empty(3, 2, device="meta"), "b": torch.empty(2, device="meta")}
        optimizer = make(rate)
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(params, state, params=params, inplace=inplace)
        assert {k: (u.shape, u.is_meta) for k, u in updates.items()} == {
            k: (p.shape, True) for k, p in params.items()
        }


@pytest.mark.parametrize("name", ["apply_if_finite", "cautious", "compensated", "galore", "sam"])
def test_wrappers_on_the_meta_device_give_shapes(name: str) -> None:
    params = {"w": torch.empty(3, 2, device="meta"), "b": torch.empty(2, device="meta")}
    options = {"rank": 1} if name == "galore" else {}
    optimizer = getattr(transform, name)(torchopt.adam(0.1), **options)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params=params, inplace=False)
    assert {k: u.shape for k, u in updates.items()} == {k: p.shape for k, p in params.items()}


def accepts_no_eps(name: str) -> bool:
    make = getattr(alias, name)
    if "eps" not in inspect.signature(make).parameters:
        return False
    try:
        make(0.1, eps=0.0)
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", sorted(filter(accepts_no_eps, alias.__all__)))
def test_without_eps_derivatives_are_those_of_a_tiny_one(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p, x, y, *cotangents = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    found = []
    for eps in (0.0, 1e-30):
        optimizer = getattr(alias, name)(0.1, eps=eps)
        g = x.clone().requires_grad_()
        state = optimizer.init((p,))
        moved = []
        for grad in (g, 0.3 * g + 0.1 * y):
            (u,), state = optimizer.update((grad,), state, params=(p,), inplace=False)
            moved.append(u)
        total = sum((u * c).sum() for u, c in zip(moved, cotangents))
        found.append(torch.autograd.grad(total, g)[0])
    # The first steps of these are zero.
    assert found[0].abs().max() > 0 or name in ("adadelta", "schedule_free_radam")
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


SEVERAL = [
    (name, parameter.name, parameter.default)
    for name in sorted(alias.__all__)
    for parameter in inspect.signature(getattr(alias, name)).parameters.values()
    if isinstance(parameter.default, tuple)
]


@pytest.mark.parametrize(("name", "parameter", "usual"), SEVERAL)
def test_one_number_for_several_proposes_the_others(
    name: str, parameter: str, usual: tuple[float, ...]
) -> None:
    for given, proposed in ((0.5, (0.5, *usual[1:])), (None, usual)):
        with pytest.raises(TypeError) as error:
            getattr(alias, name)(0.1, **{parameter: given})
        assert f"pass {parameter}={proposed}" in str(error.value)


@pytest.mark.parametrize("etas", [(0.0, 1.2), (1.0, 1.2), (0.5, 1.0), (1.2, 0.5)])
def test_step_sizes_shrink_by_less_than_one_and_grow_by_more(etas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 < eta_minus < 1 < eta_plus"):
        torchopt.rprop(etas=etas)
    with pytest.raises(ValueError, match="expected 0 < eta_minus < 1 < eta_plus"):
        transform.scale_by_rprop(eta_minus=etas[0], eta_plus=etas[1])


GALORE = "galore", lambda lr: transform.galore(torchopt.adam(lr), rank=1)


@pytest.mark.parametrize(
    ("name", "make"), [*((n, getattr(alias, n)) for n in sorted(alias.__all__)), GALORE]
)
def test_a_gradient_may_be_narrower_than_its_parameter(name: str, make: Any) -> None:
    """The updates are those of gradients in the dtype of the parameter."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,)]
    draws = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(4)]
    params = [x.double() for x in draws[0]]
    found = []
    for dtype in (torch.float32, torch.float64):
        optimizer = make(0.1)
        state = optimizer.init(params)
        for grads in draws[1:]:
            narrow = [g.to(dtype) for g in grads]
            updates, state = optimizer.update(narrow, state, params=params, inplace=False)
            found.append([u.double() for u in updates])
    # Products of gradients, and the iterations of matrices, are rounded to float32 first.
    for narrow, wide in zip(found[:3], found[3:]):
        for x, y in zip(narrow, wide):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6 * float(y.abs().max()))


@pytest.mark.parametrize("name", sorted(alias.__all__))
def test_tensors_without_elements_have_steps_without_elements(name: str) -> None:
    shapes = [(0,), (3, 0), (0, 3), (2, 0, 3), (2,)]
    params = [torch.ones(shape) for shape in shapes]
    optimizer = getattr(alias, name)(0.1)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params=params, inplace=False)
        assert [tuple(u.shape) for u in updates] == shapes
        assert all(u.isfinite().all() for u in updates)


@pytest.mark.parametrize("inplace", [False, True])
def test_parameters_on_two_devices_are_stepped_where_they_are(inplace: bool) -> None:
    for row in ROWS.values():
        if row.name == "muon":  # its labels are those of the shapes; nothing new
            continue
        if row.joint:  # what has no values cannot be a part of it
            continue
        params = {"w": torch.ones(2), "m": torch.ones(2, device="meta")}
        optimizer = row.functional(**row.settings[0])
        updates, _ = optimizer.update(params, optimizer.init(params), params=params, inplace=False)
        new = torchopt.apply_updates(params, updates, inplace=inplace)
        assert new["m"].device.type == "meta"
        assert new["w"].device.type == "cpu"


def test_a_classic_parameter_that_was_resized() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torchopt.Adam([p])
    p.grad = torch.ones(2)
    optimizer.step()
    p.data, p.grad = torch.ones(3), None
    p.grad = torch.ones(3)
    with pytest.raises(MismatchError, match=r"expected shape \(3,\), got \(2,\)"):
        optimizer.step()


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_a_module_that_changed_between_steps() -> None:
    x = torch.ones(1, 2)

    def removed(net: nn.Sequential) -> None:
        del net[1]

    def added(net: nn.Sequential) -> None:
        net.append(nn.Linear(2, 1))

    def reshaped(net: nn.Sequential) -> None:
        net[1] = nn.Linear(2, 3)

    for change, message in (
        (removed, "1.bias is gone; 1.weight is gone"),
        (added, "2.bias is new; 2.weight is new"),
        (reshaped, r"1.bias had shape \(2,\), now \(3,\); 1.weight had shape \(2, 2\), now"),
    ):
        net = two_layers()
        optimizer = torchopt.MetaAdam(net)
        optimizer.step(net(x).sum())
        before = copy.copy(optimizer.state_groups)
        change(net)
        with pytest.raises(ValueError, match=f"the module changed since the last step.*{message}"):
            optimizer.step(net(x).sum())
        assert optimizer.state_groups == before
        optimizer.load_state_dict((torchopt.base.UninitializedState(),))
        optimizer.step(net(x).sum())


def test_freezing_a_parameter_is_not_a_change() -> None:
    net = two_layers()
    optimizer = torchopt.MetaSGD(net, 0.1, momentum=0.9)
    optimizer.step(net(torch.ones(1, 2)).sum())
    net[0].weight = nn.Parameter(net[0].weight.detach(), requires_grad=False)
    kept = net[0].weight
    optimizer.step(net(torch.ones(1, 2)).sum())
    assert net[0].weight is kept


def test_losses_without_the_parameters() -> None:
    net = two_layers()
    func = torchopt.FuncOptimizer(torchopt.sgd(0.1))
    optimizer = torchopt.MetaSGD(net, 0.1)
    loss = net(torch.ones(1, 2)).sum()
    optimizer.step(loss)
    for step in (optimizer.step, lambda loss: func.step(loss, dict(net.named_parameters()))):
        for other in (loss, torch.ones((), requires_grad=True) * 2):
            with pytest.raises(NotDifferentiableError, match="does not depend on any of the param"):
                step(other)
        with pytest.raises(NotDifferentiableError, match="the loss has no graph"):
            step(torch.ones(()))
        with pytest.raises(ValueError, match=r"expected a scalar loss, got .* shape \(1, 2\)"):
            step(net(torch.ones(1, 2)))
        with pytest.raises(TypeError, match="expected a 0-dim tensor, got float"):
            step(1.0)
