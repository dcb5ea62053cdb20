# SPDX-License-Identifier: Apache-2.0
"""Steps in place with compensated parameters and with states in 8 bits."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import pytest
import torch
from optimizers import ROWS, SMOOTH
from torch import Tensor

import torchopt
from torchopt.errors import MismatchError, NotDifferentiableError
from torchopt.optimizers import stages
from torchopt.transform.in_8_bits import Quantized, dequantize, quantize
from torchopt.tree import tree_leaves, tree_map


def trained(dtype: torch.dtype, **options: bool) -> tuple[Tensor, torchopt.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5000, generator=generator, dtype=torch.float64).to(dtype)
    optimizer = torchopt.Adam([p], lr=1e-4, **options)
    for _ in range(100):
        p.grad = torch.randn(5000, generator=generator, dtype=torch.float64).to(dtype) + 1
        optimizer.step()
    return p, optimizer


def test_compensated_parameters_are_the_exact_ones_rounded_once() -> None:
    exact = trained(torch.float32)[0]
    lost = trained(torch.bfloat16)[0].float() - exact
    kept = trained(torch.bfloat16, compensated=True)[0].float() - exact
    # The start and the result are rounded once each, and the gradients to 8 bits.
    bound = exact.abs() * 2**-7 + 1e-3
    assert (kept.abs() <= bound).all()
    assert kept.mean().abs() < 0.2 * lost.mean().abs()


@pytest.mark.parametrize("in_8_bits", [False, True], ids=["plain states", "in 8 bits"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torchopt.schedule_free_sgd(2**-10),
        lambda: torchopt.schedule_free_adamw(2**-10),
        lambda: torchopt.transform.lookahead(torchopt.sgd(2**-10), 5),
    ],
    ids=["schedule-free SGD", "schedule-free AdamW", "lookahead"],
)
def test_compensated_optimizers_keep_copies_of_parameters_in_float32(
    make: Any, *, in_8_bits: bool
) -> None:
    """In bfloat16, each step of 2^-10 of such a copy of 1 would be lost."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.ones(4, dtype=dtype, requires_grad=True)
        optimizer = torchopt.Optimizer([p], make(), compensated=True, in_8_bits=in_8_bits)
        for _ in range(300):
            p.grad = -torch.ones_like(p)
            optimizer.step()
        ends.append(p.detach().float())
    assert (ends[0] > 1.1).all()
    assert ((ends[1] - ends[0]).abs() < 2**-6).all()  # two units of bfloat16 there


def is_trained(p: Tensor) -> bool:
    return p.requires_grad


def is_parameter(p: Tensor) -> bool:
    return isinstance(p, torch.nn.Parameter)


@pytest.mark.parametrize("option", ["compensated", "in_8_bits"])
@pytest.mark.parametrize("chosen", [is_trained, is_parameter, "by identity"])
def test_masks_see_the_parameters_themselves(option: str, chosen: Any) -> None:
    dtype = torch.bfloat16 if option == "compensated" else torch.float32
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    frozen = torch.ones(8, dtype=dtype)
    inner = torchopt.transform.masked(
        torchopt.schedule_free_sgd(0.5),
        lambda tree: tree_map(chosen if callable(chosen) else lambda x: x is p, tree),
    )
    optimizer = torchopt.Optimizer([p, frozen], inner, **{option: True})
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 0.5))
    assert torch.equal(frozen, torch.ones_like(frozen))


class Start(NamedTuple):
    """Two copies of a parameter that no graph connects with it, and no copy."""

    detached: Tensor
    written: Tensor
    other: Tensor


def with_starts() -> torchopt.base.GradientTransformation:
    def init(p: Tensor) -> Start:
        written = torch.empty_like(p)
        written[:] = p
        return Start(p.detach().clone(), written, p.new_ones(p.shape))

    return torchopt.base.GradientTransformation(init, lambda u, s, **_: (u, s))


