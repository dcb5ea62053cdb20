# SPDX-License-Identifier: Apache-2.0
"""Noise, curvature given from outside, and preconditioners of dimensions."""

from __future__ import annotations

import pytest
import torch

import torchopt
from torchopt import alias
from torchopt.kernels.reference.inverse_root import inverse_root
from torchopt.optimizers.psgd import scale_by_psgd
from torchopt.optimizers.soap import scale_by_soap
from torchopt.transform import add_noise, observe_curvature, scale_by_shampoo

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_noise_has_the_given_variance_and_fades() -> None:
    n = 40_000
    noise = add_noise(eta=0.5, gamma=2.0, generator=torch.Generator().manual_seed(3))
    g = torch.full((n,), 7.0, dtype=DOUBLE)
    state = noise.init(g)
    for k in (1, 2, 3):
        updates, state = noise.update(g, state)
        variance = 0.5 / k**2
        # Five standard errors of a mean and of a variance of n normal numbers.
        assert abs(updates.mean().item() - 7.0) < 5 * (variance / n) ** 0.5
        assert abs(updates.var().item() - variance) < 5 * variance * (2 / n) ** 0.5
    again, _ = add_noise(0.5, 2.0, torch.Generator().manual_seed(3)).update(g, noise.init(g))
    first = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    torch.testing.assert_close(again, 7.0 + 0.5**0.5 * first)
    assert torch.equal(g, torch.full((n,), 7.0, dtype=DOUBLE))


def test_noise_advances_its_generator_in_each_step() -> None:
    generator = torch.Generator().manual_seed(3)
    noise, g = add_noise(eta=1.0, gamma=0.0, generator=generator), torch.zeros(4, dtype=DOUBLE)
    state = noise.init(g)
    found = []
    for _ in range(3):
        updates, state = noise.update(g, state)
        found.append(updates)
    drawn = torch.Generator().manual_seed(3)
    wanted = [torch.randn(4, generator=drawn, dtype=DOUBLE) for _ in range(3)]
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    assert torch.equal(generator.get_state(), drawn.get_state())


def test_noise_passes_gradients_on_and_vmaps() -> None:
    g = randn(3).requires_grad_()
    noise = add_noise(0.1)
    updates, _ = noise.update({"g": g}, noise.init({"g": g}), inplace=False)
    assert torch.equal(torch.autograd.grad(updates["g"].sum(), g)[0], torch.ones(3, dtype=DOUBLE))

    def once(x: torch.Tensor) -> torch.Tensor:
        return noise.update(x, noise.init(x), inplace=False)[0]

    batch = torch.func.vmap(once, randomness="different")(torch.zeros(2, 3, dtype=DOUBLE))
    assert not torch.equal(batch[0], batch[1])
    with pytest.raises(ValueError, match="Invalid eta value: -1"):
        add_noise(-1.0)


@pytest.mark.parametrize("p", [1, 2, 4, 6])
def test_inverse_root_and_its_derivatives(p: int) -> None:
    q, _ = torch.linalg.qr(randn(4, 4))
    values = torch.tensor([1e-6, 1.0, 1.0, 40.0], dtype=DOUBLE)  # two of them are equal
    a = (q * values) @ q.mT
    expected = (q * values ** (-1 / p)) @ q.mT
    # An eigenvalue is known to eps times the largest, here 4e7 times the least.
    rtol = 4 * torch.finfo(DOUBLE).eps * 4e7 / p
    torch.testing.assert_close(inverse_root(a, p), expected, rtol=rtol, atol=1e-9)

    base = (q * values.clamp(min=0.1)) @ q.mT

    def of_symmetric(x: torch.Tensor) -> torch.Tensor:
        return inverse_root((x + x.mT) / 2, p)

    assert torch.autograd.gradcheck(of_symmetric, base.requires_grad_(), check_forward_ad=True)
    # Daleckii and Krein: in the eigenbasis the derivative is the table of divided differences.
    direction = randn(4, 4, seed=1)
    direction = direction + direction.mT
    (basis, v) = (q, values.clamp(min=0.1))
    powers = v ** (-1 / p)
    gaps = v[:, None] - v[None, :]
    slopes = torch.where(
        gaps.abs() < 1e-9,
        (-1 / p) * v[:, None] ** (-1 / p - 1),
        (powers[:, None] - powers[None, :]) / torch.where(gaps.abs() < 1e-9, 1.0, gaps),
    )
    wanted = basis @ (slopes * (basis.mT @ direction @ basis)) @ basis.mT
    _, got = torch.func.jvp(of_symmetric, (base.detach(),), (direction,))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_shampoo_preconditions_every_dimension_of_a_tensor() -> None:
    g = randn(3, 2, 4)
    eps, u = 0.3, g
    for i, n in enumerate(g.shape):
        rows = g.movedim(i, 0).reshape(n, -1)
        values, vectors = torch.linalg.eigh(eps * torch.eye(n, dtype=DOUBLE) + rows @ rows.mT)
        u = torch.tensordot(u, (vectors * values ** (-1 / 6)) @ vectors.mT, dims=([0], [0]))
    direction = scale_by_shampoo(eps)
    got, state = direction.update({"w": g}, direction.init({"w": g}), inplace=False)
    torch.testing.assert_close(got["w"], u, rtol=1e-10, atol=1e-12)
    assert state.statistics["w"].numel() == 9 + 4 + 16


