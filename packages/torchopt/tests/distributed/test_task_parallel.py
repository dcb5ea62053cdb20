# SPDX-License-Identifier: Apache-2.0
"""Gradients over tasks are independent of the number of ranks; sums, buckets, wrappers."""

from __future__ import annotations

import distributed_programs as programs
import pytest
import torch

import torchopt
import torchopt.distributed as todist
from torchopt.distributed.ordered_sum import OrderedSum, nodes_of

SIZES = (1, 2, 3, 4)
COUNT = 7  # not divisible by any of the sizes


def sequential_gradients(engine: str) -> list[torch.Tensor]:
    """Return twice the gradient of the mean loss, by one process without torchopt.distributed."""
    leaves, _, loss = programs.problem(engine)
    tasks = programs.make_tasks(COUNT)
    mean = sum(loss(task) for task in tasks) / COUNT
    return [2.0 * g for g in torch.autograd.grad(mean, leaves)]


def assert_close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        scale = b.abs().max().item()
        assert scale > 1e-3  # nothing to compare otherwise
        assert (a - b).abs().max().item() <= 1e-12 * scale


@pytest.mark.parametrize(
    ("schedule", "across"),
    [("static", False), ("dynamic", False), ("dynamic", True)],
    ids=["static", "dynamic", "dynamic on several machines"],
)
def test_every_engine_at_every_world_size(standing_at_once, schedule, across):
    options = {"schedule": schedule}
    results = standing_at_once(programs.task_gradients_with, SIZES, COUNT, options, across)
    one = results[1][0]
    for engine in programs.ENGINES:
        if engine != "zero-order":  # its reference draws other random numbers
            assert_close(one[engine][0], sequential_gradients(engine))
        for n in SIZES:
            for rank in range(n):
                grads, loss, losses, owners, _, _ = results[n][rank][engine]
                assert_close(grads, one[engine][0])
                torch.testing.assert_close(losses, one[engine][2], rtol=1e-13, atol=0)
                torch.testing.assert_close(loss, losses.mean(), rtol=1e-13, atol=0)
                assert all(torch.equal(g, h) for g, h in zip(grads, results[n][0][engine][0]))
                assert len(owners) == COUNT
                assert set(owners) <= set(range(n))
                if schedule == "static":
                    assert len(set(owners)) == n
                    assert list(owners) == sorted(owners)


@pytest.mark.parametrize("schedule", ["static", "dynamic"])
def test_deterministic_gradients_have_the_same_bits_at_every_world_size(standing_at_once, schedule):
    options = {"schedule": schedule, "deterministic": True}
    results = standing_at_once(programs.task_gradients_with, SIZES, COUNT, options)
    for engine in programs.ENGINES:
        want = results[1][0][engine][0]
        for ranks in results.values():
            for result in ranks:
                assert all(torch.equal(g, w) for g, w in zip(result[engine][0], want))
    assert_close(results[1][0]["explicit"][0], sequential_gradients("explicit"))


def test_buckets_are_sent_before_the_last_backward_pass_ends(standing):
    for result in standing(programs.task_gradients_with, 2, COUNT, {}):
        _, _, _, _, early_bytes, bytes_sent = result["explicit"]
        sizes = [8 * p.numel() for p in programs.make_net().parameters()]
        # Buckets of 128 bytes, the first of 32; the last is sent with the losses, after the pass.
        assert early_bytes == sum(sizes[2:])
        # 7 losses, 6 parameters used and 2 flags; before them, whether there is shared memory.
        assert bytes_sent == sum(sizes) + 8 * (COUNT + len(sizes) + 2 + 1)


