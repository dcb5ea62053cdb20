# SPDX-License-Identifier: Apache-2.0
"""Updates, gradients and states share no memory that a caller may write to."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from optimizers import ROWS

import torchopt
from torchopt import transform
from torchopt.clip import adaptive_clip, clip_by_value, clip_each_norm, clip_grad_norm
from torchopt.combine import chain
from torchopt.kernels import native
from torchopt.tree import tree_leaves, tree_map

DOUBLE = torch.float64
TRANSFORMATIONS: dict[str, Any] = {
    "trace": lambda: transform.trace(0.9),
    "trace_dampened": lambda: transform.trace(0.9, dampening=0.5),
    "trace_nesterov": lambda: transform.trace(0.9, nesterov=True),
    "ema": lambda: transform.ema(0.9, debias=False),
    "ema_debiased": lambda: transform.ema(0.9, debias=True),
    "clip_grad_norm": lambda: clip_grad_norm(0.1),
    "clip_grad_norm_loose": lambda: clip_grad_norm(1e9),
    "clip_each_norm": lambda: clip_each_norm(0.1),
    "clip_by_value": lambda: clip_by_value(0.1),
    "adaptive_clip": lambda: adaptive_clip(0.1),
    "sam": lambda: transform.sam(torchopt.sgd(0.1, momentum=0.9), 0.1),
    "lookahead": lambda: transform.lookahead(torchopt.sgd(0.1, momentum=0.9), 2),
    "accumulate": lambda: transform.accumulate(torchopt.sgd(0.1, momentum=0.9), 2),
    "cautious": lambda: transform.cautious(torchopt.sgd(0.1, momentum=0.9)),
    "apply_if_finite": lambda: transform.apply_if_finite(torchopt.sgd(0.1, momentum=0.9)),
}
for name in sorted(n for n in dir(transform) if n.startswith("scale_by_")):
    constructor = getattr(transform, name)
    required = [
        p
        for p in inspect.signature(constructor).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    if not required:
        TRANSFORMATIONS[name] = constructor
for row in ROWS.values():
    TRANSFORMATIONS[f"optimizer_{row.name}"] = lambda row=row: row.functional(**row.settings[0])


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(3, 2, generator=generator, dtype=DOUBLE),
        "vector": torch.randn(4, generator=generator, dtype=DOUBLE),
        "scalar": torch.randn((), generator=generator, dtype=DOUBLE),
    }


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def update(t: Any, g: Any, state: Any, p: Any, *, inplace: bool) -> tuple[Any, Any]:
    return t.update(g, state, params=p, inplace=inplace)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_what_a_caller_overwrites_does_not_reach_the_state(name: str) -> None:
    t, params = TRANSFORMATIONS[name](), draw(0)
    state = t.init(params)
    kept = [x.clone() for x in tensors(state)]
    for x in tensors(params):  # as a step in place does
        x.fill_(torch.nan)
    assert all(map(torch.equal, kept, tensors(state)))
    for seed in (1, 2):
        grads, params = draw(seed), draw(0)
        kept = [x.clone() for x in tensors(state)]
        updates, new = update(t, grads, state, params, inplace=False)
        assert all(map(torch.equal, kept, tensors(state)))
        assert all(map(torch.equal, tensors(grads), tensors(draw(seed))))
        kept = [x.clone() for x in tensors(new)]
        for x in [*tensors(updates), *tensors(grads), *tensors(params)]:
            x.fill_(torch.nan)
        for old, now in zip(kept, tensors(new)):
            torch.testing.assert_close(now, old, rtol=0, atol=0)
        state = new


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_steps_are_in_place_unless_told_otherwise(name: str) -> None:
    update = TRANSFORMATIONS[name]().update
    assert inspect.signature(update).parameters["inplace"].default is True


@pytest.mark.parametrize("number", [2, 4])
def test_a_state_of_fewer_or_more_leaves_is_refused(number: int) -> None:
    grads = list(draw(1).values())
    for t in (transform.trace.flat(0.9), transform.scale_by_adam.flat()):
        state = t.init([torch.ones(2, dtype=DOUBLE)] * number)
        with pytest.raises(ValueError, match=f"expected a state for 3 leaves.* has {number}"):
            t.update(grads, state, inplace=False)


@pytest.mark.parametrize("name", ["trace", "trace_nesterov", "scale_by_adopt", "scale_by_lion"])
def test_what_a_caller_overwrites_does_not_reach_a_state_that_cannot_be_written(name: str) -> None:
    """A step in place makes new tensors instead of writing into leaves that require grad."""
    t, params = TRANSFORMATIONS[name](), draw(0)
    state = tree_map(lambda x: x.requires_grad_() if x.is_floating_point() else x, t.init(params))
    updates, new = update(t, draw(1), state, params, inplace=True)
    kept = [x.detach().clone() for x in tensors(new)]
    with torch.no_grad():
        for x in tensors(updates):
            x.fill_(torch.nan)
    for x, y in zip(tensors(new), kept, strict=True):
        torch.testing.assert_close(x.detach(), y, rtol=0, atol=0)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
def test_a_step_in_place_leaves_learned_states_as_they_are(name: str, graph: bool) -> None:
    """With or without a graph, it makes new tensors instead of writing into them."""
    t, params = TRANSFORMATIONS[name](), draw(0)
    _, state = update(t, draw(1), t.init(params), params, inplace=False)
    learned = tree_map(
        lambda x: (
            x.detach().requires_grad_()
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
        ),
        state,
    )
    before = [x.detach().clone() for x in tensors(learned)]
    with torch.set_grad_enabled(graph):
        updates, new = update(t, draw(2), learned, params, inplace=True)
    assert all(map(torch.equal, before, tensors(learned)))
    kept = [x.detach().clone() for x in tensors(new)]
    with torch.no_grad():
        for x in tensors(updates):
            x.fill_(torch.nan)
    assert all(map(torch.equal, kept, tensors(new)))


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_what_comes_behind_in_a_chain_may_write_to_the_updates(name: str) -> None:
    """Scaling in place behind it changes the updates, and not the state of the next step."""
    ours, plain = [chain(TRANSFORMATIONS[name](), transform.scale(-0.5)) for _ in range(2)]
    params = draw(0)
    states = [t.init(params) for t in (ours, plain)]
    for seed in (1, 2, 3):
        written, states[0] = update(ours, draw(seed), states[0], params, inplace=True)
        expected, states[1] = update(plain, draw(seed), states[1], params, inplace=False)
        for x, y in zip(tensors(written), tensors(expected)):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(ROWS) - {"muon"}))
def test_a_step_in_place_keeps_the_tensors_of_the_state(name: str) -> None:
    """Memory does not move: where a step writes, the next one finds the same tensor.

    Partitions, such as Muon, are the exception: if one part refuses, no other may have written.
    """
    t, params = ROWS[name].functional(**ROWS[name].settings[0]), draw(0)
    old = t.init(params)
    for seed in (1, 2):
        update(t, draw(seed), old, params, inplace=False)  # and this one leaves them
        before = {x.data_ptr() for x in tensors(old) if x.ndim and x.numel() > 1}
        _, old = update(t, draw(seed), old, params, inplace=True)
        after = {x.data_ptr() for x in tensors(old) if x.ndim and x.numel() > 1}
        assert after == before


@pytest.mark.parametrize("name", sorted(ROWS))
@pytest.mark.parametrize("chain", [torchopt.chain, torchopt.chain.flat], ids=["trees", "flat"])
def test_a_step_in_place_that_is_refused_half_way_has_written_nothing(
    name: str, chain: Any
) -> None:
    def refuse(updates: Any, state: Any, **_: Any) -> Any:
        raise ArithmeticError

    refused = torchopt.base.GradientTransformation(lambda params: (), refuse)
    t = chain(ROWS[name].functional(**ROWS[name].settings[0]), refused)
    params = draw(0)
    state = t.init(params)
    before = [x.clone() for x in tensors(state)]
    with pytest.raises(ArithmeticError):
        update(t, draw(1), state, params, inplace=True)
    for x, y in zip(tensors(state), before, strict=True):
        assert torch.equal(x, y)


ZERO = {"lamb": torchopt.lamb, "lars": torchopt.lars, "adafactor": torchopt.adafactor}


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize(
    "way", ["natively", "in place", "with a learned step size", "without kernels"]
)
def test_parameters_of_zero_are_left_behind(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trust ratio of |p| = 0 would hold zeros for ever."""
    if way == "without kernels":
        monkeypatch.setattr(native, "why_missing", lambda extension: "there is none")
    learned = way == "with a learned step size"  # in torch's operations, which have a graph
    optimizer = ZERO[name](lr=torch.tensor(0.1, requires_grad=True) if learned else 0.1)
    params = {k: torch.zeros_like(x) for k, x in draw(0).items()}
    updates, _ = update(
        optimizer, draw(1), optimizer.init(params), params, inplace=way == "in place"
    )
    moved = torchopt.apply_updates(params, updates, inplace=False)
    for k, x in moved.items():
        # Down the gradient; Adafactor's smallest root mean square is 1e-3, its step 0.1.
        assert (x * draw(1)[k] < 0).all()
        assert x.square().mean().sqrt() > 0.99e-4
