# SPDX-License-Identifier: Apache-2.0
"""Tensors that a function uses without taking them as arguments: every engine finds them all."""

from __future__ import annotations

import dataclasses
import functools
import types

import pytest
import torch
from torch.func import grad, jvp, vmap

from torchopt.diff.implicit import custom_fixed_point, custom_root, root_jvp, root_vjp
from torchopt.errors import NotDifferentiableError
from torchopt.nn import ImplicitMetaGradientModule
from torchopt.solvers import (
    LBFGS,
    Anderson,
    Broyden,
    FixedPointIteration,
    GradientDescent,
    Newton,
    NewtonCG,
)


def tensor(x, requires_grad=True):
    return torch.tensor(x, dtype=torch.float64, requires_grad=requires_grad)


GLOBAL = tensor(0.25)
TABLE = types.ModuleType("settings_of_a_user")
TABLE.strength = tensor(0.25)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(tensor(0.25))

    def forward(self, x):
        return self.weight * x


@dataclasses.dataclass
class Config:
    strength: torch.Tensor

    def __call__(self, x):
        return self.strength * x


class Slots:
    __slots__ = ("strength",)

    def __init__(self):
        self.strength = tensor(0.25)

    def scaled(self, x):
        return self.strength * x


# Each row: a function x -> 0.25 x with a hidden 0.25, and its name in the message. The names of
# locals are those in the functions below.
def by_closure():
    hidden = tensor(0.25)
    return lambda x: hidden * x, "hidden"


def by_nested_closure():
    hidden = tensor(0.25)

    def outer(x):
        def inner():
            return hidden * x

        return inner()

    return lambda x: outer(x), "hidden"


def by_default():
    def scaled(x, strength=tensor(0.25)):  # noqa: B008 - the point of the row
        return strength * x

    return scaled, "strength"


def by_keyword_default():
    def scaled(x, *, strength=tensor(0.25)):  # noqa: B008 - the point of the row
        return strength * x

    return scaled, "strength"


def by_result():
    weight = tensor(0.5)
    hidden = weight / 2
    return lambda x: hidden * x, "hidden"


def by_list():
    hidden = [1.0, {"k": tensor(0.25)}]
    return lambda x: hidden[1]["k"] * x, "hidden[1]['k']"


def by_module():
    model = Model()
    return lambda x: model(x), "model.weight"


def by_attribute():
    config = Config(tensor(0.25))
    return lambda x: config.strength * x, "config.strength"


def by_wrapper():
    hidden = tensor(0.25)

    @functools.wraps(by_list)
    def wrapper(x):
        return hidden * x

    return functools.lru_cache(maxsize=0)(wrapper), "hidden"


def by_generator():
    hidden = tensor(0.25)
    anonymous = iter(lambda: hidden, None)
    return lambda x: next(anonymous) * x, "a tensor of shape ()"


ROUTES = {
    "a closure": by_closure,
    "a nested closure": by_nested_closure,
    "a default": by_default,
    "a keyword default": by_keyword_default,
    "what was computed": by_result,
    "a list of dicts": by_list,
    "a module": by_module,
    "an attribute": by_attribute,
    "a wrapper": by_wrapper,
    "an iterator": by_generator,
    "a global": lambda: (lambda x: GLOBAL * x, "GLOBAL"),
    "a module of Python": lambda: (lambda x: TABLE.strength * x, "TABLE.strength"),
    "a bound method": lambda: (Slots().scaled, "self.strength"),
    "a partial": lambda: (functools.partial(torch.mul, tensor(0.25)), "argument 0 of a partial"),
    "a callable object": lambda: (Config(tensor(0.25)), "strength"),
    "a callable module": lambda: (Model(), "weight"),
}

# Each row solves x = a - scaled(x), or minimises the like, from 0.
A = tensor(2.0, requires_grad=False)
ZERO = tensor(0.0, requires_grad=False)


def objective_of(scaled):
    return lambda x, a: (x * scaled(x) + (x - a) ** 2) / 2


def module_of(scaled):
    class Inner(ImplicitMetaGradientModule):
        def __init__(self, a):
            super().__init__()
            self.a = a
            self.x = torch.nn.Parameter(tensor(0.0))

        def objective(self):
            return objective_of(scaled)(self.x, self.a)

        def solve(self):
            with torch.no_grad():
                self.x.copy_(self.a / 1.25)
            return self

    return Inner(A.clone().requires_grad_()).solve().x


def root(scaled):
    return custom_root(lambda x, a: x - a + scaled(x), 1)(lambda x, a: a / 1.25)(ZERO, A)


