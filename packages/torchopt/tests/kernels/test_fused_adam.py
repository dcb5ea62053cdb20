# SPDX-License-Identifier: Apache-2.0
"""The native Adam against the torch reference: values, derivatives, layouts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_cases import RULES, fused_update, fused_update_, reference_update
from torch import Tensor

from torchopt import _C
from torchopt.accelerated_op import AdamOp, is_available
from torchopt.errors import KernelUnavailableError

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (3, 5), (16383,), (16385,), (2, 20000))
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-14}


def hypers_of(b1: Any, b2: Any, eps: Any, eps_root: Any) -> dict[str, Any]:
    """Return the hyper-parameters of Adam's direction."""
    chain = {"lr": -1.0, "weight_decay": 0.0, "decoupled_weight_decay": 0.0}
    return {**chain, "b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}


def fused_adam(grads: Any, mu: Any, nu: Any, counts: Any, hyper: Any) -> tuple[Any, Any, Any]:
    updates, (new_mu, new_nu) = fused_update("adam", grads, [mu, nu], None, counts, hyper)
    return updates, new_mu, new_nu


def fused_adam_(grads: Any, mu: Any, nu: Any, counts: Any, hyper: Any) -> Any:
    return fused_update_("adam", grads, [mu, nu], None, counts, hyper)


def adam(g: Tensor, mu: Tensor, nu: Tensor, count: Tensor, **hyper: Any) -> tuple[Tensor, ...]:
    return reference_update(RULES["adam"], g, [mu, nu], None, count, hyper, maximize=False)


def make(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(7)

    def randn() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]

    grads, mu, nu = randn(), randn(), [x.abs() for x in randn()]
    for g, n in zip(grads, nu):
        g.view(-1)[::5] = 0.0
        n.view(-1)[::10] = 0.0
    counts = [torch.tensor(1 + i % 3) for i in range(len(SHAPES))]
    return grads, mu, nu, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("eps_root", [0.0, 1e-3])
@pytest.mark.parametrize("threads", [1, 2])
def test_value(dtype: torch.dtype, eps: float, eps_root: float, threads: int) -> None:
    grads, mu, nu, counts = make(dtype)
    hyper = hypers_of(0.9, 0.999, eps, eps_root)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = fused_adam(grads, mu, nu, counts, hyper)
        in_place = [x.clone() for x in mu], [x.clone() for x in nu]
        updates = fused_adam_(grads, *in_place, counts, hyper)
    finally:
        torch.set_num_threads(before)
    rows = [adam(*row, **hyper) for row in zip(grads, mu, nu, counts)]
    for role, column in enumerate(zip(*rows)):
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(got[role], list(column), rtol=tolerance, atol=tolerance)
        assert all(torch.equal(a, b) for a, b in zip(got[role], (updates, *in_place)[role]))


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    grads, mu, nu, counts = make(torch.float32)
    hyper = hypers_of(0.9, 0.999, 1e-8, 0.0)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(fused_adam(grads, mu, nu, counts, hyper))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for x, y in zip(*results) for a, b in zip(x, y))


