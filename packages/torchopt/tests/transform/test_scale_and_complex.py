# SPDX-License-Identifier: Apache-2.0
"""Norms keep their meaning at every size, and complex tensors are one tensor or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchopt
from torchopt import alias, clip, transform
from torchopt.errors import MismatchError
from torchopt.transform.norm import scaled

DOUBLE, COMPLEX = torch.float64, torch.complex128


def random(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(make: Any, grads: list[Tensor], params: list[Tensor] | None = None) -> list[Tensor]:
    params = grads if params is None else params
    updates, _ = make.update(grads, make.init(params), params=params, inplace=False)
    return updates


# name: (transformation, degree of the update in the gradient where the norm decides)
BY_NORM: dict[str, tuple[Callable[[float], Any], int]] = {
    "clip_grad_norm": (lambda s: torchopt.clip_grad_norm(s), 1),
    "clip_grad_norm, 1": (lambda s: torchopt.clip_grad_norm(s, 1.0), 1),
    "clip_grad_norm, inf": (lambda s: torchopt.clip_grad_norm(s, "inf"), 1),
    "clip_grad_norm, differentiable": (
        lambda s: torchopt.clip_grad_norm(s, differentiable=True),
        1,
    ),
    "clip_each_norm": (lambda s: clip.clip_each_norm(s), 1),
    "scale_by_trust_ratio": (lambda s: transform.scale_by_trust_ratio(), 0),
    "orthogonalize": (lambda s: transform.orthogonalize(eps=0.0), 0),
}
SIZES = (1e-30, 1e-23, 1e-18, 1e19, 1e25, 1e37)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", BY_NORM)
def test_updates_by_norm_do_not_depend_on_the_size_of_gradients(name: str, size: float) -> None:
    make, degree = BY_NORM[name]
    grads = [random(3, 4), random(2, 3, seed=1)]
    params = [random(3, 4, seed=2), random(2, 3, seed=3)]
    # 1e-6 is added to the norm of all in clip_grad_norm: it is part of what is asked for.
    added = 1e-6 if name.startswith("clip_grad_norm") else 0.0
    want = run(make(0.5), grads, params)
    if added:
        order = {"clip_grad_norm, 1": 1.0, "clip_grad_norm, inf": float("inf")}.get(name, 2.0)
        total = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]), order)
        factor = (0.5 * size / (size * total + added)).clamp(max=1.0)
        want = [g * factor for g in grads]
    small = [(g * size).float() for g in grads]
    got = run(make(0.5 * size), small, [p.float() for p in params])
    for x, y in zip(got, want):
        torch.testing.assert_close(x.double() / size**degree, y, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, -140), (DOUBLE, -1060)])
@pytest.mark.parametrize("name", BY_NORM)
def test_updates_by_norm_of_subnormal_gradients(
    name: str, dtype: torch.dtype, exponent: int
) -> None:
    make, degree = BY_NORM[name]
    grads = [(100 * random(3, 4)).round().to(dtype), (100 * random(2, 3, seed=1)).round().to(dtype)]
    params = [random(3, 4, seed=2).to(dtype), random(2, 3, seed=3).to(dtype)]
    small = [torch.ldexp(g, torch.tensor(exponent)) for g in grads]  # without rounding
    assert all(0 < float(g.abs().amax()) < torch.finfo(dtype).tiny for g in small)
    want = small if degree else run(make(1.0), grads, params)
    for x, y in zip(run(make(1.0), small, params), want):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6 * (1 - degree))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_adaptive_clip_does_not_depend_on_the_size(size: float) -> None:
    g, p = random(3, 4), 5 * random(3, 4, seed=1)
    (want,) = run(clip.adaptive_clip(0.1, 0.0), [g], [p])
    (got,) = run(clip.adaptive_clip(0.1, 0.0), [(g * size).float()], [(p * size).float()])
    assert not torch.equal(want, g)
    torch.testing.assert_close(got.double() / size, want, rtol=1e-5, atol=1e-7)


def test_derivatives_of_scaled_norms_are_those_of_the_norm() -> None:
    x = random(3, 4).requires_grad_()

    def through(x: Tensor, dim: Any) -> Tensor:
        size, unit, norm = scaled(x, dim)
        return (size * norm).sum() + (size * unit).square().sum()

    for dim in (None, (1,), (0, 1)):
        assert torch.autograd.gradcheck(lambda x, dim=dim: through(x, dim), x)
        assert torch.autograd.gradgradcheck(lambda x, dim=dim: through(x, dim), x)
    zero = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled(zero).norm, zero)
    assert torch.equal(grad, torch.zeros(3, dtype=DOUBLE))
    assert scaled(torch.zeros(0, 3)).norm == 0


def test_scaled_norms_work_under_vmap() -> None:
    batch = random(5, 3, 4) * torch.tensor([1e-30, 1e-5, 1.0, 1e5, 1e30]).view(5, 1, 1)
    for make in (clip.clip_each_norm(0.5), torchopt.clip_grad_norm(0.5)):
        got = torch.func.vmap(lambda g, make=make: run(make, [g])[0])(batch)
        want = torch.stack([run(make, [g])[0] for g in batch])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_stay_visible(value: float) -> None:
    g = torch.tensor([1.0, value])
    for make in (torchopt.clip_grad_norm(1.0), clip.clip_each_norm(1.0)):
        (got,) = run(make, [g])
        assert not torch.isfinite(got).all()


def test_centralize_takes_the_mean_of_complex_numbers() -> None:
    matrix, vector = random(2, 3, dtype=COMPLEX), random(3, dtype=COMPLEX)
    got = run(transform.centralize(), [matrix, vector])
    torch.testing.assert_close(got[0], matrix - matrix.mean(1, keepdim=True))
    assert torch.equal(got[1], vector)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, float("inf")])
def test_clip_grad_norm_takes_the_modulus_as_torch_does(order: float) -> None:
    grads = [random(2, 3, dtype=COMPLEX), random(4)]
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    nn.utils.clip_grad_norm_(params, 0.5, order)
    for got, p in zip(run(torchopt.clip_grad_norm(0.5, order), grads), params):
        torch.testing.assert_close(got, p.grad, rtol=1e-12, atol=1e-12)


def test_adaptive_clip_takes_complex_units() -> None:
    matrix, vector = random(2, 3, dtype=COMPLEX), random(3, dtype=COMPLEX)
    params = [random(2, 3, seed=1, dtype=COMPLEX), random(3, seed=2, dtype=COMPLEX)]
    got = run(clip.adaptive_clip(0.1), [matrix, vector], params)
    ratio = 0.1 * params[0].norm(dim=1, keepdim=True) / matrix.norm(dim=1, keepdim=True)
    torch.testing.assert_close(got[0], matrix * ratio.clamp(max=1.0))
    torch.testing.assert_close(got[1], vector * (0.1 * params[1].norm() / vector.norm()))


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [DOUBLE, COMPLEX])
def test_orthogonalize_applies_its_polynomial_to_singular_values(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    g = random(*shape, dtype=dtype)
    (got,) = run(transform.orthogonalize(steps=3), [g])
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / g.norm()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    want = (u * s) @ vh * max(1.0, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["shampoo", "adafactor"])
def test_statistics_of_rows_and_columns_refuse_complex_tensors(name: str) -> None:
    optimizer = getattr(alias, name)(0.1)
    params = {"w": random(2, 3), "z": random(2, 3, dtype=COMPLEX)}
    with pytest.raises(MismatchError, match=r"at \$\['z'\]: ScaleBy\w+: expected real tensors"):
        optimizer.init(params)
    with pytest.raises(ValueError, match="expected matrices, got shape \\(3,\\)"):
        run(transform.orthogonalize(), [random(3, dtype=COMPLEX)])


def test_muon_differs_from_torch_by_the_dtype_of_the_iteration_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # the only place where theirs rounds
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    for adjust, match_rms in (("original", False), ("match_rms_adamw", True)):
        for nesterov in (True, False):
            ours, theirs = ([nn.Parameter(random(4, 3)), nn.Parameter(random(3, 5))] for _ in "ab")
            optimizers = (
                torchopt.optim.Muon(ours, nesterov=nesterov, match_rms=match_rms, **settings),
                torch.optim.Muon(theirs, nesterov=nesterov, adjust_lr_fn=adjust, **settings),
            )
            for step in range(4):
                for params, optimizer in zip((ours, theirs), optimizers):
                    for i, p in enumerate(params):
                        p.grad = random(*p.shape, seed=10 * step + i)
                    optimizer.step()
            for x, y in zip(ours, theirs):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_a_hook_sees_a_complex_derivative_as_one_number() -> None:
    g = random(3, dtype=COMPLEX).requires_grad_()
    weights = random(3, seed=1, dtype=COMPLEX)
    seen = []

    def phase(derivative: Tensor) -> Tensor:
        seen.append(derivative)
        return derivative / derivative.abs()

    hooked = torchopt.register_hook(phase)
    u, _ = hooked.update(g * 1, hooked.init(g))
    (got,) = torch.autograd.grad((u * weights.conj()).real.sum(), g)
    torch.testing.assert_close(seen, [weights])
    torch.testing.assert_close(got, weights / weights.abs())


def test_hooks_for_nan_take_complex_derivatives() -> None:
    g = random(2, dtype=COMPLEX).requires_grad_()
    hooked = torchopt.register_hook(torchopt.hook.zero_nan_hook)
    u, _ = hooked.update(g * 1, hooked.init(g))
    weights = torch.tensor([complex(float("nan"), 2.0), 3.0 + 4.0j], dtype=COMPLEX)
    (got,) = torch.autograd.grad(u, g, weights)
    assert got.tolist() == [2.0j, 3.0 + 4.0j]
