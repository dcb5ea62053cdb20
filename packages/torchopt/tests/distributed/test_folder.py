# SPDX-License-Identifier: Apache-2.0
"""The folder of a world is private to its user, and the last process removes it."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import distributed_programs
import pytest

from torchopt.distributed import folder
from torchopt.distributed.folder import Folder
from torchopt.distributed.meeting import meet_on_this_machine

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and permissions of POSIX")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.delenv(folder.FOLDER, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_last_process_that_leaves_removes_the_folder(temporary):
    first = Folder()
    assert first.path.parent == temporary
    assert first.path.stat().st_mode & 0o77 == 0
    second = Folder(first.path)
    first.leave()
    assert second.path.is_dir()
    second.leave()
    assert list(temporary.iterdir()) == []


def test_the_next_world_removes_the_files_of_killed_processes(temporary):
    told, tell = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(
        target=distributed_programs.hold_a_folder, args=(str(temporary), tell)
    )
    process.start()
    left = Path(told.recv())
    stale = folder.place_of("1234")
    stale.write_text(json.dumps({"folder": str(left)}))
    others = temporary / "torchopt-notes"  # not one of our folders
    others.mkdir()
    Folder().leave()
    assert left.is_dir()  # its process is alive
    assert stale.exists()
    process.kill()
    process.join()
    Folder().leave()
    Folder().leave()
    assert list(temporary.glob("torchopt-*")) == [others]


def test_a_port_at_which_another_world_meets_is_refused(temporary, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    place = folder.place_of("1234")
    told, tell = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(
        target=distributed_programs.hold_a_folder, args=(str(temporary), tell)
    )
    process.start()
    record = json.dumps({"folder": told.recv()})
    place.write_text(record)  # of a world that is open
    with pytest.raises(RuntimeError, match="one world .* MASTER_PORT 1234"):
        meet_on_this_machine(0, (0, 1), 0.1)
    assert place.read_text() == record
    process.kill()
    process.join()
    with pytest.raises(TimeoutError):  # no other process joins, but the port is free
        meet_on_this_machine(0, (0, 1), 0.1)
    assert list(temporary.glob("torchopt-*")) == []


def test_a_forked_child_holds_nothing(temporary):
    held = Folder()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        held.forget()
        os.read(reader, 1)
        os._exit(0)
    held.leave()
    assert not held.path.exists()
    os.write(writer, b".")
    assert os.waitpid(child, 0)[1] == 0
    os.close(reader)
    os.close(writer)


def test_a_folder_named_by_a_port_is_private_to_the_user(temporary, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29123")
    place = folder.place_of("29123")
    target = temporary / "target"
    target.write_text("of another program")
    place.symlink_to(target)
    met = meet_on_this_machine(0, (0,), 10.0)
    assert target.read_text() == "of another program"
    assert not place.is_symlink()
    met.watch.close()
    met.end()
    assert list(temporary.iterdir()) == [target]


def test_a_world_that_does_not_come_together_leaves_nothing(temporary, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29123")
    with pytest.raises(TimeoutError, match=r"ranks \[1\] are missing"):
        meet_on_this_machine(0, (0, 1), 0.1)
    assert list(temporary.iterdir()) == []
