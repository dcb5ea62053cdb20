# SPDX-License-Identifier: Apache-2.0
"""Make the tables in this folder importable, and every run reproducible."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torchopt
from torchopt.kernels.missing import why_missing

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test that needs a kernel if the package was built without kernels."""
    try:
        return (yield)
    except torchopt.errors.KernelUnavailableError:
        if why_missing(torchopt._C) is None:
            raise
        pytest.skip("asks for a kernel; this build has none")
