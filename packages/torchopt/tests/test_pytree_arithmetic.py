# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `torchopt.pytree` against that of the leaves, by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchopt import pytree

DOUBLE = torch.float64


def tree(seed: int, dtype: torch.dtype = DOUBLE) -> Any:
    """Return a tree of square leaves, so that all can be multiplied."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(3, 3, generator=generator, dtype=dtype)

    return {"b": [draw(), (draw(),)], "a": draw(), "n": None}


X, Y, Z = tree(0), tree(1), tree(2)


def leaves(t: Any) -> list[torch.Tensor]:
    return [t["a"], t["b"][0], t["b"][1][0]]


ARITHMETIC: dict[str, tuple[Callable[[], Any], Callable[..., torch.Tensor], tuple[Any, ...]]] = {
    "pos": (lambda: pytree.tree_pos(X), lambda x: x, (X,)),
    "neg": (lambda: pytree.tree_neg(X), lambda x: -x, (X,)),
    "add": (lambda: pytree.tree_add(X, Y), lambda x, y: x + y, (X, Y)),
    "add_three": (lambda: pytree.tree_add(X, Y, Z), lambda x, y, z: x + y + z, (X, Y, Z)),
    "add_scaled": (lambda: pytree.tree_add_scalar_mul(X, Y, 3.0), lambda x, y: x + 3 * y, (X, Y)),
    "add_alone": (lambda: pytree.tree_add_scalar_mul(X, Y), lambda x, y: x + y, (X, Y)),
    "sub": (lambda: pytree.tree_sub(X, Y), lambda x, y: x - y, (X, Y)),
    "sub_scaled": (lambda: pytree.tree_sub_scalar_mul(X, Y, 3.0), lambda x, y: x - 3 * y, (X, Y)),
    "sub_alone": (lambda: pytree.tree_sub_scalar_mul(X, Y), lambda x, y: x - y, (X, Y)),
    "mul": (lambda: pytree.tree_mul(X, Y), lambda x, y: x * y, (X, Y)),
    "mul_three": (lambda: pytree.tree_mul(X, Y, Z), lambda x, y, z: x * y * z, (X, Y, Z)),
    "matmul": (lambda: pytree.tree_matmul(X, Y), lambda x, y: x @ y, (X, Y)),
    "matmul_three": (lambda: pytree.tree_matmul(X, Y, Z), lambda x, y, z: x @ y @ z, (X, Y, Z)),
    "scalar_mul": (lambda: pytree.tree_scalar_mul(-2.0, X), lambda x: -2 * x, (X,)),
    "truediv": (lambda: pytree.tree_truediv(X, Y), lambda x, y: x / y, (X, Y)),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_that_of_the_leaves(name: str) -> None:
    compute, leaf, operands = ARITHMETIC[name]
    before = [[x.clone() for x in leaves(t)] for t in (X, Y, Z)]
    found = compute()
    assert set(found) == {"a", "b", "n"}
    assert found["n"] is None
    for got, *inputs in zip(leaves(found), *map(leaves, operands)):
        torch.testing.assert_close(got, leaf(*inputs), rtol=1e-13, atol=1e-15)
    for saved, t in zip(before, (X, Y, Z)):
        assert all(map(torch.equal, saved, leaves(t)))


def test_operands_of_another_structure_are_refused() -> None:
    for f in (pytree.tree_add, pytree.tree_sub, pytree.tree_mul, pytree.tree_truediv):
        with pytest.raises(ValueError, match="dict"):
            f(X, {"a": X["a"]})


@pytest.mark.parametrize(
    ("name", "f"), [("add", operator.add), ("mul", operator.mul), ("matmul", operator.matmul)]
)
def test_accumulation_goes_from_the_left(name: str, f: Callable[..., Any]) -> None:
    x, y, z = (leaves(t)[0] for t in (X, Y, Z))
    acc = getattr(pytree, f"acc_{name}")
    assert torch.equal(acc(x, y, z), f(f(x, y), z))
    assert acc(x) is x


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_real_inner_product(dtype: torch.dtype) -> None:
    u, v = tree(3, dtype), tree(4, dtype)
    flat = [torch.cat([x.ravel() for x in leaves(t)]) for t in (u, v)]
    expected = float(torch.vdot(flat[0], flat[1]).real)
    assert pytree.tree_vdot_real(u, v) == pytest.approx(expected, rel=1e-12)


def test_flattening_as_a_tuple_and_back() -> None:
    flat, treespec = pytree.tree_flatten_as_tuple(X)
    assert isinstance(flat, tuple)
    assert all(x is y for x, y in zip(flat, leaves(X)))
    assert pytree.tree_unflatten(treespec, flat)["b"][1][0] is X["b"][1][0]
    assert len(pytree.tree_flatten_as_tuple(X, none_is_leaf=True)[0]) == len(flat) + 1


def test_each_leaf_becomes_a_reference_and_is_read_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other processes; `distributed/test_remote_calls.py` has those."""
    asked: list[float] = []

    class Reference:
        def __init__(self, value: Any) -> None:
            self.value = value

        def to_here(self, timeout: float) -> Any:
            asked.append(timeout)
            return self.value

    monkeypatch.setattr(torch.distributed.rpc, "RRef", Reference)
    references = pytree.tree_as_rref(X)
    assert references["n"] is None
    assert all(type(x) is Reference for x in leaves(references))
    for found in (pytree.tree_to_here(references), pytree.tree_to_here(references, timeout=2.0)):
        assert found["n"] is None
        assert all(x is y for x, y in zip(leaves(found), leaves(X), strict=True))
    assert asked == [-1.0] * 3 + [2.0] * 3  # torch's own number for the default of the agent


def test_waiting_for_a_tree_of_futures() -> None:
    futures: list[torch.futures.Future[Any]] = [torch.futures.Future() for _ in range(2)]
    futures[0].set_result(1)
    futures[1].set_result("b")
    assert pytree.tree_wait({"x": futures[0], "y": [futures[1]]}) == {"x": 1, "y": ["b"]}
