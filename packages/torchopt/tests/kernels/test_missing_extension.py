# SPDX-License-Identifier: Apache-2.0
"""If the extension cannot be imported, torchopt warns and computes the same without it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch

import torchopt
from torchopt.kernels.missing import MissingExtension, why_missing

WITHOUT = """
import importlib.abc, json, sys, warnings

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchopt._C":
            raise ImportError("no kernels for this platform")

sys.meta_path.insert(0, Refuse())
"""

STEPS = """
import torch, torchopt

def results():
    found = {}
    for name in ("SGD", "Adam", "AdamW", "RMSProp", "AdaGrad", "AdaMax", "RAdam", "AdaDelta"):
        w = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
        optimizer = getattr(torchopt, name)([w], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (w**2).sum().backward()
            optimizer.step()
        net = torch.nn.Linear(2, 1).double()
        with torch.no_grad():
            net.weight.fill_(0.5)
            net.bias.fill_(0.25)
        start = list(net.parameters())
        inner = getattr(torchopt, "Meta" + name)(net, lr=0.1)
        x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
        for _ in range(2):
            inner.step((net(x) ** 2).sum())
        slopes = torch.autograd.grad((net(x) ** 2).sum(), start)
        found[name] = [w.tolist(), slopes[0].tolist()]
    return found
"""


def run_without(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, check=False
    )


def test_results_are_the_same_with_one_warning_about_missing_kernels() -> None:
    run = run_without(STEPS + "print(json.dumps(results()))")
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("MissingExtensionWarning") == 1
    assert "no kernels for this platform" in run.stderr
    names: dict[str, Any] = {}
    exec(STEPS, names)
    expected = names["results"]()
    for name, (values, slopes) in json.loads(run.stdout).items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(expected[name][0]), rtol=1e-6, atol=1e-9
        )
        torch.testing.assert_close(
            torch.tensor(slopes), torch.tensor(expected[name][1]), rtol=1e-6, atol=1e-9
        )


def test_requesting_a_kernel_raises_with_the_reason() -> None:
    program = """
warnings.simplefilter("ignore")
import torch, torchopt
assert not torchopt.accelerated_op_available("cpu")
optimizer = torchopt.adam(0.1, use_accelerated_op=True)
w = torch.ones(2)
try:
    optimizer.update(w, optimizer.init(w), inplace=False)
except torchopt.errors.KernelUnavailableError as error:
    print(error)
"""
    run = run_without(program)
    assert run.returncode == 0, run.stderr
    assert "could not be imported (no kernels for this platform)" in run.stdout


def test_the_warning_can_be_an_error() -> None:
    run = run_without("warnings.simplefilter('error')\nimport torchopt\ntorchopt.adam(0.1)")
    assert run.returncode != 0
    assert "MissingExtensionWarning" in run.stderr


def test_the_extension_is_present_here() -> None:
    assert why_missing(torchopt._C) is None
    missing = MissingExtension(ImportError("x"))
    assert "(x)" in str(why_missing(missing))
    with pytest.raises(torchopt.errors.KernelUnavailableError, match="torchopt._C.run: the comp"):
        missing.run()


def test_a_present_extension_must_load() -> None:
    """Tests that need a kernel are skipped where there is none, but not where it fails to load."""
    folder = Path(torchopt.__file__).parent
    built = [p for suffix in EXTENSION_SUFFIXES for p in folder.glob(f"_C{suffix}")]
    assert not built or why_missing(torchopt._C) is None, why_missing(torchopt._C)