@pytest.mark.parametrize("across", [False, True], ids=["one machine", "several"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_step_is_one_message_or_as_many_as_there_are_buckets(standing, size, across):
    """On one machine, torch sends only buckets and what does not fit into the shared memory."""
    more = int(across)
    for counted in standing(programs.messages_of_steps, size, across):
        assert counted["packet"] == {10: [more] * 2, 2000: [1 + more] * 2}  # static, dynamic
        # One more message checks, before the first bucket, that the ranks do the same.
        assert counted["one bucket"] == [1 + more] * 2
        assert counted["three buckets"] == [3 + more] * 2
        assert counted["half"] == [1 + 2 * more] * 2  # float16 cannot hold the losses


def test_memory_does_not_grow_with_the_steps(standing):
    for static, dynamic in standing(programs.memory_of_steps, 2):
        assert static < 8.0  # MiB over 200 steps: 40 KiB per step would be noticed
        assert dynamic < 8.0


def test_losses_and_gradients_are_exact_in_buckets_of_every_type(standing):
    for n in (1, 2, 3):
        for dtype, (losses, grads, owners) in standing(programs.steps_of_every_type, n)[-1].items():
            assert losses.dtype == torch.float64
            want = programs.awkward_losses(dtype)
            torch.testing.assert_close(losses, want.double(), rtol=0, atol=0, equal_nan=True)
            assert len(owners) == len(want)
            for g in grads:
                assert torch.equal(g, torch.ones_like(g))


@pytest.mark.parametrize("at_once", [None, 2])
@pytest.mark.parametrize("schedule", ["static", "dynamic"])
def test_tasks_under_vmap_equal_tasks_one_by_one(standing, at_once, schedule):
    for n in (1, 2):
        options = {"tasks_at_once": at_once, "schedule": schedule}
        for grads, losses, want_grads, want_losses, calls in standing(
            programs.together, n, options
        ):
            assert_close(grads, want_grads)
            torch.testing.assert_close(losses, want_losses, rtol=1e-12, atol=0)
            if at_once is None and schedule == "static":
                assert calls == 1  # whatever the number of tasks


def test_tasks_under_vmap_report_what_they_expect():
    p = torch.ones(2, requires_grad=True)
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2, affine=False), torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match="expected None or >= 1, got 0"):
        todist.TaskParallel([p], tasks_at_once=0)
    for wrong in (2.5, "all"):
        with pytest.raises(TypeError, match="expected an int or None, for all, got (float|str)"):
            todist.TaskParallel([p], tasks_at_once=wrong)
    with pytest.raises(ValueError, match="expected 1 with deterministic=True"):
        todist.TaskParallel([p], tasks_at_once=None, deterministic=True)
    together = todist.TaskParallel([p], tasks_at_once=None)

    def loss(task):
        return (p * task["x"]).sum()

    x = torch.ones(2)
    for other, text in (
        ({"x": torch.ones(3)}, r"expected \[2\] torch.float32 on cpu, as in task 1, got \[3\]"),
        ({"x": 1.0}, r"trees of tensors, got float in task 2 at \$\['x'\]"),
        ({"y": x}, "trees of one structure, got"),
    ):
        with pytest.raises(TypeError, match=text):
            together.backward(loss, [{"x": x}, other])
    with pytest.raises(RuntimeError, match="must not draw random numbers.*tasks_at_once=1"):
        together.backward(lambda t: (p * torch.rand(2) * t).sum(), [x, x])
    with pytest.raises(todist.task_parallel.NotDifferentiableError, match="tasks 1 to 2 depends"):
        together.backward(lambda t: t.sum(), [x, x])

    def by_autograd(task):
        (g,) = torch.autograd.grad((p * task).pow(2).sum(), p, create_graph=True)
        return g.sum()

    with pytest.raises(RuntimeError, match=r"gradients with torch\.func\.grad.*tasks_at_once=1"):
        together.backward(by_autograd, [x, x])

    def by_meta_optimizer(task):
        inner = torchopt.MetaSGD(net, lr=0.1)
        inner.step((net[1].weight * task).pow(2).sum())
        return p.sum()

    with pytest.raises(todist.task_parallel.NotDifferentiableError, match=r"inner_loop.*at_once=1"):
        together.backward(by_meta_optimizer, [x, x])
    assert p.grad is None
    buffers = [b.clone() for b in net.buffers()]
    with pytest.raises(RuntimeError, match="`tasks_at_once`: Batch norm"):
        todist.TaskParallel(net, tasks_at_once=None).backward(
            lambda t: net(t).sum(), [torch.randn(4, 2), torch.randn(4, 2)]
        )
    for b, before in zip(net.buffers(), buffers):
        assert torch.equal(b, before)


def test_large_gradients_are_summed_in_their_memory_unless_somebody_sees_it(standing):
    for n in (1, 2):
        for found in standing(programs.large_gradients, n):
            assert found.pop(("kept", 0)) == (1.0, 1.0)
            assert len(found) == 10 + (n == 2)
            for (name, count), ((once, twice), in_place) in found.items():
                want = {  # the mean of the tasks is 3
                    "alone": (3.0, 6.0, 1.0),
                    "unused": (4.0 / count, {2: 1.0, 4: 2.0}[count], 1.0),
                    "kept": (2.0, 3.0, 1.0),
                }.get(name, (3.0, 3.0, 1.0))
                assert once == [(x, x) for x in want], name
                assert twice == [(2 * x, 2 * x) for x in want], name
                if n == 2 and name in ("alone", "expanded"):
                    assert in_place == [True, True]
                if n == 2 and name == "kept":
                    assert in_place == [False, True]


def test_large_gradients_in_the_memory_of_others_or_with_signs_are_copied(standing):
    for rank, found in enumerate(standing(programs.large_gradients_of_others, 2)):
        assert found["of a hook"] == ({1.5}, {(rank + 1) / 2})
        assert found["array"] == {2.0}
        assert found["of an array"] == {4.0}
        assert found["negated"] == {3.0}
        assert found["conjugated"] == {2 + 1j}


def test_gradients_are_changed_in_place_one_by_one(standing):
    for n in (1, 2):
        for found in standing(programs.edited_gradients, n):
            assert [float(x) for x in found] == [1800.0, 1800.0, 5400.0, 0.0]


