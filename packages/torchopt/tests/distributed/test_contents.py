# SPDX-License-Identifier: Apache-2.0
"""Parameters are restored after a task."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import torchopt.distributed as todist
from torchopt.distributed.contents import Contents

LARGE, SMALL = 300, 30  # the sides of a square


def filled(side):
    p = torch.nn.Parameter(torch.empty(side, side, dtype=torch.float64))
    with torch.no_grad():
        p.copy_(torch.arange(float(side * side)).view(side, side))
    return p


def kept(*params):
    contents = Contents()
    contents.keep(params, [], only_shards=False)
    return contents


def is_whole(p):
    return torch.equal(p.detach(), filled(len(p)).detach())


@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_a_written_parameter_gets_its_values_and_memory_back(side):
    p = filled(side)
    place = p.data_ptr()
    contents = kept(p)
    for k in range(3):  # tasks
        with torch.no_grad():
            p.mul_(k + 2.0)
        assert not is_whole(p)
        contents.put_back()
        assert is_whole(p)
        assert p.data_ptr() == place
        contents.require_unchanged()


@pytest.mark.parametrize("side", [SMALL, LARGE])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_graph_of_written_values_is_refused_when_they_are_gone(side, how):
    p = filled(side)
    contents = kept(p)
    with torch.no_grad():
        if how == "in place":
            p.mul_(2.0)
        else:
            p.data = p.data.repeat(2, 1)
    loss = (p * p).sum()
    contents.put_all_back()
    assert is_whole(p)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_tasks_that_run_together_and_write_raise(side):
    p = filled(side)
    engine = todist.TaskParallel([p], tasks_at_once=None)

    def loss(task):
        with torch.no_grad():
            p.mul_(2.0)
        return (p * p * task).sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.backward(loss, [torch.ones((), dtype=p.dtype), torch.ones((), dtype=p.dtype)])
    assert is_whole(p)
    assert p.grad is None


@pytest.mark.parametrize("side", [SMALL, LARGE])
@pytest.mark.parametrize("how", ["view", "array", "in the task"])
def test_what_shares_the_memory_of_a_parameter_still_does_afterwards(side, how):
    p = filled(side)
    other = {"view": p.detach().t, "array": p.detach().numpy}.get(how, lambda: None)()
    contents = kept(p)
    if how == "in the task":
        other = p.detach().view(-1)
    with torch.no_grad():
        p.mul_(2.0)
    contents.put_back()
    contents.require_unchanged()
    assert is_whole(p)
    with torch.no_grad():
        p.fill_(7.0)
    assert np.asarray(other).sum() == 7.0 * side**2


@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_a_write_through_data_is_found_in_small_tensors_and_at_the_start_of_large_ones(side):
    for row in (0, side - 1) if side == SMALL else (0,):
        p = filled(side)
        contents = kept(p)
        p.data[row, -1] = -1.0
        with pytest.raises(TypeError, match=r"through `\.data`"):
            contents.require_unchanged()
        contents.put_all_back()
        assert is_whole(p)


@pytest.mark.parametrize("side", [SMALL, LARGE])
@pytest.mark.parametrize("turned", [False, True])
def test_a_tensor_that_takes_the_place_of_a_parameter_is_left_alone(side, turned):
    p, other = filled(side), torch.full((side, side), 5.0, dtype=torch.float64)
    contents = kept(p)
    p.data = p.data.t() if turned else other
    with pytest.raises(TypeError, match=r"through `\.data`"):
        contents.require_unchanged()
    contents.put_all_back()
    assert is_whole(p)
    assert bool((other == 5.0).all())
    contents.require_unchanged()
    with torch.no_grad():
        p.fill_(1.0)
    assert bool((other == 5.0).all())


def test_a_step_inside_a_task_of_one_process_leaves_the_outer_step_its_copies():
    p = filled(LARGE)
    engine = todist.TaskParallel([p])
    inner = []

    def loss(task):
        with torch.no_grad():
            p.add_(task)
        if not inner:
            inner.append(engine.backward(lambda t: (p * t).sum(), [1.0]).loss)
            p.grad = None
        return (p * task).sum()

    start = filled(LARGE).sum().item()
    step = engine.backward(loss, [1.0, 2.0])
    assert inner[0].item() == start + LARGE**2
    assert step.losses.tolist() == [start + LARGE**2, 2.0 * (start + 2.0 * LARGE**2)]
    assert is_whole(p)
    assert bool((p.grad == 1.5).all())
