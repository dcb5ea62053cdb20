# SPDX-License-Identifier: Apache-2.0
"""Half precision and autocast: a step means the same wherever it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import ROWS, SMOOTH
from torch import Tensor

import torchopt
from torchopt.optimizers.native import with_backend

HALF = [torch.float16, torch.bfloat16]
NAMES = sorted(SMOOTH)
Update = Callable[[Tensor], Tensor]


def made(name: str) -> Any:
    optimizer, settings = SMOOTH[name]
    return ROWS[optimizer].functional(**settings)


def gradients(dtype: torch.dtype) -> list[Tensor]:
    """Return two gradients whose squares a half type cannot represent."""
    g = torch.tensor([[1e-3, 1e-4, 1.0, 300.0], [-2e-3, 3e-4, -0.5, 100.0]])
    return [g.to(dtype), g.flip(1).cos().to(dtype)]


def second_update(optimizer: Any, p: Tensor, first: Tensor, inplace: bool) -> Update:
    """Return the function from the second gradient to the updates of the second step."""

    def update(g: Tensor) -> Tensor:
        state = optimizer.init((p,))
        _, state = optimizer.update((first.clone(),), state, params=(p,), inplace=False)
        updates, _ = optimizer.update((g,), state, params=(p,), inplace=inplace)
        return updates[0]  # type: ignore[no-any-return]

    return update


def close(got: Tensor, expected: Tensor, ulps: float = 2.0) -> None:
    """Check the dtype, and the values to a few units in the last place."""
    assert got.dtype is expected.dtype
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=ulps * eps, atol=ulps * eps * 1e-2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_half_precision_update_is_the_same_in_every_transform(
    name: str, dtype: torch.dtype
) -> None:
    p = torch.linspace(-1, 1, 8).reshape(2, 4).to(dtype)
    first, g = gradients(dtype)
    expected = second_update(made(name), p, first, False)(g)
    assert torch.isfinite(expected).all()
    assert expected.dtype is dtype
    for optimizer in (made(name), with_backend(made(name), "reference")):
        close(second_update(optimizer, p, first, True)(g.clone()), expected)
        f = second_update(optimizer, p, first, False)
        close(f(g), expected)
        close(torch.vmap(f)(g[None])[0], expected)
        close(torch.func.vjp(f, g)[0], expected)
        close(torch.func.jvp(f, (g,), (g,))[0], expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["adam", "lion", "lamb", "shampoo"])
def test_a_compiled_half_precision_update_is_the_same(name: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    p = torch.linspace(-1, 1, 8).reshape(2, 4).to(dtype)
    first, g = gradients(dtype)
    f = second_update(made(name), p, first, False)
    close(torch.compile(f, backend="aot_eager", fullgraph=True)(g), f(g))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_steps_are_those_of_float32_rounded(name: str, dtype: torch.dtype) -> None:
    p = torch.linspace(-1, 1, 8).reshape(2, 4).to(dtype)
    first = gradients(dtype)[0]
    optimizer = made(name)
    got = optimizer.update((first,), optimizer.init((p,)), params=(p,), inplace=False)[0][0]
    wide = (p.float(),)
    exact = optimizer.update((first.float(),), optimizer.init(wide), params=wide, inplace=False)
    close(got, exact[0][0].to(dtype))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_keeps_its_dtype(name: str, inplace: bool) -> None:
    optimizer = with_backend(made(name), "reference")
    params = {k: torch.linspace(-1, 1, 8).reshape(2, 4).to(k) for k in HALF}
    state = optimizer.init(tuple(params.values()))
    before = [x.dtype for x in torchopt.pytree.tree_leaves(state) if isinstance(x, Tensor)]
    for _ in range(2):
        grads = tuple(p.cos() for p in params.values())
        _, state = optimizer.update(grads, state, params=tuple(params.values()), inplace=inplace)
    after = [x.dtype for x in torchopt.pytree.tree_leaves(state) if isinstance(x, Tensor)]
    assert after == before


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_state_in_float32_leaves_bfloat16_parameters_what_they_are(name: str) -> None:
    row = ROWS[name]
    settings = row.settings[-1]
    net = torch.nn.Linear(3, 2)
    saved = row.meta(net, **settings)
    saved.step(net(torch.ones(1, 3)).square().sum())
    half = torch.nn.Linear(3, 2).bfloat16()
    optimizer = row.meta(half, **settings)
    optimizer.load_state_dict(saved.state_dict())
    optimizer.step(half(torch.ones(1, 3).bfloat16()).square().sum())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in half.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_an_update_does_not_run_under_the_autocast_of_its_caller(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(4, 5, generator=generator)
    grads = [torch.randn(4, 5, generator=generator) for _ in range(2)]

    def steps(inplace: bool) -> list[Tensor]:
        optimizer, out = made(name), []
        state = optimizer.init((p,))
        for g in grads:
            updates, state = optimizer.update((g.clone(),), state, params=(p,), inplace=inplace)
            out.append(updates[0])
        return out

    for inplace in (False, True):
        expected = steps(inplace)
        for dtype in HALF:
            with torch.autocast("cpu", dtype=dtype):
                got = steps(inplace)
        assert all(map(torch.equal, got, expected))


def test_the_derivative_of_a_product_of_matrices_does_not_run_under_autocast() -> None:
    """The steps of Muon are computed again in the backward pass."""
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(20, 16, generator=generator, requires_grad=True)
    weight = torch.randn(20, 16, generator=generator)

    def derivative(enabled: bool) -> Tensor:
        optimizer = torchopt.muon(0.1)
        updates, _ = optimizer.update((g,), optimizer.init((g,)), params=(g,), inplace=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return torch.autograd.grad((updates[0] * weight).sum(), g)[0]

    torch.testing.assert_close(derivative(True), derivative(False), rtol=0, atol=0)


SCALES = {
    torch.float32: (1e-20, 1e-10, 1.0, 1e10, 1e20),
    torch.bfloat16: (1e-20, 1.0, 1e20),
    torch.float16: (1e-7, 1.0, 1e4),
}


def hard_gradients() -> dict[str, Tensor]:
    """Return matrices whose second moments are singular."""
    full = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    column = full[:, :1].clone()
    with_zeros = full.clone()
    with_zeros[1] = 0.0
    return {
        "rank one": column @ full[:1],
        "zero rows": with_zeros,
        "one column": column,
        "one row": full[:1].clone(),
        "zero": torch.zeros(4, 3),
    }


def three_updates(optimizer: Any, p: Tensor, g: Tensor) -> list[Tensor]:
    state, out = optimizer.init((p,)), []
    for weight in (1.0, -0.5, 1.0):
        updates, state = optimizer.update((g * weight,), state, params=(p,), inplace=False)
        out.append(updates[0])
    return out


@pytest.mark.parametrize("dtype", list(SCALES), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_updates_are_finite_for_gradients_of_low_rank_and_any_size(
    name: str, dtype: torch.dtype
) -> None:
    optimizer = ROWS[SMOOTH[name][0]].functional(**ROWS[SMOOTH[name][0]].settings[0])
    for scale in SCALES[dtype]:
        for kind, g in hard_gradients().items():
            g = (g * scale).to(dtype)
            p = torch.linspace(-1, 1, g.numel()).reshape(g.shape).to(dtype)
            got = three_updates(optimizer, p, g)
            assert all(torch.isfinite(u).all() for u in got), (scale, kind)
            if name == "shampoo" and (dtype is not torch.float16 or scale >= 1):
                exact = three_updates(optimizer, p.double(), g.double())
                for u, v in zip(got, exact):
                    size = float(v.abs().max())
                    eps = torch.finfo(dtype).eps
                    torch.testing.assert_close(u.double(), v, rtol=4 * eps, atol=4 * eps * size)
