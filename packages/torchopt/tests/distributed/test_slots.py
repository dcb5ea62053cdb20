# SPDX-License-Identifier: Apache-2.0
"""The memory in which the ranks of one machine add up vectors."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import slots_programs as programs
import torch

from torchopt.distributed.slots import Slots, can_share

pytestmark = pytest.mark.skipif(not can_share(), reason="memory without a name, as on Linux")


def waiting(look):
    until = time.monotonic() + 60.0
    while (found := look()) is None:
        assert time.monotonic() < until
        time.sleep(0.0)
    return found


def opened(tmp_path, size):
    ranks = [Slots(tmp_path / "slots", rank, size) for rank in range(size)]
    for rank in ranks:
        assert not rank.is_open
        rank.open()
        assert rank.is_open
    return ranks


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64, torch.int64])
def test_every_rank_gets_the_same_sum_of_all_vectors(tmp_path, size, dtype):
    ranks = opened(tmp_path, size)
    generator = torch.Generator().manual_seed(size)

    def numbers(n):  # integers, so that the sums are exact in every type
        return torch.randint(-9, 9, (size, n), generator=generator).to(dtype)

    rounds = [[numbers(n) for n in (1, 0, 1000)], [numbers(5)], [numbers(3), numbers(64)]]

    def run(rank):
        found = []
        for k, parts in enumerate(rounds, 1):
            start = 64 * 300 * (k % 2)
            found.append(ranks[rank].put([x[rank] for x in parts], start, k).sum(waiting))
            meet(rank, k)
        return found

    arrived = [0] * size

    def meet(rank, k):  # as ranks do between two steps: nobody writes while another rank reads
        arrived[rank] = k
        waiting(lambda: min(arrived) >= k or None)

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    for found in results:
        for got, parts in zip(found, rounds, strict=True):
            assert torch.equal(got, torch.cat([x.sum(0) for x in parts]))


def test_a_sum_waits_for_the_vectors_of_all_ranks(tmp_path):
    own, other = opened(tmp_path, 2)
    looks = []

    def until(look):
        looks.append(look())
        if looks[-1] is None:
            other.put([torch.full((3,), 2.0)], 64, 9)
        looks.append(look())
        return looks[-1]

    shares = own.put([torch.ones(3)], 64, 9)
    assert shares.nbytes == 12
    assert shares.sum(until).tolist() == [3.0] * 3
    assert looks == [None, True]


def test_a_sum_has_memory_of_its_own(tmp_path):
    own, other = opened(tmp_path, 2)
    shares = [rank.put([torch.ones(2)], 0, 1) for rank in (own, other)]
    total = shares[0].sum(waiting)
    own.put([torch.zeros(2)], 0, 2)
    assert total.tolist() == [2.0, 2.0]


def test_vectors_for_which_there_is_no_room_are_not_taken(tmp_path):
    own, _ = opened(tmp_path, 2)
    whole = torch.ones(own.room // 8, dtype=torch.float64)
    assert own.put([whole], 0, 1) is not None
    assert own.put([whole], 64, 2) is None
    assert own.put([whole, whole[:1]], 0, 2) is None


def test_vectors_on_another_device_are_not_taken(tmp_path):
    own, _ = opened(tmp_path, 2)
    assert own.put([torch.ones(3, device="meta")], 0, 1) is None


@pytest.mark.parametrize("what", ["nothing", "no process", "another process", "a smaller file"])
def test_memory_that_is_not_there_is_not_opened(tmp_path, what):
    path = tmp_path / "slots"
    first = Slots(path, 0, 2)
    if what == "nothing":
        path.unlink()
    elif what == "no process":
        path.write_text("/proc/999999999/fd/3 token")
    elif what == "another process":
        place, token = path.read_text().split()
        path.write_text(f"{place} {token[::-1]}")
    else:
        (tmp_path / "small").write_bytes(bytes(100))
        path.write_text(f"{tmp_path / 'small'} token")
    second = Slots(path, 1, 2)
    second.open()
    assert not second.is_open
    del first


def test_memory_that_cannot_be_made_is_found_by_nobody(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", refused)
    for rank in (Slots(tmp_path / "slots", rank, 2) for rank in (0, 1)):
        rank.open()
        assert not rank.is_open


@pytest.mark.parametrize("n", [2, 4])
def test_steps_add_up_gradients_in_shared_memory_once_all_ranks_have_found_it(standing, n):
    want = programs.reference()
    for bucket_bytes, room, blind in ((2**20, 2**20, -1), (2**14, 2**15, -1), (2**14, 2**20, 1)):
        for found in standing(programs.steps, n, bucket_bytes, room, blind):
            for k, step in enumerate(found):
                for got, g in zip(step["grads"], want, strict=True):
                    exact = got.dtype != torch.float32
                    torch.testing.assert_close(got, g, rtol=1e-12 if exact else 1e-5, atol=1e-12)
                assert step["here"] + step["torch"] == step["buckets"]
                if blind >= 0:
                    assert step["here"] == 0
                elif k:
                    assert step["is_open"]
                    assert step["here"] == step["buckets"] if room == 2**20 else step["here"] > 0
                    assert (step["torch"] > 0) == (room < 2**20)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have one dtype")
@pytest.mark.parametrize("n", [20, 3000])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_another_dtype_than_their_parameters(standing, n, deterministic):
    want = [torch.full((n,), 0.5 + 2.0**-11), torch.full((n,), 0.5)]  # not in bfloat16
    for found in standing(programs.gradients_of_another_dtype, 2, n, deterministic):
        for grads in found:
            assert [g.dtype for g in grads] == [torch.float32] * 2
            assert all(map(torch.equal, grads, want))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have one dtype")
@pytest.mark.parametrize("n", [20, 3000])
@pytest.mark.parametrize("deterministic", [False, True])
def test_dtypes_may_change_between_steps(standing, n, deterministic):
    mean = {True: 0.5 + 2.0**-11, False: 0.5}  # bfloat16 cannot hold the former
    for found in standing(programs.gradients_of_changed_dtypes, 2, n, deterministic):
        for k, grads in enumerate(found):
            wide = [k >= 1 and torch.float32, k >= 2 and torch.float64, False]
            assert [g.dtype for g in grads] == [dtype or torch.bfloat16 for dtype in wide]
            for g, dtype in zip(grads, wide):
                assert g.unique().tolist() == [mean[bool(dtype)]]


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have one dtype")
@pytest.mark.parametrize("n", [20, 3000])
@pytest.mark.parametrize("of_gradient", [False, True])
def test_dtypes_that_change_on_one_rank_are_named(standing, n, of_gradient):
    here = f"float32 [{n}]"
    there = f"{here} with gradients of float64" if of_gradient else f"float64 [{n}]"
    for told, grad, before in standing(programs.dtypes_that_differ, 2, n, of_gradient):
        rank, task, kind, text, _ = told
        assert (rank, task, kind) == (1, "step 2", "differs")
        assert f"got {here} as number 1 on rank 0 and {there} on rank 1" in text
        assert grad is None
        assert before.unique().tolist() == [1.5]
