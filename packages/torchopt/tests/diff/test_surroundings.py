# SPDX-License-Identifier: Apache-2.0
"""A derivative uses the state of its call: random numbers, buffers, modes, counters, arguments."""

from __future__ import annotations

import random
import types

import numpy as np
import pytest
import torch
from torch.func import grad, jvp

import torchopt
from torchopt.diff.implicit import custom_root
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import NotDifferentiableError
from torchopt.nn import ImplicitMetaGradientModule
from torchopt.params.swap import Swap
from torchopt.solvers import LBFGS, Newton, NewtonCG

D = torch.float64
N = 5
LAM = torch.tensor(0.3, dtype=D)
OWN = torch.Generator()
OWN_NUMPY = np.random.default_rng(0)
OWN_PYTHON = random.Random(0)

# Each row: draw() -> weights [N], from one source of random numbers.
DRAWS = {
    "torch": lambda: torch.rand(N, dtype=D),
    "dropout": lambda: torch.dropout(torch.ones(N, dtype=D), 0.5, True) + 1,
    "a generator": lambda: torch.rand(N, dtype=D, generator=OWN),
    "random": lambda: torch.tensor([random.random() for _ in range(N)], dtype=D),
    "numpy.random": lambda: torch.from_numpy(np.random.rand(N)),
    "a generator of numpy": lambda: torch.from_numpy(OWN_NUMPY.random(N)),
    "a Random": lambda: torch.tensor([OWN_PYTHON.random() for _ in range(N)], dtype=D),
    "two sources": lambda: torch.rand(N, dtype=D) + torch.from_numpy(np.random.rand(N)),
}


def seed():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    OWN.manual_seed(0)
    OWN_PYTHON.seed(0)
    OWN_NUMPY.bit_generator.state = np.random.default_rng(0).bit_generator.state


# min sum m_i (w_i - i)^2 + lam w_i^2 has w_i = m_i i / (m_i + lam).
GOAL = torch.arange(1.0, N + 1, dtype=D)


def truth(m):
    return lambda lam: (m * GOAL / (m + lam)).sum()


def objective_of(draw):
    return lambda w, lam: (draw() * (w - GOAL) ** 2 + lam * w**2).sum() / 2


def module_of(draw):
    class Inner(ImplicitMetaGradientModule):
        def __init__(self, lam):
            super().__init__()
            self.lam = lam
            self.w = torch.nn.Parameter(torch.zeros(N, dtype=D))

        def objective(self):
            return objective_of(draw)(self.w, self.lam)

        def solve(self):
            m = draw()
            with torch.no_grad():
                self.w.copy_(m * GOAL / (m + self.lam))
            return self

    return lambda lam: Inner(lam).solve().w.sum()


def root_of(draw):
    def solver(start, lam):
        m = draw()
        return m * GOAL / (m + lam)

    solved = custom_root(grad(objective_of(draw)), argnums=1)(solver)
    return lambda lam: solved(None, lam).sum()


def solver_of(cls):
    zero = torch.zeros(N, dtype=D)
    if cls is Newton:
        return lambda draw: lambda lam: cls()(grad(objective_of(draw)), zero, lam).sum()
    return lambda draw: lambda lam: cls()(objective_of(draw), zero, lam).sum()


ENGINES = {"custom_root": root_of, "a module": module_of} | {
    cls.__name__: solver_of(cls) for cls in (LBFGS, NewtonCG, Newton)
}


def expected(draw):
    seed()
    lam = LAM.clone().requires_grad_()
    value = truth(draw())(lam)
    (first,) = torch.autograd.grad(value, lam, create_graph=True)
    return value, first, torch.autograd.grad(first, lam)[0]


@pytest.mark.parametrize("source", sorted(DRAWS))
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_all_evaluations_of_one_call_see_one_draw(engine, source):
    draw = DRAWS[source]
    function = ENGINES[engine](draw)
    value, first, second = expected(draw)
    seed()
    lam = LAM.clone().requires_grad_()
    found = function(lam)
    draw()  # other draws in the meantime change nothing
    (got,) = torch.autograd.grad(found, lam, create_graph=True)
    draw()
    torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, first, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(got, lam)[0], second, rtol=1e-6, atol=0)


def push(f):
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]


TRANSFORMS = {
    "grad": grad,
    "jvp": push,
    "grad of grad": lambda f: grad(grad(f)),
    "grad of jvp": lambda f: grad(push(f)),
    "jvp of grad": lambda f: push(grad(f)),
}