@pytest.mark.parametrize("grad", [False, True], ids=["without a graph", "with a graph"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_copies_are_found_without_a_graph(*, compiled: bool, grad: bool) -> None:
    half = torch.ones(8, dtype=torch.bfloat16, requires_grad=grad)
    starts = {
        "compensated": torchopt.transform.compensated(with_starts()).init,
        "in 8 bits": torchopt.transform.in_8_bits(with_starts(), min_size=1).init,
    }
    if compiled:
        starts = {
            k: torch.compile(init, backend="eager", fullgraph=True) for k, init in starts.items()
        }
    state = starts["compensated"](half).inner_state
    assert [x.dtype for x in state] == [torch.float32, torch.float32, torch.bfloat16]
    coded = starts["in 8 bits"](half)
    assert [isinstance(x, Quantized) for x in coded] == [False, False, True]


def test_a_start_is_computed_once() -> None:
    calls = []
    inner = with_starts()

    def init(p: Tensor) -> Any:
        calls.append(p)
        return inner.init(p)

    counted = torchopt.base.GradientTransformation(init, inner.update)
    p = torch.ones(8, dtype=torch.bfloat16)
    torchopt.transform.compensated(counted).init(p)
    torchopt.transform.in_8_bits(counted).init(p)
    assert len(calls) == 2
    assert all(x is p for x in calls)


def test_copies_are_found_inside_transforms() -> None:
    p = torch.ones(3, 8, dtype=torch.bfloat16)
    state = torch.func.vmap(torchopt.transform.compensated(with_starts()).init)(p)
    assert [x.dtype for x in state.inner_state] == [torch.float32, torch.float32, torch.bfloat16]


def test_the_start_of_a_compensated_optimizer_is_differentiated() -> None:
    p = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = torchopt.transform.compensated(torchopt.transform.lookahead(torchopt.sgd(0.5), 1))
    state, g = optimizer.init(p), torch.ones_like(p)
    updates, state = optimizer.update(g, state, params=p, inplace=False)
    (found,) = torch.autograd.grad((p + updates).sum(), p)
    assert torch.equal(found, torch.ones_like(p))


def test_states_are_in_8_bits_and_steps_are_close() -> None:
    plain, _ = trained(torch.float32)
    coded, optimizer = trained(torch.float32, in_8_bits=True)
    (state,) = optimizer.state_groups
    bytes_ = [x for x in tree_leaves(state) if isinstance(x, Tensor) and x.dtype == torch.uint8]
    assert [x.numel() for x in bytes_] == [5000, 5000]
    # After 100 steps of up to 1e-4: what a code is off by, 7 % at most and 2 % on average, adds up
    # where the same one is kept, as that of a second moment is.
    off = (coded - plain).abs()
    assert off.max() < 5e-4
    assert off.mean() < 1e-4
    assert not torch.equal(coded, plain)


def test_a_coded_step_is_a_step_of_the_decoded_states() -> None:
    size, inner = 32, torchopt.adam(0.1)
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(4, 100, generator=generator, dtype=torch.float64)
    optimizer = torchopt.transform.in_8_bits(inner, block_size=size, min_size=1)
    state, plain = optimizer.init(start), inner.init(start)

    def is_coded(x: Any) -> bool:
        return isinstance(x, Quantized)

    for g in grads:
        updates, state = optimizer.update(g, state, params=start, inplace=False)
        expected, plain = inner.update(g, plain, params=start, inplace=False)
        torch.testing.assert_close(updates, expected, rtol=1e-12, atol=0)
        coded = tree_map(lambda x: quantize(x, size) if x.numel() > 1 else x, plain)
        for x, y in zip(tree_leaves(state), tree_leaves(coded), strict=True):
            assert torch.equal(x, y)
        plain = tree_map(
            lambda x: dequantize(x, size) if is_coded(x) else x, coded, is_leaf=is_coded
        )


KEEP_PARAMETERS: dict[str, Any] = {
    "schedule-free SGD": lambda: torchopt.schedule_free_sgd(0.02),
    "schedule-free AdamW": lambda: torchopt.schedule_free_adamw(0.002),
    "schedule-free RAdam": lambda: torchopt.schedule_free_radam(0.002),
    "lookahead": lambda: torchopt.transform.lookahead(torchopt.adam(0.002), 5),
    "prodigy": lambda: torchopt.prodigy(),
}


@pytest.mark.parametrize("start", [0.0, 1.0], ids=["from zero", "from random numbers"])
@pytest.mark.parametrize("name", KEEP_PARAMETERS)
def test_copies_of_parameters_lose_no_small_steps(name: str, start: float) -> None:
    """Steps here are much smaller than the distance between two codes of a parameter."""
    generator = torch.Generator().manual_seed(0)
    first, target = torch.randn(2, 64, 64, generator=generator, dtype=torch.float64)
    ends = []
    for coded in (False, True):
        p = (start * first).requires_grad_()
        optimizer = torchopt.Optimizer([p], KEEP_PARAMETERS[name](), in_8_bits=coded)
        for _ in range(40):
            p.grad = p.detach() - target
            optimizer.step()
        ends.append(p.detach())
    moved = (ends[0] - start * first).norm()
    assert moved > 0
    assert (ends[1] - ends[0]).norm() < 0.1 * moved


@pytest.mark.parametrize("option", ["compensated", "in_8_bits"])
def test_the_average_of_asgd_is_not_rounded(option: str) -> None:
    """It moves by 1/k of a distance, and is no copy of a parameter at the start."""
    dtype = torch.bfloat16 if option == "compensated" else torch.float64
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 64, 64, generator=generator).to(dtype).double()
    ends = []
    for exact in (True, False):
        p = start.to(torch.float64 if exact else dtype, copy=True).requires_grad_()
        optimizer = torchopt.ASGD([p], lr=0.02, t0=0.0, **{} if exact else {option: True})
        for _ in range(300):
            p.grad = (p.detach().double() - target).to(p.dtype)
            optimizer.step()
        (found,) = [x for x in tree_leaves(optimizer.state_groups) if is_average(x, p)]
        ends.append(found.double())
    assert (ends[1] - ends[0]).norm() < 0.01 * ends[0].norm()


def is_average(x: Any, p: Tensor) -> bool:
    wide = torch.promote_types(p.dtype, torch.float32)
    return isinstance(x, Tensor) and x.shape == p.shape and x.dtype is wide


MATRICES: dict[str, Any] = {
    "shampoo": lambda: torchopt.shampoo(0.05),
    "soap": lambda: torchopt.soap(0.05),
    "psgd": lambda: torchopt.psgd(0.05),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_no_codes(name: str) -> None:
    """Codes of a statistic may have negative eigenvalues, whose roots are NaN."""
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 64, 64, generator=generator, dtype=torch.float64)
    ends = []
    for coded in (False, True):
        p = start.clone().requires_grad_()
        optimizer = torchopt.Optimizer([p], MATRICES[name](), in_8_bits=coded)
        for _ in range(8):
            p.grad = p.detach() - target
            optimizer.step()
        ends.append(p.detach())
        (state,) = optimizer.state_groups
        leaves = tree_leaves(state, is_leaf=lambda x: isinstance(x, Quantized))
        assert all(not isinstance(x, Quantized) or x.codes.shape == p.shape for x in leaves)
    # The moments of SOAP differ much in size from one eigenvector to the next.
    assert (ends[1] - ends[0]).norm() < 0.2 * (ends[0] - start).norm()


WRAPPED: dict[str, Any] = {
    "sam": lambda: torchopt.transform.sam(torchopt.sgd(1e-3), rho=1.0),
    "galore": lambda: torchopt.transform.galore(torchopt.sgd(0.05), rank=8, update_every=3),
    "sam of galore": lambda: torchopt.transform.sam(
        torchopt.transform.galore(torchopt.sgd(1e-3), rank=8), rho=1.0
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_a_later_step_takes_back_or_projects_with_is_no_code(name: str) -> None:
    """SAM leaves the parameters where they were but for its step; bases stay orthogonal."""
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 64, 64, generator=generator, dtype=torch.float64)
    ends = []
    for coded in (False, True):
        p = start.clone().requires_grad_()
        optimizer = torchopt.Optimizer([p], WRAPPED[name](), in_8_bits=coded)
        for _ in range(8):
            p.grad = p.detach() - target
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_schedule_free_averages_are_found_among_codes() -> None:
    params = {"w": torch.randn(64, 64), "b": torch.zeros(3)}
    inner = torchopt.schedule_free_adamw(0.1)
    for optimizer in (inner, torchopt.transform.in_8_bits(inner)):
        state = optimizer.init(params)
        _, state = optimizer.update(tree_map(torch.ones_like, params), state, params=params)
        found = torchopt.transform.averaged_params(state, params)
        torch.testing.assert_close(found, tree_map(lambda p: p - 0.1, params))


def test_codes_cut_off_no_derivative_of_the_start() -> None:
    optimizer = torchopt.transform.in_8_bits(torchopt.schedule_free_sgd(0.1), min_size=1)
    p = torch.ones(8, requires_grad=True)
    optimizer.init(p)
    with torch.no_grad():
        optimizer.init(2 * p)
    with pytest.raises(NotDifferentiableError, match="parameters that are differentiated"):
        optimizer.init(2 * p)


LEARNED: dict[str, Any] = {
    "step size": lambda h: torchopt.adam(h),
    "decay of a moment": lambda h: torchopt.sgd(0.1, momentum=h),
    "schedule": lambda h: torchopt.sgd(lambda count: h / (count + 1)),
    "weight decay": lambda h: torchopt.adamw(0.1, weight_decay=h),
}


@pytest.mark.parametrize("name", LEARNED)
def test_codes_cut_off_no_derivative_of_a_number(name: str) -> None:
    h = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = torch.linspace(-1, 1, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torchopt.transform.in_8_bits(LEARNED[name](h), min_size=1)
    state, grads = optimizer.init(params), params.detach() ** 3
    with pytest.raises(NotDifferentiableError, match="numbers are constants"):
        optimizer.update(grads, state, params=params, inplace=False)
    with torch.no_grad():
        optimizer.update(grads, state, params=params, inplace=False)


@pytest.mark.parametrize("make", [torchopt.sgd, torchopt.adamw])
def test_codes_take_trained_parameters_and_refuse_differentiated_ones(make: Any) -> None:
    start = torch.linspace(-1, 1, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torchopt.transform.in_8_bits(make(0.1, weight_decay=0.1), min_size=1)
    state, grads = optimizer.init(start), start.detach() ** 3
    updates, state = optimizer.update(grads, state, params=start, inplace=False)
    assert not updates.requires_grad
    with pytest.raises(NotDifferentiableError, match="numbers are constants"):
        optimizer.update(grads, state, params=start * 1, inplace=False)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}], ids=["adam", "with decay"])
@pytest.mark.parametrize("make", [torchopt.Adam, torchopt.AdamW])
def test_compensated_steps_are_one_native_call_in_float32(
    make: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with `use_accelerated_op`, which refuses whatever is not one."""

    def stepped(**options: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        p = torch.randn(50, generator=generator).to(torch.bfloat16)
        optimizer = make([p], lr=1e-3, compensated=True, **settings, **options)
        for _ in range(5):
            p.grad = torch.randn(50, generator=generator).to(torch.bfloat16)
            optimizer.step()
            assert {x.dtype for x in tree_leaves(optimizer.state_dict()) if x.ndim} == {p.dtype}
        return p

    asked, chosen = stepped(use_accelerated_op=True), stepped()
    assert torch.equal(asked, chosen)
    monkeypatch.setattr(stages, "DEFAULT_BACKEND", "reference")
    torch.testing.assert_close(chosen, stepped())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_real_gradients_of_complex_parameters_are_not_widened_for_ever(weight_decay: float) -> None:
    optimizer = torchopt.adam(0.1, weight_decay=weight_decay)
    p = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(MismatchError, match="shape"):
        optimizer.update(torch.ones(3), optimizer.init(p), params=p)


@pytest.mark.parametrize("option", ["compensated", "in_8_bits"])
def test_the_options_hold_for_later_groups_too(option: str) -> None:
    first, second = (torch.ones(4096, dtype=torch.bfloat16) for _ in range(2))
    optimizer = torchopt.SGD([first], lr=2**-10, momentum=0.5, **{option: True})
    optimizer.add_param_group([second], impl=torchopt.sgd(2**-10, momentum=0.5))
    for _ in range(20):
        first.grad = second.grad = -torch.ones(4096, dtype=torch.bfloat16)
        optimizer.step()
    assert torch.equal(first, second)
    assert (first > 1).all() == (option == "compensated")


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_named_states_in_codes_go_on_where_they_were_saved(name: str) -> None:
    """Also of tensors that are too small for codes, beside others."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((64, 64), (3,), (), (0, 2))
    data = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(5)]
    row, settings = ROWS[SMOOTH[name][0]], {"lr": 0.1, **SMOOTH[name][1]}

    def made(start: list[Tensor]) -> torchopt.Optimizer:
        inner = row.functional(**settings)
        return torchopt.Optimizer([p.clone() for p in start], inner, in_8_bits=True)

    def step(optimizer: torchopt.Optimizer, grads: list[list[Tensor]]) -> tuple[Tensor, ...]:
        for leaves in grads:
            for p, g in zip(optimizer.param_groups[0], leaves):
                p.grad = g
            optimizer.step()
        return optimizer.param_groups[0]

    whole = made(data[0])
    middle = [p.clone() for p in step(whole, data[1:3])]
    file = io.BytesIO()
    torch.save(whole.named_state_dict(), file)
    file.seek(0)
    later = made(middle)
    later.load_named_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(step(later, data[3:]), step(whole, data[3:])):
        assert torch.equal(p, q)