ENGINES = {
    "custom_root": root,
    "custom_root of a gradient": lambda scaled: custom_root(grad(objective_of(scaled)), 1)(
        lambda x, a: a / 1.25
    )(ZERO, A),
    "custom_fixed_point": lambda scaled: custom_fixed_point(lambda x, a: a - scaled(x), 1)(
        lambda x, a: a / 1.25
    )(ZERO, A),
    "root_vjp": lambda scaled: root_vjp(
        lambda x, a: x - a + scaled(x), A / 1.25, (A,), torch.ones_like(A)
    )[0],
    "root_jvp": lambda scaled: root_jvp(
        lambda x, a: x - a + scaled(x), A / 1.25, (A,), (torch.ones_like(A),)
    ),
    "a module": module_of,
    **{
        cls.__name__: lambda scaled, cls=cls: cls()(objective_of(scaled), ZERO, A)
        for cls in (LBFGS, GradientDescent, NewtonCG)
    },
    **{
        cls.__name__: lambda scaled, cls=cls: cls()(lambda x, a: a - scaled(x), ZERO, A)
        for cls in (FixedPointIteration, Anderson, Broyden)
    },
    "Newton": lambda scaled: Newton()(lambda x, a: x - a + scaled(x), ZERO, A),
}


@pytest.mark.parametrize("route", sorted(ROUTES))
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_hidden_tensor_is_refused_by_its_name(engine, route):
    scaled, name = ROUTES[route]()
    with pytest.raises(NotDifferentiableError) as caught:
        ENGINES[engine](scaled)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 400


UNUSED = tensor(7.0)
HARMLESS = {
    "not used": lambda x: 0.25 * x if UNUSED is not None else x,
    "its number": lambda x: UNUSED.item() / 28 * x,
    "detached": lambda x: UNUSED.detach() / 28 * x,
    "its shape": lambda x: 0.25 * x.expand(UNUSED.shape),
}


@pytest.mark.parametrize("use", sorted(HARMLESS))
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_tensor_that_is_not_differentiated_is_not_hidden(engine, use):
    value = ENGINES[engine](HARMLESS[use])
    expected = 0.8 if engine.startswith("root_") else 1.6
    assert abs(value.item() - expected) < 1e-6


@pytest.mark.parametrize("engine", sorted(ENGINES.keys() - {"a module", "root_vjp", "root_jvp"}))
def test_nothing_is_refused_where_no_gradient_can_be_asked_for(engine):
    hidden = tensor(0.25)
    with torch.no_grad():
        assert abs(ENGINES[engine](lambda x: hidden * x).item() - 1.6) < 1e-6


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, h: grad(f)(h),
        lambda f, h: jvp(f, (h,), (h,)),
        lambda f, h: grad(grad(f))(h),
        lambda f, h: vmap(grad(f))(torch.stack([h, h])),
    ],
    ids=["grad", "jvp", "grad of grad", "vmap of grad"],
)
@pytest.mark.parametrize("engine", sorted(ENGINES.keys() - {"a module"}))
def test_a_hidden_tensor_of_a_transform_is_refused(engine, transform):
    with pytest.raises(NotDifferentiableError, match="hidden"):
        transform(lambda hidden: ENGINES[engine](lambda x: hidden * x), GLOBAL.detach())


def test_the_search_does_not_run_properties():
    class Trap:
        @property
        def strength(self):
            raise AssertionError("a search must not run the user's code")

        def scaled(self, x):
            return GLOBAL * x

    with pytest.raises(NotDifferentiableError, match="GLOBAL"):
        root(Trap().scaled)


def by_requires_grad(x, a):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (g,) = torch.autograd.grad((y**3 / 3 - a * y).sum(), y, create_graph=True)
    return g


def by_a_parameter(x, a):
    y = torch.nn.Parameter(x.detach())
    return torch.autograd.grad((y**3 / 3 - a * y).sum(), y, create_graph=True)[0]


@pytest.mark.parametrize("residual", [by_requires_grad, by_a_parameter])
def test_autograd_inside_an_optimality_function_is_refused_with_advice(residual):
    a = tensor(2.0)
    solved = custom_root(residual, argnums=1)(lambda s, a: a.sqrt())
    with pytest.raises(NotDifferentiableError, match=r"use torch\.func\.grad"):
        solved(None, a)


def by_an_augmented_argument(x, a):
    x -= a
    return x


def by_an_out_argument(x, a):
    return torch.sub(x, a, out=x)


@pytest.mark.parametrize("residual", [by_an_augmented_argument, by_an_out_argument])
def test_writes_into_the_solution_never_give_a_silent_gradient(residual):
    a = tensor(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        custom_root(residual, argnums=1)(lambda s, a: a.detach().clone())(None, a).backward()
