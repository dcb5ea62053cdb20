# SPDX-License-Identifier: Apache-2.0
"""What the processes of a machine write down for each other."""

from __future__ import annotations

from torchopt.distributed.board import Begun, Board


def test_ranks_see_whether_the_others_begin_the_same(tmp_path):
    first, second, third = (Begun(tmp_path / "begun", rank, 3) for rank in range(3))
    largest = 2**32 - 1
    first.begin(largest)
    assert first.is_common() is None
    second.begin(largest)
    assert second.is_common() is None
    third.begin(largest)
    assert [x.is_common() for x in (first, second, third)] == [True] * 3
    first.begin(1)
    assert first.is_common() is None  # the others are at the operation before
    second.begin(1)
    third.begin(2)
    assert [x.is_common() for x in (first, second, third)] == [False] * 3


def test_the_note_of_a_process_is_read_by_another(tmp_path):
    own, other = Board(tmp_path, 0), Board(tmp_path, 1)
    assert other.read(0) is None
    own.write("task 1 of 2")
    own.write("x" * 300)
    assert other.read(0) == "x" * 255
    own.write("after")
    assert other.read(0) == "after"
    assert other.read(5) is None
