# SPDX-License-Identifier: Apache-2.0
"""A traced step equals the eager step, for any number of steps, or the loop says why not."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import optimizers
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from unrolled_loops import loss_of, outer, problem, worst

import torchopt
from torchopt.diff.explicit.memory import CountBytes
from torchopt.diff.explicit.trace import programs
from torchopt.errors import NotDifferentiableError, NotTraceableError
from torchopt.params import functional_call

TOLERANCE = 1e-12
QUICK = ("adamax", "sgd-momentum")
READING = {"shampoo", "soap"}
CASES = [
    pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in optimizers.SMOOTH
    if case not in READING
]
WAYS = [  # each value with each other value
    ("reverse", "all", None),
    ("reverse", 2, 3),
    ("reverse", "1MiB", 3),
    ("mixed", "all", 3),
    ("mixed", 2, None),
    ("mixed", "1MiB", None),
    ("first_order", "all", 3),
    ("first_order", 2, None),
    ("forward", "all", 3),
]


def gradients(
    optimizer: Any = torchopt.sgd,
    hypers: dict[str, Any] | None = None,
    tasks: int | None = None,
    **options: Any,
) -> tuple[Any, list[Tensor]]:
    """Return the gradients of everything that a run returns, and the tensors they belong to."""
    params, batch, scale = problem(tasks)
    params = {k: x.clone().requires_grad_() for k, x in params.items()}
    batch = tuple(x.clone().requires_grad_() for x in batch)
    scale = scale.clone().requires_grad_()
    if hypers is None:
        values = {"lr": 0.1, "momentum": 0.9}
        hypers = {
            k: torch.tensor(x, dtype=torch.float64, requires_grad=True) for k, x in values.items()
        }
    dims = None if tasks is None else (None, 0, None)
    inner = torchopt.inner_loop(loss_of, optimizer, tasks=dims, **{"steps": 4, **options})
    result = inner(params, batch, scale, **hypers)
    numbers = [x for x in hypers.values() if isinstance(x, Tensor) and x.requires_grad]
    inputs = [*params.values(), *batch, scale, *numbers]
    total = outer(result.params, result.losses, result.state)
    return torch.autograd.grad(total, inputs, allow_unused=True), inputs


def difference(**options: Any) -> float:
    """Return the difference between a traced and an eager run."""
    expected, inputs = gradients(**options)
    return worst(expected, gradients(**options, execute="trace")[0], inputs)


@pytest.mark.filterwarnings("ignore:.*expected fewer scalars:UserWarning")
@pytest.mark.parametrize(("derivative", "keep", "window"), WAYS)
def test_a_traced_run_has_the_gradient_of_the_run(
    derivative: str, keep: Any, window: int | None
) -> None:
    assert difference(derivative=derivative, keep=keep, window=window) < TOLERANCE


def test_a_batch_of_tasks_is_traced_as_one_program() -> None:
    assert difference(derivative="mixed", tasks=3) < TOLERANCE


def test_forward_mode_is_used_for_few_scalars() -> None:
    def found(execute: str) -> tuple[Tensor, ...]:
        start = torch.tensor([1.0, 2.0], dtype=torch.float64)
        numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.01)]
        inner = torchopt.inner_loop(
            _dropped, torchopt.adamax, steps=4, derivative="forward", execute=execute
        )
        torch.manual_seed(0)
        result = inner(start, start * 3, lr=numbers[0], eps=numbers[1])
        return torch.autograd.grad(result.params.sum() + result.losses.sum(), numbers)

    torch.testing.assert_close(found("trace"), found("eager"), rtol=1e-12, atol=0)


def _dropped(w: Tensor, x: Tensor) -> Tensor:
    return nn.functional.dropout((w - x) ** 4, 0.5).sum()


@pytest.mark.parametrize("case", CASES)
def test_optimizers_of_every_kind_are_traced(case: str) -> None:
    values = optimizers.hypers_of(case).values()
    numbers = [torch.tensor(float(x), dtype=torch.float64, requires_grad=True) for x in values]
    make = optimizers.ROWS[optimizers.SMOOTH[case][0]].functional
    hypers = optimizers.with_hypers(case, numbers)
    assert difference(optimizer=make, hypers=hypers, derivative="mixed") < TOLERANCE


def test_the_state_of_a_traced_run_goes_on_in_one_that_is_not() -> None:
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    results = []
    for ways in (("trace", "eager"), ("eager", "trace"), ("eager", "eager")):
        params, state = start, None
        for way in ways:
            inner = torchopt.inner_loop(_quartic, torchopt.adamax, steps=2, execute=way)
            params, state, *_ = inner(params, start * 3, state=state)
        results.append((params, torchopt.tree.tree_leaves(state)))
    for params, state in results[:2]:
        assert torch.allclose(params, results[2][0], rtol=1e-12)
        assert [type(x) for x in state] == [type(x) for x in results[2][1]]


def _quartic(w: Tensor, x: Tensor) -> Tensor:
    return ((w - x) ** 4).sum()


def run(
    loss: Any,
    execute: str,
    steps: int = 3,
    lr: Any = 0.01,
    make: Any = torchopt.sgd,
    **options: Any,
) -> Tensor:
    w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    inner = torchopt.inner_loop(loss, make, steps=steps, execute=execute, **options)
    result = inner(w, torch.ones_like(w), lr=lr)
    (found,) = torch.autograd.grad((result.params**2).sum(), w)
    return found


def assert_same(loss: Any, **options: Any) -> None:
    expected = run(loss, "eager", **options)
    torch.testing.assert_close(run(loss, "trace", **options), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("compiler", ["trace", pytest.param("compile", marks=pytest.mark.slow)])
def test_one_trace_serves_any_number_of_steps(compiler: str) -> None:
    for keep, count in (("all", 1), ("steps", 2)):  # a step and its adjoint are one program, or two
        counted = []
        for steps in (5, 10, 50, 500):
            counted.append(programs().traced)
            expected = run(_quartic, "eager", steps=steps, lr=1e-4)
            got = run(_quartic, compiler, steps=steps, lr=1e-4, keep=keep)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        assert counted[0] + count == counted[1] == counted[3] == programs().traced


class CountProducts(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_the_adjoint_does_not_repeat_products_of_its_step() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ w) @ w).square().sum()

    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    counted, found = [], []
    for execute, keep in (("eager", "all"), ("trace", "all"), ("trace", "steps")):
        inner = torchopt.inner_loop(loss, torchopt.adam(0.1), steps=3, execute=execute, keep=keep)
        inner(w, x).params.sum().backward()  # traced here
        with CountProducts() as products:
            found.append(torch.autograd.grad(inner(w, x).params.square().sum(), w))
        counted.append(products.count)
    assert counted[1] <= counted[0] < counted[2]
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-12, atol=1e-14)


def _in_place(w: Tensor, x: Tensor) -> Tensor:
    y = w - x
    before = y + 1.0
    y.add_(2.0)
    after = y + 1.0  # the same operation on another value
    return (before * after.square()).sum()


def _linear(w: Tensor, x: Tensor) -> Tensor:
    return (w * x).sum()


def _with_aux(w: Tensor, x: Tensor) -> Any:
    aux = {"count": torch.tensor(3), "of": w * x, "signs": w > x, "rows": COLUMN, "is": True}
    return (w**3 * x).sum(), aux


@pytest.mark.parametrize("loss", [_quartic, _in_place, _linear, _with_aux])
def test_losses_of_steps_and_another_backward_pass_are_exact(loss: Any) -> None:
    found = []
    for execute in ("eager", "trace"):
        w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
        inner = torchopt.inner_loop(loss, torchopt.sgd(1e-3), steps=3, execute=execute)
        result = inner(w, torch.full_like(w, 0.5))
        outer = (result.params**2).sum()
        first = torch.autograd.grad(outer, w, retain_graph=True)
        again = torch.autograd.grad(outer, w, retain_graph=True)
        found.append([*first, *again, *torch.autograd.grad(outer + result.losses.sum(), w)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


def test_optimizers_that_count_are_traced_once() -> None:
    before = programs().traced
    for steps in (3, 4):
        run(_quartic, "trace", steps=steps, make=torchopt.adam)
    assert programs().traced == before + 1


def test_another_number_or_shape_causes_a_logged_new_trace(caplog: Any) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return ((w - x) ** 2).sum() * factor

    factor = 2.0
    assert_same(loss)
    with caplog.at_level(logging.INFO, "torchopt.diff.explicit.trace"):
        assert_same(loss)
        assert not caplog.records
        factor = 3.0
        assert_same(loss)
        assert_same(loss, keep="steps")
    assert [r.message.partition(" of")[0] for r in caplog.records] == [
        "traced a step",
        "traced a step",
        "traced the adjoint",
    ]


def test_tensors_that_a_loss_holds_are_not_constants() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (((w - x) * factor) ** 2).sum()

    factor = torch.tensor(2.0, dtype=torch.float64)
    assert_same(loss)
    before = programs().traced
    factor.mul_(2)
    assert_same(loss)
    factor = torch.tensor(0.5, dtype=torch.float64)
    assert_same(loss, lr=torch.tensor(0.01))
    between = programs().traced
    assert_same(loss, lr=torch.tensor(0.02))
    assert programs().traced == between == before + 1  # for a tensor instead of a number


@pytest.mark.parametrize(
    ("execute", "keep"),
    [("trace", "all"), ("trace", "steps"), ("trace", 1), ("eager", "steps"), ("eager", 1)],
)
@pytest.mark.parametrize(("of_losses", "again"), [(False, False), (True, False), (False, True)])
def test_a_tensor_that_was_changed_before_the_backward_pass_is_named(
    execute: str, keep: Any, of_losses: bool, again: bool
) -> None:
    factor = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(
        lambda w, x: ((w * factor).sin() ** 2).sum(),
        torchopt.adam(0.1),
        steps=3,
        execute=execute,
        keep=keep,
    )
    result = inner(w)
    outer = result.params.sum() + (result.losses.sum() if of_losses else 0.0)
    if again:
        outer.backward(retain_graph=True)
    factor.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place") as error:
        outer.backward()
    assert "factor" in str(error.value)
    assert len(str(error.value)) < 400


def test_a_mask_is_drawn_again_in_each_step_and_in_its_adjoint() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return nn.functional.dropout((w - x) ** 4, 0.5).sum()

    for options in ({}, {"keep": 1}, {"derivative": "mixed"}):
        assert_same(loss, **options)


@pytest.mark.filterwarnings("ignore:.*expected fewer scalars:UserWarning")
@pytest.mark.parametrize("derivative", ["reverse", "forward"])
def test_each_step_has_its_own_batch(derivative: str) -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.5, 1.0], [3.0, 2.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    rows = torch.ones(3, 2, dtype=torch.float64)
    found = []
    for way in [(), ("eager", x), ("trace", x), ("trace", list(x)), ("trace", [x[0], x[1:], rows])]:
        execute, batches = way or ("eager", [x[0], x[1:], rows])
        inner = torchopt.inner_loop(
            _quartic, torchopt.sgd, steps=3, execute=execute, derivative=derivative
        )
        result = inner(w, batches=batches, lr=0.01)
        found.append(torch.autograd.grad((result.params**2).sum(), (w, x)))
    for got in found[2:4]:
        torch.testing.assert_close(got, found[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[4], found[0], rtol=1e-12, atol=0)  # batches of other shapes


def branches(w: Tensor, x: Tensor) -> Tensor:
    return (w**2).sum() if w.sum() > 0 else (w**4).sum()


def reads(w: Tensor, x: Tensor) -> Tensor:
    return (w**2).sum() * HELD.item()


def counts(w: Tensor, x: Tensor) -> Tensor:
    CALLS.append(1)
    return (w**2).sum()


def draws(w: Tensor, x: Tensor) -> Tensor:
    return (w**2).sum() * random.random()


def masks(w: Tensor, x: Tensor) -> Tensor:
    return (w[w > 0] ** 2).mean()


def leaves_torch(w: Tensor, x: Tensor) -> Tensor:
    return (w**2).sum() * float(w.detach().numpy()[0])


def lists(w: Tensor, x: Tensor) -> Tensor:
    return (w**2).sum() * x.tolist()[0]


def writes(w: Tensor, x: Tensor) -> Tensor:
    HELD.mul_(2)
    return (w**2).sum()


def normalizes(w: Tensor, x: Tensor) -> Tensor:
    return (NORM(torch.stack([w, w * w, x])) ** 2 * w).sum()


HELD, NORM = torch.tensor(2.0), nn.BatchNorm1d(3, affine=False, dtype=torch.float64)
CALLS: list[int] = []
COLUMN = torch.arange(3)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (branches, "branches: return"),
        (reads, "of HELD in reads"),
        (counts, "changes CALLS"),
        (draws, "random or numpy"),
        (masks, "in masks"),
        (leaves_torch, "numpy"),
        (lists, "tolist"),
        (writes, "changes HELD"),
    ],
)
def test_operations_that_cannot_be_traced_are_named(loss: Callable[..., Tensor], said: str) -> None:
    with pytest.raises(NotTraceableError, match="inner_loop: execute: expected") as error:
        run(loss, "trace")
    assert said in str(error.value)
    assert len(str(error.value)) < 400


GRU = nn.GRU(2, 3, dtype=torch.float64)
SEQUENCES = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 2, 2)


def packs(p: Any, x: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, [3, 1])
    return functional_call(GRU, p, (packed,))[0].data.square().sum()


def takes_packed(p: Any, packed: PackedSequence) -> Tensor:
    return functional_call(GRU, p, (packed,))[0].data.square().sum()


def unpacks(p: Any, packed: PackedSequence) -> Tensor:
    found, _ = pad_packed_sequence(packed)
    return functional_call(GRU, p, found)[0].square().sum()


@pytest.mark.parametrize("tasks", [None, (0, None)])
@pytest.mark.parametrize("derivative", ["reverse", "first_order"])
@pytest.mark.parametrize("loss", [packs, takes_packed, unpacks])
def test_packed_sequences_are_named(loss: Any, derivative: str, tasks: Any) -> None:
    batch = SEQUENCES if loss is packs else pack_padded_sequence(SEQUENCES, [3, 1])
    p = {k: x.detach() for k, x in GRU.named_parameters()}
    if tasks:
        p = {k: torch.stack([x, -x]) for k, x in p.items()}
    lr = torch.tensor(0.1, requires_grad=True)
    inner = torchopt.inner_loop(
        loss, torchopt.sgd, steps=2, derivative=derivative, execute="trace", tasks=tasks
    )
    with pytest.raises(NotTraceableError, match="a packed sequence.* Use padded sequences") as told:
        inner(p, batch, lr=lr)
    assert len(str(told.value)) < 400
    with pytest.raises(NotTraceableError, match="a packed sequence"), torch.no_grad():
        inner(p, batch, lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(READING))
def test_an_optimizer_that_reads_tensors_on_the_host_is_named(case: str) -> None:
    with pytest.raises(NotTraceableError, match="depends on a value"):
        test_optimizers_of_every_kind_are_traced(case)


def test_an_optimizer_that_branches_on_its_count_is_named() -> None:
    with pytest.raises(NotTraceableError, match="refresh"):
        difference(optimizer=torchopt.shampoo, hypers={"lr": 0.1})


@pytest.mark.parametrize(
    ("derivative", "keep"), [("reverse", "all"), ("mixed", 1), ("forward", "all")]
)
def test_statistics_of_a_batch_norm_are_written_once_a_step(derivative: str, keep: Any) -> None:
    found = []
    for execute in ("eager", "trace"):
        NORM.reset_running_stats()
        gradient = run(normalizes, execute, derivative=derivative, keep=keep)
        found.append((gradient, copy.deepcopy(NORM.state_dict())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    assert found[1][1]["num_batches_tracked"] == 3


def test_a_module_in_evaluation_mode_is_traced() -> None:
    NORM.eval()
    assert_same(normalizes)
    NORM.train()


def test_a_run_keeps_within_its_budget() -> None:
    def peak(keep: str) -> int:
        inner = torchopt.inner_loop(loss, torchopt.sgd, steps=24, keep=keep, execute="trace")
        inner(w, x, lr=0.1, momentum=0.9).params.sum().backward()
        with CountBytes() as count:
            inner(w, x, lr=0.1, momentum=0.9).params.sum().backward()
        return int(count.peak)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return ((x @ w).tanh() @ w).square().mean()

    w = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(4, 64)
    assert 2**18 < peak("512KiB") <= 2**19 < peak("all")


def test_a_tensor_that_would_get_no_gradient_raises() -> None:
    held = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match="held"):
        run(lambda w, x: (w * held).sum() ** 2, "trace")


def test_unsupported_uses_of_a_traced_loop_raise() -> None:
    w = torch.ones(3, requires_grad=True)
    inner = torchopt.inner_loop(_quartic, torchopt.sgd, steps=2, execute="trace")
    found = inner(w, torch.zeros(3), lr=0.1).params.sum()
    with pytest.raises(NotTraceableError, match="differentiated again"):
        torch.autograd.grad(found, w, create_graph=True)
    with pytest.raises(NotTraceableError, match="outside of torch.func"):
        torch.func.grad(lambda w: inner(w, torch.zeros(3), lr=0.1).params.sum())(w)
    with pytest.raises(ValueError, match="execute"):
        torchopt.inner_loop(_quartic, torchopt.sgd, steps=2, execute="fast")


def test_the_order_of_a_dict_counts() -> None:
    """A loss that iterates over a dict depends on the order of its keys."""

    def walked(x: Any) -> Any:
        return sum(i * v for i, v in enumerate(x.values()))

    def loss(w: Any, batch: Any, meta: Any) -> Tensor:
        weight = walked(w) * walked(batch) * walked(meta)
        return weight * (w["a"] ** 2 + w["b"] ** 2).sum()

    def ends(*flip: bool, execute: str) -> list[Tensor]:
        def tree(a: float, b: float, back: bool) -> Any:
            items = [("a", torch.tensor(a).double()), ("b", torch.tensor(b).double())]
            return dict(reversed(items) if back else items)

        inner = torchopt.inner_loop(loss, torchopt.sgd(0.01), steps=2, execute=execute)
        params = inner(*(tree(1.0 + i, 6.0 - i, back) for i, back in enumerate(flip))).params
        return [params["a"], params["b"]]

    expected = [ends(*flip, execute="eager") for flip in itertools.product((False, True), repeat=3)]
    found = [ends(*flip, execute="trace") for flip in itertools.product((False, True), repeat=3)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len({tuple(map(float, x)) for x in expected}) == 8


def test_the_strides_of_an_argument_count() -> None:
    def loss(w: Tensor, batch: Any, x: Tensor) -> Tensor:
        return (x.sum() * w ** (2 if x.is_contiguous() else 4)).sum()

    w, x = torch.randn(3, requires_grad=True), torch.rand(2, 2, requires_grad=True)
    for given in (x, x.t()):
        eager, traced = (
            torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, execute=execute)(w, None, given)
            for execute in ("eager", "trace")
        )
        torch.testing.assert_close(traced.params, eager.params)


def test_the_attributes_of_an_argument_count() -> None:
    given = SimpleNamespace(power=2)

    def loss(w: Tensor, batch: Any, more: Any) -> Tensor:
        return (w**more.power).sum()

    w = torch.randn(3, requires_grad=True)
    for power in (2, 4):
        given.power = power
        eager, traced = (
            torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, execute=execute)(w, None, given)
            for execute in ("eager", "trace")
        )
        torch.testing.assert_close(traced.params, eager.params)


def test_the_cache_of_an_inner_loop_follows_the_arguments_of_the_optimizer() -> None:
    rates = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.01, 0.02)]
    w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)

    def changed(rate: Tensor) -> Tensor:
        with torch.no_grad():
            rate.mul_(0.5)
        return rate

    def tried(inner: Any, lr: Any) -> list[Tensor]:
        wanted = [w, *([lr] if isinstance(lr, Tensor) and lr.requires_grad else [])]
        return list(torch.autograd.grad(inner(w, w.detach() * 3, lr=lr).params.sum(), wanted))

    loops = [torchopt.inner_loop(_quartic, torchopt.adam, steps=2, execute=x) for x in EXECUTIONS]
    given = [*rates, rates[0], 0.01, 0.02, 1, True, rates[0].detach(), rates[1] * 1.0]
    given += [changed]
    for lr in given:
        lr = lr(rates[0]) if callable(lr) else lr
        fresh = torchopt.inner_loop(_quartic, torchopt.adam, steps=2)
        for inner in loops:
            found, expected = tried(inner, lr), tried(fresh, lr)
            assert len(found) == len(expected)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


EXECUTIONS = ("eager", "trace")


def test_a_copy_of_an_inner_loop_starts_with_an_empty_cache() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    inner = torchopt.inner_loop(_quartic, torchopt.adam, steps=2, execute="trace")
    expected = inner(w, w * 3, lr=0.1).params
    for again in (copy.deepcopy(inner), pickle.loads(pickle.dumps(inner))):
        assert torch.equal(again(w, w * 3, lr=0.1).params, expected)
        assert again == inner


@pytest.mark.parametrize(("unroll", "tasks"), [(2, None), (3, None), (4, 3), (9, None)])
def test_several_steps_a_program_have_the_gradient_of_the_run(
    unroll: int, tasks: int | None
) -> None:
    expected, inputs = gradients(tasks=tasks)
    found, _ = gradients(tasks=tasks, execute="trace", unroll=unroll)
    assert worst(expected, found, inputs) < TOLERANCE


@pytest.mark.parametrize("loss", [_quartic, _linear, _with_aux])
def test_several_steps_a_program_take_losses_and_another_backward_pass(loss: Any) -> None:
    found = []
    for options in ({}, {"execute": "trace", "unroll": 2}):
        w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
        batches = [torch.full_like(w, 0.5 + k).detach() for k in range(5)]
        inner = torchopt.inner_loop(loss, torchopt.sgd(1e-3), steps=5, **options)
        for given in ({"batches": batches}, {"batches": {"x": torch.stack(batches)}}):
            if isinstance(given["batches"], dict):
                inner = torchopt.inner_loop(_of_dict(loss), torchopt.sgd(1e-3), steps=5, **options)
            result = inner(w, **given)
            outer = (result.params**2).sum()
            first = torch.autograd.grad(outer, w, retain_graph=True)
            again = torch.autograd.grad(outer, w, retain_graph=True)
            found.append([*first, *again, *torch.autograd.grad(outer + result.losses.sum(), w)])
    half = len(found) // 2
    torch.testing.assert_close(found[half:], found[:half], rtol=1e-12, atol=0)


def _of_dict(loss: Any) -> Any:
    return lambda w, batch: loss(w, batch["x"])


def test_several_steps_a_program_are_traced_once() -> None:
    before = programs().traced
    for steps in (5, 10, 50):
        expected = run(_quartic, "eager", steps=steps, lr=1e-4)
        got = run(_quartic, "trace", steps=steps, lr=1e-4, unroll=5)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert programs().traced == before + 1


def test_several_steps_a_program_that_cannot_be_kept_raise() -> None:
    with pytest.raises(NotTraceableError, match="unroll=1 for a loss that draws random numbers"):
        run(_dropped, "trace", unroll=3)
    for options in (
        {"keep": "steps"},
        {"derivative": "mixed"},
        {"window": 2},
        {"execute": "eager"},
    ):
        with pytest.raises(ValueError, match=r"unroll: expected execute=.*for 2 steps a program"):
            torchopt.inner_loop(
                _quartic, torchopt.sgd, steps=3, unroll=2, **{"execute": "trace", **options}
            )
