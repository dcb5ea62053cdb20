# SPDX-License-Identifier: Apache-2.0
"""Kernels on random calls, and on calls that fail half-way.

The suite runs a few hundred calls. Set TORCHOPT_FUZZ=20000 for more, and TORCHOPT_FUZZ_SEED for
others; a failure names the seed of its call.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_cases import (
    CHAIN,
    DECAYED,
    POSITIVE,
    RULES,
    all_hypers,
    fused_update,
    fused_update_,
    make_inputs,
    reference_update,
)
from torch import Tensor

import torchopt
from torchopt import _C
from torchopt.kernels.devices import EXCHANGE

CALLS = int(os.environ.get("TORCHOPT_FUZZ", "160"))
FIRST = int(os.environ.get("TORCHOPT_FUZZ_SEED", "0"))
BATCHES = 8
NAMES = sorted(RULES)
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 5e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


def random_shape(rng: random.Random) -> tuple[int, ...]:
    kind = rng.randrange(5)
    if kind == 0:
        return ()
    if kind == 1:
        return (rng.choice([0, 1, 2, 255, 256, 257, 16383, 16384, 16385]),)
    return tuple(rng.choice([0, 1, 1, 2, 3, 5, 8]) for _ in range(rng.randrange(1, 5)))


def random_strides(rng: random.Random, x: Tensor) -> Tensor:
    """Return a tensor of the shape of `x` with other strides, and mostly with its values."""
    kind = rng.randrange(6)
    if kind == 0:  # dimensions in another order
        order = list(range(x.dim()))
        rng.shuffle(order)
        back = [order.index(d) for d in range(x.dim())]
        return x.permute(order).contiguous().permute(back)
    if kind == 1:  # gaps, and an address that is not aligned
        wide = (
            torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7.0, dtype=x.dtype) if x.dim() else x
        )
        if x.dim():
            wide[..., 1::2] = x
            return wide[..., 1::2]
    if kind == 2 and x.dim() and x.shape[0]:  # one row for all
        return x[:1].expand(x.shape)
    if kind == 3:  # behind other elements of the same storage
        space = torch.full((x.numel() + 3,), 7.0, dtype=x.dtype)
        space[3:] = x.reshape(-1)
        return space[3:].view(x.shape)
    if kind == 4 and x.dtype in (torch.float32, torch.float64):  # a pending negation
        return torch.complex(torch.zeros_like(x), -x).conj().imag
    return x


def positive(name: str, role: str) -> bool:
    return role in POSITIVE or (role == "mu" and name == "adadelta")


def random_call(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    name = rng.choice(NAMES)
    dtype = rng.choice(list(TOLERANCES))
    shapes = [random_shape(rng) for _ in range(rng.randrange(1, 6))]

    def role(kind: str) -> list[Tensor]:
        out = []
        for shape in shapes:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            if positive(name, kind):
                x = x.square() + 2.5
            elif "centered" in name and kind == "mu":
                x = x.clamp(-1, 1)  # so that nu - mu^2 does not cancel
            out.append(random_strides(rng, x.to(dtype)))
        return out

    return {
        "name": name,
        "dtype": dtype,
        "grads": role("g"),
        "states": [role(kind) for kind in RULES[name].states],
        "params": role("p"),
        "hypers": all_hypers(name, rng.choice([CHAIN, DECAYED])),
        "steps": [torch.tensor(rng.choice([1, 2, 3, 50, 10**6])) for _ in shapes],
        "maximize": rng.random() < 0.5,
        "threads": rng.choice([1, 2, 3, 7]),
    }


def check_call(seed: int) -> None:
    call = random_call(seed)
    name, grads, states, params = (call[k] for k in ("name", "grads", "states", "params"))
    rows = [
        reference_update(
            RULES[name],
            g.resolve_neg(),
            [role[i].resolve_neg() for role in states],
            params[i].resolve_neg(),
            call["steps"][i],
            call["hypers"],
            maximize=call["maximize"],
        )
        for i, g in enumerate(grads)
    ]
    expected = [list(column) for column in zip(*rows)]
    inputs = [x for role in (grads, *states, params) for x in role]
    before = [x.clone() for x in inputs]
    threads = torch.get_num_threads()
    torch.set_num_threads(call["threads"])
    try:
        updates, new = fused_update(
            name, grads, states, params, call["steps"], call["hypers"], maximize=call["maximize"]
        )
    finally:
        torch.set_num_threads(threads)
    tolerance = TOLERANCES[call["dtype"]]
    for got, want in zip((updates, *new), expected):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before)), "an input was written to"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_calls(batch: int) -> None:
    for seed in range(FIRST + batch, FIRST + CALLS, BATCHES):
        try:
            check_call(seed)
        except Exception as error:
            raise AssertionError(f"the call with TORCHOPT_FUZZ_SEED={seed}: {error}") from error


@pytest.mark.parametrize("inplace", [False, True])
def test_a_failed_allocation_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, inplace: bool
) -> None:
    grads, states, params = make_inputs("adam", torch.float64, ((3,), (2, 2)))
    inputs = [x for role in (grads, *states, params) for x in role]
    before, versions = [x.clone() for x in inputs], [x._version for x in inputs]
    allocate, left = torch.empty_like, 1

    def failing(x: Tensor) -> Tensor:
        nonlocal left
        if left == 0:
            raise MemoryError("no memory is left")
        left -= 1
        return allocate(x)

    monkeypatch.setattr(torch, "empty_like", failing)
    monkeypatch.setattr(_C, "fused_call", lambda *_: None)  # torch allocates
    function: Any = fused_update_ if inplace else fused_update
    with pytest.raises(MemoryError, match="no memory is left"):
        function("adam", grads, states, params, 2, all_hypers("adam", DECAYED))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert [x._version for x in inputs] == versions


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.skipif(EXCHANGE is None, reason="torch allocates")
@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer needs address space"
)
def test_a_failed_allocation_in_the_extension_changes_nothing() -> None:
    # In a separate process, where malloc has no large freed block.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "as it was"), done.stderr


WITHOUT_MEMORY = """
import resource
from pathlib import Path