def test_shampoo_keeps_diagonals_of_long_dimensions() -> None:
    g = randn(2, 5)
    direction = scale_by_shampoo(eps=0.3, decay=0.9, max_size=4)
    got, state = direction.update(g, direction.init(g), inplace=False)
    values, vectors = torch.linalg.eigh(0.27 * torch.eye(2, dtype=DOUBLE) + 0.1 * g @ g.mT)
    expected = (vectors * values ** (-1 / 4)) @ vectors.mT @ g
    expected = expected * (0.27 + 0.1 * (g * g).sum(0)) ** (-1 / 4)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert state.statistics.numel() == 4 + 5
    for settings, message in (
        ({"eps": 0.0}, "Invalid epsilon value: 0"),
        ({"decay": 1.5}, "Invalid decay value: 1.5"),
        ({"update_every": 0}, "Invalid update_every value: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            scale_by_shampoo(**settings)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (5, 6, 7), (5, 6, 7, 5)])
def test_the_exponent_of_a_long_dimension_is_that_of_the_order(shape: tuple[int, ...]) -> None:
    g = randn(*shape)
    direction = scale_by_shampoo(eps=0.3, max_size=4)
    got, _ = direction.update(g, direction.init(g), inplace=False)
    expected = g
    for i in range(g.ndim):
        others = tuple(k for k in range(g.ndim) if k != i)
        square = g.square().sum(dim=others, keepdim=True) if others else g.square()
        expected = expected * (0.3 + square) ** (-1 / (2 * g.ndim))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_sophia_takes_curvature_from_outside() -> None:
    # With the exact Hessian and no averages a step of one is Newton's, clipped to 1.
    h = torch.tensor([2.0, 50.0, 0.01], dtype=DOUBLE)
    optimizer = alias.sophia(1.0, (0.0, 0.0), rho=1.0, weight_decay=0.0, update_every=None)
    params = {"w": torch.tensor([0.4, -0.3, 9.0], dtype=DOUBLE)}
    state = observe_curvature(optimizer.init(params), {"w": h}, b2=0.0)
    updates, state = optimizer.update({"w": h * params["w"]}, state, params=params, inplace=False)
    stepped = torchopt.apply_updates(params, updates, inplace=False)
    expected = torch.tensor([0.0, 0.0, 8.0], dtype=DOUBLE)
    torch.testing.assert_close(stepped["w"], expected, rtol=0, atol=1e-15)
    kept = observe_curvature(state, {"w": None})
    assert torch.equal(kept[0].h[0], h)

    with pytest.raises(ValueError, match="expected a state for 2 leaves, got one for 1"):
        observe_curvature(state, [h, h])
    with pytest.raises(ValueError, match="expected the state of Sophia, got ScaleByAdamState"):
        observe_curvature(torchopt.adam().init(params), {"w": h})
    coded = torchopt.transform.in_8_bits(alias.sophia(update_every=None), min_size=1)
    with pytest.raises(ValueError, match="codes of in_8_bits"):
        observe_curvature(coded.init(params), {"w": h})
    for settings, message in (
        ({"rho": -1.0}, "Invalid rho value: -1"),
        ({"eps": 0.0}, "Invalid epsilon value: 0"),
        ({"batch_size": 0}, "Invalid batch_size value: 0"),
        ({"update_every": 0}, "Invalid update_every value: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            alias.sophia(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soap_makes_no_steps_of_rounding(dtype: torch.dtype) -> None:
    # A tall matrix has no gradient along some left eigenvectors.
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(6, 2, generator=generator).to(dtype) for _ in range(3)]
    found = []
    for kind in (dtype, DOUBLE):
        direction = scale_by_soap(update_every=1)
        state = direction.init(grads[0].to(kind))
        for g in grads:
            u, state = direction.update(g.to(kind), state, inplace=False)
        found.append(u)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double(), found[1], rtol=eps, atol=eps)


def test_soap_is_adam_in_the_eigenbasis() -> None:
    # With one gradient again and again, the bases are those of its singular vectors, in which it
    # is diagonal: Adam's direction is the sign of the diagonal, and SOAP's is U V'.
    u, _, vh = torch.linalg.svd(randn(3, 3))
    g = u @ torch.diag(torch.tensor([9.0, 3.0, 1.0], dtype=DOUBLE)) @ vh
    direction = scale_by_soap(update_every=1)
    state = direction.init(g)
    for _ in range(300):  # the bases come nearer by a factor 0.95 a step
        got, state = direction.update(g, state, inplace=False)
    torch.testing.assert_close(got, u @ vh, rtol=0, atol=1e-6)


def test_psgd_whitens_gradients() -> None:
    # Gradients L N R with normal N: Q fits so that the directions have equal variances.
    generator = torch.Generator().manual_seed(11)
    left = torch.diag(torch.tensor([9.0, 3.0, 1.0], dtype=DOUBLE))
    right = torch.diag(torch.tensor([2.0, 0.5], dtype=DOUBLE))
    direction = scale_by_psgd(momentum=0.0, precondition_lr=0.05)
    state = direction.init(torch.zeros(3, 2, dtype=DOUBLE))
    directions = []
    for step in range(1500):
        g = left @ torch.randn(3, 2, generator=generator, dtype=DOUBLE) @ right
        u, state = direction.update(g, state, inplace=False)
        if step >= 500:
            directions.append(u.flatten())
    sizes = torch.stack(directions).square().mean(0).sqrt()
    assert sizes.max() / sizes.min() < 2  # 36 for the gradients
    assert 0.5 < sizes.mean() < 2
