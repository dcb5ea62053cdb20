# SPDX-License-Identifier: Apache-2.0
"""The bundle adjustment example: smoke run, its rotations and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("bundle_adjustment")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert results["adjusted"]["huber"]["status"] == "CONVERGED"
    found = results["calibrated"]
    assert found["slope"] == pytest.approx(found["difference"], rel=1e-3)


def test_rotation_vectors_turn_as_the_exponential_of_their_matrix(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    cross = torch.stack([torch.linalg.cross(v.expand(3, 3), eye).T for v in w])
    expected = x @ torch.linalg.matrix_exp(cross).mT
    torch.testing.assert_close(example.rotate(w, x), expected)
    still = torch.func.jacrev(lambda w: example.rotate(w, x[:1]))(torch.zeros_like(w[:1]))
    assert still.isfinite().all()
