# SPDX-License-Identifier: Apache-2.0
"""A task's changes to parameters and modules are undone at its end, even if it raises."""

from __future__ import annotations

import pytest
import torch
import undo_programs as programs
from distributed_programs import make_tasks


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_everything_that_a_failed_task_changed_is_restored(standing, n, deterministic):
    options = {"deterministic": deterministic}
    for found in standing(programs.changes_of_a_task_that_raises, n, options):
        assert len(found) == 2 * len(programs.CHANGES)
        for name, (told, is_as_before, off) in found.items():
            assert (name, told, is_as_before) == (name, "raised", True)
            assert off < 1e-14, name


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tasks_that_adapt_parameters_in_place_are_equal_at_every_world_size(standing, n):
    grads, losses = programs.adapted_reference(make_tasks(5))
    for found in standing(programs.adapted_in_place, n):
        assert len(found) == 2 * 2 * 2
        for got, got_losses, kept in found.values():
            assert kept
            torch.testing.assert_close(got_losses, losses, rtol=1e-13, atol=0)
            for a, b in zip(got, grads):
                assert b.abs().max() > 1e-3
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [1, 2])
def test_changes_that_cannot_be_undone_after_each_task_are_refused(standing, n):
    words = {
        "touch": "frozen parameters of more than 64 MiB",
        "write": "through `.data`",
        "leave": "no `.grad` behind",
    }
    for found in standing(programs.what_cannot_be_undone, n):
        assert {name.split()[0] for name in found} == words.keys()
        for name, (told, grad, kept) in found.items():
            text = told if isinstance(told, str) else told[3]
            assert words[name.split()[0]] in text, name
            assert grad is None
            assert kept
