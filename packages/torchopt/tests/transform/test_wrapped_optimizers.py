# SPDX-License-Identifier: Apache-2.0
"""Combinators of published methods equal loops written from their papers, and differentiate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torchopt
from torchopt.errors import NotDifferentiableError
from torchopt.transform import (
    add_decayed_weights,
    cautious,
    compensated,
    galore,
    in_8_bits,
    sam,
    scale,
    scale_by_adam,
)
from torchopt.transform.in_8_bits import Quantized, _kept_values, code_values, dequantize, quantize

DOUBLE = torch.float64
Params = dict[str, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def start() -> Params:
    return {"w": randn(3, 5, seed=1), "tall": randn(5, 3, seed=2), "b": randn(4, seed=3)}


def loss(params: Params) -> Tensor:
    total = torch.zeros((), dtype=DOUBLE)
    for i, p in enumerate(params.values()):
        total = total + (torch.sin(p + i) * randn(*p.shape, seed=10 + i)).sum() + (p**4).sum() / 9
    return total


def gradients(params: Params) -> Params:
    leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values()))))


def run(optimizer: Any, steps: int, inplace: bool = False) -> Params:
    params = start()
    state = optimizer.init(params)
    for _ in range(steps):
        grads = gradients(params)
        updates, state = optimizer.update(grads, state, params=params, inplace=inplace)
        params = torchopt.apply_updates(params, updates, inplace=inplace)
    return params


def close(got: Params, wanted: Params) -> None:
    for key, x in wanted.items():
        torch.testing.assert_close(got[key], x, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(x, start()[key])


def adam_memory(params: Params) -> dict[str, list[Tensor]]:
    return {k: [torch.zeros_like(p), torch.zeros_like(p)] for k, p in params.items()}


def adam_direction(memory: list[Tensor], g: Tensor, t: int) -> Tensor:
    memory[0] = 0.9 * memory[0] + 0.1 * g
    memory[1] = 0.999 * memory[1] + 0.001 * g * g
    return (memory[0] / (1 - 0.9**t)) / ((memory[1] / (1 - 0.999**t)).sqrt() + 1e-8)


@pytest.mark.parametrize("inplace", [False, True])
def test_cautious_steps_are_masked_where_they_go_up(inplace: bool) -> None:
    params, memory = start(), adam_memory(start())
    masked = 0
    for t in range(1, 8):
        for key, g in gradients(params).items():
            u = adam_direction(memory[key], g, t)
            mask = (u * g >= 0).to(DOUBLE)
            masked += int((mask == 0).sum())
            params[key] = params[key] - 0.3 * u * mask * mask.numel() / (mask.sum() + 1)
    close(run(cautious(torchopt.adam(0.3)), 7, inplace), params)
    assert masked > 0
    # Going up along the gradient of the negative loss is the same.
    up = torchopt.adam(0.3, maximize=True)  # of the negative loss
    optimizer = cautious(up, maximize=True)
    other = start()
    state = optimizer.init(other)
    for _ in range(7):
        grads = {k: -g for k, g in gradients(other).items()}
        updates, state = optimizer.update(grads, state, params=other, inplace=False)
        other = torchopt.apply_updates(other, updates, inplace=False)
    close(other, params)


def test_cautious_takes_complex_numbers_as_pairs_and_shows_nan() -> None:
    optimizer = cautious(torchopt.sgd(1.0, momentum=0.5))
    g = torch.tensor([1.0 + 2.0j, -1.0 + 0.5j])
    pairs = torch.view_as_real(g)
    results = []
    for x, second in ((g, g.conj().resolve_conj() * 0.1), (pairs, None)):
        state = optimizer.init(x)
        _, state = optimizer.update(x, state)
        second = pairs * torch.tensor([0.1, -0.1]) if second is None else second
        results.append(optimizer.update(second, state)[0])
    torch.testing.assert_close(torch.view_as_real(results[0]), results[1])
    bad = torch.tensor([math.nan, 1.0])
    assert optimizer.update(bad, optimizer.init(bad))[0].isnan().tolist() == [True, False]


def test_cautious_shares_are_computed_in_single_precision() -> None:
    optimizer = cautious(torchopt.sgd(1.0, momentum=0.5))
    g = torch.ones(2**17, dtype=torch.float16)
    _, state = optimizer.update(g, optimizer.init(g))
    u, state = optimizer.update(g * -0.25, state)  # no element of -0.25 goes downhill
    assert not u.any()  # 0, and not 0 times an infinite share
    g[0] = 1.0
    g[1:] = -0.0625
    u, _ = optimizer.update(g, state)
    assert u[0].item() == -math.inf  # one element takes the place of all: 1.125 * 2**16
    assert not u[1:].any()


@pytest.mark.parametrize("inplace", [False, True])
def test_sharpness_aware_steps_take_the_gradient_at_the_top(inplace: bool) -> None:
    params, memory = start(), adam_memory(start())
    for t in range(1, 4):
        grads = gradients(params)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        top = {k: p + 0.1 * grads[k] / norm for k, p in params.items()}
        for key, g in gradients(top).items():
            u = adam_direction(memory[key], g, t)
            params[key] = params[key] - 0.3 * (u + 0.1 * params[key])
    close(run(sam(torchopt.adamw(0.3, weight_decay=0.1), rho=0.1), 6, inplace), params)


def test_sharpness_aware_steps_of_any_size_and_none() -> None:
    optimizer = sam(torchopt.sgd(1.0), rho=0.5)
    for size in (1e-30, 1e30):
        g = torch.tensor([3.0, 4.0]) * size
        way, state = optimizer.update((g, None), optimizer.init((g, g)))
        torch.testing.assert_close(way[0], torch.tensor([0.3, 0.4]))
        assert way[1] is None
        down, state = optimizer.update((torch.ones(2), torch.ones(2)), state)
        torch.testing.assert_close(down[0], torch.tensor([-1.3, -1.4]))
        torch.testing.assert_close(down[1], torch.tensor([-1.0, -1.0]))
    zero = torch.zeros(2, requires_grad=True)
    way, _ = optimizer.update((zero,), optimizer.init((zero,)), inplace=False)
    (slope,) = torch.autograd.grad(way[0].sum(), zero)
    assert torch.equal(way[0], torch.zeros(2))
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_low_rank_steps_project_gradients(inplace: bool) -> None:
    params, memory, bases = start(), {}, {}
    for t in range(1, 6):
        for key, g in gradients(params).items():
            if g.ndim < 2:
                own = memory.setdefault(key, [torch.zeros_like(g), torch.zeros_like(g)])
                params[key] = params[key] - 0.3 * adam_direction(own, g, t)
                continue
            wide = g if key == "w" else g.mT
            if t in (1, 4):
                values, vectors = torch.linalg.eigh(wide @ wide.mT)
                bases[key] = vectors[:, values.argsort(descending=True)[:2]]
                if key in memory:  # what is remembered belongs to columns of either sign
                    signs = torch.linalg.svd(wide, full_matrices=False)[0][:, :2]
                    bases[key] = signs if key == "w" else torch.linalg.svd(g)[2][:2].mT
                else:
                    signs = torch.linalg.svd(wide, full_matrices=False)[0][:, :2]
                    first = signs if key == "w" else torch.linalg.svd(g)[2][:2].mT
                    torch.testing.assert_close(first @ first.mT, bases[key] @ bases[key].mT)
                    bases[key] = first
            small = bases[key].mT @ wide
            own = memory.setdefault(key, [torch.zeros_like(small), torch.zeros_like(small)])
            u = 0.5 * bases[key] @ adam_direction(own, small, t)
            params[key] = params[key] - 0.3 * (u if key == "w" else u.mT)
    optimizer = galore(torchopt.adam(0.3), rank=2, update_every=3, scale=0.5)
    close(run(optimizer, 5, inplace), params)


def test_low_rank_states_are_small_and_need_no_parameters() -> None:
    state = galore(torchopt.adam(), rank=2).init(start())
    leaves = torchopt.pytree.tree_leaves(state)
    sizes = sorted(x.numel() for x in leaves if isinstance(x, Tensor) and x.ndim)
    assert sizes == [4, 4, 10, 10, 10, 10]
    with pytest.raises(ValueError, match="an optimizer whose state starts without the parameters"):
        galore(torchopt.alias.schedule_free_sgd(0.1), rank=2).init(start())
    with pytest.raises(ValueError, match="Invalid rank value: 0"):
        galore(torchopt.adam(), rank=0)


def test_steps_with_low_rank_gradients_are_counted() -> None:
    optimizer = galore(torchopt.sgd(0.1), rank=2, update_every=3)
    state = optimizer.init(start())
    for count in range(5):
        assert state.steps == count
        _, state = optimizer.update(gradients(start()), state, inplace=False)


COMBINED: dict[str, Callable[..., Any]] = {
    "cautious": lambda lr: cautious(torchopt.adam(lr, eps=1e-2)),
    "sam": lambda lr: sam(torchopt.adam(lr, eps=1e-2), rho=lr * 2),
    "galore": lambda lr: galore(torchopt.adam(0.1, eps=1e-2), rank=2, update_every=2, scale=lr * 3),
    "compensated": lambda lr: compensated(torchopt.adam(lr, eps=1e-2)),
}


def unrolled(name: str, steps: int, fixed: Any = None) -> Callable[..., tuple[Tensor, ...]]:
    def function(lr: Tensor, w: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        optimizer = COMBINED[name](lr) if fixed is None else fixed
        params = {"w": w}
        state = optimizer.init(params)
        for g in grads[:steps]:
            updates, state = optimizer.update({"w": g * w}, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return (params["w"],)

    return function


@pytest.mark.parametrize("name", sorted(COMBINED))
def test_steps_are_differentiable_twice(name: str) -> None:
    values = [torch.tensor(0.2, dtype=DOUBLE), *(randn(3, 4, seed=i) for i in range(20, 24))]
    inputs = [x.requires_grad_() for x in values]
    function = unrolled(name, 3)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(unrolled(name, 2), inputs[:4])


@pytest.mark.parametrize("name", sorted(COMBINED))
def test_steps_under_vmap_and_compile(name: str) -> None:
    function = unrolled(name, 3)
    batch = [torch.stack([randn(3, 4, seed=i), randn(3, 4, seed=i + 50)]) for i in range(30, 34)]
    lr = torch.tensor(0.2, dtype=DOUBLE)
    wanted = torch.stack([function(lr, *row)[0] for row in zip(*batch)])
    got = torch.func.vmap(function, (None, 0, 0, 0, 0))(lr, *batch)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()
    made = unrolled(name, 3, COMBINED[name](0.2))
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    row = [x[0] for x in batch]
    torch.testing.assert_close(compiled(lr, *row)[0], wanted[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compensated_parameters_take_steps_below_their_spacing(dtype: torch.dtype) -> None:
    steps, eps = 400, torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(5)
    first = (torch.rand(50, generator=generator) + 1).to(dtype)
    grads = [torch.rand(50, generator=generator).to(dtype) for _ in range(steps)]
    exact = first.double() - sum(eps / 16 * g.double() for g in grads)
    ends = []
    for optimizer in (compensated(torchopt.sgd(eps / 16)), torchopt.sgd(eps / 16)):
        p = first.clone()
        state = optimizer.init(p)
        for g in grads:
            updates, state = optimizer.update(g, state, params=p)
            p = torchopt.apply_updates(p, updates)
        ends.append(p.double())
        if optimizer.update.__self__.__class__.__name__ == "Compensated":
            # Each step rounds the rest, at most half a spacing, to its own dtype.
            bound = steps * eps * eps / 4 * 2
            assert ((p.double() + state.rest.double()) - exact).abs().max() <= bound
            assert ((p.double() - exact) / exact).abs().max() <= eps
    assert (ends[1] - exact).abs().min() > 0  # without, nearly nothing moves
    assert (ends[1] - exact).abs().mean() > 4 * (ends[0] - exact).abs().mean()


def test_codes_are_the_nearest_and_their_error_is_bounded() -> None:
    values = code_values()
    assert len(values) == 256
    assert values.min() >= -1
    assert values.max() == 1
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(37, 29, generator=generator) * torch.logspace(-9, 3, 29)
    q = quantize(x, 100)
    got = dequantize(q, 100)
    blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 100)).reshape(-1, 100)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = values[(blocks[..., None] / scales[..., None] - values).abs().argmin(-1)] * scales
    torch.testing.assert_close(got.flatten(), nearest.flatten()[: x.numel()], rtol=1e-6, atol=0)
    error = (got.flatten() - x.flatten()).abs() / scales.expand_as(blocks).flatten()[: x.numel()]
    relative = x.flatten().abs() / scales.expand_as(blocks).flatten()[: x.numel()]
    assert error.max() <= 0.9 / 2**6 / 2 * 1.001  # half of the widest spacing, of the first decade
    for decade in range(1, 7):
        within = error[relative <= 10.0**-decade]
        spacings = [0.9 * 10.0**-k / 2 ** (6 - k) for k in (decade, decade - 1)]
        assert within.max() <= sum(spacings) / 4 * 1.001
    assert q.codes.dtype == torch.uint8
    zero = quantize(torch.zeros(5), 2)
    assert torch.equal(dequantize(zero, 2), torch.zeros(5))


def test_eight_bit_states_step_as_full_ones_do() -> None:
    generator = torch.Generator().manual_seed(7)
    p = torch.randn(64, 80, generator=generator)
    sizes = torch.logspace(-2, 0, 80)
    ends = []
    for wrap in (in_8_bits, lambda x: x):
        optimizer = wrap(torchopt.adam(0.01, betas=(0.9, 0.95)))
        q, noise = p.clone(), torch.Generator().manual_seed(8)
        state = optimizer.init(q)
        for _ in range(30):
            g = (q + torch.randn(64, 80, generator=noise) * 0.1) * sizes
            updates, state = optimizer.update(g, state, params=q)
            q = torchopt.apply_updates(q, updates)
        ends.append(q)
        leaves = torchopt.pytree.tree_leaves(state)
        held = sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))
        assert (held < 2.1 * p.numel()) == (wrap is in_8_bits)
    moved = (ends[1] - p).abs().mean()
    # Codes are off by 2 % on average, those of both moments, and alike in successive steps.
    assert (ends[0] - ends[1]).abs().mean() < 0.1 * moved


def test_small_tensors_and_counts_stay_as_they_are() -> None:
    state = in_8_bits(torchopt.adam()).init({"w": torch.zeros(64, 64), "b": torch.zeros(8)})
    kinds = [type(x) for x in (*state[0].mu, *state[0].nu)]
    assert kinds == [Tensor, Quantized] * 2


def test_codes_refuse_to_be_differentiated() -> None:
    optimizer = in_8_bits(torchopt.adam(), min_size=1)
    g = torch.ones(3, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match="codes have no derivative"):
        optimizer.update(g, optimizer.init(g), inplace=False)
    with pytest.raises(NotDifferentiableError, match="codes have no derivative"):
        torch.func.vmap(lambda x: optimizer.update(x, optimizer.init(g))[0])(torch.ones(2, 3))


def test_combinators_nest() -> None:
    optimizer = galore(
        torchopt.chain(
            cautious(scale_by_adam(), maximize=True), add_decayed_weights(0.1), scale(-0.1)
        ),
        rank=1,
    )
    params = run(sam(optimizer), 4)
    assert all(torch.isfinite(p).all() for p in params.values())
    net = torch.nn.Linear(3, 2)
    stepping = torchopt.Optimizer(net.parameters(), compensated(cautious(torchopt.adamw(0.1))))
    before = net.weight.detach().clone()
    net(torch.ones(1, 3)).sum().backward()
    stepping.step()
    assert not torch.equal(net.weight, before)


def test_sharpness_aware_steps_bring_back_what_has_no_second_gradient() -> None:
    """A leaf that climbed and then has no gradient is moved back to where it was."""
    optimizer = torchopt.transform.sam(torchopt.sgd(0.5), rho=1.0)
    p = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    state = optimizer.init(p)
    up, state = optimizer.update({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, state)
    torch.testing.assert_close([up["a"], up["b"]], [torch.tensor([0.6]), torch.tensor([0.8])])
    down, state = optimizer.update({"a": torch.tensor([2.0]), "b": None}, state)
    torch.testing.assert_close([down["a"], down["b"]], [torch.tensor([-1.6]), torch.tensor([-0.8])])
    assert not state.climbed


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
def test_codes_do_not_depend_on_the_mode_of_their_first_use(mode: Callable[[], Any]) -> None:
    _kept_values.cache_clear()
    optimizer = in_8_bits(torchopt.adam(0.1), min_size=1)
    params = torch.zeros(5)
    for _ in range(2):
        with mode():
            optimizer.init(torch.zeros(5))
        update, _ = optimizer.update(torch.ones(5), optimizer.init(params))
        torch.testing.assert_close(update, torch.full((5,), -0.1))


def test_galore_projects_without_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randn(6, 4, generator=generator) for _ in "pg")
    optimizer = galore(torchopt.sgd(0.1, weight_decay=0.1), rank=2)
    want = optimizer.update(g, optimizer.init(p), params=p)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = optimizer.update(g, optimizer.init(p), params=p)[0]
    assert torch.equal(got, want)
