# SPDX-License-Identifier: Apache-2.0
"""Ten steps of every optimizer, in every form in which it can be called, against its twin.

The gradients are given, not computed: seeded numbers, missing at some steps, with various strides.
If a form takes a loss, the loss is linear with these gradients.

Run it as a program for the table of worst differences:

    python packages/torchopt/tests/parity.py
"""

# ruff: noqa: T201 -- run as a program, it prints a table.

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from optimizers import ROWS, Row
from problems import zoo
from torch import Tensor, nn

import torchopt
from torchopt.optimizers.native import with_backend
from torchopt.transform import in_precision

STEPS = 10
NAMES = ("b", "empty", "s", "w")

Grads = dict[str, Any]
Settings = dict[str, Any]


def given_gradients(step: int, dtype: torch.dtype) -> Grads:
    """Return the gradients of one step, from 0. Those of `w` have the strides of a transpose; that
    of `b` is missing in the third step, and that of `s` in the sixth.
    """
    generator = torch.Generator().manual_seed(100 + step)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    grads: Grads = {"b": randn(6)[::2], "empty": randn(0, 2), "s": randn(), "w": randn(3, 4).mT}
    assert not grads["w"].is_contiguous()
    assert not grads["b"].is_contiguous()
    if step == 2:
        grads["b"] = None
    if step == 5:
        grads["s"] = None
    return grads


