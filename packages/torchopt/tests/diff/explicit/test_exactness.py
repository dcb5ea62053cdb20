# SPDX-License-Identifier: Apache-2.0
"""Every way of differentiating a loop gives the gradient of the plain unrolled loop."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import optimizers
import pytest
import torch
from torch import Tensor
from unrolled_loops import loss_of, outer, problem, unrolled, worst

import torchopt

TOLERANCE = 1e-12
STEPS = 4


def leaves() -> tuple[Any, Any, Tensor, Tensor]:
    params, batch, scale = problem()
    params = {k: x.clone().requires_grad_() for k, x in params.items()}
    batch = tuple(x.clone().requires_grad_() for x in batch)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    return params, batch, scale.clone().requires_grad_(), lr


WAYS = list(itertools.product(("reverse", "mixed", "first_order"), ("all", "steps", 1, 2, 3)))


@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize(("derivative", "keep"), WAYS)
def test_a_run_has_the_gradient_of_the_unrolled_loop(
    derivative: str, keep: Any, window: int | None
) -> None:
    params, batch, scale, lr = leaves()
    inputs = [*params.values(), *batch, scale, lr]
    parts = unrolled(
        loss_of,
        torchopt.adam(lr=lr, eps=1e-2),
        params,
        [batch] * STEPS,
        scale,
        window=window,
        first_order=derivative == "first_order",
    )
    expected = torch.autograd.grad(outer(*parts), inputs, allow_unused=True)
    inner = torchopt.inner_loop(
        loss_of, torchopt.adam, steps=STEPS, derivative=derivative, keep=keep, window=window
    )
    result = inner(params, batch, scale, lr=lr, eps=1e-2)
    assert torch.equal(result.losses, parts[1])
    got = torch.autograd.grad(
        outer(result.params, result.losses, result.state), inputs, allow_unused=True
    )
    assert worst(expected, got, inputs) < TOLERANCE


@pytest.mark.parametrize("window", [None, 2])
def test_forward_mode_gives_the_same_gradient(window: int | None) -> None:
    params, batch, scale, lr = leaves()
    plain = {k: x.detach() for k, x in params.items() if k != "s"}
    batch = tuple(x.detach() for x in batch)
    inputs = [params["s"], scale, lr]
    given = {**plain, "s": params["s"]}
    inner = torchopt.inner_loop(
        loss_of, torchopt.adam, steps=STEPS, derivative="forward", window=window
    )
    result = inner(given, batch, scale, lr=lr, eps=1e-2)
    got = torch.autograd.grad(outer(result.params, result.losses, result.state), inputs)
    optimizer = torchopt.adam(lr=lr, eps=1e-2)
    parts = unrolled(loss_of, optimizer, given, [batch] * STEPS, scale, window=window)
    expected = torch.autograd.grad(outer(*parts), inputs, allow_unused=True)
    assert worst(expected, got, inputs) < TOLERANCE


# (derivative, keep, whether the hyper-parameters are given to the call)
OF_OPTIMIZERS: list[tuple[str, Any, bool]] = [
    ("reverse", "all", False),
    ("reverse", "steps", True),
    ("mixed", 2, False),
    ("first_order", 1, True),
    ("forward", "all", False),
]


@pytest.mark.parametrize("case", list(optimizers.SMOOTH))
def test_every_optimizer_and_each_of_its_hyper_parameters(case: str) -> None:
    make = optimizers.ROWS[optimizers.SMOOTH[case][0]].functional
    params, batch, scale = problem()
    params = {k: x.requires_grad_() for k, x in params.items()}
    scale.requires_grad_()
    hypers = [
        torch.tensor(float(x), dtype=torch.float64, requires_grad=True)
        for x in optimizers.hypers_of(case).values()
    ]
    settings = optimizers.with_hypers(case, hypers)
    inputs = [params["s"], *hypers, scale, params["b"], params["unused"], params["w"]]

    def expected(*, first_order: bool) -> tuple[Tensor | None, ...]:
        parts = unrolled(
            loss_of, make(**settings), params, [batch] * 3, scale, first_order=first_order
        )
        return torch.autograd.grad(outer(*parts), inputs, allow_unused=True)

    full, first = expected(first_order=False), expected(first_order=True)
    # The derivative of an eigenbasis divides by differences of eigenvalues.
    tolerance = 10 * TOLERANCE if case.startswith("soap") else TOLERANCE
    for derivative, keep, in_call in OF_OPTIMIZERS:
        optimizer, keywords = (make, settings) if in_call else (make(**settings), {})
        inner = torchopt.inner_loop(loss_of, optimizer, steps=3, derivative=derivative, keep=keep)
        wanted, given, meta = inputs, params, scale
        if derivative == "forward":  # few scalars
            wanted, meta = inputs[: 1 + len(hypers)], scale.detach()
            given = {k: x if k == "s" else x.detach() for k, x in params.items()}
        result = inner(given, batch, meta, **keywords)
        total = outer(result.params, result.losses, result.state)
        got = torch.autograd.grad(total, wanted, allow_unused=True)
        right = first if derivative == "first_order" else full
        assert worst(right[: len(wanted)], got, wanted) < tolerance, derivative


def learned(lr: Tensor) -> Any:
    return lambda count: lr * 0.9**count


def decayed(lr: Tensor, count: Any, *, rate: Tensor) -> Tensor:
    return lr * (1 - rate) ** count


WRAPPED: dict[str, Any] = {
    "a schedule in a closure": lambda h: torchopt.adam(lr=learned(h), eps=1e-2),
    "a schedule in a partial": lambda h: torchopt.sgd(lr=partial(decayed, h, rate=h)),
    "a chain with clipping": lambda h: torchopt.chain(
        torchopt.clip_grad_norm(0.3), torchopt.sgd(lr=h, momentum=0.9)
    ),
    "decoupled decay": lambda h: torchopt.adamw(lr=0.1, eps=1e-2, weight_decay=h),
    "masked leaves": lambda h: torchopt.transform.masked(
        torchopt.sgd(lr=h, momentum=0.9), {"b": True, "s": False, "unused": True, "w": True}
    ),
    "lookahead": lambda h: torchopt.transform.lookahead(torchopt.sgd(lr=h), 2, 0.5),
    "hyper-parameters in the state": lambda h: torchopt.transform.inject_hyperparams(torchopt.adam)(
        lr=h, eps=1e-2
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize(
    ("derivative", "keep"), [("reverse", "steps"), ("mixed", 2), ("first_order", "steps")]
)
def test_tensors_in_a_finished_transformation_get_gradients(
    name: str, derivative: str, keep: Any
) -> None:
    params, batch, scale, lr = leaves()
    inputs = [*params.values(), scale, lr]
    parts = unrolled(
        loss_of,
        WRAPPED[name](lr),
        params,
        [batch] * STEPS,
        scale,
        first_order=derivative == "first_order",
    )
    expected = torch.autograd.grad(outer(*parts), inputs, allow_unused=True)
    inner = torchopt.inner_loop(
        loss_of, WRAPPED[name](lr), steps=STEPS, derivative=derivative, keep=keep
    )
    result = inner(params, batch, scale)
    got = torch.autograd.grad(
        outer(result.params, result.losses, result.state), inputs, allow_unused=True
    )
    assert worst(expected, got, inputs) < TOLERANCE


def test_hyper_parameters_that_depend_on_each_other_count_once() -> None:
    params, batch, scale, lr = leaves()
    for keep in ("all", "steps", 1):
        decay = lr**2
        inner = torchopt.inner_loop(loss_of, torchopt.adamw, steps=3, keep=keep)
        result = inner(params, batch, scale * lr, lr=lr, eps=1e-2, weight_decay=decay)
        (got,) = torch.autograd.grad(outer(result.params, result.losses), lr)
        optimizer = torchopt.adamw(lr=lr, eps=1e-2, weight_decay=lr**2)
        parts = unrolled(loss_of, optimizer, params, [batch] * 3, scale * lr)
        (expected,) = torch.autograd.grad(outer(*parts[:2]), lr)
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("derivative", ["reverse", "mixed", "first_order"])
@pytest.mark.parametrize("keep", ["all", "steps", 2])
@pytest.mark.parametrize("form", ["stacked", "sequence"])
def test_each_step_takes_its_own_batch(derivative: str, keep: Any, form: str) -> None:
    params, _, scale, lr = leaves()
    _, batches, _ = problem(tasks=STEPS)
    batches = tuple(x.requires_grad_() for x in batches)
    each = [tuple(x[t] for x in batches) for t in range(STEPS)]
    inputs = [*params.values(), *batches, scale, lr]
    first_order = derivative == "first_order"
    optimizer = torchopt.sgd(lr=lr, momentum=0.9)
    parts = unrolled(loss_of, optimizer, params, each, scale, first_order=first_order)
    expected = torch.autograd.grad(outer(*parts), inputs, allow_unused=True)
    inner = torchopt.inner_loop(loss_of, optimizer, steps=STEPS, derivative=derivative, keep=keep)
    result = inner(params, None, scale, batches=batches if form == "stacked" else each)
    got = torch.autograd.grad(
        outer(result.params, result.losses, result.state), inputs, allow_unused=True
    )
    assert worst(expected, got, inputs) < TOLERANCE


@pytest.mark.parametrize("keep", ["all", "steps", 1])
def test_a_run_continues_from_the_state_of_another(keep: Any) -> None:
    params, batch, scale, lr = leaves()
    inputs = [*params.values(), scale, lr]
    parts = unrolled(loss_of, torchopt.adam(lr=lr, eps=1e-2), params, [batch] * 5, scale)
    expected = torch.autograd.grad(outer(*parts), inputs, allow_unused=True)
    one = torchopt.inner_loop(loss_of, torchopt.adam, steps=2, keep=keep)
    other = torchopt.inner_loop(loss_of, torchopt.adam, steps=3, keep=keep, derivative="mixed")
    first = one(params, batch, scale, lr=lr, eps=1e-2)
    second = other(first.params, batch, scale, lr=lr, eps=1e-2, state=first.state)
    losses = torch.cat([first.losses, second.losses])
    got = torch.autograd.grad(outer(second.params, losses, second.state), inputs, allow_unused=True)
    assert worst(expected, got, inputs) < TOLERANCE


@pytest.mark.parametrize("derivative", ["reverse", "mixed", "forward"])
@pytest.mark.parametrize("keep", ["all", "steps", 2])
def test_auxiliary_outputs_are_stacked_and_differentiated(derivative: str, keep: Any) -> None:
    params, batch, scale, lr = leaves()

    def with_more(p: Any, b: Any, m: Tensor) -> Any:
        value = loss_of(p, b, m)
        return value, {"cube": value**3 + m.sum(), "count": torch.tensor(3), "name": "x"}

    given = {k: x.detach() for k, x in params.items()}
    batch = tuple(x.detach() for x in batch)
    inner = torchopt.inner_loop(with_more, torchopt.sgd, steps=3, derivative=derivative, keep=keep)
    result = inner(given, batch, scale, lr=lr)
    assert result.aux["count"].tolist() == [3, 3, 3]
    assert result.aux["name"] == ("x", "x", "x")
    got = torch.autograd.grad((result.aux["cube"] ** 2).sum(), (scale, lr))
    _, losses, _ = unrolled(loss_of, torchopt.sgd(lr=lr), given, [batch] * 3, scale)
    expected = torch.autograd.grad(((losses**3 + scale.sum()) ** 2).sum(), (scale, lr))
    assert worst(expected, got, (scale, lr)) < TOLERANCE


@pytest.mark.parametrize("derivative", ["reverse", "mixed"])
@pytest.mark.parametrize("keep", ["all", "steps", 1])
def test_the_initial_parameters_may_be_arguments_of_the_loss_too(
    derivative: str, keep: Any
) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    theta = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def proximal(x: Tensor, b: Tensor, center: Tensor) -> Tensor:
        return ((a @ x - b) ** 2).mean() + 0.3 * ((x - center) ** 2).sum()

    inner = torchopt.inner_loop(
        proximal, torchopt.sgd(0.1), steps=3, derivative=derivative, keep=keep
    )
    (got,) = torch.autograd.grad(inner(theta, a[:, 0], theta).params.pow(2).sum(), theta)
    hessian = 2 * a.mT @ a / 6 + 0.6 * torch.eye(3, dtype=torch.float64)
    x, jacobian = theta.detach(), torch.eye(3, dtype=torch.float64)
    step = torch.eye(3, dtype=torch.float64) - 0.1 * hessian
    for _ in range(3):
        x = x - 0.1 * (hessian @ x - 2 * a.mT @ a[:, 0] / 6 - 0.6 * theta.detach())
        jacobian = step @ jacobian + 0.06 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(got, 2 * jacobian.mT @ x, rtol=TOLERANCE, atol=TOLERANCE)


def test_tied_parameters_become_separate_in_every_mode() -> None:
    _, batch, _, lr = leaves()
    w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()

    def loss(p: Any, b: Any) -> Tensor:
        return ((b[0] @ p["a"] * 0.3 + torch.tanh(b[0] @ p["b"]) - b[1]) ** 2).mean()

    found = []
    for derivative, keep in [("reverse", "all"), ("reverse", "steps"), ("mixed", 1)]:
        inner = torchopt.inner_loop(loss, torchopt.sgd, steps=3, derivative=derivative, keep=keep)
        result = inner({"a": w, "b": w}, batch, lr=lr)
        found.append(torch.autograd.grad(outer(result.params, result.losses), (w, lr)))
    for other in found[1:]:
        assert worst(found[0], other, (w, lr)) < TOLERANCE


@pytest.mark.parametrize("keep", ["steps", 2])
def test_the_backward_pass_can_be_run_again(keep: Any) -> None:
    params, batch, scale, lr = leaves()
    inner = torchopt.inner_loop(loss_of, torchopt.adam, steps=5, keep=keep)
    total = outer(*inner(params, batch, scale, lr=lr, eps=1e-2)[::2])
    first = torch.autograd.grad(total, (scale, lr), retain_graph=True)
    second = torch.autograd.grad(total, (scale, lr))
    assert all(map(torch.equal, first, second))


def test_parameters_changed_in_place_are_noticed() -> None:
    params, batch, scale, lr = leaves()
    inner = torchopt.inner_loop(loss_of, torchopt.sgd, steps=2, keep="steps")
    total = outer(*inner(params, batch, scale, lr=lr)[::2])
    with torch.no_grad():
        params["w"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_without_grad_mode_nothing_is_kept_and_the_values_are_the_same() -> None:
    params, batch, scale, lr = leaves()
    inner = torchopt.inner_loop(loss_of, torchopt.adam, steps=3)
    expected = inner(params, batch, scale, lr=lr)
    with torch.no_grad():
        got = inner(params, batch, scale, lr=lr)
    assert not got.losses.requires_grad
    torch.testing.assert_close(got.losses, expected.losses.detach(), rtol=1e-14, atol=0)


@pytest.mark.filterwarnings("ignore:.*expected fewer scalars")
@pytest.mark.parametrize("tasks", [None, (None, 0, None)], ids=["one task", "tasks"])
@pytest.mark.parametrize("execute", ["eager", "trace"])
@pytest.mark.parametrize("derivative", ["reverse", "mixed", "forward"])
def test_complex_inputs_whose_loss_has_no_complex_derivative(
    derivative: str, execute: str, tasks: Any
) -> None:
    # The gradient of |w|^4 is 4 |w|^2 w, which is no holomorphic function of w.
    def loss(w: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        size = w.abs() ** 2 - scale * x.abs() ** 2 + (w * x.conj()).imag
        return (size**2).sum() + (w * w * scale).real.sum()

    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(2, 3, generator=generator, dtype=torch.complex128) for _ in range(2))
    w, x = 0.3 * w[0], x if tasks else x[0]
    scale, lr = (torch.tensor(c, dtype=torch.float64) for c in (0.3, 0.02))
    inputs = [t.clone().requires_grad_() for t in (w, x, scale, lr)]

    def total(params: Tensor, losses: Tensor) -> Tensor:
        return (params.abs() ** 3).sum() + (params * (1 + 2j)).real.sum() + losses.sum()

    expected = torch.zeros((), dtype=torch.float64)
    for batch in inputs[1] if tasks else [inputs[1]]:
        parts = unrolled(
            loss, torchopt.sgd(inputs[3], momentum=0.9), inputs[0], [batch] * 3, inputs[2]
        )
        expected = expected + total(*parts[:2])
    inner = torchopt.inner_loop(
        loss, torchopt.sgd, steps=3, derivative=derivative, execute=execute, tasks=tasks
    )
    result = inner(*inputs[:3], lr=inputs[3], momentum=0.9)
    got = torch.autograd.grad(total(result.params, result.losses), inputs)
    assert worst(torch.autograd.grad(expected, inputs), got, inputs) < TOLERANCE