@pytest.mark.parametrize("eps", [1e-8, 1e-2, 0.1])
@pytest.mark.parametrize("eps_root", [0.0, 1e-8, 1e-3])
def test_first_derivative_equals_that_of_the_reference(eps: float, eps_root: float) -> None:
    grads, mu, nu, counts = make(torch.float64)
    hyper = hypers_of(0.9, 0.999, eps, eps_root)
    inputs = [x.requires_grad_() for x in (*grads, *mu, *nu)]
    generator = torch.Generator().manual_seed(8)

    def derivative(columns: tuple[list[Tensor], ...]) -> tuple[Tensor, ...]:
        outputs = [x for column in columns for x in column]
        generator.manual_seed(8)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
        return torch.autograd.grad(outputs, inputs, cotangents)

    got = derivative(fused_adam(grads, mu, nu, counts, hyper))
    rows = [adam(*row, **hyper) for row in zip(grads, mu, nu, counts)]
    expected = derivative(tuple(list(column) for column in zip(*rows)))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_gradgradcheck_with_zero_gradients() -> None:
    hyper = hypers_of(0.9, 0.999, 1e-2, 1e-3)

    def function(g: Tensor, mu: Tensor, nu: Tensor) -> tuple[Tensor, ...]:
        u, m, n = fused_adam([g], [mu], [nu], [torch.tensor(2)], hyper)
        return u[0], m[0], n[0]

    g = torch.tensor([0.0, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    mu = torch.tensor([0.0, 0.2, 0.1], dtype=torch.float64, requires_grad=True)
    nu = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (g, mu, nu), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (g, mu, nu))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_layouts_other_than_contiguous(layout: str) -> None:
    base = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4)
    g = {
        "expanded": base[:, :1].expand(3, 4),
        "transposed": base.reshape(4, 3).t(),
        "strided": torch.stack([base, -base], -1)[..., 0],
    }[layout]
    mu, nu = torch.zeros(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    hyper = hypers_of(0.9, 0.999, 1e-8, 0.0)
    count = torch.tensor(1)
    expected = adam(g, mu, nu, count, **hyper)
    got = fused_adam([g], [mu], [nu], [count], hyper)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a[0], b, rtol=1e-14, atol=0)
    updates = fused_adam_([g], [mu], [nu], [count], hyper)
    torch.testing.assert_close(updates[0], expected[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(mu, expected[1], rtol=1e-14, atol=0)


def test_in_place_call_bumps_the_version_of_the_moments() -> None:
    mu, nu = torch.zeros(3), torch.ones(3)
    fused_adam_([torch.ones(3)], [mu], [nu], [torch.tensor(1)], hypers_of(0.9, 0.999, 1e-8, 0.0))
    assert mu._version == 1
    assert nu._version == 1


def test_unsupported_tensors_are_refused() -> None:
    hyper = hypers_of(0.9, 0.999, 1e-8, 0.0)
    integers = [torch.ones(3, dtype=torch.int64)]
    with pytest.raises(KernelUnavailableError, match=r"float16 and bfloat16, got torch.int64"):
        fused_adam(integers, integers, integers, [torch.tensor(1)], hyper)
    meta = [torch.ones(3, device="meta")]
    with pytest.raises(KernelUnavailableError, match=r"got a tensor on meta"):
        fused_adam(meta, meta, meta, [torch.tensor(1)], hyper)
    one = [torch.ones(3)]
    with pytest.raises(
        ValueError, match=r"expected mu of the shape, dtype and device of the gradient"
    ):
        fused_adam(one, [torch.ones(4)], one, [torch.tensor(1)], hyper)


def test_availability() -> None:
    assert is_available("cpu")
    assert is_available(torch.device("cpu"))
    assert is_available(["cpu", "cpu"])
    assert not is_available("meta")
    with pytest.raises(RuntimeError, match="no such device"):
        is_available("no such device")
    assert is_available() == (_C.WITH_CUDA and torch.cuda.is_available())


@pytest.mark.parametrize("inplace", [False, True])
def test_adam_op(inplace: bool) -> None:
    mu, nu, g = torch.zeros(2), torch.zeros(2), torch.tensor([2.0, -3.0])
    new_mu, _, u = AdamOp(eps=0.0, inplace=inplace)(mu, nu, g, 1)
    assert u is not None
    torch.testing.assert_close(u, torch.tensor([1.0, -1.0]))
    assert (new_mu is mu) == inplace


@pytest.mark.parametrize("inplace", [False, True])
def test_adam_op_is_differentiable_in_its_numbers(inplace: bool) -> None:
    """In the second step mu' = b1 mu + (1 - b1) g, so that d mu' / d b1 = mu - g."""
    b1 = torch.tensor(0.9, requires_grad=True)
    mu, nu, g = torch.ones(2), torch.ones(2), torch.tensor([2.0, -3.0])
    new_mu, _, u = AdamOp(b1, eps=0.0, inplace=inplace)(mu, nu, g, 2)
    assert u is not None
    assert u.requires_grad
    slope = torch.autograd.grad(new_mu.sum(), b1, retain_graph=True)[0].item()
    assert slope == pytest.approx(2 - g.sum().item())
