# SPDX-License-Identifier: Apache-2.0
"""The kernels of every device: one set of tests for the CPU and, if there is one, for CUDA.

Those named "sanitizer" are also run under compute-sanitizer; see
benchmarks/torchopt/gpu_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rule_cases import (
    CHAIN,
    DECAYED,
    RULES,
    all_hypers,
    fused_step_,
    fused_update,
    fused_update_,
    make_inputs,
    reference_update,
)
from torch import Tensor

import torchopt
from torchopt import _C
from torchopt.kernels.devices import DTYPE_CODES, placement
from torchopt.kernels.fused_step import StepCache

NAMES = sorted(RULES)
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
# Sizes around a pack of 4, a thread block of 256 and the 2048 elements of a block; more tensors
# than fit into one table of a launch.
EDGES = tuple((n,) for n in (1, 2, 3, 5, 255, 257, 1023, 1025, 1027, 2047, 2048, 2049, 4097))
MANY = ((3,),) * 70


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not (_C.WITH_CUDA and torch.cuda.is_available()):
        pytest.skip("needs a CUDA device and a build with TORCHOPT_CUDA=ON")
    yield request.param
    if request.param == "cuda":
        torch.cuda.synchronize()  # so that the test that launched a kernel reports its error


def to(device: str, *roles: list[Tensor]) -> list[list[Tensor]]:
    return [[x.to(device) for x in role] for role in roles]


def plain(
    name: str, grads: list[Tensor], states: Any, params: Any, step: int, hypers: Any
) -> list[list[Tensor]]:
    """Return the updates and new states of the reference implementation, role by role."""
    rows = [
        reference_update(
            RULES[name],
            g,
            [role[i] for role in states],
            params[i],
            torch.tensor(step, device=g.device),
            hypers,
            maximize=False,
        )
        for i, g in enumerate(grads)
    ]
    return [list(column) for column in zip(*rows)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("step", [1, 10**6])
def test_sanitizer_value(device: str, name: str, dtype: torch.dtype, step: int) -> None:
    grads, states, params = make_inputs(name, dtype, (*EDGES, (), (0,)))
    grads, params, *states = to(device, grads, params, *states)
    chain = CHAIN if step == 1 else DECAYED
    hypers = all_hypers(name, chain)
    count = torch.tensor(step, device=device)
    updates, new = fused_update(name, grads, states, params, count, hypers)
    expected = plain(name, grads, states, params, step, hypers)
    for got, want in zip((updates, *new), expected):
        torch.testing.assert_close(got, want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    in_place = fused_update_(name, grads, states, params, step, hypers)
    for got, want in zip((in_place, *states), (updates, *new)):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_hypers", [False, True])
def test_sanitizer_derivative(device: str, name: str, with_hypers: bool) -> None:
    grads, states, params = make_inputs(name, torch.float64, ((3, 5), (257,), (4099,)))
    grads, params, *states = to(device, grads, params, *states)
    hypers = all_hypers(name, DECAYED)
    if with_hypers:
        hypers = {
            k: torch.tensor(v, dtype=torch.float64, device=device, requires_grad=True)
            for k, v in hypers.items()
        }
    flat = [x.requires_grad_() for role in (grads, *states, params) for x in role]
    inputs = [*flat, *(hypers.values() if with_hypers else ())]

    def derivative(roles: Any) -> tuple[Tensor, ...]:
        outputs = [x for role in roles for x in role]
        cotangents = [torch.linspace(-1, 1, x.numel()).to(x).reshape(x.shape) for x in outputs]
        return torch.autograd.grad(
            outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
        )

    updates, new = fused_update(name, grads, states, params, 4, hypers)
    got = derivative([updates, *new])
    expected = derivative(plain(name, grads, states, params, 4, hypers))
    n = len(flat)
    torch.testing.assert_close(got[:n], expected[:n], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got[n:], expected[n:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_sanitizer_tensors_that_are_absent(device: str, name: str, dtype: torch.dtype) -> None:
    """Derivatives of one output in one input: other cotangents are not allocated or read."""
    shapes = ((3, 5), (2049,), (4099,), ())
    grads, states, params = make_inputs(name, dtype, shapes, zeros=False)
    grads, params, *states = to(device, grads, params, *states)
    for role in (grads, params, *states):
        for x in role:
            x.requires_grad_()
    updates, new = fused_update(name, grads, states, params, 4, all_hypers(name, DECAYED))
    outputs = [updates, *new]
    for output in outputs:
        weights = [torch.linspace(-1, 1, x.numel()).to(x).reshape(x.shape) for x in output]
        zeros = [[torch.zeros_like(x) for x in role] for role in outputs]
        every = [weights if role is output else z for role, z in zip(outputs, zeros)]
        for inputs in (grads, *states, params):
            got = torch.autograd.grad(
                *(output, inputs, weights), retain_graph=True, materialize_grads=True
            )
            want = torch.autograd.grad(
                [x for role in outputs for x in role],
                inputs,
                [x for role in every for x in role],
                retain_graph=True,
                materialize_grads=True,
            )
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(device: str, name: str) -> None:
    grads, states, params = make_inputs(name, torch.float64, ((2,),), zeros=False)
    grads, params, *states = to(device, grads, params, *states)
    hypers = all_hypers(name, DECAYED)

    def function(g: Tensor, p: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        updates, new = fused_update(name, [g], [[x] for x in state], [p], 4, hypers)
        return (*updates, *(x for role in new for x in role))

    inputs = [x[0].requires_grad_() for x in (grads, params, *states)]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_sanitizer_addresses_that_are_not_aligned(
    device: str, dtype: torch.dtype, offset: int
) -> None:
    grads, states, _ = make_inputs("adam", dtype, ((4097,),))
    wide = [torch.zeros(4097 + offset, dtype=dtype, device=device) for _ in range(3)]
    for space, (x,) in zip(wide, (grads, *states)):
        space[offset:] = x.to(device)
    g, mu, nu = (space[offset:] for space in wide)
    hypers = all_hypers("adam", CHAIN)
    want, new = fused_update("adam", *to(device, grads), to(device, *states), None, 3, hypers)  # type: ignore[misc]
    got = fused_update_("adam", [g], [[mu], [nu]], None, 3, hypers)
    assert torch.equal(got[0], want[0])
    assert torch.equal(mu, new[0][0])
    assert torch.equal(nu, new[1][0])
    assert all((space[:offset] == 0).all() for space in wide)


def test_sanitizer_many_tensors_and_different_steps(device: str) -> None:
    grads, states, params = make_inputs("adan", torch.float64, MANY)
    grads, params, *states = to(device, grads, params, *states)
    hypers = all_hypers("adan", DECAYED)
    steps = [torch.tensor(1 + i % 3, device=device) for i in range(len(grads))]
    inputs = [grads, *states, params]
    updates, *_ = outputs = [[torch.empty_like(g) for g in grads] for _ in range(1 + len(states))]
    index, stream = placement(grads[0])
    _C.run(
        "adan", _C.DECAYED_UPDATE, inputs, outputs, steps, DTYPE_CODES[torch.float64],
        [hypers[key] for key in RULES["adan"].all_hypers],
        maximize=False, num_threads=torch.get_num_threads(), device=index, stream=stream,
    )  # fmt: skip
    for k in range(3):
        part = slice(k, None, 3)
        want = plain(
            "adan", grads[part], [role[part] for role in states], params[part], 1 + k, hypers
        )
        torch.testing.assert_close(updates[part], want[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_sanitizer_step_in_place(device: str, name: str) -> None:
    grads, states, params = make_inputs(name, torch.float64, ((3, 5), (2049,), ()), zeros=False)
    grads, params, *states = to(device, grads, params, *states)
    hypers = all_hypers(name, DECAYED)
    updates, new = fused_update(name, grads, states, params, 2, hypers)
    want = [p + u for p, u in zip(params, updates)]
    assert fused_step_(StepCache(), name, params, list(grads), states, 2, list(hypers.values()))
    torch.testing.assert_close(params, want, rtol=1e-14, atol=1e-14)
    for role, expected in zip(states, new):
        assert all(torch.equal(a, b) for a, b in zip(role, expected))


def test_optimizers_follow_torch(device: str) -> None:
    ours = [torch.linspace(-1, 1, n, device=device).requires_grad_() for n in (5, 3000)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizers = (torchopt.Adam(ours, lr=0.01), torch.optim.Adam(theirs, lr=0.01))
    for _ in range(5):
        for params, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            sum(p.square().sum() for p in params).backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_current_stream_is_used(device: str) -> None:
    if device != "cuda":
        pytest.skip("streams are CUDA's")
    g = torch.zeros(1 << 20, device=device)
    stream = torch.cuda.Stream()
    hypers = {"lr": -1.0, "weight_decay": 0.0, "decoupled_weight_decay": 0.0}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some hundredths of a second, then the gradient arrives
        g.fill_(3.0)
        (u,), _ = fused_update("sgd", [g], [], None, 1, hypers)
    stream.synchronize()
    assert (u == 3.0).all()


def test_device_of_the_tensors_is_used(device: str) -> None:
    if device != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    hypers = {"lr": -1.0, "weight_decay": 0.0, "decoupled_weight_decay": 0.0}
    grads = [torch.full((5,), float(i), device=f"cuda:{i}") for i in (1, 0, 1)]
    updates, _ = fused_update("sgd", grads, [], None, 1, hypers)
    assert [u.device for u in updates] == [g.device for g in grads]
    assert all(torch.equal(u, g) for u, g in zip(updates, grads))


def test_more_than_two_to_the_31_elements(device: str) -> None:
    if device != "cuda" or torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of a CUDA device")
    size = 2**31 + 5
    g = torch.ones(size, dtype=torch.bfloat16, device=device)
    hypers = {"lr": -2.0, "weight_decay": 0.0, "decoupled_weight_decay": 0.0}
    (u,), _ = fused_update("sgd", [g], [], None, 1, hypers)
    assert u[-10:].eq(2.0).all()
    assert u[2**31 - 5 : 2**31].eq(2.0).all()
    assert u.view(torch.int16).max() == u.view(torch.int16).min()