@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
@pytest.mark.parametrize("engine", sorted(ENGINES.keys() - {"a module"}))
def test_one_draw_under_every_transform(engine, transform):
    draw = DRAWS["torch"]
    _, first, second = expected(draw)
    seed()
    got = TRANSFORMS[transform](ENGINES[engine](draw))(LAM)
    truth = second if " of " in transform else first.detach()
    torch.testing.assert_close(got, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("source", sorted(DRAWS))
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_call_and_its_derivative_consume_one_draw(engine, source):
    draw = DRAWS[source]
    seed()
    draw()
    following = draw()
    seed()
    lam = LAM.clone().requires_grad_()
    ENGINES[engine](draw)(lam).backward()
    assert torch.equal(draw(), following)


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_the_next_call_sees_another_draw(engine):
    function = ENGINES[engine](DRAWS["torch"])
    first = function(LAM.clone().requires_grad_())
    assert abs(first.item() - function(LAM.clone().requires_grad_()).item()) > 1e-3


# --- state that changes between the solve and its derivative -----------------------------------


class Scaled(torch.nn.Module):
    """x -> factor x; the factor is distributed over all kinds of state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", torch.ones(3, dtype=D))
        self.number = 1.0
        self.list = [1.0]
        self.weight = torch.nn.Parameter(torch.ones(3, dtype=D), requires_grad=False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1  # invisible both here and outside
        assert self.calls == 1
        train = 1.0 if self.training else 3.0
        return self.buffer * self.number * sum(self.list) * self.weight * train * x


CHANGES = {
    "nothing": lambda m: None,
    "eval()": lambda m: m.eval(),
    "a buffer": lambda m: m.buffer.fill_(7.0),
    "another buffer": lambda m: setattr(m, "buffer", torch.zeros(3, dtype=D)),
    "a number": lambda m: setattr(m, "number", 7.0),
    "a list": lambda m: m.list.append(7.0),
    "a counter": lambda m: setattr(m, "calls", 5),
}
A = torch.tensor([1.0, -2.0, 3.0], dtype=D)


def solve_with(model, kind):
    """Return x = a / 2, the minimum of |model(x) - a|^2 + |x|^2, with its graph, and a."""
    a = A.clone().requires_grad_()

    def objective(x, a):
        return ((model(x) - a) ** 2).sum() + (x**2).sum()

    if kind == "LBFGS":
        return LBFGS()(objective, torch.zeros_like(A), a), a
    if kind == "custom_root":
        return custom_root(grad(objective), 1)(lambda s, a: a / 2)(None, a), a
    if kind == "a module as an argument":
        gradient = grad(lambda x, model, a: ((model(x) - a) ** 2).sum() + (x**2).sum())
        return custom_root(gradient, 2)(lambda s, model, a: a / 2)(None, model, a), a

    class Inner(ImplicitMetaGradientModule):
        def __init__(self, a):
            super().__init__()
            self.a = a
            self.model = model
            self.x = torch.nn.Parameter(torch.zeros_like(A))

        def objective(self):
            return ((self.model(self.x) - self.a) ** 2).sum() + (self.x**2).sum()

        def solve(self):
            with torch.no_grad():
                self.x.copy_(self.a / 2)
            return self

    return Inner(a).solve().x, a


KINDS = ["custom_root", "a module as an argument", "LBFGS", "a module"]


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("kind", KINDS)
def test_a_derivative_sees_the_modules_of_its_call(kind, change):
    model = Scaled()
    x, a = solve_with(model, kind)
    assert model.calls == 0
    CHANGES[change](model)
    (got,) = torch.autograd.grad(x.sum(), a)
    torch.testing.assert_close(got, torch.full_like(A, 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_weight_that_changes_in_place_is_refused(kind):
    model = Scaled()
    x, a = solve_with(model, kind)
    model.weight.mul_(7.0)
    with pytest.raises(NotDifferentiableError, match="weight.*changed in place"):
        torch.autograd.grad(x.sum(), a)


def test_a_tensor_of_the_closure_that_changes_in_place_is_refused():
    data = A.clone()
    a = torch.ones((), dtype=D, requires_grad=True)
    x = custom_root(lambda x, a: x**2 * data - a, 1)(lambda s, a: (a / data.abs()).sqrt())(None, a)
    data.mul_(2)
    with pytest.raises(NotDifferentiableError, match="data, which was changed in place"):
        x.sum().backward()


def test_a_tensor_that_changes_without_an_effect_is_no_reason_to_refuse():
    calls = torch.zeros(())
    a = torch.tensor(8.0, dtype=D, requires_grad=True)

    def residual(x, a):
        assert calls is not None
        return x**3 - a

    x = custom_root(residual, 1)(lambda s, a: a ** (1 / 3))(None, a)
    calls.fill_(100)
    x.backward()
    torch.testing.assert_close(a.grad, torch.tensor(1 / 12, dtype=D))


STARTS = {
    "custom_root": lambda x0, a: custom_root(lambda x, a: x**3 - a, 1)(lambda s, a: a ** (1 / 3))(
        x0, a
    ),
    "LBFGS": lambda x0, a: LBFGS(tol=1e-12)(lambda x, a: (x**4 / 4 - a * x).sum(), x0, a),
    "Newton": lambda x0, a: Newton()(lambda x, a: x**3 - a, x0, a),
}


@pytest.mark.parametrize("kind", sorted(STARTS))
def test_the_start_may_be_written_to_before_the_backward_pass(kind):
    a = torch.tensor([8.0, 27.0], dtype=D, requires_grad=True)
    x0 = torch.ones(2, dtype=D)
    x = STARTS[kind](x0, a)
    x0.copy_(x.detach())  # the warm start of the next call
    (first,) = torch.autograd.grad(x.sum(), a, create_graph=True)
    x0.zero_()
    (second,) = torch.autograd.grad(first.sum(), a)
    torch.testing.assert_close(first, (a ** (-2 / 3) / 3), rtol=1e-5, atol=0)
    torch.testing.assert_close(second, (-2 / 9 * a ** (-5 / 3)).detach(), rtol=1e-5, atol=0)


def test_a_function_that_changes_its_arguments_in_place_is_refused():
    def residual(x, a, count):
        count += 1
        return x**3 - a * count

    solved = custom_root(residual, 1)(lambda s, a, count: a ** (1 / 3))
    a = torch.tensor(8.0, dtype=D, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match="changes its arguments in place"):
        solved(None, a, torch.zeros((), dtype=torch.int64))


# --- state of Python, that no module holds ------------------------------------------------------


class Bag:
    weight = 1.0


class Slotted:
    __slots__ = ("weight",)


SETTINGS = types.ModuleType("settings_of_a_user_too")
WEIGHT = 1.0


def in_a_cell():
    weight = 1.0

    def change():
        nonlocal weight
        weight = 4.0

    return (lambda: weight), change


def in_a_tensor_that_is_bound_anew():
    weight = torch.ones((), dtype=D)

    def change():
        nonlocal weight
        weight = 4 * weight

    return (lambda: weight), change


def in_a_flag():
    training = True

    def change():
        nonlocal training
        training = False

    return (lambda: 1.0 if training else 4.0), change


def in_a_list():
    weights = [1.0, 0.0]
    return (lambda: sum(weights)), lambda: weights.append(3.0)


def in_an_entry():
    weights = [[1.0], {"a": (1.0,)}]
    return (lambda: sum(weights[0])), lambda: weights[0].__setitem__(0, 4.0)


def in_a_dict():
    config = {"a": {"weight": 1.0}}
    return (lambda: config["a"]["weight"]), lambda: config["a"].update(weight=4.0)


def in_a_dict_without_the_key():
    config = {}
    return (lambda: config.get("weight", 1.0)), lambda: config.update(weight=4.0)


def in_a_set():
    chosen = {1}
    return (lambda: float(sum(chosen))), lambda: chosen.add(3)


def in_an_array():
    weights = np.ones(2)
    return (lambda: float(weights.mean())), lambda: weights.fill(4.0)


def in_an_object():
    bag = Bag()
    bag.weight = 1.0
    return (lambda: bag.weight), lambda: setattr(bag, "weight", 4.0)


def in_slots():
    bag = Slotted()
    bag.weight = 1.0
    return (lambda: bag.weight), lambda: setattr(bag, "weight", 4.0)


def in_a_namespace():
    bag = types.SimpleNamespace(weight=1.0)
    return (lambda: bag.weight), lambda: setattr(bag, "weight", 4.0)


def in_another_object():
    bag = Bag()
    other = types.SimpleNamespace(weight=4.0)

    def change():
        nonlocal bag
        bag = other

    return (lambda: bag.weight), change


def in_a_class():
    Bag.weight = 1.0
    return (lambda: Bag.weight), lambda: setattr(Bag, "weight", 4.0)


def in_a_global():
    globals()["WEIGHT"] = 1.0
    return (lambda: WEIGHT), lambda: globals().update(WEIGHT=4.0)


def in_a_python_module():
    SETTINGS.weight = 1.0
    return (lambda: SETTINGS.weight), lambda: setattr(SETTINGS, "weight", 4.0)


PLACES = [in_a_cell, in_a_tensor_that_is_bound_anew, in_a_flag, in_a_list, in_an_entry, in_a_dict]
PLACES += [in_a_dict_without_the_key, in_a_set, in_an_array, in_an_object, in_slots, in_a_namespace]
PLACES += [in_another_object, in_a_class, in_a_global, in_a_python_module]


@pytest.mark.parametrize("kind", ["custom_root", "Newton"])
@pytest.mark.parametrize("place", PLACES)
def test_a_derivative_sees_the_python_state_of_its_call(place, kind):
    weight, change = place()
    a = torch.tensor(8.0, dtype=D, requires_grad=True)

    def residual(x, a):
        return x**3 - a * weight() ** 3

    if kind == "Newton":
        x = Newton()(residual, torch.tensor(1.5, dtype=D), a)
    else:
        x = custom_root(residual, 1)(lambda s, a: a ** (1 / 3))(None, a)
    change()
    for _ in range(2):
        (got,) = torch.autograd.grad(x, a, retain_graph=True)
        torch.testing.assert_close(got, torch.tensor(1 / 12, dtype=D))
    assert weight() == 4.0


def test_an_int_counts_the_evaluations_of_replays_but_not_those_of_trials():
    calls = 0

    def loss(p, batch):
        nonlocal calls
        calls += 1
        return (p**3).sum()

    for keep in ("steps", 1):
        calls, p = 0, torch.ones(2, dtype=D, requires_grad=True)
        inner = torchopt.inner_loop(loss, torchopt.sgd(0.01), steps=40, keep=keep)
        total = inner(p, None).params.sum()
        assert calls == 40, keep  # a step is tried to measure it
        total.backward()
        assert calls > 40, keep


def test_the_log_of_a_function_is_kept():
    log, seen = [], {}
    a = torch.tensor(8.0, dtype=D, requires_grad=True)

    def residual(x, a):
        log.append(1)
        seen[len(log)] = 1
        assert len(log) < 50
        return x**3 - a

    custom_root(residual, 1)(lambda s, a: a ** (1 / 3))(None, a).backward()
    assert len(log) > 0
    assert len(seen) > 0


def test_an_error_half_way_does_not_change_python_state():
    config = {"fail": False, "weight": 1.0}
    a = torch.tensor(8.0, dtype=D, requires_grad=True)

    def residual(x, a):
        config["weight"] = 2.0
        if FAIL:
            raise KeyError("mine")
        return x**3 - a

    FAIL = False
    x = custom_root(residual, 1)(lambda s, a: a ** (1 / 3))(None, a)
    assert config["weight"] == 1.0
    config["weight"] = 3.0
    FAIL = True
    torch.autograd.grad(x, a)  # sees what was there
    with pytest.raises(KeyError, match="mine"):
        custom_root(residual, 1)(lambda s, a: a ** (1 / 3))(None, a)
    assert config["weight"] == 3.0


class Strange(dict):
    def copy(self):
        raise RuntimeError("not meant to be copied")


def test_a_container_of_the_users_own_class_is_left_alone():
    own = Strange(weight=1.0)
    a = torch.tensor(8.0, dtype=D, requires_grad=True)
    x = custom_root(lambda x, a: own["weight"] * (x**3 - a), 1)(lambda s, a: a ** (1 / 3))(None, a)
    x.backward()
    torch.testing.assert_close(a.grad, torch.tensor(1 / 12, dtype=D))


def test_buffers_that_are_exchanged_outlive_what_is_replayed_inside():
    module = torch.nn.BatchNorm1d(N)
    with Swap(module, {"running_mean": torch.ones(N)}):
        seen = Surroundings(module.forward).retaken()
        for _ in range(2):
            with seen.replayed():
                module(torch.randn(4, N))
            torch.testing.assert_close(module.running_mean, torch.ones(N))
    torch.testing.assert_close(module.running_mean, torch.zeros(N))
