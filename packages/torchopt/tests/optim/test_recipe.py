# SPDX-License-Identifier: Apache-2.0
"""The optimizer in CONTRIBUTING.md works as written: its file and one line of the index."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torchopt

CONTRIBUTING = Path(__file__).resolve().parents[4] / ".github" / "CONTRIBUTING.md"
RECIPE = re.compile(r"<!-- recipe: (\S+) -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)

if not CONTRIBUTING.is_file():
    pytest.skip("the guide is not beside these tests", allow_module_level=True)

PROGRAM = """
import pickle
import sys

# An editable installation would come before the path.
for finder in list(sys.meta_path):
    if "torchopt" in getattr(finder, "known_source_files", ()):
        sys.meta_path.remove(finder)
import torch, torchopt

torch.set_default_dtype(torch.float64)
settings = {"lr": 0.1, "beta": 0.8, "weight_decay": 0.3}
generator = torch.Generator().manual_seed(1)
target, start = torch.randn(2, 4, generator=generator)


def by_hand(p, lr, steps=3, beta=0.8):
    mu = torch.zeros_like(p)
    for k in range(1, steps + 1):
        mu = beta * mu + (1 - beta) * (torch.sin(p) - target + 0.3 * p)
        corrected = mu / (1 - beta**k)
        p = p - lr * corrected / (1 + corrected.abs())
    return p


def functional(p, lr, steps=3, beta=0.8):
    impl = torchopt.softsign(lr, beta, 0.3)
    state = impl.init((p,))
    for _ in range(steps):
        grads = (torch.sin(p) - target,)
        updates, state = impl.update(grads, state, params=(p,), inplace=False)
        p = p + updates[0]
    return p


want = by_hand(start, 0.1)
torch.testing.assert_close(functional(start, 0.1), want)
torch.testing.assert_close(
    torch.func.vmap(lambda p: functional(p, 0.1))(torch.stack([start, start])),
    torch.stack([want, want]),
)

p = start.clone().requires_grad_()
classic = torchopt.Softsign([p], **settings)
for _ in range(3):
    p.grad = (torch.sin(p) - target).detach()
    classic.step()
torch.testing.assert_close(p.detach(), want)
state = pickle.loads(pickle.dumps(classic.state_dict()))
assert type(state[0][1]).__name__ == "ScaleBySoftsignState"

net = torch.nn.ParameterDict({"p": start.clone()})
meta = torchopt.MetaSoftsign(net, **settings)
for _ in range(3):
    meta.step(-torch.cos(net["p"]).sum() - (target * net["p"]).sum())
torch.testing.assert_close(net["p"].detach(), want)

lr, beta = (torch.tensor(x, requires_grad=True) for x in (0.1, 0.8))
for f in (lambda p, lr, beta: functional(p, lr, 2, beta),):
    variables = (start.clone().requires_grad_(), lr, beta)
    assert torch.autograd.gradcheck(f, variables)
    assert torch.autograd.gradgradcheck(f, variables)
try:
    torchopt.transform.scale_by_softsign(1.5)
except ValueError as error:
    print(error)
"""


def test_the_optimizer_of_the_guide_needs_its_file_and_one_line(tmp_path: Path) -> None:
    ((place, text),) = RECIPE.findall(CONTRIBUTING.read_text(encoding="utf-8"))
    package = tmp_path / "torchopt"
    source = Path(torchopt.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    # Beside the sources, where an editable installation does not have it.
    extension = Path(torchopt._C.__file__)
    shutil.copy(extension, package / extension.name)
    (package / place).write_text(text, encoding="utf-8")
    index = package / "index.py"
    line = '    "sophia": "Sophia",\n'
    before = index.read_text(encoding="utf-8")
    assert line in before
    index.write_text(before.replace(line, '    "softsign": "Softsign",\n' + line), encoding="utf-8")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "Invalid beta value: 1.5; expected 0 <= number < 1\n"
