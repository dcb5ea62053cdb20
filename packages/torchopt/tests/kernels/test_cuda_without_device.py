# SPDX-License-Identifier: Apache-2.0
"""Decisions about CUDA that need no device; csrc/tests/test_cuda_text.cpp tests the kernels."""

from __future__ import annotations

import pytest
import torch

from torchopt.kernels import devices
from torchopt.kernels.devices import explain_unavailable, has_code_for, refuse_capture
from torchopt.update import share_memory

COMPILED = "80-real,90-real,90-virtual"


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 5), COMPILED, False),  # older than all architectures
        ((8, 0), COMPILED, True),
        ((8, 9), COMPILED, True),  # machine code of a smaller minor version
        ((9, 0), COMPILED, True),
        ((12, 0), COMPILED, True),  # PTX
        ((12, 0), "80-real,90-real", False),
        ((8, 0), "86", False),
        ((9, 0), "86", True),  # a number alone includes PTX
        ((9, 0), "90a", True),
        ((10, 0), "90a", False),  # code for one family does not run on the next
        ((10, 3), "100f-real", True),
        ((7, 0), "all-major", True),  # not checked
        ((7, 0), "", True),
    ],
)
def test_a_device_refuses_code_that_was_not_compiled_for_it(
    capability: tuple[int, int], architectures: str, runs: bool
) -> None:
    assert has_code_for(capability, architectures) is runs


def test_an_old_device_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices._C, "WITH_CUDA", True)
    monkeypatch.setattr(devices._C, "CUDA_ARCHITECTURES", COMPILED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5 + index))
    devices._why_no_code.cache_clear()
    try:
        reason = explain_unavailable(torch.device("cuda", 1), torch.float32)
    finally:
        devices._why_no_code.cache_clear()
    assert reason is not None
    assert "cuda:1 of compute capability 7.6" in reason
    assert COMPILED in reason


def test_a_captured_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refuse_capture(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="expected no capture of a CUDA graph"):
        refuse_capture(torch.device("cuda", 0))


def test_tensors_with_common_memory_are_found() -> None:
    a, b = torch.ones(3), torch.ones(3)
    assert share_memory([a, b, a.view(3)])
    whole = torch.ones(4, 4)
    assert share_memory([whole[:3], a, whole[2:]])
    assert share_memory([whole[1], whole])
    assert not share_memory([whole[2:], whole[0], whole[1]])
    assert not share_memory([a, b, torch.ones(0), torch.ones(0)])
