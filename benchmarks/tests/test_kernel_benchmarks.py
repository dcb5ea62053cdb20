# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the kernels work up to the device, and notice what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.torchopt import cpu_kernels, gpu_kernels, kernel_rivals
from torch.utils._pytree import tree_map_only

SHAPES = [(4,), (2, 3)]


def test_gpu_measurements_on_tiny_tensors(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = gpu_kernels.arguments_of(["--dry-run", "--seconds", "0", "--out", str(out)])
    gpu_kernels.measure_here(arguments)
    cells = json.loads(out.read_text())["cells"]
    assert {cell["layout"] for cell in cells} == {"1k in 1", "1k in 10"}
    assert len(cells) == 2 * (3 + 2 + 2 + 2)
    assert all(cell["seconds"] > 0 and cell["fraction_of_copy"] > 0 for cell in cells)


def test_gpu_layouts_are_all_sizes_in_all_numbers_of_tensors() -> None:
    found = gpu_kernels.layouts(gpu_kernels.arguments_of([]))
    assert len(found) == 9
    assert {size * count for _, size, count in found} == {10**6, 10**8, 10**9}
    assert len(gpu_kernels.layouts(gpu_kernels.arguments_of(["--sizes", "1M"]))) == 3


def test_gpu_stages_that_fail_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(gpu_kernels.shutil, "which", lambda name: None)
    assert gpu_kernels.main(["--stages", "build", "check"]) == 1
    printed = capsys.readouterr().out
    assert "build: FAILED expected nvcc on PATH" in printed
    assert "=== check" not in printed
    assert gpu_kernels.main(["--stages", "sanitize"]) == 1
    assert "compute-sanitizer on PATH" in capsys.readouterr().out


def test_gpu_tests_that_were_skipped_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_skipped(command: list[str], variables: object) -> None:
        (tmp_path / "tests.xml").write_text(
            '<testsuites><testsuite tests="5" failures="0" errors="0" skipped="5"/></testsuites>'
        )

    monkeypatch.setattr(gpu_kernels, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_kernels, "run", all_skipped)
    with pytest.raises(gpu_kernels.StageError, match="expected tests to run on cuda"):
        gpu_kernels.check(gpu_kernels.arguments_of([]))


def test_cpu_cells() -> None:
    cells = cpu_kernels.measure({"tiny": SHAPES}, 0.0)
    assert {cell["case"] for cell in cells} == {
        "Adam in place",
        "Adam functional",
        "Adam forward and backward, by all",
        "Adam forward and backward",
        "operations",
    }
    timed = [cell for cell in cells if cell["case"] != "operations"]
    assert all(cell["fraction_of_triad"] > 0 for cell in timed)
    assert all(cell["load"] >= 0 and cell["clock"] == "perf_counter" for cell in timed)


@pytest.mark.parametrize("function", ["functional", "differentiated", "differentiated_in_all"])
def test_a_wrong_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def wrong(params: Sequence[torch.Tensor], backend: kernel_rivals.Backend) -> Callable[[], Any]:
        run = right(params, backend)
        factor = 1.01 if backend == "native" else 1.0
        return lambda: tree_map_only(torch.Tensor, lambda x: factor * x, run())

    right = getattr(kernel_rivals, function)
    monkeypatch.setattr(kernel_rivals, function, wrong)
    with pytest.raises(AssertionError, match="not close"):
        cpu_kernels.measure({"tiny": SHAPES}, 0.0)


def test_fusion_saves_operations() -> None:
    params = kernel_rivals.make_parameters(SHAPES, "cpu")
    native, reference = (
        kernel_rivals.count_operations(kernel_rivals.differentiated(params, b))
        for b in kernel_rivals.BACKENDS
    )
    assert native < 0.7 * reference


def test_rivals_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        kernel_rivals.IN_PLACE, "torch foreach", lambda p: torch.optim.Adam(p, lr=2e-3)
    )
    with pytest.raises(AssertionError, match="not close"):
        kernel_rivals.in_place_rivals(SHAPES, "cpu")
