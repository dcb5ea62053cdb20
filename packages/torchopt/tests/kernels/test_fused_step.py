# SPDX-License-Identifier: Apache-2.0
"""Native optimizer steps against the same stages one by one."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from optimizers import CASE_IDS, CASES, Row
from rule_cases import fused_step_
from torch import Tensor

import torchopt
from torchopt.errors import KernelUnavailableError
from torchopt.kernels.fused_step import StepCache
from torchopt.optim.base import Optimizer
from torchopt.optimizers.adam import ScaleByAdamState
from torchopt.optimizers.native import FusedChain, with_backend
from torchopt.transform.plan import longest_plan
from torchopt.tree import tree_leaves

FUSED = (
    *("sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta", "adamax", "radam", "amsgrad"),
    *("amsgradw", "nadam", "nadamw", "lion", "adan", "lamb", "asgd", "rprop"),
)

SHAPES = ((3, 5), (), (7,), (0,), (16390,))


def make_params(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in SHAPES
    ]


def run(
    impl: Any,
    steps: int = 4,
    missing: tuple[int, int] = (-1, -1),
    dtype: torch.dtype = torch.float64,
) -> tuple[Optimizer, list[Tensor]]:
    """Return the optimizer and the parameters after `steps` steps."""
    generator = torch.Generator().manual_seed(4)
    params = make_params(dtype)
    optimizer = Optimizer(params, impl)
    for step in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            g.view(-1)[::6] = 0.0
            p.grad = None if (step, i) == missing else g
        optimizer.step()
    return optimizer, params


def is_native(optimizer: Optimizer) -> bool:
    return all(cache.plan is not None for cache in optimizer._step_caches)


@pytest.mark.parametrize(("row", "settings"), CASES, ids=CASE_IDS)
@pytest.mark.parametrize("missing", [(-1, -1), (1, 2)], ids=["all", "missing"])
def test_step_is_that_of_the_stages(
    row: Row, settings: dict[str, Any], missing: tuple[int, int]
) -> None:
    impl = row.functional(**settings)
    fused = getattr(impl.update, "__self__", None)
    fusable = isinstance(fused, FusedChain) and fused.part is not None
    assert fusable or row.name not in FUSED
    native, got = run(impl, missing=missing)
    plain, expected = run(with_backend(impl, "reference"), missing=missing)
    # LAMB's trust ratio is not an element-wise rule, so its step is more than one call.
    assert is_native(native) == (fusable and fused.is_whole)
    assert not is_native(plain)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    states = [tree_leaves(o.state_dict()) for o in (native, plain)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("row", "settings"), CASES, ids=CASE_IDS)
def test_functional_update_is_that_of_the_stages(row: Row, settings: dict[str, Any]) -> None:
    impl = row.functional(**settings)
    reference = with_backend(impl, "reference")
    params = tuple(p.detach() for p in make_params())
    start = [torch.ones_like(p).requires_grad_() for p in params]

    def roll(t: Any, inplace: bool) -> tuple[Any, Any]:
        state = t.init(params)
        updates = params
        for k in range(3):
            grads = tuple(torch.sin(x * (k + 1)) for x in start)
            grads = tuple(g.detach() for g in grads) if inplace else grads
            updates, state = t.update(grads, state, params=params, inplace=inplace)
        return updates, state

    for inplace in (False, True):
        (got, state), (want, want_state) = (roll(t, inplace) for t in (impl, reference))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            tree_leaves(state), tree_leaves(want_state), rtol=1e-12, atol=1e-12
        )
    a, b = (
        torch.autograd.grad([u.square().sum() for u in roll(t, False)[0]], start)
        for t in (impl, reference)
    )
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_step_of_other_dtypes(dtype: torch.dtype) -> None:
    optimizer, got = run(torchopt.adam(0.05, weight_decay=0.1), steps=1, dtype=dtype)
    assert is_native(optimizer)
    _, expected = run(with_backend(torchopt.adam(0.05, weight_decay=0.1), "reference"), steps=1)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for a, b in zip(got, expected):
        inner = b.detach().abs() > 0.2  # where rounding the gradient does not flip its sign
        torch.testing.assert_close(
            a.detach().double()[inner], b.detach()[inner], rtol=tolerance, atol=tolerance
        )


def test_schedules_and_tensor_step_sizes() -> None:
    schedule = torchopt.schedule.linear_schedule(0.1, 0.01, 3)
    for lr in (schedule, torch.tensor(0.1)):
        optimizer, got = run(torchopt.adam(lr))
        assert is_native(optimizer)
        _, expected = run(with_backend(torchopt.adam(lr), "reference"))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_derivative_with_respect_to_the_step_size_is_native() -> None:
    results = []
    for backend in ("native", "reference"):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        t = with_backend(torchopt.adam(lr), backend)
        params = tuple(p.detach() for p in make_params())
        updates, _ = t.update(tuple(p.sin() for p in params), t.init(params), inplace=False)
        results.append(torch.autograd.grad(sum(u.square().sum() for u in updates), lr))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


def test_moved_tensors_are_noticed() -> None:
    p = torch.ones(4, dtype=torch.float64, requires_grad=True)
    optimizer = torchopt.SGD([p], lr=0.5)
    p.grad = torch.ones(4, dtype=torch.float64)
    optimizer.step()
    old = p.data
    p.data = torch.zeros(4, dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == [-0.5] * 4
    assert old.tolist() == [0.5] * 4
    p.data = torch.zeros(2, dtype=torch.float32)  # fewer, narrower elements
    p.grad = torch.ones(2)
    optimizer.step()
    assert p.tolist() == [-0.5] * 2


@pytest.mark.parametrize("which", ["parameter", "state", "count"])
def test_a_negation_that_becomes_pending_is_noticed(which: str) -> None:
    ends = []
    for backend in ("auto", "reference"):
        p = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
        optimizer = Optimizer([p], with_backend(torchopt.adam(0.1), backend))
        for step in range(5):
            if step == 2:
                (state,) = (s for s in optimizer.state_groups[0] if type(s) is ScaleByAdamState)
                x = {"parameter": p, "state": state.mu[0], "count": state.count[0]}[which]
                # The parameter and the state change their sign, at the same address.
                x.data = torch._neg_view(x.neg() if which == "count" else x.data)
            p.grad = torch.tensor([0.3, -1.0, 2.0 + step], dtype=torch.float64)
            optimizer.step()
        ends.append(p.detach().resolve_neg().clone())
    assert math.isfinite(ends[0].sum())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_versions_are_bumped_and_graphs_protected() -> None:
    p = torch.ones(3, requires_grad=True)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    version = p._version
    torchopt.Adam([p], lr=0.1).step()
    assert p._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_layouts_that_cannot_be_stepped_in_one_pass_are_still_stepped() -> None:
    base = torch.randn(4, 3, dtype=torch.float64)
    grad = torch.randn(3, 4, dtype=torch.float64)
    for p, g in (
        (base.clone().t().detach(), grad),
        (base.clone().reshape(3, 4), grad.t().contiguous().t()),
        (base.clone().reshape(3, 4), grad[:, :1].expand(3, 4)),
    ):
        want = p - 0.5 * g
        p.requires_grad_()
        p.grad = g
        torchopt.SGD([p], lr=0.5).step()
        torch.testing.assert_close(p.detach(), want, rtol=1e-15, atol=1e-15)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["classic", "functional"])
def test_a_step_in_place_does_not_depend_on_the_layout(layout: str, kind: str) -> None:
    """Two tensors of the same values but other strides take the same steps, states included."""
    generator = torch.Generator().manual_seed(5)
    start, *grads = torch.randn(4, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    ends = []
    for change in (LAYOUTS[layout], torch.Tensor.clone):
        p = change(start).requires_grad_()
        assert p.is_contiguous() == (change is torch.Tensor.clone or layout == "negated")
        impl = torchopt.adam(0.1, weight_decay=0.1, use_accelerated_op=True)
        if kind == "classic":
            optimizer = Optimizer([p], impl)
            for g in grads:
                p.grad = g.clone()
                optimizer.step()
            state = optimizer.state_groups[0]
        else:
            state = impl.init((p.detach(),))
            for g in grads:
                updates, state = impl.update((g,), state, params=(p.detach(),), inplace=True)
                p.data.add_(updates[0])
        ends.append([p.detach().resolve_neg(), *tree_leaves(state)])
    torch.testing.assert_close(*ends, rtol=1e-13, atol=1e-13, check_stride=False)


def test_shared_memory_is_not_stepped_in_parallel() -> None:
    p = torch.ones(4)
    cache = StepCache()
    hypers = (1.0, 0.0, 0.0)  # lr and both decays
    assert not fused_step_(cache, "sgd", [p, p], [torch.ones(4)] * 2, [], 1, hypers)
    assert p.tolist() == [1.0] * 4
    assert fused_step_(cache, "sgd", [p], [torch.ones(4)], [], 1, hypers)
    assert p.tolist() == [0.0] * 4


def test_copies_start_with_an_empty_cache() -> None:
    optimizer, params = run(torchopt.adam(0.1))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not is_native(twin)
        for p, q in zip(params, twin.param_groups[0]):
            q.grad = p.grad.clone()
        twin.step()
        assert is_native(twin)
    optimizer.step()
    torch.testing.assert_close(list(twin.param_groups[0]), params)


def test_backend_requests() -> None:
    adam = torchopt.adam(0.1)
    with pytest.raises(ValueError, match=r"expected one of \('auto', 'native', 'reference'\)"):
        with_backend(adam, "cuda")  # type: ignore[arg-type]
    chained = torchopt.chain(torchopt.clip_grad_norm(1.0), adam)
    with pytest.raises(KernelUnavailableError, match="one fused rule"):
        with_backend(chained, "native")
    assert with_backend(chained, "auto") is chained
    params = (torch.ones(2, dtype=torch.complex64),)
    native = with_backend(adam, "native")
    with pytest.raises(KernelUnavailableError, match="got torch.complex64"):
        native.update(params, native.init(params))


def test_compiles_as_one_graph() -> None:
    t = torchopt.adam(0.1, weight_decay=0.1)
    params = (torch.randn(3, 5), torch.randn(4))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(grads: Any, state: Any) -> Any:
        return t.update(grads, state, params=params, inplace=False)

    grads = tuple(p.sin() for p in params)
    got = step(grads, t.init(params))
    want = t.update(grads, t.init(params), params=params, inplace=False)
    torch.testing.assert_close(tree_leaves(got), tree_leaves(want), rtol=1e-5, atol=1e-6)


def test_vmap_over_members_of_an_ensemble() -> None:
    t = torchopt.adam(0.1)
    params = (torch.randn(6, 3, dtype=torch.float64),)
    grads = (params[0].sin(),)
    updates = torch.func.vmap(lambda p, g: t.update((g,), t.init((p,)), inplace=False)[0])(
        params[0], grads[0]
    )
    want, _ = t.update(grads, t.init(params), inplace=False)
    torch.testing.assert_close(updates[0], want[0], rtol=1e-13, atol=1e-13)


def test_an_optimizer_that_takes_no_step_makes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def plan(rules: Any) -> Any:
        asked.append(rules)
        return longest_plan(rules)

    for module in (torchopt.optimizers.native, torchopt.transform.parts):
        monkeypatch.setattr(module, "longest_plan", plan)
    optimizer = torchopt.adamw(0.1)
    params = (torch.ones(2),)
    state = optimizer.init(params)
    assert not asked
    for _ in range(3):
        _, state = optimizer.update(params, state, params=params, inplace=False)
    assert len(asked) == 1
