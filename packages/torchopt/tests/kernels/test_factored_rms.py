# SPDX-License-Identifier: Apache-2.0
"""Adafactor's native step equals its rule in torch operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt import _C
from torchopt.kernels.devices import EXCHANGE
from torchopt.kernels.missing import why_missing
from torchopt.transform import scale_by_factored_rms

pytestmark = pytest.mark.skipif(
    why_missing(_C) is not None or EXCHANGE is None, reason="no native step"
)

SHAPES = (
    (7,),
    (),
    (5, 3),
    (3, 5),
    (1, 40),
    (40, 1),
    (2, 3, 4),
    (1,),
    (1500,),
    (33, 70),
    (2, 2, 2, 2),
)


def leaves(shapes: Any, dtype: torch.dtype, seed: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * size).to(dtype) for s in shapes]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list to which each call of the kernel appends whether it ran."""
    out: list[bool] = []
    native = _C.factored_rms

    def counted(*arguments: Any) -> Any:
        found = native(*arguments)
        out.append(found is not None)
        return found

    monkeypatch.setattr(_C, "factored_rms", counted)
    return out


def steps(rule: Any, dtype: torch.dtype, *, graph: bool, inplace: bool, size: float = 1.0) -> Any:
    params = leaves(SHAPES, dtype, 1)
    state = rule.init(params)
    for k in range(3):
        grads = [g.requires_grad_(graph) for g in leaves(SHAPES, dtype, 2 + k, size)]
        updates, state = rule.update(grads, state, params=params, inplace=inplace)
    return [x.detach() for x in (*updates, *state.rows, *state.columns)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "hypers", [{}, {"lr": 0.5, "beta2_decay": -0.5, "eps1": 0.3, "eps2": 2.0, "d": 0.1}]
)
def test_native_steps_equal_the_rule(
    hypers: dict[str, float], dtype: torch.dtype, inplace: bool, calls: list[bool]
) -> None:
    rule = scale_by_factored_rms(**hypers)
    wanted = steps(rule, dtype, graph=True, inplace=False)  # tensors with a graph use torch
    assert not calls
    got = steps(rule, dtype, graph=False, inplace=inplace)
    assert calls == [True] * 3  # one for all tensors of a step
    eps = torch.finfo(dtype).eps
    for x, y in zip(got, wanted):
        torch.testing.assert_close(x, y, rtol=40 * eps, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e25])
def test_native_steps_at_the_ends_of_the_range(size: float, calls: list[bool]) -> None:
    rule = scale_by_factored_rms()
    got = steps(rule, torch.float32, graph=False, inplace=False, size=size)
    wanted = steps(rule, torch.float32, graph=True, inplace=False, size=size)
    assert calls == [True] * 3
    for x, y in zip(got, wanted):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=0)


def test_nan_stays_where_it_is(calls: list[bool]) -> None:
    rule = scale_by_factored_rms()
    good, bad = torch.ones(3, 2), torch.ones(3, 2)
    bad[1, 0] = torch.nan
    updates, _ = rule.update([good, bad], rule.init([good, bad]), params=[good, bad])
    assert calls == [True]
    assert torch.isfinite(updates[0]).all()
    assert updates[1].isnan().all()


def test_states_in_place_are_written_to_and_their_versions_bumped(calls: list[bool]) -> None:
    rule = scale_by_factored_rms()
    p = torch.ones(3, 2)
    state = rule.init([p])
    row, column = state.rows[0], state.columns[0]
    versions = row._version, column._version
    _, after = rule.update([p], state, params=[p], inplace=True)
    assert after.rows[0] is row
    assert after.columns[0] is column
    assert (row._version, column._version) > versions
    kept = row.clone()
    _, following = rule.update([2 * p], after, params=[p], inplace=False)
    assert torch.equal(row, kept)
    assert not torch.equal(following.rows[0], kept)
    assert calls == [True, True]


def test_other_tensors_use_torch(calls: list[bool]) -> None:
    rule = scale_by_factored_rms()
    strided, empty = torch.randn(4, 3).mT, torch.ones(0, 3)
    for g in (strided, empty):
        updates, _ = rule.update([g], rule.init([g]), params=[g])
        assert updates[0].shape == g.shape
    assert calls
    assert not any(calls)
