# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: complete at any moment, refused if changed, sharded, for any world size."""

from __future__ import annotations

import os
import random
import shutil
import time
import warnings
from collections import OrderedDict, namedtuple
from pathlib import Path

import checkpoint_programs as programs
import pytest
import torch
from ahead import ahead, codes_of, started
from distributed_programs import PATIENCE

import torchopt
import torchopt.distributed as todist
from torchopt.errors import CheckpointError
from torchopt.index import OPTIMIZERS

MORE = {
    "AdamW": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSProp": {"centered": True, "momentum": 0.5},
}


@pytest.fixture
def checkpoint(tmp_path):
    return todist.Checkpoint(tmp_path / "folder" / "state.pt")


@pytest.mark.parametrize("name", OPTIMIZERS.values())
def test_the_state_of_every_optimizer_is_restored(checkpoint, name):
    def steps(optimizer, p, count):
        for _ in range(count):
            optimizer.zero_grad()
            (p**3).sum().backward()
            optimizer.step()

    p = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    optimizer = getattr(torchopt, name)([p], lr=0.05, **MORE.get(name, {}))
    steps(optimizer, p, 3)
    q = p.detach().clone().requires_grad_()
    checkpoint.save(3, {"p": p.detach(), "optimizer": optimizer.state_dict()})
    steps(optimizer, p, 2)
    again = getattr(torchopt, name)([q], lr=0.05, **MORE.get(name, {}))
    step, state = checkpoint.load()
    again.load_state_dict(state["optimizer"])
    steps(again, q, 2)
    assert step == 3
    assert torch.equal(p, q)


def test_the_state_of_a_meta_optimizer_is_restored(checkpoint):
    net = torch.nn.Linear(2, 1)
    inner = torchopt.MetaAdam(net, lr=0.1)
    inner.step(net(torch.ones(1, 2)).sum())
    checkpoint.save(1, {"inner": inner.state_dict(), "net": OrderedDict(net.state_dict())})
    assert checkpoint.load()[0] == 1


Own = namedtuple("Own", "x")


def test_a_state_that_could_not_be_loaded_is_not_saved(checkpoint):
    checkpoint.save(1, {"w": torch.ones(2)})
    for value, name in ((Own(1), "Own"), (Path("here"), "Path"), (print, "print")):
        with pytest.raises(TypeError, match=rf"{name} at \$\['a'\]\[1\]"):
            checkpoint.save(2, {"a": [0, value]})
    assert checkpoint.load()[0] == 1


def damage(data: bytes) -> dict[str, bytes]:
    middle = len(data) // 2
    return {
        "empty": b"",
        "half": data[:middle],
        "cut": data[:-10],
        "changed": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "other": b"something else entirely" * 10,
        "end": data[:-1] + bytes([data[-1] ^ 1]),
        "longer": data + b"\0",
    }


def test_a_damaged_file_is_refused_and_the_previous_one_is_used(checkpoint):
    for step in (1, 2):
        checkpoint.save(step, {"w": torch.full((1000,), float(step))})
    path = checkpoint.path
    for data in damage(path.read_bytes()).values():
        path.write_bytes(data)
        with pytest.warns(UserWarning, match=rf"refuses {path}: .*; uses {path}.previous, step 1"):
            step, state = todist.Checkpoint(path).load()
        assert (step, state["w"][0]) == (1, 1.0)
    # A damaged file never replaces the good one.
    todist.Checkpoint(path).save(3, {"w": torch.zeros(2)})
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="step 1"):
        assert todist.Checkpoint(path).load()[0] == 1


@pytest.mark.parametrize("done", [0, 1])
def test_an_interrupted_save_leaves_two_states_in_files_of_their_own(checkpoint, monkeypatch, done):
    for step in (1, 2):
        checkpoint.save(step, {"w": torch.full((1000,), float(step))})
    replace, calls = os.replace, iter(range(9))

    def killed(source, target):
        if next(calls) == done:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(3, {"w": torch.full((1000,), 3.0)})
    path = checkpoint.path
    assert todist.Checkpoint(path).load()[0] == 2 + done
    with path.open("r+b") as file:  # changed in its place
        file.write(b"something")
    with pytest.warns(UserWarning, match="step 1"):
        assert todist.Checkpoint(path).load()[0] == 1
    # The next one is complete all the same.
    todist.Checkpoint(path).save(4, {"w": torch.zeros(2)})
    assert todist.Checkpoint(path).load()[0] == 4


def test_a_damaged_file_without_a_previous_one_is_refused(checkpoint):
    checkpoint.save(1, {"w": torch.ones(1000)})
    path = checkpoint.path
    for data in damage(path.read_bytes()).values():
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"refuses {path}: .*no earlier one"):
            todist.Checkpoint(path).load()


def test_torch_reads_the_file(checkpoint):
    checkpoint.save(4, {"w": torch.ones(3)})
    found = torch.load(checkpoint.path, weights_only=True)
    assert found["step"] == 4
    assert torch.equal(found["state"]["w"], torch.ones(3))


def test_an_asynchronous_save_has_the_state_at_the_call(tmp_path):
    checkpoint = todist.Checkpoint(tmp_path / "state.pt", asynchronous=True)
    w = torch.zeros(100_000)
    for step in range(1, 4):
        w.fill_(float(step))
        checkpoint.save(step, {"w": w})
        w.fill_(-1.0)
    checkpoint.wait()
    step, state = todist.Checkpoint(tmp_path / "state.pt").load()
    assert step == 3
    assert bool((state["w"] == 3.0).all())