def test_weights_unused_parameters_and_existing_gradients(standing):
    for n in (1, 3):
        for a, b, c in standing(programs.weights_and_unused, n):
            torch.testing.assert_close(a, torch.full((3,), 9 / 4, dtype=torch.float64))
            torch.testing.assert_close(b, torch.full((3,), 2.0, dtype=torch.float64))
            assert torch.equal(c, torch.ones(3, dtype=torch.float64))  # no task depends on it


def test_parameters_that_differ_between_ranks_are_noticed(standing):
    for text in standing(programs.diverged, 2):
        assert "those of ranks [1] differ from rank 0" in text


def test_ddp_dtensor_and_fsdp_parameters(standing):
    tasks = programs.make_tasks(5)
    net = programs.make_net()
    sum(((net(t[0]) - t[1]) ** 2).mean() for t in tasks).div(5).backward()
    want = [p.grad for p in net.parameters()]
    theta = torch.tensor([[0.3], [-0.2], [0.5]], dtype=torch.float64, requires_grad=True)
    sum(programs.implicit_loss(theta, t) for t in tasks).div(5).backward()
    for result in standing(programs.wrapped_parameters, 4):
        assert_close(result["ddp"], want)
        assert_close(result["fsdp"], want)
        assert_close(result["dtensor False"], [theta.grad])
        assert_close(result["dtensor True"], [theta.grad])


@pytest.mark.parametrize("vectorized", [True, False])
def test_zero_order_evaluations_are_distributed_and_only_numbers_are_sent(standing, vectorized):
    one, made_by_one, _ = standing(programs.shared_evaluations, 1, vectorized)[0]
    for n in (2, 3):
        results = standing(programs.shared_evaluations, n, vectorized)
        for grad, made, sent in results:
            scale = one.abs().max()
            assert (grad - one).abs().max() <= 1e-12 * scale
            assert torch.equal(grad, results[0][0])
            # 20 losses in two rows, and a seed; nothing has the size of the 4000 parameters.
            assert sent <= 2 * 80 * 2 + 8 * n
            if not vectorized:
                assert made <= -(-2 * (made_by_one - 1) // (2 * n)) + 2
    assert one.norm() > 1.0


def test_task_parallel_reports_what_it_expects():
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="found none"):
        todist.TaskParallel([torch.ones(2)])
    with pytest.raises(ValueError, match="leaf tensors"):
        todist.TaskParallel([p * 2])
    with pytest.raises(ValueError, match="'static' or 'dynamic'"):
        todist.TaskParallel([p], schedule="random")
    parallel = todist.TaskParallel([p])
    with pytest.raises(ValueError, match="at least one task"):
        parallel.backward(lambda t: p.sum(), [])
    with pytest.raises(ValueError, match="one for each of 2 tasks, got 1"):
        parallel.backward(lambda t: p.sum(), [1, 2], weights=[1.0])
    with pytest.raises(TypeError, match=r"0-dim tensor, got shape \[2\]"):
        parallel.backward(lambda t: p, [1])
    with pytest.raises(TypeError, match="a real number, got torch.complex64; .* real part"):
        parallel.backward(lambda t: (1j * p).sum(), [1])
    with pytest.raises(todist.task_parallel.NotDifferentiableError, match="task 1 depends on no"):
        parallel.backward(lambda t: torch.ones(()), [1])
    assert p.grad is None


def test_random_numbers_of_a_task_are_its_own():
    p = torch.ones(3, requires_grad=True)
    parallel = todist.TaskParallel([p], seed=4)
    drawn = []

    def loss(task):
        drawn.append(torch.rand(()).item())
        return p.sum()

    torch.manual_seed(9)
    before = torch.get_rng_state()
    parallel.backward(loss, [0, 1])
    parallel.backward(loss, [0, 1])
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(drawn)) == 4
    again = todist.TaskParallel([p], seed=4)
    again.load_state_dict({"steps": 1})
    again.backward(loss, [0, 1])
    assert drawn[4:] == drawn[2:4]


@pytest.mark.parametrize("terms", [1, 2, 3, 5, 8, 13])
def test_ordered_sum_does_not_depend_on_the_rank_that_adds(terms):
    values = torch.randn(terms, generator=torch.Generator().manual_seed(terms)).tolist()
    order = torch.randperm(terms, generator=torch.Generator().manual_seed(0)).tolist()

    def parts(owners):
        whole = OrderedSum(terms, lambda a, b: f"({a}{b})")
        for rank in set(owners):
            own = OrderedSum(terms, lambda a, b: f"({a}{b})")
            mine = [i for i in order if owners[i] == rank]
            for i in mine:
                own.put((0, i), f"{values[i]:+}")
            assert sorted(own.nodes) == nodes_of(mine, terms)
            for node, value in own.nodes.items():
                whole.put(node, value)
        return whole.total()

    alone = parts([0] * terms)
    assert alone.count("+") + alone.count("-") == terms
    for size in (2, 3, 4):
        assert parts([i * size // terms for i in range(terms)]) == alone
        assert parts([i % size for i in range(terms)]) == alone