@functools.cache
def _twin(name: str, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
    row = ROWS[name]
    params = {k: v.clone().requires_grad_() for k, v in zoo(dtype=dtype).items()}
    optimizer = row.twin(params.values(), **row.settings[index])
    for step in range(STEPS):
        for key, g in given_gradients(step, dtype).items():
            params[key].grad = g
        optimizer.step()
    return {k: v.detach() for k, v in params.items()}


def twin(row: Row, settings: Settings, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return the parameters after steps of torch.optim or of the reference."""
    return _twin(row.name, row.settings.index(settings), dtype)


def functional(
    pack: Callable[[Grads], Any],
    unpack: Callable[[Any], dict[str, Tensor]],
    *,
    inplace: bool,
    backend: Any = "auto",
    dtype: torch.dtype = torch.float64,
) -> Callable[[Row, Settings], dict[str, Tensor]]:
    """Return a form: `update` and `apply_updates` on the tree that `pack` returns."""

    def run(row: Row, settings: Settings) -> dict[str, Tensor]:
        optimizer = with_backend(row.functional(**settings), backend)
        params = pack({k: v.clone() for k, v in zoo(dtype=dtype).items()})
        state = optimizer.init(params)
        for step in range(STEPS):
            grads = pack(given_gradients(step, dtype))
            updates, state = optimizer.update(grads, state, params=params, inplace=inplace)
            params = torchopt.apply_updates(params, updates, inplace=inplace)
        return unpack(params)

    return run


def classic(row: Row, settings: Settings, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The classic optimizer with two groups."""
    params = {k: v.clone().requires_grad_() for k, v in zoo(dtype=dtype).items()}
    optimizer = row.classic([params["w"], params["empty"]], **settings)
    optimizer.add_param_group({"b": params["b"], "s": params["s"]})
    for step in range(STEPS):
        for key, g in given_gradients(step, dtype).items():
            params[key].grad = g
        optimizer.step()
    return {k: v.detach() for k, v in params.items()}


def adapted(row: Row, settings: Settings) -> dict[str, Tensor]:
    """A `torch.optim.Optimizer` around the transformation."""
    params = {k: v.clone().requires_grad_() for k, v in zoo().items()}
    optimizer = torchopt.optim.TorchOptimizer(params.values(), row.functional, **settings)
    for step in range(STEPS):
        for key, g in given_gradients(step, torch.float64).items():
            params[key].grad = g
        optimizer.step()
    return {k: v.detach() for k, v in params.items()}


def linear_loss(params: dict[str, Tensor], grads: Grads) -> Tensor:
    return sum((params[k] * g).sum() for k, g in grads.items() if g is not None)  # type: ignore[return-value]


def stateful(inplace: bool) -> Callable[[Row, Settings], dict[str, Tensor]]:
    """Return a form: `FuncOptimizer` on a tuple."""

    def run(row: Row, settings: Settings) -> dict[str, Tensor]:
        params = tuple(v.clone().requires_grad_() for v in zoo().values())
        optimizer = torchopt.FuncOptimizer(row.functional(**settings), inplace=inplace)
        for step in range(STEPS):
            grads = given_gradients(step, torch.float64)
            params = optimizer.step(linear_loss(dict(zip(NAMES, params)), grads), params)
        return dict(zip(NAMES, params))

    return run


class Zoo(nn.Module):
    """A module with the parameters of `zoo`, half of them in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Module()
        for name, value in zoo().items():
            owner = self if name in ("b", "w") else self.child
            owner.register_parameter(name, nn.Parameter(value.clone()))

    def tensors(self) -> dict[str, Tensor]:
        return {"b": self.b, "empty": self.child.empty, "s": self.child.s, "w": self.w}


def meta(row: Row, settings: Settings) -> dict[str, Tensor]:
    """The meta-optimizer, its graph kept through all steps."""
    net = Zoo()
    optimizer = row.meta(net, **settings)
    start = net.b
    for step in range(STEPS):
        grads = given_gradients(step, torch.float64)
        optimizer.step(linear_loss(net.tensors(), grads))
    assert net.b is not start
    assert net.b.grad_fn is not None
    return net.tensors()


def _mapping(tree: dict[str, Any]) -> dict[str, Any]:
    return dict(tree)


def _list(tree: dict[str, Any]) -> list[Any]:
    return [tree[name] for name in NAMES]


def _nested(tree: dict[str, Any]) -> Any:
    return ({"x": [tree["w"], tree["s"]]}, tree["b"], {"y": (tree["empty"],)})


def _from_nested(tree: Any) -> dict[str, Tensor]:
    return {"w": tree[0]["x"][0], "s": tree[0]["x"][1], "b": tree[1], "empty": tree[2]["y"][0]}


def _named(values: Any) -> dict[str, Tensor]:
    return dict(zip(NAMES, values))


FORMS: dict[str, Callable[[Row, Settings], dict[str, Tensor]]] = {
    "dict": functional(_mapping, _mapping, inplace=False),
    "dict, in place": functional(_mapping, _mapping, inplace=True),
    "list, reference": functional(_list, _named, inplace=False, backend="reference"),
    "nested tuple, in place": functional(_nested, _from_nested, inplace=True),
    "one tensor": functional(lambda t: t["w"], lambda w: {"w": w}, inplace=False),
    "classic, two groups": classic,
    "torch.optim adapter": adapted,
    "FuncOptimizer": stateful(False),
    "FuncOptimizer, in place": stateful(True),
    "MetaOptimizer": meta,
}
"""The forms of an optimizer in float64: (row, settings) -> parameters after `STEPS` steps."""

FLOAT32_FORMS: dict[str, Callable[[Row, Settings], dict[str, Tensor]]] = {
    "float32, dict": functional(_mapping, _mapping, inplace=False, dtype=torch.float32),
    "float32, classic": functools.partial(classic, dtype=torch.float32),
}


APART = frozenset({"one tensor", "classic, two groups", "float32, classic"})
"""The forms in which not all parameters are stepped together."""


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest |got - expected| / max(1, |expected|)."""
    worst = 0.0
    for name, value in got.items():
        wanted = expected[name]
        assert value.shape == wanted.shape
        assert value.dtype is wanted.dtype
        if value.numel():
            error = (value.detach() - wanted).abs() / wanted.abs().clamp(min=1.0)
            worst = max(worst, error.max().item())
    return worst


def bfloat16_differences(row: Row, settings: Settings) -> int:
    """Return how many entries of ten bfloat16 updates with float32 moments differ from the float32
    updates, rounded once.
    """
    low = in_precision(row.functional(**settings), torch.float32)
    high = row.functional(**settings)
    params = zoo(dtype=torch.bfloat16)
    low_state = low.init(params)
    high_state = high.init({k: v.float() for k, v in params.items()})
    wrong = 0
    for step in range(STEPS):
        grads = given_gradients(step, torch.bfloat16)
        updates, low_state = low.update(grads, low_state, params=params, inplace=False)
        exact, high_state = high.update(
            {k: None if g is None else g.float() for k, g in grads.items()},
            high_state,
            params={k: v.float() for k, v in params.items()},
            inplace=False,
        )
        for name, u in updates.items():
            if u is None:
                assert exact[name] is None
                continue
            assert u.dtype is torch.bfloat16
            wrong += int((u != exact[name].bfloat16()).sum())
        params = torchopt.apply_updates(params, updates, inplace=False)
    assert all(v.dtype is torch.bfloat16 for v in params.values())
    return wrong


def main() -> None:
    """Print the worst difference of each optimizer in each form, over all settings."""
    columns = [*FORMS, *FLOAT32_FORMS]
    print("| optimizer | settings | " + " | ".join(columns) + " | bfloat16, float32 moments |")
    print("|---" + "|---:" * (len(columns) + 2) + "|")
    total = 0
    for name in sorted(ROWS):
        row = ROWS[name]
        cells = []
        for form in columns:
            if row.joint and form in APART:
                cells.append("-")
                continue
            run = FORMS.get(form) or FLOAT32_FORMS[form]
            dtype = torch.float64 if form in FORMS else torch.float32
            worst = max(difference(run(row, s), twin(row, s, dtype)) for s in row.settings)
            total += len(row.settings)
            cells.append(f"{worst:.0e}")
        wrong = sum(bfloat16_differences(row, s) for s in row.settings)
        total += len(row.settings)
        print(f"| {name} | {len(row.settings)} | {' | '.join(cells)} | {wrong} differ |")
    print(f"\n{total} runs of {STEPS} steps")


if __name__ == "__main__":
    main()
