# SPDX-License-Identifier: Apache-2.0
"""Training steps are traced by torch.compile in one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import ROWS
from torch import Tensor

import torchopt


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_training_step_is_one_graph(name: str) -> None:
    row = ROWS[name]
    optimizer = row.functional(**row.settings[0])
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.tanh(x @ params["w"] + params["b"]).pow(2).mean()

    def step(params: dict[str, Tensor], state: Any) -> tuple[dict[str, Tensor], Any]:
        grads = torch.func.grad(loss)(params)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False), state

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(0)
    start = {
        "b": torch.randn(2, generator=generator, dtype=torch.float64),
        "w": torch.randn(3, 2, generator=generator, dtype=torch.float64),
    }
    results = []
    for function in (step, compiled):
        params, state = dict(start), optimizer.init(start)
        for _ in range(3):
            params, state = function(params, state)
        results.append(params)
    for key in start:
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-11, atol=1e-12)
    assert not torch.equal(results[0]["w"], start["w"])
