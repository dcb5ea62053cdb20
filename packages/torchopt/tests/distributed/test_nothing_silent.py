# SPDX-License-Identifier: Apache-2.0
"""Former silent errors: each is now correct, or raises on every rank."""

from __future__ import annotations

import pytest
import silent_programs as programs
import torch
from ahead import ahead, in_world

import torchopt.distributed as todist


def same(got, want, bound=1e-12):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize("schedule", ["static", "dynamic"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_step_after_a_failed_step_runs_all_its_tasks(standing, schedule, deterministic):
    options = {"schedule": schedule, "deterministic": deterministic}
    for name, before, loss, grad, steps in standing(programs.run, 2, "after_error", options):
        assert name == "LookupError"
        assert before is None
        assert loss == 9.0
        assert grad.tolist() == [-1.0, -5.0]
        assert steps == 1


def test_a_task_that_raises_half_way_does_not_change_the_module(standing):
    want = programs.half_way("nowhere")
    for n in (1, 2):
        for same_leaves, training, losses, grads in standing(programs.run, n, "half_way", "task"):
            assert same_leaves
            assert training
            same([losses], [want[2]])
            same(grads, want[3])
    todist.shutdown()


@pytest.mark.parametrize("deterministic", [False, True])
def test_statistics_and_what_depends_on_them_are_the_same_at_every_world_size(
    standing, deterministic
):
    grads, buffers = programs.statistics_reference()
    assert buffers[0].abs().max() > 1e-3
    found = [
        standing(programs.run, n, "statistics", {"deterministic": deterministic}) for n in (1, 3)
    ]
    for ranks in found:
        for got_grads, got_buffers, training in ranks:
            same(got_grads, grads)
            same(got_buffers, buffers)
            assert training
    if deterministic:
        for got in found[1]:
            assert all(torch.equal(a, b) for a, b in zip(got[1], found[0][0][1], strict=True))


@pytest.mark.parametrize("n", [1, 2])
def test_steps_notice_replaced_and_frozen_parameters(standing, n):
    for found in standing(programs.run, n, "changed_leaves"):
        assert found.keys() == {"assign", "unfreeze", "freeze"}
        for pairs in found.values():
            assert any(want is not None for _, want in pairs)
            for got, want in pairs:
                assert (got is None) == (want is None)
                if want is not None:
                    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_unused_parameters_have_no_gradient(standing, n):
    for *engines, call in standing(programs.run, n, "weight_decay"):
        for grad, unused in engines:
            assert grad == pytest.approx(2.0)
            assert unused is None
        assert call == (4.0, None)


@pytest.mark.parametrize("n", [1, 2])
def test_the_caller_does_not_see_what_a_function_writes_into_its_arguments(standing, n):
    for value, x, weight, bias, tensor in standing(programs.run, n, "written_arguments"):
        assert value.item() == 12.0
        assert x.flatten().tolist() == [1.0] * 4
        assert weight
        assert bias
        assert tensor.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("lengths", "number of tasks on every rank, got 4 on rank 0 and 6 on rank 1"),
        ("long lengths", "number of tasks on every rank, got 2000 on rank 0 and 2002 on rank 1"),
        ("steps", "number of steps on every rank, got 1 on rank 0 and 0 on rank 1"),
        ("weights", "same weights on every rank"),
        ("parameters", "parameters on every rank, got 1 tensors"),
        ("frozen", "places of the parameters among all leaves on every rank, got [2, 3, 4, 5]"),
        ("buffers", "parameters and buffers on every rank, those of ranks [1] differ from rank 0"),
        ("buckets", "same settings on every rank, got engine"),
        ("seed", "seed=1"),
        ("schedule", "dynamic, deterministic=False"),
        ("operations", "rank"),
        ("large operations", "same operation on every rank"),
    ],
)
def test_ranks_that_disagree_get_an_error_and_continue(standing, what, words):
    for (rank, _, kind, trace, _), again in standing(programs.run, 2, "differing", what):
        assert (rank, kind) == (1, "differs") or what.endswith("operations")
        assert kind == "differs"
        assert words in trace
        assert again == 9.0


def test_frozen_parameters_are_those_of_rank_0(standing):
    ((losses, grads),) = standing(programs.run, 1, "frozen_layer")
    assert min(g.abs().max() for g in grads) > 1e-4
    for got_losses, got in standing(programs.run, 3, "frozen_layer"):
        same([got_losses, *got], [losses, *grads])


def test_ranks_that_differentiate_different_results_raise(standing):
    for (rank, _, kind, trace, _), grad, other in standing(
        programs.run, 2, "pulled_back_in_another_order"
    ):
        assert (rank, kind) == (1, "differs")
        assert "the backward pass of call" in trace
        assert grad.tolist() == [4.0] * 3
        assert other is None


def test_an_asynchronous_call_sees_its_arguments_as_they_were_at_the_call(standing):
    for name, values in standing(programs.contents_of_the_moment, 2, backend="rpc")[0].items():
        count = 20 if name.startswith("share") else 10
        assert values == [float(i) for i in range(count)], name


def test_gradients_of_calls_are_complete_or_raise(standing):
    found = standing(programs.gradients_of_calls, 2, backend="rpc")[0]
    assert "outside of a context" in found["outside"]
    small, unused, big, idle = found["unused"]
    assert small.tolist() == [2.0, 2.0]
    assert big[0] == 2.0
    assert unused is None
    assert idle is None
    assert "expected a thread that is in no context" in found["in a context"]
    assert found["written"] == ([6.0, 6.0], [1.0] * 4)
    assert {(rank, kind) for rank, _, kind in found["unpicklable"]} == {(1, "raised")}
    assert found["afterwards"] == [1]


@ahead(lambda folder: in_world(programs.nested_calls, 2))
def test_nested_calls_finish_or_time_out(made):
    value, more = made[0]
    assert value == 8.0 * 60
    assert more in ("timed out", 140 * 2 * 8.0)


def test_results_of_every_kind_are_alike_in_every_world(standing):
    want = programs.results_of_every_kind()
    assert {k: len(told) for k, (told, _, _) in want.items()}["twice"] == 3 * 3
    for n in (1, 2, 3):
        by_calls = standing(programs.results_by_calls, n, backend="rpc")
        everywhere = standing(programs.run, n, "results_of_every_kind")
        assert by_calls[0]
        for found in (*filter(None, by_calls), *everywhere):
            assert found.keys() == want.keys()
            for kind, (told, grad, kept) in found.items():
                assert (told, kept) == (want[kind][0], True), kind
                assert grad == (want[kind][1] and pytest.approx(want[kind][1], rel=1e-14)), kind


def test_reducers_say_that_there_is_nothing_to_reduce():
    for reducer in (todist.sum_reducer, todist.mean_reducer):
        with pytest.raises(ValueError, match="the batch that was split is empty"):
            reducer([])
