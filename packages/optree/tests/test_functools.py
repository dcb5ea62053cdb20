# SPDX-License-Identifier: Apache-2.0
"""Partial functions as trees, and reduce."""

from __future__ import annotations

import functools
import pickle
import sys
from typing import Any

import pytest

import optree

partial = optree.functools.partial


def collect(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return args, kwargs


def test_partial_is_a_tree_of_its_arguments() -> None:
    function = partial(collect, 1, [2, None], key={"k": 3})
    leaves, treespec = optree.tree_flatten(function)
    assert leaves == [1, 2, 3]
    assert treespec.paths() == [("args", 0), ("args", 1, 0), ("keywords", "key", "k")]
    codes = [a.codify("f") for a in treespec.accessors()]
    assert codes == ["f.args[0]", "f.args[1][0]", "f.keywords['key']['k']"]
    assert treespec.type is partial
    assert treespec.entries() == ["args", "keywords"]
    doubled = optree.tree_map(lambda x: 2 * x, function)
    assert type(doubled) is partial
    assert doubled(0) == ((2, [4, None], 0), {"key": {"k": 6}})


def test_partial_is_a_partial() -> None:
    function = partial(collect, 1, a=2)
    assert isinstance(function, functools.partial)
    assert function(3, b=4) == ((1, 3), {"a": 2, "b": 4})
    assert (function.func, function.args, function.keywords) == (collect, (1,), {"a": 2})
    assert repr(function) == f"optree.functools.partial({collect!r}, 1, a=2)"
    assert pickle.loads(pickle.dumps(function))(3) == ((1, 3), {"a": 2})
    with pytest.raises(TypeError):
        partial(3)
    with pytest.raises(TypeError):
        partial()


def test_structure_compares_the_function() -> None:
    structure = optree.tree_structure
    assert structure(partial(max, 1)) == structure(partial(max, 2))
    assert structure(partial(max, 1)) != structure(partial(min, 1))
    assert hash(structure(partial(max, 1))) == hash(structure(partial(max, 2)))


def test_nested_partials_stay_nested() -> None:
    inner = partial(collect, 1, a=2)
    outer = partial(inner, 3, b=4)
    assert outer(5) == ((1, 3, 5), {"a": 2, "b": 4})
    assert optree.tree_leaves(outer) == [3, 4]
    assert outer.args == (3,)
    assert optree.tree_map(str, outer)() == ((1, "3"), {"a": 2, "b": "4"})
    standard = functools.partial(collect, 1)
    assert partial(standard, 2)() == ((1, 2), {})
    assert isinstance(hash(optree.tree_structure(outer)), int)


def test_reduce() -> None:
    assert optree.functools.reduce is optree.tree_reduce
    assert "partial" in optree.functools.__all__
    assert "reduce" in optree.functools.__all__


@pytest.mark.skipif(sys.version_info < (3, 14), reason="since Python 3.14")
def test_placeholder_is_a_leaf() -> None:
    placeholder = optree.functools.Placeholder
    assert optree.tree_leaves([placeholder])[0] is placeholder
    assert partial(collect, placeholder, 2)(1) == ((1, 2), {})


def test_a_partial_that_contains_itself_has_a_repr() -> None:
    for cls in (functools.partial, optree.functools.partial):
        recursive: Any = cls(print)
        recursive.__setstate__((print, (recursive, [recursive]), {"key": recursive}, {}))
        text = repr(recursive)
        assert text.endswith("partial(<built-in function print>, ..., [...], key=...)")
        recursive.__setstate__((print, (), {}, {}))
