# SPDX-License-Identifier: Apache-2.0
"""The entry point of the kernels: it steps, or returns the reason and changes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from rule_cases import DECAYED, RULES, all_hypers, fused_update, make_inputs
from torch import Tensor

import torchopt
from torchopt import _C
from torchopt.kernels import devices, fused_call, fused_step, native
from torchopt.kernels.devices import EXCHANGE
from torchopt.kernels.fused_step import StepCache

SHAPES = ((3, 2), (), (7,))


def inputs() -> tuple[list[Any], list[list[Any]], list[Any], list[float]]:
    grads, states, params = make_inputs("adam", torch.float64, SHAPES)
    hypers = all_hypers("adam", DECAYED)
    return grads, states, params, [hypers[name] for name in RULES["adam"].all_hypers]


class Subclass(Tensor):
    pass


def of_another_shape(x: Tensor) -> Tensor:
    return torch.cat([x.reshape(-1), x.reshape(-1)])


OTHERS = {
    "missing": (lambda x: None, "NoneType"),
    "subclass": (lambda x: x.as_subclass(Subclass), "Subclass"),
    "sparse": (lambda x: x.reshape(-1).to_sparse(), "dense tensors"),
    "complex": (lambda x: x.to(torch.complex128), "complex128"),
    "integer": (lambda x: x.to(torch.int64), "int64"),
    "meta": (lambda x: x.to("meta"), "on meta"),
}


def copied(roles: list[list[Any]]) -> list[list[Any]]:
    return [[x.clone() for x in role] for role in roles]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("into", [False, True])
def test_gradients_without_a_kernel_are_refused_with_a_reason(kind: str, into: bool) -> None:
    grads, states, params, hypers = inputs()
    change, words = OTHERS[kind]
    grads[1] = change(grads[1])
    kept = copied([*states, params])
    cache = StepCache() if into else None
    found = native.attempt(
        RULES["adam"], grads, states, params, 3, tuple(hypers), inplace=True, plain=True, into=cache
    )
    assert isinstance(found, torchopt.errors.KernelUnavailableError)
    assert ("gradient is missing" if into else words) in str(found)
    for role, before in zip([*states, params], kept):
        assert all(map(torch.equal, role, before))


@pytest.mark.parametrize("role", ["mu", "params"])
@pytest.mark.parametrize("change", [of_another_shape, lambda x: x.float(), lambda x: x.to("meta")])
def test_tensors_that_do_not_belong_together_are_named(role: str, change: Any) -> None:
    grads, states, params, hypers = inputs()
    if role == "mu":
        states[0][2] = change(states[0][2])
    else:
        params[2] = change(params[2])
    found = native.attempt(RULES["adam"], grads, states, params, 3, tuple(hypers))
    assert isinstance(found, ValueError)
    assert f"expected {role} of the shape, dtype and device of the gradient" in str(found)


def test_tensors_in_a_transform_are_refused_or_use_the_reference() -> None:
    grads, states, params, hypers = inputs()
    seen = []

    def step(g: Tensor) -> Tensor:
        for plain in (True, False):
            found = native.attempt(
                RULES["adam"], [g], [s[2:] for s in states], params[2:], 3, hypers, plain=plain
            )
            seen.append(found)
        updates: Tensor = seen[-1][0][0]
        return updates

    got = torch.func.vmap(step)(torch.stack([grads[2], grads[2]]))
    assert isinstance(seen[0], torchopt.errors.KernelUnavailableError)
    assert "a transform follows a gradient" in str(seen[0])
    want, _ = fused_update(
        "adam", grads[2:], [s[2:] for s in states], params[2:], 3, all_hypers("adam", DECAYED)
    )
    torch.testing.assert_close(got, torch.stack([want[0], want[0]]), rtol=1e-14, atol=0)


def test_learned_hyper_parameters_cannot_step_in_place() -> None:
    grads, states, params, _ = inputs()
    hypers = all_hypers("adam", DECAYED, lr=torch.tensor(0.1, requires_grad=True))
    found = native.attempt(RULES["adam"], grads, states, params, 3, hypers, into=StepCache())
    assert "a hyper-parameter is watched" in str(found)


def test_all_calls_of_the_entry_point_give_the_same_numbers() -> None:
    results = []
    for inplace, into in ((False, False), (True, False), (True, True)):
        grads, states, params, hypers = inputs()
        cache = StepCache() if into else None
        found = native.attempt(
            RULES["adam"], grads, states, params, 3, tuple(hypers), inplace=inplace, into=cache
        )
        assert not isinstance(found, Exception)
        updates, new = found
        if inplace:
            assert all(a is b for role, old in zip(new, states) for a, b in zip(role, old))
        stepped = params if into else [p + u for p, u in zip(params, updates)]
        results.append([*stepped, *(x for role in new for x in role)])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=1e-14, atol=1e-15)


@pytest.fixture
def judgements(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often the native call reads tensors, and `refusal` checks them one by one."""
    counts: Counter[str] = Counter()

    def counting(module: Any, name: str, call: Any) -> None:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    class Extension:
        def __getattr__(self, name: str) -> Any:
            return getattr(_C, name)

    extension = Extension()
    counting(extension, "fused_call", _C.fused_call)
    counting(extension, "StepPlan", _C.StepPlan)
    monkeypatch.setattr(fused_call, "_C", extension)
    monkeypatch.setattr(fused_step, "_C", extension)
    monkeypatch.setattr(native, "_C", extension)
    for module in (native, fused_step):
        counting(module, "refusal", devices.refusal)
    return counts


@pytest.mark.skipif(EXCHANGE is None, reason="this torch has no C interface")
def test_tensors_are_checked_once(judgements: Counter[str]) -> None:
    params = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    optimizer = torchopt.adamw(0.1)
    state = optimizer.init(params)
    for inplace in (False, True):
        _, state = optimizer.update(params, state, params=params, inplace=inplace)
    assert judgements == {"fused_call": 2}
    judgements.clear()
    watched = {name: x.clone().requires_grad_() for name, x in params.items()}
    updates, _ = optimizer.update(watched, state, params=params, inplace=False)
    assert judgements == {"fused_call": 1}
    torch.autograd.grad(updates["a"].sum(), watched["a"])
    assert judgements == {"fused_call": 2}  # the derivative is the second call
    judgements.clear()
    complexes = {"a": torch.ones(3, dtype=torch.complex64)}
    optimizer.update(complexes, optimizer.init(complexes), params=complexes)
    assert judgements == {"fused_call": 1, "refusal": 1}  # which finds the reason


def test_steps_in_place_check_tensors_in_the_first_step(judgements: Counter[str]) -> None:
    params = [torch.ones(3).requires_grad_(), torch.ones(2, 2).requires_grad_()]
    optimizer = torchopt.Adam(params, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert judgements == {"refusal": 1, "StepPlan": 1}
