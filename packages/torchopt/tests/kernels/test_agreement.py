# SPDX-License-Identifier: Apache-2.0
"""Native calls and torch operations agree, or raise the same error, for all kinds of tensors.

Every optimizer runs on one row for each kind of input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
from optimizers import ROWS, SMOOTH
from torch import Tensor

import torchopt
from torchopt.optimizers.native import with_backend

NAMES = sorted(SMOOTH)


class Tagged(Tensor):
    """A subclass without its own behaviour."""


def base(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spoilt(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[0, 1] = value
    return x


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


Kind = Callable[[Tensor], Any]
KINDS: dict[str, Kind] = {
    "none": lambda x: None,
    "nan": lambda x: spoilt(x, float("nan")),
    "inf": lambda x: spoilt(x, float("inf")),
    "minus inf": lambda x: spoilt(x, -float("inf")),
    "zero": torch.zeros_like,
    "minus zero": lambda x: torch.zeros_like(x).neg(),
    "no memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "negated view": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, x], -1)[..., 1],
    "expanded": lambda x: x[:1].expand(x.shape),
    "inference": inference,
    "subclass": lambda x: x.as_subclass(Tagged),
    "leaf": lambda x: x.clone().requires_grad_(),
    "complex": lambda x: torch.complex(x, x.cos()),
    "conjugated": lambda x: torch.complex(x, x.cos()).conj(),
}
ELSEWHERE = {
    "0-dim": lambda x: x[0, 0],
    "empty": lambda x: x[:0],
    "one element": lambda x: x[:1, :1],
}


def outcome(name: str, backend: str, make: Kind, inplace: bool) -> Any:
    """Return the updates and tensors of the state after two steps, or the type of the error."""
    optimizer, settings = SMOOTH[name]
    impl = with_backend(ROWS[optimizer].functional(**settings), backend)  # type: ignore[arg-type]
    like = make(base(0))
    if like is None:
        like = base(0)
    params: dict[str, Any] = {
        "a": torch.complex(base(3), base(4)) if like.is_complex() else base(3)[: len(base(3))],
        "b": base(5),
        "gone": None,
    }
    params["a"] = params["a"].new_tensor(0.5).expand(like.shape).clone() + 0.0
    try:
        state = impl.init(params)
        for seed in (1, 2):
            grads = {"a": make(base(seed)), "b": base(6), "gone": None}
            updates, state = impl.update(grads, state, params=params, inplace=inplace)
    except Exception as error:
        return type(error)
    return [
        x.detach().resolve_neg().resolve_conj().as_subclass(Tensor).clone()
        for x in torchopt.pytree.tree_leaves((updates, state))
        if isinstance(x, Tensor)
    ]


@pytest.mark.parametrize("kind", [*KINDS, *ELSEWHERE])
@pytest.mark.parametrize("name", NAMES)
def test_backends_agree_or_refuse_alike(name: str, kind: str) -> None:
    make = {**KINDS, **ELSEWHERE}[kind]
    for inplace in (False, True):
        expected = outcome(name, "reference", make, inplace)
        got = outcome(name, "auto", make, inplace)
        if isinstance(expected, type) or isinstance(got, type):
            assert got == expected, inplace
            continue
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


def updated(impl: Any, p: Tensor, *grads: Tensor) -> Tensor:
    """Return the parameter after a step with each gradient."""
    state = impl.init((p,))
    for g in grads:
        updates, state = impl.update((g,), state, params=(p,), inplace=False)
        p = p + updates[0]
    return p


@pytest.mark.parametrize("name", NAMES)
def test_a_classic_step_carries_the_tangents_of_gradients(name: str) -> None:
    optimizer, settings = SMOOTH[name]
    impl = ROWS[optimizer].functional(**settings)
    p, grads, tangents = base(0), (base(1), base(2)), (base(3), base(4))
    expected = torch.func.jvp(lambda *g: updated(impl, p, *g), grads, tangents)
    q = p.clone()
    classic = torchopt.Optimizer([q], impl)
    with fw.dual_level():
        for g, t in zip(grads, tangents):
            q.grad = fw.make_dual(g, t)
            classic.step()
        got = fw.unpack_dual(q)
        torch.testing.assert_close(got.primal, expected[0], rtol=1e-10, atol=1e-12)
        moved = torch.zeros_like(p) if got.tangent is None else got.tangent
        torch.testing.assert_close(moved, expected[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_batched_backward_is_the_loop_over_the_batch(name: str) -> None:
    optimizer, settings = SMOOTH[name]
    impl = ROWS[optimizer].functional(**settings)
    p, second = base(0)[:2, :2], base(2)[:2, :2]
    g = base(1)[:2, :2].requires_grad_()
    out = updated(impl, p, g, second)
    if not out.requires_grad:
        return
    basis = torch.eye(4, dtype=p.dtype).reshape(4, 2, 2)
    (got,) = torch.autograd.grad(
        out, g, basis, is_grads_batched=True, create_graph=True, allow_unused=True
    )
    rows = [torch.autograd.grad(out, g, v, retain_graph=True, allow_unused=True)[0] for v in basis]
    if got is None:
        assert rows == [None] * 4
        return
    torch.testing.assert_close(got, torch.stack(rows), rtol=1e-10, atol=1e-12)
    if got.requires_grad:
        weights = base(5)[:2, :2]
        (batched,) = torch.autograd.grad((got * weights).sum(), g, retain_graph=True)
        again = [torch.autograd.grad(out, g, v, create_graph=True)[0] for v in basis]
        (looped,) = torch.autograd.grad(sum((x * weights).sum() for x in again), g)  # type: ignore[arg-type]
        torch.testing.assert_close(batched, looped, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nan_has_no_sign(backend: Any) -> None:
    g = torch.tensor([float("nan"), 2.0])
    lion = with_backend(torchopt.alias.lion(0.1), backend)
    update = lion.update((g,), lion.init((g,)), inplace=False)[0][0]
    torch.testing.assert_close(update, torch.tensor([float("nan"), -0.1]), equal_nan=True)
    p = torch.zeros(2, requires_grad=True)
    p.grad = g
    torch.optim.Rprop([p], lr=0.1).step()
    rprop = with_backend(torchopt.alias.rprop(0.1), backend)
    state = rprop.init((g,))
    updates, state = rprop.update((g,), state, inplace=False)
    assert torch.equal(updates[0], p.detach())
    assert torch.isfinite(rprop.update((g.nan_to_num(),), state, inplace=False)[0][0]).all()


def test_a_plan_reads_the_step_count_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = torchopt._C.StepPlan("sgd", [torch.ones(3)], [])

    def forbidden(x: Tensor) -> int:
        raise AssertionError("a device would be waited for")

    monkeypatch.setattr(Tensor, "__index__", forbidden)
    monkeypatch.setattr(Tensor, "__int__", forbidden)
    monkeypatch.setattr(Tensor, "item", forbidden)
    hypers = (1.0, 0.0, 0.0)
    assert plan.run([torch.ones(3)], torch.tensor(3), hypers, False, 1, -1, 0)
    assert plan.run([torch.ones(3)], 3, hypers, False, 1, -1, 0)
    assert not plan.run([torch.ones(3)], torch.tensor(3.0), hypers, False, 1, -1, 0)
