# SPDX-License-Identifier: Apache-2.0
"""Every fused rule against its torch reference: values, derivatives, dtypes, layouts."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from rule_cases import (
    CHAIN,
    DECAYED,
    HYPERS,
    POSITIVE,
    RULES,
    all_hypers,
    fused_update,
    fused_update_,
    make_inputs,
    reference_update,
)
from torch import Tensor

from torchopt import _C
from torchopt.errors import KernelUnavailableError
from torchopt.kernels.devices import DTYPE_CODES

# Half precision: one rounding of the float32 result. float32: sums of a few products, and
# cancellation in the difference nu - mu^2 of the centred rules.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
NAMES = sorted(RULES)
CHAINS = {"plain": CHAIN, "decayed": DECAYED}


def reference(
    name: str,
    grads: list[Tensor],
    states: list[list[Tensor]],
    params: list[Tensor],
    step: int,
    hypers: dict[str, Any],
    *,
    maximize: bool = False,
) -> list[list[Tensor]]:
    """Return updates and new states, role by role."""
    rows = [
        reference_update(
            RULES[name],
            g,
            [role[i] for role in states],
            params[i],
            torch.tensor(step),
            hypers,
            maximize=maximize,
        )
        for i, g in enumerate(grads)
    ]
    return [list(column) for column in zip(*rows)]


def test_tables_agree() -> None:
    table = {name: (len(r.states), len(r.all_hypers)) for name, r in RULES.items()}
    assert table == _C.RULES
    assert {
        torch.float32: _C.FLOAT32,
        torch.float64: _C.FLOAT64,
        torch.float16: _C.FLOAT16,
        torch.bfloat16: _C.BFLOAT16,
    } == DTYPE_CODES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("chain", list(CHAINS))
@pytest.mark.parametrize("step", [1, 7, 10**6])
def test_value(name: str, dtype: torch.dtype, chain: str, step: int) -> None:
    grads, states, params = make_inputs(name, dtype)
    maximize = step == 7
    hypers = all_hypers(name, CHAINS[chain])
    updates, new = fused_update(name, grads, states, params, step, hypers, maximize=maximize)
    expected = reference(name, grads, states, params, step, hypers, maximize=maximize)
    tolerance = TOLERANCES[dtype]
    for got, want in zip((updates, *new), expected):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    copies = [[x.clone() for x in role] for role in states]
    in_place = fused_update_(name, grads, copies, params, step, hypers, maximize=maximize)
    for got, want in zip((in_place, *copies), (updates, *new)):
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(x._version == 1 for role in copies for x in role)


@pytest.mark.parametrize("name", NAMES)
def test_value_of_each_of_the_first_steps(name: str) -> None:
    grads, states, params = make_inputs(name, torch.float64, ((7,),))
    hypers = all_hypers(name, DECAYED)
    for step in range(1, 10):  # some begin later than others: averages, rectification
        updates, new = fused_update(name, grads, states, params, step, hypers)
        expected = reference(name, grads, states, params, step, hypers)
        torch.testing.assert_close([updates, *new], expected, rtol=1e-13, atol=1e-13)


def test_derivative_in_the_step_at_which_the_average_of_asgd_begins() -> None:
    grads, states, params = make_inputs("asgd", torch.float64, ((7,),))
    found = []
    for run in (fused_update, lambda *args: (None, reference(*args)[1:])):
        t0 = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        hypers = all_hypers("asgd", CHAIN, t0=t0)
        _, ((average,),) = run("asgd", grads, states, params, 3, hypers)
        found.append(torch.autograd.grad(average.square().sum(), t0)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    assert found[1] != 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.5, 1 / 3, 3.0, 2.0**-9])
def test_every_number_of_half_precision_is_read_and_rounded_as_by_torch(
    dtype: torch.dtype, factor: float
) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    hypers = all_hypers("sgd", CHAIN, lr=-factor)
    ((got,), _) = fused_update("sgd", [every], [], [every], 1, hypers)
    assert torch.equal(got.isnan(), every.isnan())
    expected = (every.float() * factor).to(dtype)
    assert torch.equal(got.nan_to_num(0.0, torch.inf, -torch.inf),
                       expected.nan_to_num(0.0, torch.inf, -torch.inf))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-2])
@pytest.mark.parametrize("zero", ["gradient", "state", "both"])
def test_value_at_zeros(name: str, eps: float, zero: str) -> None:
    grads, states, params = make_inputs(name, torch.float64, ((6,),))
    if zero != "state":
        grads = [torch.zeros_like(g) for g in grads]
    if zero != "gradient":
        states = [[torch.zeros_like(x) for x in role] for role in states]
    changes = {k: eps if k == "eps" else 0.0 for k in ("eps", "eps_root") if k in HYPERS[name]}
    hypers = all_hypers(name, CHAIN, **changes)
    updates, new = fused_update(name, grads, states, params, 3, hypers)
    expected = reference(name, grads, states, params, 3, hypers)
    for got, want in zip((updates, *new), expected):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_result_does_not_depend_on_the_number_of_threads(name: str) -> None:
    grads, states, params = make_inputs(name, torch.float32)
    before = torch.get_num_threads()
    results = []
    derivatives = []
    lr = torch.tensor(0.1, requires_grad=True)
    hypers = all_hypers(name, DECAYED, lr=lr)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            updates, new = fused_update(name, grads, states, params, 2, hypers)
            results.append([x.detach() for role in (updates, *new) for x in role])
            derivatives.append(torch.autograd.grad(sum(u.sum() for u in updates), lr)[0])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert derivatives[0] == derivatives[1] == derivatives[2]
    assert derivatives[0] != 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chain", list(CHAINS))
@pytest.mark.parametrize("step", [1, 10, 10**6])
@pytest.mark.parametrize("with_hypers", [False, True])
def test_first_derivative(name: str, chain: str, step: int, with_hypers: bool) -> None:
    grads, states, params = make_inputs(name, torch.float64, ((), (0,), (3, 5), (257,), (16390,)))
    hypers = all_hypers(name, CHAINS[chain])
    if with_hypers:
        hypers = {
            k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in hypers.items()
        }
    flat = [x.requires_grad_() for role in (grads, *states, params) for x in role]
    inputs = [*flat, *(hypers.values() if with_hypers else ())]

    def derivative(roles: list[list[Tensor]]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(8)
        outputs = [x for role in roles for x in role]
        cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
        return torch.autograd.grad(
            outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
        )

    updates, new = fused_update(name, grads, states, params, step, hypers)
    got = derivative([updates, *new])
    expected = derivative(reference(name, grads, states, params, step, hypers))
    # The last gradients are sums over all elements, in another order.
    n = len(flat)
    torch.testing.assert_close(got[:n], expected[:n], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got[n:], expected[n:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    grads, states, params = make_inputs(name, torch.float64, ((3,), ()), zeros=False)
    keys = list(RULES[name].all_hypers)
    values = [torch.tensor(v, dtype=torch.float64) for v in all_hypers(name, DECAYED).values()]
    sizes = [len(grads), *(len(role) for role in states), len(params)]
    flat = [*grads, *(x for role in states for x in role), *params, *values]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        g, *s, p = [[next(rest) for _ in range(size)] for size in sizes]
        updates, new = fused_update(name, g, s, p, 4, dict(zip(keys, rest)))
        return tuple(x for role in (updates, *new) for x in role)

    inputs = tuple(x.detach().requires_grad_() for x in flat)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_an_update_is_linear_in_the_step_size_where_the_second_moment_is_zero() -> None:
    names = [n for n in NAMES if {"mu", "nu"} <= set(RULES[n].states) and "centered" not in n]
    for name in set(names) - {"adadelta"}:  # its moments are averages of other quantities
        (g,), states, params = make_inputs(name, torch.float64, ((7,),), zeros=False)
        for kind, (x,) in zip(RULES[name].states, states):
            if kind in POSITIVE:
                x.zero_()
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        hypers = all_hypers(name, CHAIN, lr=lr, eps_root=0.0)
        hypers = {k: x for k, x in hypers.items() if k in RULES[name].all_hypers}
        ((update,), _) = fused_update(name, [0 * g], states, params, 3, hypers)
        weighted = update * torch.arange(1, 8)
        assert weighted.sum() != 0
        (slope,) = torch.autograd.grad(weighted.sum(), lr)
        torch.testing.assert_close(slope, weighted.sum().detach() / 0.1, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_finite_where_everything_is_zero(name: str) -> None:
    grads, states, params = make_inputs(name, torch.float64, ((4,),))
    grads = [torch.zeros_like(g).requires_grad_() for g in grads]
    states = [[torch.zeros_like(x) for x in role] for role in states]
    changes = {"eps_root": 0.0} if "eps_root" in HYPERS[name] else {}
    hypers = all_hypers(name, CHAIN, **changes)
    updates, _ = fused_update(name, grads, states, params, 1, hypers)
    (got,) = torch.autograd.grad(updates, grads, [torch.ones(4, dtype=torch.float64)])
    (want,) = torch.autograd.grad(
        reference(name, grads, states, params, 1, hypers)[0],
        grads,
        [torch.ones(4, dtype=torch.float64)],
    )
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


LAYOUTS = ("expanded", "transposed", "strided", "negated", "channels_last")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name: str, layout: str) -> None:
    _, states, params = make_inputs(name, torch.float64, ((2, 3, 4, 5),), zeros=False)
    base = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    g = {
        "expanded": base[:, :, :, :1].expand(2, 3, 4, 5),
        "transposed": torch.randn(5, 4, 3, 2, dtype=torch.float64).permute(3, 2, 1, 0),
        "strided": torch.stack([base, -base], -1)[..., 0],
        "negated": torch.randn(2, 3, 4, 5, dtype=torch.complex128).conj().imag,
        "channels_last": base.to(memory_format=torch.channels_last),
    }[layout]
    if layout == "channels_last":
        params = [p.to(memory_format=torch.channels_last) for p in params]
        states = [[x.to(memory_format=torch.channels_last) for x in role] for role in states]
    hypers = all_hypers(name, DECAYED)
    updates, new = fused_update(name, [g], states, params, 2, hypers)
    expected = reference(name, [g.resolve_neg()], states, params, 2, hypers)
    for got, want in zip((updates, *new), expected):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_constant_derivative_is_set_for_the_rules_that_have_one(name: str) -> None:
    hypers = all_hypers(name, DECAYED)
    generator = torch.Generator().manual_seed(3)
    gs, states, ps = make_inputs(name, torch.float64, ((257,),), zeros=False)
    inputs = [gs[0], *(role[0] for role in states), ps[0]]
    cotangents = tuple(
        torch.randn(257, generator=generator, dtype=torch.float64) for _ in inputs[:-1]
    )

    def pull_back(*values: Tensor) -> tuple[Tensor, ...]:
        def update(g: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            *state, p = others
            roles = reference(name, [g], [[x] for x in state], [p], 3, hypers)
            return tuple(role[0] for role in roles)

        return torch.func.vjp(update, *values)[1](cotangents)

    # Every input on its own, with other signs where it may have them.
    here = pull_back(*inputs)
    same = all(
        torch.equal(a, b)
        for j, x in enumerate(inputs)
        for factor in ((1.7,) if (x > 0).all() else (1.7, -0.4))
        for a, b in zip(here, pull_back(*inputs[:j], factor * x, *inputs[j + 1 :]))
    )
    assert same == RULES[name].constant_derivative


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_hypers", [False, True], ids=["numbers", "tensors"])
def test_nothing_is_saved_for_a_constant_derivative(name: str, with_hypers: bool) -> None:
    lr: Any = torch.tensor(0.1, dtype=torch.float64, requires_grad=True) if with_hypers else 0.1
    hypers = all_hypers(name, {**DECAYED, "lr": lr})
    start, states, ps = make_inputs(name, torch.float64, ((5,), (2, 3)), zeros=False)
    for x in start:
        x.requires_grad_()
    grads = [x * 1.0 for x in start]
    kept = [weakref.ref(g) for g in grads]
    updates, new_states = fused_update(name, grads, states, ps, 3, hypers)
    del grads
    free = RULES[name].constant_derivative and not with_hypers
    assert [g() is None for g in kept] == [free, free]

    # Some outputs are used, others are not, and the derivative is differentiated once more.
    def first_and_second(outputs: list[list[Tensor]]) -> tuple[Tensor, ...]:
        loss = (outputs[0][0] ** 3).sum() + sum((role[-1] ** 2).sum() for role in outputs[1:])
        options = {"allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(loss, start, create_graph=True, **options)
        return *first, *torch.autograd.grad(sum((g**2).sum() for g in first), start, **options)

    expected = reference(name, [x * 1.0 for x in start], states, ps, 3, hypers)
    found = first_and_second([updates, *new_states])
    for got, want in zip(found, first_and_second(expected)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_func_transforms(name: str) -> None:
    grads, states, params = make_inputs(name, torch.float64, ((3,),), zeros=False)
    hypers = all_hypers(name, DECAYED)

    def fused(g: Tensor, lr: Tensor) -> Tensor:
        return fused_update(name, [g], states, params, 2, {**hypers, "lr": lr})[0][0]

    def plain(g: Tensor, lr: Tensor) -> Tensor:
        return reference(name, [g], states, params, 2, {**hypers, "lr": lr})[0][0]

    g, lr = grads[0], torch.tensor(0.1, dtype=torch.float64)
    batch = torch.stack([g, 2 * g, -g])
    tangents = (torch.ones_like(g), torch.tensor(0.5, dtype=torch.float64))
    for transform in (
        lambda f: torch.func.vmap(f, in_dims=(0, None))(batch, lr),
        lambda f: torch.func.jvp(f, (g, lr), tangents)[1],
        lambda f: torch.func.jacrev(f)(g, lr),
        lambda f: torch.func.jacfwd(f, argnums=1)(g, lr),
        lambda f: torch.func.grad(lambda *a: f(*a).square().sum(), argnums=1)(g, lr),
        lambda f: torch.func.vmap(torch.func.grad(lambda *a: f(*a).square().sum()), (0, None))(
            batch, lr
        ),
    ):
        got = transform(fused)
        # In these two, u does not depend smoothly on g.
        assert name in ("lion", "rprop") or got.abs().max() > 0
        torch.testing.assert_close(got, transform(plain), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_compiles_as_one_graph(name: str) -> None:
    grads, states, params = make_inputs(name, torch.float32, ((8,), (3, 5)), zeros=False)
    hypers = all_hypers(name, DECAYED)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(grads: list[Tensor], states: list[list[Tensor]]) -> Any:
        return fused_update(name, grads, states, params, 2, hypers)

    updates, new = compiled(grads, states)
    expected, expected_new = fused_update(name, grads, states, params, 2, hypers)
    torch.testing.assert_close([updates, *new], [expected, *expected_new])


def test_mixed_dtypes_in_one_call() -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    pairs = [make_inputs("adam", d, ((5,),)) for d in dtypes]
    grads = [g for gs, _, _ in pairs for g in gs]
    states = [[s[r][0] for _, s, _ in pairs] for r in range(2)]
    updates, _ = fused_update("adam", grads, states, None, 2, all_hypers("adam", CHAIN))
    assert [u.dtype for u in updates] == dtypes
    for g, s, u in zip(grads, zip(*states), updates):
        alone = fused_update("adam", [g], [[x] for x in s], None, 2, all_hypers("adam", CHAIN))
        assert torch.equal(alone[0][0], u)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_survives(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    hypers = {"lr": -1.0, "weight_decay": 0.0, "decoupled_weight_decay": 0.0}
    (update,), _ = fused_update("sgd", [every], [], None, 1, hypers)
    torch.testing.assert_close(update, every, rtol=0, atol=0, equal_nan=True)
    # Rounding, overflow and subnormal results.
    for lr in (-0.37, -3.1, -1e-4, -(2.0**-20)):
        (update,), _ = fused_update("sgd", [every], [], None, 1, {**hypers, "lr": lr})
        want = (every.float() * torch.tensor(-lr, dtype=torch.float32)).to(dtype)
        torch.testing.assert_close(update, want, rtol=0, atol=0, equal_nan=True)


def test_refusals() -> None:
    one = [torch.ones(3)]
    hypers = all_hypers("adam", CHAIN)
    integers = [torch.ones(3, dtype=torch.int32)]
    with pytest.raises(KernelUnavailableError, match=r"bfloat16, got torch.int32"):
        fused_update("adam", integers, [integers, integers], None, 1, hypers)
    meta = [torch.ones(3, device="meta")]
    with pytest.raises(KernelUnavailableError, match=r"got a tensor on meta"):
        fused_update("adam", meta, [meta, meta], None, 1, hypers)
    sparse = [torch.ones(3).to_sparse()]
    with pytest.raises(KernelUnavailableError, match=r"dense tensors, got torch.sparse_coo"):
        fused_update("adam", sparse, [one, one], None, 1, hypers)
    with pytest.raises(ValueError, match=r"expected nu of the shape, dtype and device"):
        fused_update("adam", one, [one, [torch.ones(4)]], None, 1, hypers)
    with pytest.raises(ValueError, match=r"expected 1 tensors in mu, got 0"):
        fused_update("adam", one, [[], one], None, 1, hypers)
    with pytest.raises(ValueError, match=r"expected 1 tensors in mu, got 0"):
        fused_update("adam", one, [[], [*one, *one]], None, 1, hypers)  # as many in all
    with pytest.raises(
        ValueError, match=r"lr: expected a number or a real tensor with one element"
    ):
        fused_update("adam", one, [one, one], None, 1, {**hypers, "lr": torch.ones(2)})
    for step in (torch.tensor(1.0), torch.tensor([1]), torch.tensor(1, dtype=torch.int32)):
        with pytest.raises(KernelUnavailableError, match=r"steps as 0-dim int64 tensors"):
            fused_update("adam", one, [one, one], None, step, hypers)


def test_a_state_of_another_layout_is_written_too() -> None:
    hypers = all_hypers("adam", CHAIN)
    generator = torch.Generator().manual_seed(2)
    g, mu, nu = (torch.rand(3, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    old = [mu.clone().t().contiguous().t(), nu.clone().t().contiguous().t()]
    updates = fused_update_("adam", [g], [[old[0]], [old[1]]], None, 2, hypers)
    want, new = fused_update("adam", [g], [[mu], [nu]], None, 2, hypers)
    torch.testing.assert_close([*updates, *old], [*want, new[0][0], new[1][0]])


def test_the_native_entry_refuses_invalid_arguments() -> None:
    one = [torch.ones(3)]
    with pytest.raises(ValueError, match="wrong number of input roles: expected 3, got 1"):
        _C.run("adam", _C.UPDATE, [one], [one] * 3, 1, 0, [0.0] * 7, maximize=False, num_threads=1)
    with pytest.raises(ValueError, match="wrong number of hyper-parameters"):
        _C.run("adam", _C.UPDATE, [one] * 3, [one] * 3, 1, 0, [], maximize=False, num_threads=1)
    with pytest.raises(ValueError, match="no rule named 'nothing'"):
        _C.run("nothing", _C.UPDATE, [one], [one], 1, 0, [], maximize=False, num_threads=1)
    with pytest.raises(ValueError, match="wrong number of tensors"):
        _C.run("sgd", _C.UPDATE, [one], [[]], 1, 0, [0.0] * 3, maximize=False, num_threads=1)
