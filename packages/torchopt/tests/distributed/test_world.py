# SPDX-License-Identifier: Apache-2.0
"""Worlds of several processes: ranks, the listing, loopback, equal results of both backends."""

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
from ahead import ahead, ends_of, free_port

import torchopt.distributed as todist

LISTING = Path(listing.__file__)


def test_every_process_knows_its_rank_and_world(standing):
    facts = standing(programs.world_facts, 3, backend="rpc")
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
@pytest.mark.parametrize("backend", ["rpc", "gloo"])
def test_nothing_listens_beyond_the_loopback_interface(standing, backend):
    for addresses in standing(programs.listening, 2, backend=backend):
        assert addresses  # gloo or TensorPipe do listen
        loopback = ("0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000")
        assert {address.partition(":")[0] for address in addresses} <= set(loopback)


@pytest.mark.parametrize(("backend", "kind"), [("gloo", "collective"), ("rpc", "rpc")])
def test_a_main_function_for_another_backend_than_that_of_the_open_world_raises(
    standing, backend, kind
):
    for told in standing(programs.another_backend, 2, backend=backend):
        assert f"found one of {kind!r}; leave it first" in told


@pytest.mark.parametrize("backend", ["rpc", "gloo"])
def test_one_program_gives_the_same_gradients_on_every_backend(standing, backend):
    for n in (1, 2, 3):
        results = [r for r in standing(programs.drive, n, backend=backend) if r is not None]
        assert len(results) == (1 if backend == "rpc" else n)
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


def assert_trained(facts):
    assert facts["world_size"] == 2
    assert facts["ready"] is True
    assert facts["last"] < 0.5 * facts["first"]
    assert facts["error"] < 1e-12


@ahead(lambda folder: todist.spawn(programs.in_the_order_of_a_set, 2, timeout=programs.PATIENCE))
def test_fresh_processes_work_in_one_order_whatever_the_order_of_their_sets(made):
    """Forked processes have the hashes of their parent, those of launchers have their own."""
    orders = [names for names, _, _ in made]
    are_random = os.environ.get("PYTHONHASHSEED", "random") == "random"
    assert (orders[0] != orders[1]) == are_random
    for _, grads, told in made:
        for found in grads.values():
            assert found == {name: [float(name.partition(" ")[0])] * 2 for name in orders[0]}
        if are_random:
            rank, _, kind, trace, _ = told
            assert (rank, kind) == (1, "differs")
            assert "expected the same names on every rank" in trace


def under_torchrun(folder: Path) -> subprocess.CompletedProcess[str]:
    # Otherwise torchrun looks up the name of this machine, which takes long if it is unknown.
    here = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    launch = ["-m", "torch.distributed.run", *here, str(LISTING)]
    return subprocess.run(
        [sys.executable, *launch],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=programs.PATIENCE,
        check=False,
    )


@ahead(under_torchrun)
def test_the_listing_runs_under_torchrun(made):
    assert made.returncode == 0, made.stderr
    found = [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 1  # only rank 0 trains
    assert_trained(found[0])


def by_hand(folder: Path) -> tuple[list[int | None], str]:
    told, port = folder / "told", free_port()
    ends = ends_of(listing.process, [(rank, 2, port, told) for rank in (0, 1)])
    return ends, told.read_text()


@ahead(by_hand)
def test_the_listing_runs_in_processes_that_a_program_starts_itself(made):
    ends, told = made
    assert ends == [0, 0]
    assert_trained(json.loads(told))
