# SPDX-License-Identifier: Apache-2.0
"""Kernels under recorders of operations: compilers, fake tensors, forward mode, subclasses.

A kernel call is not an operation of torch. A recorder of operations must see the reference
implementation instead, or its record reads memory that nothing has written.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from rule_cases import DECAYED, RULES, all_hypers, fused_update, fused_update_, make_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import torchopt
from torchopt.errors import KernelUnavailableError
from torchopt.optimizers.native import with_backend
from torchopt.tree import tree_leaves

NAMES = sorted(RULES)
SHAPES = ((3,), (2, 2))


def function(name: str) -> tuple[Any, list[Tensor]]:
    """Return a function of (gradients, states, parameters) to (updates, states), and arguments."""
    grads, states, params = make_inputs(name, torch.float64, SHAPES, zeros=False)
    hypers = all_hypers(name, DECAYED)
    roles = 2 + len(states)

    def run(*flat: Tensor) -> list[Tensor]:
        g, *s, p = [list(flat[2 * r : 2 * r + 2]) for r in range(roles)]
        updates, new = fused_update(name, g, s, p, 3, hypers)
        return [*updates, *(x for role in new for x in role)]

    return run, [*grads, *(x for role in states for x in role), *params]


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "real") for name in NAMES), ("adan", "fake"), ("adan", "symbolic")],
)
def test_traces_hold_the_rule(name: str, mode: str) -> None:
    run, inputs = function(name)
    recorded = make_fx(run, tracing_mode=mode)(*inputs)
    moved = [x + 0.25 for x in inputs]
    torch.testing.assert_close(recorded(*moved), run(*moved), rtol=1e-13, atol=1e-13)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_traces_hold_the_rule() -> None:
    run, inputs = function("adam")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the steps become constants, as they are
        recorded = torch.jit.trace(lambda *x: tuple(run(*x)), tuple(inputs))
    moved = [x + 0.25 for x in inputs]
    # A trace keeps numbers in single precision.
    torch.testing.assert_close(list(recorded(*moved)), run(*moved), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_have_the_shapes_of_the_results(name: str) -> None:
    run, inputs = function(name)
    want = run(*inputs)
    with FakeTensorMode() as mode:
        got = run(*(mode.from_tensor(x) for x in inputs))
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("accelerated", [False, True])
def test_optimizers_are_traced_and_run_on_fake_tensors(inplace: bool, accelerated: bool) -> None:
    t = torchopt.adam(0.1, use_accelerated_op=accelerated)

    def run(g: Tensor) -> Tensor:
        p = (torch.ones_like(g),)
        state = t.init(p)
        _, state = t.update((g,), state, params=p, inplace=inplace)
        updates, _ = t.update((g.sin(),), state, params=p, inplace=inplace)
        return updates[0]

    g = torch.linspace(-1, 1, 4, dtype=torch.float64)
    recorded = make_fx(run)(g)
    torch.testing.assert_close(recorded(g + 3), run(g + 3), rtol=1e-13, atol=1e-13)
    with FakeTensorMode() as mode:
        assert run(mode.from_tensor(g)).shape == g.shape


def test_states_are_written_in_place_under_a_trace() -> None:
    g, mu, nu = (torch.full((3,), x, dtype=torch.float64) for x in (1.0, 0.5, 0.25))
    hypers = all_hypers("adam", {"lr": 0.1, "weight_decay": 0.0, "decoupled_weight_decay": 0.0})

    def run(g: Tensor, mu: Tensor, nu: Tensor) -> list[Tensor]:
        (u,) = fused_update_("adam", [g], [[mu], [nu]], None, 2, hypers)
        return [u, mu, nu]

    recorded = make_fx(run)(g, mu.clone(), nu.clone())
    got, want = (f(g, mu.clone(), nu.clone()) for f in (recorded, run))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


class Wrapper(Tensor):
    """A subclass whose memory does not hold its values."""


def test_subclasses_use_the_stages() -> None:
    g = torch.linspace(-1, 1, 4).as_subclass(Wrapper)
    t = torchopt.adam(0.1)
    params = (torch.ones(4).as_subclass(Wrapper),)
    updates, _ = t.update((g,), t.init(params), inplace=False)
    reference = with_backend(t, "reference")
    want, _ = reference.update((g,), reference.init(params), inplace=False)
    assert type(updates[0]) is Wrapper
    torch.testing.assert_close(updates[0], want[0], rtol=0, atol=0)
    native = with_backend(t, "native")
    with pytest.raises(KernelUnavailableError, match="plain tensors, got a Wrapper"):
        native.update((g,), native.init(params), inplace=False)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_not_silently_zero(name: str) -> None:
    # A custom operator with only a reverse rule would give zero tangents here.
    run, inputs = function(name)
    tangents = [torch.cos(x) for x in inputs]
    _, pushed = torch.func.jvp(lambda *x: tuple(run(*x)), tuple(inputs), tuple(tangents))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents)]
        seen = [forward_ad.unpack_dual(y).tangent for y in run(*duals)]
    h = 1e-6
    ahead, behind = (run(*(x + s * h * t for x, t in zip(inputs, tangents))) for s in (1, -1))
    want = [(a - b) / (2 * h) for a, b in zip(ahead, behind)]
    for got in (pushed, seen):
        assert all(x is not None and x.abs().max() > 0 for x in got)
        torch.testing.assert_close(list(got), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["adan"])
def test_compiles_as_one_graph_with_its_derivative(name: str) -> None:
    # The compiler refuses an autograd function with a forward-mode rule.
    run, inputs = function(name)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*flat: Tensor) -> list[Tensor]:
        return run(*flat)

    def derivative(f: Any) -> Any:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = f(*leaves)
        return out, torch.autograd.grad(sum(x.square().sum() for x in out), leaves)

    got, want = derivative(compiled), derivative(run)
    torch.testing.assert_close(tree_leaves(got), tree_leaves(want), rtol=1e-11, atol=1e-12)
