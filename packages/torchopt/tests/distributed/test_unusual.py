# SPDX-License-Identifier: Apache-2.0
"""Unusual parameters, buffers, groups and arguments: correct at every world size, or refused."""

from __future__ import annotations

import pytest
import torch
import unusual_programs as programs
from ahead import ahead, in_world, told_of

OPTIONS = {
    "static": {},
    "dynamic": {"schedule": "dynamic"},
    "deterministic": {"deterministic": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_gradients_of_unusual_parameters_are_those_of_a_loop(standing, options):
    one = standing(programs.run, 1, "gradients", options)[0]
    for found in standing(programs.run, 3, "gradients", options):
        for name, (got, want) in found.items():
            for a, b, c in zip(got, want, one[name][0]):
                assert (a.layout, a.dtype, a.shape) == (b.layout, b.dtype, b.shape), name
                assert (c.layout, c.dtype) == (b.layout, b.dtype), name
                if a.is_sparse:
                    assert sorted({*a.coalesce().indices()[0].tolist()}) == [1, 2, 3, 4, 5, 8]
                a, b, c = (x.to_dense() for x in (a, b, c))
                bound = max(4 * torch.finfo(b.dtype).eps, 1e-13)
                scale = b.abs().max().item() if b.numel() else 0.0
                assert scale > 0.1 or not b.numel()
                torch.testing.assert_close(a, b, rtol=0, atol=bound * scale)
                if "deterministic" in options:
                    assert torch.equal(a, c)


def test_parameters_with_bits_for_signs_start_as_those_of_rank_0(standing):
    assert standing(programs.run, 3, "signed_of_rank_0") == [[[1 - 2j] * 2, [-1.0] * 2]] * 3


def test_a_second_gradient_after_the_first_was_sent_is_refused(standing):
    for (rank, _, kind, trace, _), grads in standing(programs.run, 3, "second_gradients"):
        assert (rank, kind) == (0, "raised")
        assert "expected one gradient of a parameter in a backward pass, got a second" in trace
        assert grads == [None, None]
    ((_, grads),) = standing(programs.run, 1, "second_gradients")
    assert [set(g.tolist()) for g in grads] == [{9.0}, {3.0}]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_buffers_of_every_kind_are_the_same_at_every_world_size(standing, options):
    inf = float("inf")
    want = {
        "count": [5, 5],
        "small": [5, 5],
        "on": [False, True],
        "off": [False, True],
        "coarse": [1.0, 1.0],
        "empty": [],
        "once": [inf, inf],
        "mask": [[0.0, -inf], [0.0, 0.0]],
    }
    for n in (1, 3):
        for found in standing(programs.run, n, "buffers", options):
            assert found.pop("phase") == pytest.approx(3j, rel=1e-14)
            # If it starts at infinity, the result is the mean of the tasks' values.
            assert found.pop("least") == pytest.approx([3.0, 3.0], rel=1e-14)
            assert found == want


def test_groups_with_common_ranks_make_separate_engines(standing):
    first, second, third = standing(programs.run, 3, "overlapping_groups")
    assert first == {(0, 2): ((0, 0, 2, 2, 2), 2), (2, 0): ((0, 0, 2, 2, 2), 2)}
    assert second == {(1, 2): ((1, 1, 2, 2, 2), 2)}
    assert third == {**first, **second, (2,): ((2,) * 5, None)}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("empty", "ValueError: `tasks`: expected at least one task, got none"),
        ("generator", "TypeError: `tasks`: expected a sequence"),
        ("weights", "ValueError: `weights`: expected numbers >= 0"),
        ("frozen", "ValueError: `params`: expected tensors that require gradients"),
        ("learned weights", "NotDifferentiableError: `weights`: expected numbers, got tensors"),
        pytest.param(
            *("any dtype", "ValueError: `params`: expected gradients of a known dtype"),
            marks=pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="one dtype"),
        ),
    ],
)
def test_a_step_that_one_rank_cannot_begin_is_taken_by_none(standing, how, words):
    for n in (3,) if how == "any dtype" else (1, 3):  # one process needs no dtype
        *others, last = standing(programs.run, n, "refused", how)
        assert last[0].startswith(words)
        for told, _, _ in others:
            if how == "learned weights":
                assert told.startswith(words)
                continue
            rank, task, kind, trace, _ = told
            assert (rank, task, kind) == (n - 1, "step 1", "differs")
            assert f"no step ({words}" in trace
        for _, losses, grad in (*others, last):
            assert losses == [2.0 * t for t in programs.TASKS]
            assert grad.tolist() == [3.0, 3.0]


