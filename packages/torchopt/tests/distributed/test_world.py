# SPDX-License-Identifier: Apache-2.0
"""Worlds of several processes: who is where, listings, loopback, both backends alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_programs as programs
import listing
import pytest
import torch

LISTING = Path(listing.__file__)


def test_every_process_knows_where_it_is(world):
    facts = world(programs.world_facts, 3)
    for rank, (info, name, zero, other, one_or_two, not_one, id_, own, drives) in enumerate(facts):
        assert info == (rank, 3, rank, 3)
        assert name == f"worker{rank}"
        assert zero == ("zero" if rank == 0 else None)
        assert other == ("other" if rank else None)
        assert one_or_two == ("one or two" if rank else None)
        assert not_one == ("not one" if rank != 1 else None)
        assert (id_, own) == (1, rank)
        assert drives == ("drives" if rank == 0 else None)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux' tables of sockets")
@pytest.mark.parametrize("program", [programs.listening_rpc, programs.listening_collective])
def test_nothing_listens_beyond_the_loopback_interface(world, program):
    for addresses in world(program, 2):
        assert addresses  # gloo or TensorPipe do listen
        loopback = ("0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000")
        assert set(addresses) <= set(loopback)


@pytest.mark.parametrize(
    "program", [programs.drive_rpc, programs.drive_collective], ids=["rpc", "collective"]
)
def test_one_program_gives_the_same_gradients_on_every_backend(world, program):
    for n in (1, 2, 3):
        results = [r for r in world(program, n) if r is not None]
        assert len(results) == (1 if program is programs.drive_rpc else n)
        net = programs.make_net()
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        loss = (net(x) ** 2).mean()
        loss.backward()
        for result in results:
            assert sorted(result["facts"]) == [
                (rank, 7 // n + (7 % n if rank == n - 1 else 0), "seven") for rank in range(n)
            ]
            torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-13, atol=0)
            for got, p in zip(result["grads"], net.parameters()):
                torch.testing.assert_close(got, p.grad, rtol=1e-12, atol=1e-15)
            for got, want in zip(result["meta"], result["reference"]):
                assert want.abs().max() > 1e-4
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
            assert result["untouched"] == [None] * len(result["grads"])


def test_the_listing_runs_alone(world):
    found = world(listing.main, 1)[0]
    assert found["world_size"] == 1
    assert found["last"] < 0.5 * found["first"]
    assert found["error"] < 1e-12


@pytest.mark.parametrize("how", ["torchrun", "multiprocessing"])
def test_the_listing_runs_in_two_processes(how):
    if how == "torchrun":
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(LISTING)]
    else:
        launch = [str(LISTING), "--multiprocessing", "2"]
    done = subprocess.run(
        [sys.executable, *launch],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=programs.PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 1  # rank 0 alone trains
    assert found[0]["world_size"] == 2
    assert found[0]["ready"] is True
    assert found[0]["last"] < 0.5 * found[0]["first"]
    assert found[0]["error"] < 1e-12
