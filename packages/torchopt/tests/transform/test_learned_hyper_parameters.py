# SPDX-License-Identifier: Apache-2.0
"""Hyper-parameters that are tensors are read in each step, not when the optimizer is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optimizers import ROWS, SMOOTH, Row, hypers_of, with_hypers
from torch import Tensor, nn

import torchopt
from torchopt import transform
from torchopt.clip import adaptive_clip, clip_by_value, clip_each_norm, clip_grad_norm
from torchopt.errors import KernelUnavailableError, NotDifferentiableError
from torchopt.optimizers.native import with_backend
from torchopt.pytree import tree_leaves

DOUBLE = torch.float64
Params = dict[str, Tensor]
LATER = 0.9  # what hyper-parameters are multiplied by between two steps


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def params() -> Params:
    return {"b": randn(3, seed=1), "w": randn(3, 2, seed=2)}


def gradients(step: int, like: Params) -> Params:
    """Return gradients of a smooth loss of `like`, another one in each step."""
    return {k: (randn(*p.shape, seed=10 + step) * p).sin() + p for k, p in like.items()}


def tensors(case: str, scale: float = 1.0) -> list[Tensor]:
    return [torch.tensor(v * scale, dtype=DOUBLE) for v in hypers_of(case).values()]


def step(optimizer: Any, state: Any, p: Params, number: int, inplace: bool = False) -> Any:
    grads = gradients(number, p)
    updates, state = optimizer.update(grads, state, params=p, inplace=inplace)
    return torchopt.apply_updates(p, updates, inplace=inplace), state


def expected(case: str) -> Params:
    """Return the parameters after two steps, each of an optimizer made for it."""
    p, state = params(), None
    for number, scale in enumerate((1.0, LATER)):
        settings = with_hypers(case, tensors(case, scale))
        optimizer = with_backend(ROWS[SMOOTH[case][0]].functional(**settings), "reference")
        state = optimizer.init(p) if state is None else state
        p, state = step(optimizer, state, p, number)
    return p


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in params().items():
            self.register_parameter(name, nn.Parameter(value))

    def tensors(self) -> Params:
        return {"b": self.b, "w": self.w}


def loss_of(p: Params, number: int) -> Tensor:
    grads = gradients(number, {k: v.detach() for k, v in p.items()})
    total: Tensor = sum((p[k] * g).sum() for k, g in grads.items())  # type: ignore[assignment]
    return total


def functional(backend: str, inplace: bool) -> Callable[..., Params]:
    def run(row: Row, settings: dict[str, Any], change: Callable[[], None]) -> Params:
        optimizer = row.functional(**settings)
        if backend != "auto":
            try:
                optimizer = with_backend(optimizer, backend)
            except KernelUnavailableError as error:
                if "one fused rule" not in str(error):
                    raise
                pytest.skip("no fused rule")
        p = params()
        state = optimizer.init(p)
        p, state = step(optimizer, state, p, 0, inplace)
        change()
        return step(optimizer, state, p, 1, inplace)[0]

    return run


def classic(make: Callable[..., Any]) -> Callable[..., Params]:
    def run(row: Row, settings: dict[str, Any], change: Callable[[], None]) -> Params:
        net = Net()
        optimizer = make(row, list(net.parameters()), settings)
        for number in range(2):
            optimizer.zero_grad()
            loss_of(net.tensors(), number).backward()
            optimizer.step()
            change() if number == 0 else None
        return net.tensors()

    return run


def meta(row: Row, settings: dict[str, Any], change: Callable[[], None]) -> Params:
    net = Net()
    optimizer = row.meta(net, **settings)
    for number in range(2):
        optimizer.step(loss_of(net.tensors(), number))
        change() if number == 0 else None
    return net.tensors()


def stateful(row: Row, settings: dict[str, Any], change: Callable[[], None]) -> Params:
    optimizer = torchopt.FuncOptimizer(row.functional(**settings))
    p = {k: v.requires_grad_() for k, v in params().items()}
    p = optimizer.step(loss_of(p, 0), p)
    change()
    return optimizer.step(loss_of(p, 1), p)


FORMS: dict[str, Callable[..., Params]] = {
    "auto": functional("auto", False),
    "reference": functional("reference", False),
    "native": functional("native", False),
    "in place": functional("auto", True),
    "reference, in place": functional("reference", True),
    "classic": classic(lambda row, p, settings: row.classic(p, **settings)),
    "adapter": classic(
        lambda row, p, settings: torchopt.optim.TorchOptimizer(p, row.functional, **settings)
    ),
    "meta": meta,
    "stateful": stateful,
}
# Settings that only the functional optimizer has.
FUNCTIONAL_ONLY = {"moment_requires_grad", "mask"}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_start_of_one_number_fills_tensors_like_the_parameters(shape: tuple[int, ...]) -> None:
    like = {"number": randn(seed=0), **params()}
    value = torch.full(shape, 0.1, dtype=DOUBLE)
    state = torchopt.transform.scale_by_rss(initial_accumulator_value=value).init(like)
    found = {name: x.tolist() for name, x in state.sum_of_squares.items()}
    assert found == {name: torch.full_like(p, 0.1).tolist() for name, p in like.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", sorted(SMOOTH))
def test_a_value_that_changes_in_place_counts_from_the_next_step(case: str, form: str) -> None:
    hypers = tensors(case)

    def change() -> None:
        for h in hypers[::2]:
            h.mul_(LATER)
        for h in hypers[1::2]:
            h.data = h.data * LATER  # as module.to() and load_state_dict(assign=True) do

    with torch.no_grad():
        settings = with_hypers(case, hypers)
    got = FORMS[form](ROWS[SMOOTH[case][0]], settings, change)
    for name, value in expected(case).items():
        torch.testing.assert_close(got[name].detach(), value, rtol=1e-11, atol=1e-13)
        assert not torch.allclose(value, params()[name])


def meta_gradients(case: str, make: Callable[..., Any], hypers: Sequence[Tensor]) -> Any:
    optimizer = make(case, hypers)
    p = {k: v.requires_grad_() for k, v in params().items()}
    start = list(p.values())
    state = optimizer.init(p)
    for number in range(2):
        p, state = step(optimizer, state, p, number)
    loss = sum(x.sin().sum() for x in p.values())
    return torch.autograd.grad(loss, [*start, *hypers], allow_unused=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", sorted(SMOOTH))
def test_an_optimizer_made_under_no_grad_has_meta_gradients(case: str, backend: Any) -> None:
    def made(case: str, hypers: Sequence[Tensor]) -> Any:
        optimizer = ROWS[SMOOTH[case][0]].functional(**with_hypers(case, hypers))
        return with_backend(optimizer, backend)

    def made_under_no_grad(case: str, hypers: Sequence[Tensor]) -> Any:
        with torch.no_grad():
            return made(case, hypers)

    hypers = [h.requires_grad_() for h in tensors(case)]
    wanted = meta_gradients(case, made, hypers)
    for got, value in zip(meta_gradients(case, made_under_no_grad, hypers), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-14)
    lr = list(hypers_of(case)).index(("lr", None)) + 2
    assert wanted[lr].abs() > 1e-6


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", sorted(SMOOTH))
def test_a_value_may_be_overwritten_before_the_backward_pass(case: str, backend: Any) -> None:
    name = SMOOTH[case][0]

    def derivative(optimizers: Sequence[Any], change: Callable[[], None]) -> Any:
        p = {k: v.requires_grad_() for k, v in params().items()}
        start = list(p.values())
        state = optimizers[0].init(p)
        for number, optimizer in enumerate(optimizers):
            p, state = step(with_backend(optimizer, backend), state, p, number)
            change()
        return torch.autograd.grad(sum(x.sin().sum() for x in p.values()), start)

    hypers = tensors(case)

    def change() -> None:
        for h in hypers:
            h.mul_(LATER)

    followed = ROWS[name].functional(**with_hypers(case, hypers))
    fresh = [
        ROWS[name].functional(**with_hypers(case, tensors(case, scale))) for scale in (1.0, LATER)
    ]
    wanted = derivative(fresh, lambda: None)
    for got, value in zip(derivative([followed, followed], change), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", sorted(ROWS))
def test_one_number_may_have_any_shape_and_an_integer_dtype(name: str, backend: Any) -> None:
    p = {"s": torch.tensor(0.7, dtype=DOUBLE), "w": randn(3, 2, seed=2)}
    grads = {"s": torch.tensor(0.3, dtype=DOUBLE), "w": randn(3, 2, seed=3)}

    def updates(lr: Any) -> Params:
        optimizer = with_backend(ROWS[name].functional(lr=lr), backend)
        found: Params = optimizer.update(grads, optimizer.init(p), params=p, inplace=False)[0]
        return found

    for lr, same in (
        (nn.Parameter(torch.tensor([0.5], dtype=DOUBLE)), 0.5),
        (torch.tensor(2), 2.0),
    ):
        got, wanted = updates(lr), updates(same)
        for key in p:
            assert got[key].shape == p[key].shape
            torch.testing.assert_close(got[key].detach(), wanted[key], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "sgd"])
def test_one_number_may_have_any_shape_in_a_compiled_step(name: str) -> None:
    torch.compiler.reset()
    p = {"s": torch.tensor(0.7, dtype=DOUBLE), "w": randn(3, 2, seed=2)}
    grads = {"s": torch.tensor(0.3, dtype=DOUBLE), "w": randn(3, 2, seed=3)}
    optimizer = ROWS[name].functional(lr=torch.tensor([0.5], dtype=DOUBLE))

    def step(grads: Params, state: Any, p: Params) -> Params:
        found: Params = optimizer.update(grads, state, params=p, inplace=False)[0]
        return found

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    got, wanted = (f(grads, optimizer.init(p), p) for f in (compiled, step))
    for key in p:
        assert got[key].shape == p[key].shape
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-14, atol=0)


ONE_NUMBER: dict[str, Callable[[Any], Any]] = {
    "lookahead": lambda h: transform.lookahead(torchopt.sgd(0.1), 2, h),
    "sam": lambda h: transform.sam(torchopt.sgd(0.1), h),
    "galore": lambda h: transform.galore(torchopt.sgd(0.1), 1, scale=h),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
@pytest.mark.parametrize("wrapper", ONE_NUMBER)
def test_one_number_of_a_wrapper_may_have_any_shape_and_dtype(
    wrapper: str, dtype: torch.dtype
) -> None:
    start = {"s": torch.tensor(0.7), "w": randn(3, 2, seed=2)}
    start = {key: x.to(dtype) for key, x in start.items()}

    def after(number: Any) -> Params:
        optimizer, p = ONE_NUMBER[wrapper](number), start
        state = optimizer.init(p)
        for k in range(4):
            grads = {key: x.sin() + k for key, x in p.items()}
            updates, state = optimizer.update(grads, state, params=p, inplace=False)
            p = torchopt.apply_updates(p, updates, inplace=False)
        return p

    wanted = after(0.3)
    for shape, wide in (((), DOUBLE), ((1,), DOUBLE), ((1,), torch.float32)):
        got = after(torch.full(shape, 0.3, dtype=wide, requires_grad=True))
        for key, x in start.items():
            assert (got[key].shape, got[key].dtype) == (x.shape, x.dtype)
            torch.testing.assert_close(got[key].detach(), wanted[key])


def test_a_learning_rate_for_each_element_is_broadcast_in_every_path() -> None:
    lr = torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE, requires_grad=True)
    g = randn(3, seed=4)
    for graph in (False, True):
        for size in (1, 6):  # up to four tensors are left to torch, whoever asks
            grads = [g.clone().requires_grad_(graph) for _ in range(size)]
            optimizer = torchopt.sgd(lr)
            updates, _ = optimizer.update(grads, optimizer.init(grads), inplace=False)
            assert all(torch.equal(u, -lr * g) for u in updates)
    w = nn.Parameter(torch.zeros(3, dtype=DOUBLE))
    w.grad = g
    classic = torchopt.SGD([w], lr=lr)
    for _ in range(2):
        classic.step()
    torch.testing.assert_close(w.detach(), (-2 * lr * g).detach(), rtol=1e-14, atol=0)


WRAPPERS: dict[str, Callable[[Tensor], Any]] = {
    "masked": lambda lr: transform.masked(torchopt.sgd(lr), {"a": True, "b": False}),
    "partition": lambda lr: transform.partition(
        {"x": torchopt.sgd(lr), "y": torchopt.adam(lr)}, {"a": "x", "b": "y"}
    ),
    "lookahead": lambda lr: transform.lookahead(torchopt.sgd(1.0), 1, lr),
    "accumulate": lambda lr: transform.accumulate(torchopt.sgd(lr), 1),
    "finite": lambda lr: transform.apply_if_finite(torchopt.sgd(lr)),
    "in precision": lambda lr: transform.in_precision(torchopt.sgd(lr), DOUBLE),
    "injected": lambda lr: transform.inject_hyperparams(torchopt.sgd)(lr=lr),
    "injected schedule": lambda lr: transform.inject_hyperparams(torchopt.sgd)(lr=lambda c: lr),
    "schedule": lambda lr: torchopt.sgd(lambda count: lr),
    "chain": lambda lr: torchopt.chain(transform.trace(0.9), transform.scale(lr)),
    "flat chain": lambda lr: torchopt.chain.flat(transform.trace(0.9), transform.scale(lr)),
    "by schedule": lambda lr: transform.scale_by_schedule(lambda count: lr),
    "norm": lambda lr: clip_grad_norm(lr),
    "differentiable norm": lambda lr: clip_grad_norm(lr, differentiable=True),
    "each norm": lambda lr: clip_each_norm(lr),
    "value": lambda lr: clip_by_value(lr),
    "unit-wise": lambda lr: adaptive_clip(lr),
    "unit-wise, smallest": lambda lr: adaptive_clip(0.1, lr),
    "trust ratio": lambda lr: transform.scale_by_trust_ratio(lr),
    "decay": lambda lr: transform.add_decayed_weights(lr),
    "average": lambda lr: transform.ema(lr, debias=False),
    "momentum": lambda lr: transform.trace(lr, nesterov=True),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_thresholds_and_wrapped_optimizers_follow_a_learned_number(wrapper: str) -> None:
    p = {"a": randn(3, seed=5), "b": randn(2, 2, seed=6)}
    grads = {"a": randn(3, seed=7), "b": randn(2, 2, seed=8)}
    # Larger than both norms in the one place where it is a lower bound.
    lr = torch.tensor(9.0 if "smallest" in wrapper else 0.1, dtype=DOUBLE, requires_grad=True)
    with torch.no_grad():
        optimizer = WRAPPERS[wrapper](lr)

    def total(optimizer: Any) -> Tensor:
        state = optimizer.init(p)
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params=p, inplace=False)
        return sum((u.cos() * u).sum() for u in tree_leaves(updates))  # type: ignore[return-value]

    assert torch.autograd.gradcheck(lambda h: total(WRAPPERS[wrapper](h)), lr)
    assert torch.autograd.grad(total(optimizer), lr)[0].abs() > 1e-4
    with torch.no_grad():
        lr.mul_(0.5)
    fresh = total(WRAPPERS[wrapper](lr.detach().clone()))
    torch.testing.assert_close(total(optimizer).detach(), fresh, rtol=1e-13, atol=0)


def test_what_replaces_nan_and_infinities_is_differentiated() -> None:
    values = [torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (0.5, 2.0, -3.0)]
    g = torch.tensor([math.nan, math.inf, -math.inf, 0.7, math.nan], dtype=DOUBLE)
    make = transform.inject_hyperparams(transform.nan_to_num)
    optimizer = make(nan=values[0], posinf=values[1], neginf=values[2])
    u, _ = optimizer.update(g, optimizer.init(g), inplace=False)
    assert u.tolist() == [0.5, 2.0, -3.0, 0.7, 0.5]
    assert [x.item() for x in torch.autograd.grad(u.sum(), values)] == [2.0, 1.0, 1.0]


def test_an_outer_optimizer_learns_the_learning_rate_of_an_inner_one() -> None:
    """On w^2 a step multiplies w by 1 - 2 lr, so the outer gradient is -4 w^2 (1 - 2 lr)."""
    lr = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)
    outer, inner = torch.optim.SGD([lr], lr=0.1), torchopt.sgd(lr)
    value = 0.1
    for _ in range(4):
        w = torch.ones(1, dtype=DOUBLE, requires_grad=True)
        (g,) = torch.autograd.grad((w**2).sum(), w, create_graph=True)
        u, _ = inner.update(g, inner.init(w), params=w, inplace=False)
        assert -u.item() == pytest.approx(2 * value, rel=1e-14)
        outer.zero_grad()
        ((w + u) ** 2).sum().backward()
        outer.step()
        value += 0.1 * 4 * (1 - 2 * value)
    assert value > 0.4


def test_clipping_is_not_differentiable_in_the_order_of_its_norm() -> None:
    order = torch.tensor(2.0)
    clip = clip_grad_norm(1.0, order)
    g = torch.tensor([3.0, 4.0])
    assert clip.update(g, ())[0].tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    order.fill_(1.0)
    assert clip.update(g, ())[0].tolist() == pytest.approx([3 / 7, 4 / 7], rel=1e-5)
    with pytest.raises(NotDifferentiableError, match=r"norm_type\.detach"):
        clip_grad_norm(1.0, order.clone().requires_grad_()).update(g, ())


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_number_of_an_optimizer_can_be_injected(name: str) -> None:
    settings = ROWS[name].settings[-1]
    results = []
    for make in (ROWS[name].functional, transform.inject_hyperparams(ROWS[name].functional)):
        optimizer = make(**settings)
        p = params()
        state = optimizer.init(p)
        for number in range(3):
            p, state = step(optimizer, state, p, number)
        results.append(p)
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-12, atol=1e-14)


DAMPENED = ("sgd-momentum", ("momentum", None), 0.0)


@pytest.mark.parametrize("case", SMOOTH)
def test_a_tensor_means_what_its_number_means(case: str) -> None:
    """Where 0 or 1 as a number switches something off or over, a tensor of that value does too.

    The exception is a momentum of 0 with dampening: the number means no momentum, while the
    tensor dampens.
    """
    make, usual = ROWS[SMOOTH[case][0]].functional, list(hypers_of(case).values())
    start = {"s": torch.tensor(0.7, dtype=DOUBLE), "w": randn(3, 2, seed=2)}
    for place, value in enumerate(usual):
        for number in (value, 0.0, 1.0):
            if (case, list(hypers_of(case))[place], number) == DAMPENED:
                continue
            found = []
            for given in (
                number,
                torch.tensor(number, dtype=DOUBLE),
                torch.tensor([[number]], dtype=DOUBLE),
            ):
                values = [*usual[:place], given, *usual[place + 1 :]]
                try:
                    optimizer = make(**with_hypers(case, values))
                except ValueError:
                    assert given is number  # numbers only are checked
                    break
                p, state = start, optimizer.init(start)
                for seed in (3, 4):
                    g = {"s": torch.tensor(0.3, dtype=DOUBLE), "w": randn(3, 2, seed=seed)}
                    updates, state = optimizer.update(g, state, params=p, inplace=False)
                    p = torchopt.apply_updates(p, updates, inplace=False)
                found.append(p)
            for other in found[1:]:
                for name, wanted in found[0].items():
                    assert other[name].shape == wanted.shape
                    torch.testing.assert_close(
                        other[name], wanted, rtol=1e-10, atol=1e-13, equal_nan=True
                    )