@ahead(lambda folder: in_world(programs.run, 3, "different_operations"))
def test_ranks_that_wait_for_each_other_in_different_operations_are_named(made):
    for rank, task, kind, trace, _ in made:
        assert (rank, kind) == (1, "differs")
        assert "barrier" in task
        assert "rank 0 waits in the sum of step 2 and rank 1 in the barrier" in trace


@ahead(lambda folder: in_world(programs.run, 3, "a_rank_that_cannot_exchange"))
def test_a_rank_that_fails_in_an_exchange_is_named_at_once(made):
    first, second, third = made
    assert isinstance(second, str)
    for rank, task, kind, trace, _ in (first, third):
        assert (rank, task, kind) == (1, "the sum of step 1", "raised")
        assert "MemoryError: no room" in trace


def test_operations_of_all_ranks_in_a_task_are_refused(standing):
    for found in standing(programs.run, 3, "inside_a_task"):
        for kind, told in found.items():
            if kind.startswith("afterwards"):
                assert told == [2.0 * t for t in programs.TASKS]
                continue
            _, task, how, trace, kinds = told
            assert how == "raised", kind
            assert "of 5" in task
            assert "RuntimeError" in kinds
            ranks = [0, 2] if kind.startswith("barrier of two") else [0, 1, 2]
            assert f"expected an operation of ranks {ranks} outside of their tasks" in trace
    (alone,) = standing(programs.run, 1, "inside_a_task")  # allowed in a world of one process
    assert not any(isinstance(told, tuple) for told in alone.values())


def test_threads_take_turns(standing):
    for at_once, afterwards in standing(programs.run, 3, "steps_of_two_threads"):
        assert set(at_once) <= {True, "differs"}  # ranks may begin with different threads
        assert afterwards == [True, True]


@ahead(lambda folder: in_world(programs.group_in_a_task, 3))
def test_a_group_is_first_used_outside_tasks_and_not_after_its_end(made):
    for (rank, task, how, trace, _), afterwards in made:
        assert (rank, task, how) == (0, "task 1 of 5", "raised")
        assert "expected an operation of ranks [0, 1] outside of their tasks" in trace
        assert (
            "expected the process group of the 3 ranks, found that it was destroyed" in afterwards
        )


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("raises", "raised", "LookupError: bad point"),
        ("samples", "differs", "an estimate by 12 losses"),
        ("tensors", "differs", r"float64 [4]"),
    ],
)
def test_an_estimate_that_fails_on_one_rank_raises_on_all(standing, how, kind, words):
    found = standing(programs.run, 3, "estimates", how)
    for (rank, _, told, trace, _), grad in found:
        assert (rank, told) == (2, kind)
        assert words in trace
        assert torch.equal(grad, found[0][1])  # of the next one
        assert grad.abs().max() > 0.1


@ahead(lambda folder: in_world(programs.run, 2, "outside_of_the_world"))
def test_a_process_outside_the_world_takes_no_step(made):
    for by_child, after, losses in made:
        assert len(by_child) == len(after) == 2
        for told in (*by_child, *after):
            assert "expected a rank of the open world of 2 processes" in told
        assert losses == [[2.0 * t for t in programs.TASKS]] * 2


@ahead(
    lambda folder: told_of(
        folder, programs.run, 3, "killed_beside_its_child", str(folder / "report")
    )
)
def test_a_process_that_a_task_forked_does_not_hide_the_end_of_its_rank(made):
    ended, found = made
    assert ended.rank == 1
    assert {*found} == {0, 2}
    for told in found.values():
        assert told[:3] == (1, "task 2 of 5", "lost")


@ahead(lambda folder: in_world(programs.engines_of_before, 2))
def test_engines_from_before_the_world_do_not_count(made):
    assert made == [[2.0 * t for t in programs.TASKS]] * 2


@ahead(lambda folder: told_of(folder, programs.hub_that_stops_at_a_draw, 2, str(folder / "report")))
def test_a_rank_that_draws_from_a_stopped_one_names_it(made):
    _, found = made
    assert found[1][:3] == (0, "task 1 of 5", "timed out")


@ahead(lambda folder: in_world(programs.turns_of_a_fork, 1))
def test_a_process_forked_beside_a_busy_thread_has_locks_of_its_own(made):
    assert made == [(True, True)]
