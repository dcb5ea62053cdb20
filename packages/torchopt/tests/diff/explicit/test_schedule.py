# SPDX-License-Identifier: Apache-2.0
"""Snapshots are placed so that as few steps as possible run again."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt.diff.explicit.schedule import actions, forward_steps, kept_by_the_run


@functools.cache
def fewest(steps: int, snapshots: int) -> int:
    """Return the smallest number of forward steps, by trying every place of the next snapshot."""
    if steps == 1:
        return 0
    if snapshots == 1:
        return steps * (steps - 1) // 2
    return min(k + fewest(steps - k, snapshots - 1) + fewest(k, snapshots) for k in range(1, steps))


@pytest.mark.parametrize("snapshots", range(1, 9))
def test_steps_forward_are_the_binomial_formula(snapshots: int) -> None:
    for steps in range(1, 61):
        present, count, kept, most, reversed_ = 0, 0, {0}, 1, []
        for action, t in actions(0, steps, snapshots):
            if action == "advance":
                assert t > present
                count, present = count + t - present, t
            elif action == "store":
                assert t == present
                kept.add(t)
                most = max(most, len(kept))
            elif action == "restore":
                assert t in kept
                present = t
            elif action == "free":
                kept.remove(t)
            else:
                assert t == present
                reversed_.append(t)
        assert reversed_ == list(range(steps))[::-1]
        assert not kept
        assert most <= snapshots
        assert count == forward_steps(steps, snapshots) == fewest(steps, snapshots)
        assert len(kept_by_the_run(0, steps, snapshots)) < snapshots


@pytest.mark.parametrize(("steps", "snapshots"), [(1, 1), (7, 1), (10, 3), (13, 2), (9, 20)])
def test_the_loss_is_called_as_often_as_counted(steps: int, snapshots: int) -> None:
    calls = [0]

    def loss(w: Tensor, batch: Any) -> Tensor:
        calls[0] += 1
        return ((w - batch) ** 2).sum() + (w**4).sum()

    w = torch.tensor([0.5, -0.2], dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.01), steps=steps, keep=snapshots)
    result = inner(w, torch.ones(2, dtype=torch.float64))
    assert calls == [steps]
    result.params.sum().backward()
    # The run itself, the repeated steps, and each step once more in the backward pass.
    again = forward_steps(steps, min(snapshots, steps)) - (steps - 1)
    assert calls == [steps + again + steps]
