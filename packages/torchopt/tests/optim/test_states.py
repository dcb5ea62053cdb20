# SPDX-License-Identifier: Apache-2.0
"""States stay whole: when kept, when a step is refused, across threads, names and dtypes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from optimizers import ROWS
from torch import Tensor, nn

import torchopt
from torchopt.base import GradientTransformation, UninitializedState
from torchopt.errors import MismatchError
from torchopt.optim import TorchOptimizer
from torchopt.optim.named_state import StateGroups
from torchopt.optimizers.native import with_backend

NAMES = sorted(ROWS)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 2), (2,))]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for p in params:
        p.grad = (p.detach() * (step + 1)).cos()


def described(value: Any) -> str:
    """Return what a state or a dictionary of states holds, in full."""

    def plain(x: Any) -> Any:
        return x.detach().clone().tolist() if isinstance(x, Tensor) else x

    return str(torchopt.pytree.tree_map(plain, value))


class Classic:
    """`torchopt.Optimizer`."""

    def __init__(self, impl: Any, params: list[nn.Parameter]) -> None:
        self.params = params
        self.optimizer = torchopt.Optimizer(params, impl)

    def step(self, number: int) -> None:
        give_gradients(self.params, number)
        self.optimizer.step()

    def save(self) -> Any:
        return self.optimizer.state_dict()

    def load(self, saved: Any) -> None:
        self.optimizer.load_state_dict(saved)

    def values(self) -> list[Tensor]:
        return [p.detach() for p in self.params]

    def states(self) -> Any:
        return self.optimizer.state_groups


class Named(Classic):
    """`torchopt.Optimizer` with named states."""

    def save(self) -> Any:
        return self.optimizer.named_state_dict()

    def load(self, saved: Any) -> None:
        self.optimizer.load_named_state_dict(saved)


class Adapter(Classic):
    """`TorchOptimizer`."""

    def __init__(self, impl: Any, params: list[nn.Parameter]) -> None:
        self.params = params
        self.optimizer: Any = TorchOptimizer(params, lambda: impl)

    def states(self) -> Any:
        return self.optimizer._states


class Functional(Classic):
    """`FuncOptimizer`, in place."""

    def __init__(self, impl: Any, params: list[nn.Parameter]) -> None:
        self.params = params
        self.optimizer: Any = torchopt.FuncOptimizer(impl, inplace=True)

    def step(self, number: int) -> None:
        loss = sum((p * (p.detach() * (number + 1)).cos()).sum() for p in self.params)
        self.optimizer.step(loss, tuple(self.params))

    def states(self) -> Any:
        return self.optimizer.optim_state


class Meta(Classic):
    """`MetaOptimizer`."""

    def __init__(self, impl: Any, params: list[nn.Parameter]) -> None:
        self.net = nn.ParameterList(params)
        self.optimizer: Any = torchopt.MetaOptimizer(self.net, impl)

    def step(self, number: int) -> None:
        loss: Any = sum((p * (p.detach() * (number + 1)).cos()).sum() for p in self.net)
        self.optimizer.step(loss)

    def values(self) -> list[Tensor]:
        return [p.detach() for p in self.net]


class MetaNamed(Meta):
    """`MetaOptimizer` with named states."""

    save, load = Named.save, Named.load


KINDS = (Classic, Named, Adapter, Functional, Meta, MetaNamed)
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_kept_stays_that_of_its_step(name: str, kind: type[Classic]) -> None:
    impl = ROWS[name].functional(**ROWS[name].settings[-1])
    stepper = kind(impl, parameters())
    stepper.step(0)
    stepper.step(1)
    kept, values = stepper.save(), [x.clone() for x in stepper.values()]
    expected = described(kept)
    after: list[list[Tensor]] = []
    stepper.step(2)
    after.append([x.clone() for x in stepper.values()])
    for number in range(3, 6):
        stepper.step(number)
    assert described(kept) == expected
    for _ in range(2):  # later steps do not write into what was loaded
        again = kind(impl, [nn.Parameter(x.clone()) for x in values])
        again.load(kept)
        again.step(2)
        after.append([x.clone() for x in again.values()])
        again.step(3)
    assert described(kept) == expected
    for first, second, third in zip(*after):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@kinds
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_follows_the_dtype_of_its_parameters(name: str, kind: type[Classic]) -> None:
    impl = ROWS[name].functional(**ROWS[name].settings[-1])
    old = kind(impl, parameters(torch.float32))
    old.step(0)
    new, fresh = (kind(impl, parameters(torch.bfloat16)) for _ in range(2))
    new.load(old.save())
    for stepper in (new, fresh):
        stepper.step(1)
    assert {x.dtype for x in new.values()} == {torch.bfloat16}
    found, expected = (
        [x.dtype for x in torchopt.pytree.tree_leaves(s.states()) if isinstance(x, Tensor)]
        for s in (new, fresh)
    )
    assert found == expected


def other_states() -> Iterator[tuple[str, GradientTransformation, list[nn.Parameter], str]]:
    another = r"expected ScaleByAdamState, got TraceState|is that of another optimizer: missing"
    yield "another optimizer", torchopt.sgd(0.1, momentum=0.9), parameters(), another
    fewer = r"expected 2 entries, got 1|other parameters: missing \[1\]|match the size of opt"
    yield "another number", torchopt.adam(0.1), parameters()[:1], fewer
    reshaped = [nn.Parameter(p.detach().new_ones(*p.shape, 2)) for p in parameters()]
    other = r"expected shape \(3, 2\), got shape \(3, 2, 2\)"
    yield "other shapes", torchopt.adam(0.1), reshaped, other


@kinds
@pytest.mark.parametrize("case", tuple(other_states()), ids=lambda case: case[0])
def test_the_state_of_something_else_is_refused_and_the_old_one_stays(
    kind: type[Classic], case: Any
) -> None:
    stepper, other = kind(torchopt.adam(0.1), parameters()), kind(*case[1:3])
    stepper.step(0)
    other.step(0)
    before = described(stepper.states())
    values = [x.clone() for x in stepper.values()]
    saved = other.save()

    def load_and_step() -> None:
        stepper.load(saved)
        stepper.step(1)  # a functional optimizer sees its parameters here only

    with pytest.raises(ValueError, match=case[3]) as error:
        load_and_step()
    assert len(str(error.value)) < 400
    for old, new in zip(values, stepper.values()):
        assert torch.equal(old, new)
    if kind is not Functional:
        assert described(stepper.states()) == before


class Refusal(Exception):
    """What a transformation raises."""


def refusing(name: str) -> GradientTransformation:
    """Return an optimizer followed by a stage that raises in its second step."""

    def update(
        updates: Any, state: int, *, params: Any = None, inplace: bool = True
    ) -> tuple[Any, int]:
        if state == 1:
            raise Refusal
        return updates, state + 1

    impl = ROWS[name].functional(**ROWS[name].settings[-1])
    return torchopt.chain(impl, GradientTransformation(lambda params: 0, update))


@kinds
@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_refused_has_written_nothing(name: str, kind: type[Classic]) -> None:
    impl = ROWS[name].functional(**ROWS[name].settings[-1])
    more = [nn.Parameter(torch.ones(2, 2, dtype=torch.float64))]
    if kind in (Classic, Named):
        stepper = kind(impl, parameters())
        stepper.optimizer.add_param_group(more, impl=refusing(name))
        stepper.params += more
    elif kind in (Meta, MetaNamed):
        stepper = kind(impl, parameters())
        assert isinstance(stepper, Meta)
        module = nn.ParameterList(more)
        stepper.optimizer.add_param_group(module, impl=refusing(name))
        plain = stepper.step

        def step(number: int) -> None:
            stepper.optimizer.step(
                sum((p * (p.detach() + number).cos()).sum() for p in (*stepper.net, *module))
            )

        del plain
        stepper.step = step  # type: ignore[method-assign]
    else:
        stepper = kind(refusing(name), parameters())
    stepper.step(0)
    states, values = described(stepper.states()), [x.clone() for x in stepper.values()]
    with pytest.raises(Refusal):
        stepper.step(1)
    assert described(stepper.states()) == states
    for old, new in zip(values, stepper.values()):
        assert torch.equal(old, new)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_parameters_that_cannot_be_written_to_are_refused_before_the_others(backend: Any) -> None:
    good, bad = torch.ones(3), torch.ones(1).expand(3)
    impl = with_backend(torchopt.adam(0.1), backend)
    for groups in ([[good, bad]], [[good], [bad]]):
        optimizer = torchopt.Optimizer(groups[0], impl)
        for group in groups[1:]:
            optimizer.add_param_group(group)
        for p in (good, bad):
            p.grad = torch.ones(3)
        with pytest.raises(torchopt.errors.MismatchError, match="got an expanded tensor"):
            optimizer.step()
        assert good.tolist() == [1.0, 1.0, 1.0]


@pytest.fixture
def _eager_threads() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_eager_threads")
@pytest.mark.parametrize("kind", [Classic, Adapter])
@pytest.mark.parametrize("name", NAMES)
def test_threads_that_share_an_optimizer_lose_no_step(name: str, kind: type[Classic]) -> None:
    steppers = []
    for together in (True, False):
        stepper = kind(ROWS[name].functional(**ROWS[name].settings[-1]), parameters())
        give_gradients(stepper.params, 0)
        steppers.append(stepper)
        raised: list[BaseException] = []

        def run(optimizer: Any = stepper.optimizer, raised: Any = raised) -> None:
            try:
                for _ in range(6):
                    optimizer.step()
                    optimizer.state_dict()
            except BaseException as error:
                raised.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
            if not together:
                thread.join()
        for thread in threads:
            thread.join()
        assert raised == []
    for first, second in zip(*(stepper.values() for stepper in steppers)):
        assert torch.equal(first, second)


def overlapping() -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    yield "shifted", lambda: [(base := torch.arange(1.0, 7.0))[0:4], base[2:6]]
    yield "inside", lambda: [(base := torch.arange(1.0, 7.0)), base[1:3]]
    yield "the same", lambda: [(base := torch.arange(1.0, 7.0))[:], base[:]]


@pytest.mark.parametrize("case", tuple(overlapping()), ids=lambda case: case[0])
@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_share_memory_step_as_the_reference(name: str, case: Any) -> None:
    results = []
    for backend in ("auto", "reference"):
        params = case[1]()
        impl = ROWS[name].functional(**ROWS[name].settings[-1])
        optimizer = torchopt.Optimizer(params, with_backend(impl, backend))
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        results.append(params[0].clone())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_the_memory_of_parameters_are_those_before_the_step(name: str) -> None:
    results = []
    for backend in ("auto", "reference"):
        base = torch.arange(1.0, 9.0)
        p, q = base[0:4], base[4:8]
        impl = ROWS[name].functional(**ROWS[name].settings[-1])
        optimizer = torchopt.Optimizer([p, q], with_backend(impl, backend))
        p.grad, q.grad = base[2:6], base[0:4]
        for _ in range(3):
            optimizer.step()
        results.append(base.clone())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        lambda a, b, c: {"a.b": a, "a": {"b": b}, "c": c},
        lambda a, b, c: {"a": {"b.c": a, "b": {"c": b}}, "a.b": {"c": c}},
        lambda a, b, c: [{"0.1": a}, [b, {"1": c}]],
        lambda a, b, c: {"x#2": a, "x": b, "x.0": [c]},
    ],
)
def test_names_of_different_parameters_differ(keys: Any) -> None:
    params = [torch.ones(1, requires_grad=True) for _ in range(3)]
    optimizer = torchopt.Adam(keys(*params), lr=0.1)
    for i, p in enumerate(params):
        p.grad = torch.full((1,), 10.0**i)
    optimizer.step()
    before = [x.item() for x in optimizer.state_groups[0][0].mu]
    saved = optimizer.named_state_dict()
    assert len(set(saved["groups"][0]["params"])) == 3
    assert len(saved["groups"][0]["state"]) == 9
    optimizer.load_named_state_dict(saved)
    assert [x.item() for x in optimizer.state_groups[0][0].mu] == before


def test_several_groups_step_natively_and_as_one_would() -> None:
    results = []
    for split in (False, True):
        params = parameters()
        impl = with_backend(torchopt.adam(0.1), "native" if split else "reference")
        optimizer = torchopt.Optimizer(params[:1] if split else params, impl)
        if split:
            optimizer.add_param_group(params[1:])
        for number in range(4):
            give_gradients(params, number)
            if number == 2:
                params[1].grad = None
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_in_place_that_is_refused_has_written_no_state(name: str) -> None:
    """Leaves that took different numbers of steps are served by several native calls."""
    impl = with_backend(ROWS[name].functional(**ROWS[name].settings[-1]), "auto")
    params = tuple(p.detach() for p in parameters())
    grads: list[Any] = [torch.ones_like(p) for p in params]
    _, state = impl.update((grads[0], None), impl.init(params), params=params)
    before = described(state)
    with pytest.raises(torchopt.errors.MismatchError, match=r"at \$\[1\]: .*expected shape "):
        impl.update((grads[0], grads[1].new_ones(7)), state, params=params)
    assert described(state) == before


def test_states_of_fewer_groups_are_refused_where_torch_takes_the_optimizer_for_its_own() -> None:
    params = parameters()
    first, second = (torchopt.Adam(params[:1], lr=0.1) for _ in range(2))
    second.add_param_group(params[1:])
    (saved,), (loaded,) = first, second
    with pytest.raises(ValueError, match="a state for each of 2 groups, got 1"):
        loaded.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="a state for each of 1 groups, got 0"):
        torchopt.MetaSGD(nn.Linear(1, 1), lr=0.1).load_state_dict(())


def test_a_state_passes_between_optimizers_in_place_and_differentiable() -> None:
    """Both kinds of optimizers save and load by `StateGroups`, in both formats."""
    net = nn.Linear(2, 1)
    classic = torchopt.Adam(dict(net.named_parameters()), lr=0.1)
    meta = torchopt.MetaAdam(net, lr=0.1)
    net(torch.ones(2)).sum().backward()
    classic.step()
    assert isinstance(classic, StateGroups)
    assert isinstance(meta, StateGroups)
    meta.load_named_state_dict(classic.named_state_dict())
    saved, loaded = map(torchopt.pytree.tree_leaves, (classic.state_dict(), meta.state_dict()))
    assert sum(isinstance(x, Tensor) and x.ndim > 0 for x in saved) == 4
    for x, y in zip(saved, loaded, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=0)


def test_a_first_step_that_is_refused_leaves_no_state() -> None:
    """The parameters may be others in the next step."""
    functional = torchopt.FuncOptimizer(torchopt.adam(0.1))
    with pytest.raises(ValueError, match="expected a scalar loss"):
        functional.step(torch.ones(3), (torch.ones(2, requires_grad=True),))
    assert functional.optim_state == UninitializedState()
    p = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (stepped,) = functional.step(p.sum(), (p,))
    torch.testing.assert_close(stepped, torch.full_like(p, 0.9), rtol=1e-7, atol=0.0)
    classic = torchopt.Adam([p], lr=0.1)
    expanded = torch.ones(1).expand(2).requires_grad_()
    classic.add_param_group([expanded])
    p.grad, expanded.grad = torch.ones(5, dtype=torch.float64), torch.ones(2)
    with pytest.raises(MismatchError, match="got an expanded tensor"):
        classic.step()
    assert classic.state_groups == [UninitializedState()] * 2


def test_parameters_are_given_as_a_tree_or_as_an_iterable() -> None:
    nets = [nn.Linear(2, 1, bias=False).double() for _ in range(2)]
    optimizer = torchopt.SGD(nets[0].parameters(), lr=0.5)
    optimizer.add_param_group(nets[1].parameters())
    before = [net.weight.detach().clone() for net in nets]
    for net in nets:
        net.weight.sum().backward()
    optimizer.step()
    for net, old in zip(nets, before):
        torch.testing.assert_close(net.weight.detach(), old - 0.5, rtol=1e-15, atol=0.0)
    for add in (lambda x: torchopt.SGD(x, lr=0.1), optimizer.add_param_group):
        with pytest.raises(TypeError, match=r"got a module \(Linear\); pass module.parameters"):
            add(nn.Linear(1, 1))
        with pytest.raises(ValueError, match="a generator such as .* is empty after its first use"):
            add(iter(()))


USERS_STATES: dict[str, Callable[[Any], Any]] = {
    "tree": lambda params: torchopt.pytree.tree_map(torch.zeros_like, params),
    "tensor": lambda params: torch.zeros((), dtype=torch.float64),
    "number": lambda params: 0.0,
    "tuple": lambda params: (torch.zeros(3, dtype=torch.float64), {"m": torch.zeros(2).double()}),
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", sorted(USERS_STATES))
def test_states_of_other_transformations_have_names(name: str, alone: bool) -> None:
    def update(
        updates: Any, state: Any, *, params: Any = None, inplace: bool = True
    ) -> tuple[Any, Any]:
        return updates, torchopt.pytree.tree_map(lambda x: x + 1, state)

    counting = GradientTransformation(USERS_STATES[name], update)
    impl = counting if alone else torchopt.chain(counting, torchopt.adam(0.1), counting)
    first, second = (torchopt.Optimizer(parameters(), impl) for _ in range(2))
    for number in range(2):
        give_gradients(first.param_groups[0], number)  # type: ignore[arg-type]
        first.step()
    saved = first.named_state_dict()
    values = saved["groups"][0]["state"]
    assert len(values) == len(torchopt.pytree.tree_leaves(first.state_groups))
    second.load_named_state_dict(saved)
    assert described(second.state_groups) == described(first.state_groups)
    del values[next(iter(values))]
    with pytest.raises(ValueError, match=r"missing \[state"):
        second.load_named_state_dict(saved)


@pytest.mark.parametrize("wrong", [numpy.zeros(2), 0.5, "0.5"], ids=["array", "number", "str"])
def test_a_state_without_tensors_is_refused(wrong: Any) -> None:
    optimizer = torchopt.Adam(parameters(), lr=0.1)
    (moments, *rest) = optimizer.impl.init(parameters())
    with pytest.raises(ValueError, match=r"mu\[1\]: expected a tensor of shape \(2,\), got "):
        optimizer.load_state_dict(((moments._replace(mu=[moments.mu[0], wrong]), *rest),))
    assert optimizer.state_groups == [UninitializedState()]
