# SPDX-License-Identifier: Apache-2.0
"""Check the compiled CUDA kernels without a device: loads are vectorised and nothing spills.

Usage: python tools/check_cuda_code.py [RULE ...]   (default: all rules of csrc/math/rules.h)

Each rule is compiled to PTX and then assembled by ptxas. The PTX of each kernel must load and
store packs (two float64 values, or four of another dtype, in one instruction), and ptxas must
report no spilled register and no stack. If a kernel fails, it is listed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "packages" / "torchopt" / "csrc"
ENTRY = re.compile(r"\.entry (\w+)\(")
LOAD = re.compile(r"ld\.global\.(v4\.u16|v4\.f32|v2\.f64)")
STORE = re.compile(r"st\.(?:global\.)?wb\.v[24]\.u32")
SPILLS = re.compile(
    r"Compiling entry function '(\w+)'.*?\n.*?\n\s+(\d+) bytes stack frame, (\d+) bytes spill "
    r"stores, (\d+) bytes spill loads\n.*?Used (\d+) registers",
)


def rules() -> list[str]:
    """Return the names in csrc/math/rules.h."""
    text = (CSRC / "math" / "rules.h").read_text()
    return re.findall(r"^using ([a-z_]+) = ", text, re.MULTILINE)


def compiled(nvcc: str, rule: str, architecture: str) -> tuple[str, str]:
    """Return the PTX of a rule, and the report of ptxas on its kernels."""
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-arch={architecture}", f"-I{CSRC}"]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / f"{rule}.cu"
        source.write_text(f'#define TORCHOPT_RULE {rule}\n#include "launch/cuda.inc"\n')
        ptx, cubin = source.with_suffix(".ptx"), source.with_suffix(".cubin")
        subprocess.run([nvcc, *flags, "-ptx", source, "-o", ptx], check=True)
        ptxas = str(Path(nvcc).resolve().parent / "ptxas")
        said = subprocess.run(
            [ptxas, "-v", f"-arch={architecture}", ptx, "-o", cubin],
            check=True,
            capture_output=True,
            text=True,
        )
        return ptx.read_text(), said.stderr


def faults(ptx: str, said: str) -> tuple[list[str], int, int]:
    """Return the faults, the number of kernels, and the largest number of registers of a kernel."""
    wrong = []
    parts = ENTRY.split(ptx)
    kernels = dict(zip(parts[1::2], parts[2::2]))
    for name, body in kernels.items():
        if LOAD.search(body) is None:
            wrong.append(f"{name}: no load of a pack")
        if STORE.search(body) is None:
            wrong.append(f"{name}: no store of a pack")
    seen = SPILLS.findall(said)
    for name, stack, stores, loads, _ in seen:
        if (stack, stores, loads) != ("0", "0", "0"):
            wrong.append(f"{name}: stack {stack} bytes, spills {stores} and {loads} bytes")
    if len(seen) != len(kernels):
        wrong.append(f"ptxas reported on {len(seen)} kernels, the PTX has {len(kernels)}")
    return wrong, len(kernels), max((int(registers) for *_, registers in seen), default=0)


def main() -> int:
    """Check the named rules and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rules", nargs="*", default=rules(), help="default: all")
    parser.add_argument("--architecture", default="sm_90")
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("error: expected nvcc on PATH, found none; install the CUDA toolkit")
        return 2
    failed = False
    for rule in arguments.rules:
        wrong, kernels, registers = faults(*compiled(nvcc, rule, arguments.architecture))
        print(f"{rule}: {kernels} kernels, at most {registers} registers, {len(wrong)} faults")
        for line in wrong:
            print(f"  {line}")
        failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
