# SPDX-License-Identifier: Apache-2.0
"""Write the table of optimizers in torchopt's manual; every figure in it is measured.

``python tools/optimizer_table.py`` rewrites the page; with ``--check`` it only reports whether
the page is stale.

- Paper: the first reference of the docstring.
- Native: whether native calls do a step with default settings entirely, in part or not at all.
- State: bytes of state tensors for each parameter after two steps, measured on a 128 x 128 matrix
  in float32.
- Differentiable in: the inputs in which the parameters after eight steps have a nonzero derivative.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchopt import _C, alias
from torchopt.index import OPTIMIZERS
from torchopt.optimizers.native import FusedChain
from torchopt.tree import tree_flatten, tree_leaves, tree_unflatten

PAGE = Path(__file__).resolve().parent.parent / "packages/torchopt/docs/reference/optimizers.md"
BLOCK = re.compile(r"(<!-- optimizers:begin -->\n)(.*?)(<!-- optimizers:end -->)", re.DOTALL)

# Values for hyper-parameters that have no effect by default, and the settings that enable them.
ACTIVE: dict[str, dict[str, Any]] = {
    "weight_decay": {"weight_decay": 0.1},
    "dampening": {"dampening": 0.1, "momentum": 0.9},
    "momentum": {"momentum": 0.9},
}
SETTINGS: dict[str, dict[str, Any]] = {"sophia": {"update_every": 2, "rho": 1.0}}
STEPS = 8
NOTHING = "\u2013"
# Native calls outside of chains, and the entry in the table for a step that makes one.
NATIVE_CALLS = {"factored_rms": "on the CPU", "newton_schulz": "in part"}


def paper(make: Callable[..., Any]) -> str:
    """Return the first reference of a docstring as authors, year and link."""
    section = re.search(r"References:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(make) or "", re.DOTALL)
    if section is None:
        return NOTHING
    text = " ".join(section[1].split()).partition("; ")[0]
    names = re.findall(r"(?:[A-Z]\.[- ]?)+ ?([A-Z][\w'-]+)( et al\.)?(?=,)", text)
    years = re.findall(r"\b(?:19|20)\d\d\b(?![./]\d)", text.partition("http")[0])
    who = [name for name, _ in names]
    more = len(who) > 2 or bool(names[0][1])
    label = f"{who[0]} et al." if more else " and ".join(who)
    link = re.search(r"https?://[^\s,;]+", text)
    shown = f"{label}, {years[-1]}"
    return f"[{shown}]({link[0]})" if link else shown


def native(make: Callable[..., Any]) -> str:
    """Return how much of a step with default settings is native."""
    optimizer = make(lr=0.1)
    chain = getattr(optimizer.update, "__self__", None)
    if isinstance(chain, FusedChain) and chain.part is not None:
        return "yes" if chain.is_whole else "in part"
    called: list[str] = []
    functions = {name: getattr(_C, name) for name in NATIVE_CALLS}

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found = functions[name](*arguments)
            called.extend([name] if found is not None else [])
            return found

        return call

    params = [torch.ones(4, 4)]
    try:
        for name in NATIVE_CALLS:
            setattr(_C, name, counted(name))
        optimizer.update([torch.ones(4, 4)], optimizer.init(params), params=params, inplace=True)
    finally:
        for name, function in functions.items():
            setattr(_C, name, function)
    return NATIVE_CALLS[called[0]] if called else NOTHING


def state_bytes(make: Callable[..., Any], size: int = 128) -> float:
    """Return the bytes of state per parameter after two steps."""
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(size, size, generator=generator)}
    optimizer = make(lr=0.1)
    state = optimizer.init(params)
    for _ in range(2):
        grads = {"w": torch.randn(size, size, generator=generator)}
        _, state = optimizer.update(grads, state, params=params, inplace=False)
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(state)
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values()) / size**2


def _trained(optimizer: Any, lead: Sequence[Tensor], state: Any = None) -> tuple[Any, Tensor]:
    """Return the state after some steps, and a scalar function of the parameters."""
    generator = torch.Generator().manual_seed(1)
    params = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in (("w", (4, 3)), ("b", (3,)))
    }
    state = optimizer.init(params) if state is None else state
    for _ in range(STEPS):
        grads = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.5
            for name, p in params.items()
        }
        grads["w"] = grads["w"] + sum(lead, torch.zeros(()))
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = {name: p + updates[name] for name, p in params.items()}
    value: Tensor = sum((p**2).sum() for p in params.values())  # type: ignore[assignment]
    return state, value


def _moves(value: Tensor, inputs: Iterable[Tensor]) -> bool:
    """Return whether the derivative of a value with respect to some input is nonzero."""
    inputs = list(inputs)
    if not value.requires_grad or not inputs:
        return False
    found = torch.autograd.grad(value, inputs, allow_unused=True)
    return any(g is not None and bool((g != 0).any()) for g in found)


def differentiable_in(name: str, make: Callable[..., Any]) -> list[str]:
    """Return the inputs in which the parameters after some steps have a nonzero derivative."""
    fixed = {"lr": 0.1, **SETTINGS.get(name, {})}
    found = []
    lead = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    state, value = _trained(make(**fixed), [lead])
    if _moves(value, [lead]):
        found.append("gradients")
    leaves, spec = tree_flatten(state)
    leaves = [
        leaf.detach().clone().requires_grad_()
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
        else leaf
        for leaf in leaves
    ]
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if _moves(_trained(make(**fixed), [], tree_unflatten(spec, leaves))[1], inputs):
        found.append("state")
    for key, parameter in inspect.signature(make).parameters.items():
        default: Any = 0.1 if key == "lr" else parameter.default
        many = isinstance(default, tuple)
        numbers: tuple[Any, ...] = default if many else (default,)
        if not all(isinstance(number, float) for number in numbers):
            continue
        settings = {**fixed, **ACTIVE.get(key, {})}
        numbers = numbers if many else (settings.get(key, default),)
        tensors = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in numbers]
        settings[key] = tuple(tensors) if many else tensors[0]
        if _moves(_trained(make(**settings), [])[1], tensors):
            found.append(f"`{key}`")
    return found


def optimizer_table() -> str:
    """Return the table in Markdown."""
    rows = [
        "| optimizer | paper | native | state, bytes per parameter | differentiable in |",
        "|---|---|---|--:|---|",
    ]
    for name in sorted(OPTIMIZERS):
        make = getattr(alias, name)
        cells = (
            f"{{py:func}}`{name} <torchopt.alias.{name}>`",
            paper(make),
            native(make),
            f"{round(state_bytes(make), 1):g}",
            ", ".join(differentiable_in(name, make)),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Rewrite the page or check it, and return the exit status."""
    parser = argparse.ArgumentParser(description="Fill the table of optimizers in the manual.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if stale")
    check = parser.parse_args(arguments).check
    text = PAGE.read_text(encoding="utf-8")
    table = optimizer_table()
    filled, count = BLOCK.subn(lambda m: f"{m[1]}\n{table}\n{m[3]}", text)
    if count != 1:
        print(f"{PAGE.name}: expected one pair of markers, found {count}", file=sys.stderr)
        return 1
    if filled != text and check:
        print(f"{PAGE.name}: stale; run tools/optimizer_table.py", file=sys.stderr)
        return 1
    if filled != text:
        PAGE.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
