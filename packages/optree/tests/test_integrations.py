# SPDX-License-Identifier: Apache-2.0
"""Ravelling trees of arrays, and attrs classes as nodes."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

import optree

TREE_SHAPES = {"b": (2, 3), "a": [(), (4,)], "c": None}


def test_submodules_are_lazy() -> None:
    code = (
        "import sys, optree\n"
        "assert not any(name in sys.modules for name in ('numpy', 'jax', 'torch', 'attr', 'attrs'))\n"  # noqa: E501
        "assert {'attrs', 'jax', 'numpy', 'torch', 'SUBMODULES'} <= set(dir(optree.integrations))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_unknown_submodules() -> None:
    with pytest.raises(AttributeError):
        optree.integrations.nope  # noqa: B018


class TestNumpy:
    @pytest.fixture(autouse=True)
    def load(self) -> None:
        self.np = pytest.importorskip("numpy")
        self.ravel = optree.integrations.numpy.tree_ravel

    def test_round_trip(self) -> None:
        np = self.np
        tree = {"b": np.arange(6.0).reshape(2, 3), "a": [np.float64(7), np.arange(4.0)], "c": None}
        flat, unravel = self.ravel(tree)
        assert flat.tolist() == [7, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
        again = unravel(flat + 1)
        assert again["b"].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert np.asarray(again["a"][0]).shape == ()
        assert again["c"] is None
        assert optree.integrations.numpy.ravel_pytree is self.ravel

    def test_types_are_promoted_and_cast_back(self) -> None:
        np = self.np
        flat, unravel = self.ravel(
            [np.arange(2, dtype=np.int32), np.array([0.5], dtype=np.float32)]
        )
        assert flat.dtype == np.promote_types(np.int32, np.float32)
        again = unravel(flat)
        assert [leaf.dtype for leaf in again] == [np.int32, np.float32]
        assert again[0].tolist() == [0, 1]

    def test_errors(self) -> None:
        np = self.np
        _, unravel = self.ravel([np.zeros(3)])
        with pytest.raises(
            ValueError,
            match=re.escape("The unravel function expected an array of shape (3,), got shape (2,)"),
        ):
            unravel(np.zeros(2))
        _, mixed = self.ravel([np.zeros(1, np.int32), np.zeros(1, np.float64)])
        with pytest.raises(ValueError, match="expected an array of dtype float64, got dtype"):
            mixed(np.zeros(2, np.int8))

    def test_empty(self) -> None:
        flat, unravel = self.ravel({"a": None, "b": []})
        assert flat.shape == (0,)
        assert unravel(flat) == {"a": None, "b": []}


class TestTorch:
    @pytest.fixture(autouse=True)
    def load(self) -> None:
        self.torch = pytest.importorskip("torch")
        self.ravel = optree.integrations.torch.tree_ravel

    def test_round_trip(self) -> None:
        torch = self.torch
        tree = {"b": torch.arange(6.0).reshape(2, 3), "a": [torch.tensor(7.0)], "c": None}
        flat, unravel = self.ravel(tree)
        assert flat.tolist() == [7, 0, 1, 2, 3, 4, 5]
        again = unravel(flat + 1)
        assert again["b"].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert again["a"][0].shape == ()

    def test_gradients_flow(self) -> None:
        torch = self.torch
        weight = torch.ones(2, 2, requires_grad=True)
        flat, unravel = self.ravel({"w": weight})
        (unravel(flat * 3)["w"] ** 2).sum().backward()
        assert weight.grad.tolist() == [[18.0, 18.0], [18.0, 18.0]]

    def test_errors(self) -> None:
        torch = self.torch
        _, unravel = self.ravel([torch.zeros(3)])
        with pytest.raises(ValueError, match="^Expected a tensor to unravel, got "):
            unravel([0, 0, 0])
        with pytest.raises(ValueError, match="expected a tensor of shape"):
            unravel(torch.zeros(2))
        with pytest.raises(ValueError, match=r"^All leaves must be tensors\."):
            self.ravel([torch.zeros(1), 2])


class TestAttrs:
    @pytest.fixture(autouse=True)
    def load(self) -> None:
        pytest.importorskip("attrs")

    def test_define(self) -> None:
        attrs = optree.integrations.attrs

        @attrs.define(namespace="attrs tests")
        class Local:
            a: Any
            _b: Any = 2
            c: Any = attrs.field(default=3, pytree_node=False)

        tree = Local([1], b={"k": 5}, c="meta")
        leaves, treespec = optree.tree_flatten(tree, namespace="attrs tests")
        assert leaves == [1, 5]
        assert treespec.unflatten(leaves) == tree
        assert type(treespec.accessors()[0][0]) is attrs.AttrsEntry
        assert [a(tree) for a in treespec.accessors()] == [1, 5]
        children, metadata = Local.__optree_attrs_fields__
        assert len(children) == 2
        assert len(metadata) == 1

    def test_frozen_and_mutable(self) -> None:
        attrs = optree.integrations.attrs
        assert attrs.mutable is attrs.define

        @attrs.frozen(namespace="attrs tests")
        class Local:
            a: Any

        tree = optree.tree_map(str, Local(1), namespace="attrs tests")
        assert tree == Local("1")
        import attr.exceptions

        with pytest.raises(attr.exceptions.FrozenInstanceError):
            tree.a = 2

    def test_make_class_and_errors(self) -> None:
        attrs = optree.integrations.attrs
        cls = attrs.make_class("Made", ["x", "y"], namespace="attrs tests")
        assert optree.tree_leaves(cls(1, 2), namespace="attrs tests") == [1, 2]
        with pytest.raises(TypeError, match=r"is not an attrs-decorated class\.$"):
            attrs.register_node(int, namespace="attrs tests")
        with pytest.raises(TypeError, match="namespace"):
            attrs.define(type("A", (), {}))


class TestJax:
    @pytest.fixture(autouse=True)
    def load(self) -> None:
        self.jax = pytest.importorskip("jax")

    def test_round_trip(self) -> None:
        jnp = self.jax.numpy
        tree = {"b": jnp.arange(6.0).reshape(2, 3), "a": [jnp.float32(7)]}
        flat, unravel = optree.integrations.jax.tree_ravel(tree)
        assert flat.tolist() == [7, 0, 1, 2, 3, 4, 5]
        assert unravel(flat)["b"].shape == (2, 3)
        assert isinstance(hash(unravel), int)