import torch
from rule_cases import DECAYED, all_hypers, fused_update, make_inputs

from torchopt import _C

torch.set_num_threads(1)
grads, states, params = make_inputs("adam", torch.float64, ((3,), (1 << 22,)))
inputs = [x for role in (grads, *states, params) for x in role]
before = [x.clone() for x in inputs]
hypers = all_hypers("adam", DECAYED)
limits = resource.getrlimit(resource.RLIMIT_AS)
pages = int(Path("/proc/self/statm").read_text().split()[0])
used = _C.buffer_usage()[1]
room = 40 << 20  # for the first output of 32 MiB, not for the second
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, limits[1]))
try:
    fused_update("adam", grads, states, params, 2, hypers)
except MemoryError:
    pass
else:
    raise AssertionError("expected a MemoryError, got a result")
finally:
    resource.setrlimit(resource.RLIMIT_AS, limits)
assert all(torch.equal(a, b) for a, b in zip(inputs, before))
assert _C.buffer_usage()[1] == used, (_C.buffer_usage(), used)
fused_update("adam", grads, states, params, 2, hypers)
print("as it was")
"""


def test_an_interrupted_optimizer_step_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [torch.linspace(-1, 1, n).requires_grad_() for n in (3, 4)]
    optimizer = torchopt.Adam(params, lr=0.1)
    for p in params:
        p.grad = p.detach().cos()
    optimizer.step()
    tensors = [*params, *optimizer.state_dict()[0][0].mu, *optimizer.state_dict()[0][0].nu]
    before = [x.detach().clone() for x in tensors]
    counts = [int(c) for c in optimizer.state_dict()[0][0].count]

    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "get_num_threads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before))
    assert [int(c) for c in optimizer.state_dict()[0][0].count] == counts


def test_an_invalid_address_is_noticed_before_anything_is_written() -> None:
    ones = [torch.ones(3), torch.ones(3)]
    outputs = [torch.zeros(3), torch.zeros(3, device="meta")]
    with pytest.raises(ValueError, match="no memory"):
        _C.run(
            *("sgd", _C.UPDATE, [ones], [outputs], 1, _C.FLOAT32, [-1.0, 0.0, 0.0]),
            maximize=False,
            num_threads=1,
        )
    assert outputs[0].tolist() == [0.0] * 3