def test_an_error_of_an_asynchronous_save_is_raised(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpoint = todist.Checkpoint(tmp_path / "file" / "state.pt", asynchronous=True)
    checkpoint.save(1, {"w": torch.ones(2)})
    with pytest.raises(OSError, match="file"):
        checkpoint.wait()


def killed_while_saving(folder: Path) -> list[Path]:
    """Kill a process that saves, several times; return copies of what was left each time."""
    chance, found = random.Random(0), []
    path = folder / "now" / "state.pt"
    told = path.with_name("state.pt.told")
    for k in range(4):
        with started(programs.kill_while_saving, [(str(path),)]) as (process,):
            until = time.monotonic() + PATIENCE
            while not told.exists():
                assert time.monotonic() < until
                time.sleep(0.005)
            time.sleep(chance.uniform(0.0, 0.05))
            process.kill()
            codes_of([process])
        told.unlink()
        found.append(folder / str(k) / "state.pt")
        shutil.copytree(path.parent, found[-1].parent)
    return found


@ahead(killed_while_saving)
def test_a_process_killed_while_it_saves_leaves_a_whole_state(made):
    steps = []
    for path in made:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no fallback is needed
            step, state = todist.Checkpoint(path).load()
        assert bool((state["w"] == float(step)).all())
        steps.append(step)
    assert len(steps) == 4


@pytest.mark.parametrize(
    ("dims", "asynchronous"), [((2,), False), ((2,), True), ((3,), False), ((2, 2), False)]
)
def test_shards_of_all_ranks_are_loaded_by_any_number(standing, tmp_path, dims, asynchronous):
    path = str(tmp_path / "state.pt")
    size = torch.Size(dims).numel()
    saved = standing(programs.save_sharded, size, path, dims, asynchronous)[0]
    total = sum(x.numel() for x in saved[1])
    for n in (1, 2, 3) if dims == (2,) else (size,):
        results = standing(programs.load_sharded, n, path)
        for step, kinds, whole, _, moments, told in results:
            assert (step, told) == (2, [])
            assert kinds == {"DTensor"} if n > 1 else {"Tensor"}
            assert moments == 2 * len(whole)
            assert all(torch.equal(a, b) for a, b in zip(whole, saved[1], strict=True))
        if len(dims) == 1:
            assert sum(local for _, _, _, local, _, _ in results) == total
    # If a shard was changed, every rank loads the previous state.
    shards = (tmp_path / "state.pt.shards" / "2").glob("*.distcp")
    shard = max(shards, key=lambda file: file.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    for step, _, whole, _, _, told in standing(programs.load_sharded, size, path):
        assert step == 1
        assert shard.name in told[0]
        assert all(torch.equal(a, b) for a, b in zip(whole, saved[0], strict=True))


def test_sharded_states_of_other_optimizers_are_loaded_by_any_number(standing, tmp_path):
    path = str(tmp_path / "state.pt")
    want = standing(programs.other_optimizers, 2, path, False)[0]
    for n in (1, 3):
        for found in standing(programs.other_optimizers, n, path, True):
            for name, tensors in want.items():
                torch.testing.assert_close(found[name], tensors, rtol=1e-12, atol=1e-14, msg=name)


def test_a_save_that_rank_0_cannot_make_is_refused_on_every_rank(standing, tmp_path):
    for found, last in standing(programs.saves_that_fail, 2, str(tmp_path / "state.pt")):
        assert len(found) == 4
        for what, (rank, _, kind, trace, left) in found.items():
            assert (rank, kind, left) == (0, "raised", 1), what
            assert ("TypeError" if what == "the state" else "No space left") in trace
        assert last[0] == 3


def test_shards_of_tensor_parallelism_and_fully_shard_are_restored(standing, tmp_path):
    path = str(tmp_path / "state.pt")
    for saved, loaded, later, again, kinds in standing(programs.shards_in_two_ways, 4, path):
        assert "_StridedShard" in kinds
        assert len(saved) == 3 * 4  # parameters and two moments of each
        assert len(loaded) == 3
        for pairs in (*((saved, x) for x in loaded), (later, again)):
            assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
        assert not torch.equal(saved[0], later[0])


def test_a_sum_that_is_pending_is_not_saved(standing, tmp_path):
    path = str(tmp_path / "state.pt")
    for told, loaded in standing(programs.saves_a_sum_that_is_pending, 2, path):
        assert "Partial" in told
        assert "$['net'][0]" in told
        assert loaded is None


def test_a_step_that_is_saved_again_keeps_the_first_shards_until_the_end(standing, tmp_path):
    path = str(tmp_path / "state.pt")
    for (saved, after_failures, afterwards), folders in standing(
        programs.saves_a_step_again, 2, path
    ):
        for first, kept, new in zip(saved, after_failures, afterwards):
            assert torch.equal(kept, first)
            assert torch.equal(new, first + 1.0)
        assert folders == 2  # of the state and of the one before


@pytest.mark.parametrize("n", [2, 3])
def test_sharded_training_continues_to_the_same_bits(standing, tmp_path, n):
    path = str(tmp_path / "state.pt")
    standing(programs.save_sharded, 2, path, (2,), False)
    whole = standing(programs.continue_sharded, n, path, False)[0]
    for result in standing(programs.continue_sharded, n, path, True):
        for a, b in zip(result, whole):
            torch.testing.assert_close(a, b, rtol=0 if n == 2 else 1e-12, atol=0)
