# SPDX-License-Identifier: Apache-2.0
"""Types for annotations, and the predicates on namedtuple and structseq classes."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
import types
import typing
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
from trees import Empty, Layer, Point, Point3, TupleSubclass

import optree

T = typing.TypeVar("T")
FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()
PREDICATES = [
    'is_namedtuple', 'is_namedtuple_class', 'is_namedtuple_instance', 'namedtuple_fields',
    'is_structseq', 'is_structseq_class', 'is_structseq_instance', 'structseq_fields',
]  # fmt: skip


def implementations(name: str) -> list[Any]:
    function = getattr(optree, name)
    return [
        function,
        function.__cxx_implementation__,
        function.__python_implementation__,
        getattr(optree._C, name),
    ]


@pytest.mark.parametrize("name", PREDICATES)
def test_predicates_are_python_functions_with_two_implementations(name: str) -> None:
    function = getattr(optree, name)
    assert type(function) is types.FunctionType
    assert type(function.__cxx_implementation__) is types.BuiltinFunctionType
    assert type(function.__python_implementation__) is types.FunctionType
    assert function is getattr(optree.typing, name)


NAMEDTUPLES = [Point, Point3, Layer, Empty]
STRUCTSEQS = [time.struct_time, os.stat_result, type(sys.version_info), type(sys.flags)]
OTHERS = [tuple, TupleSubclass, list, int, object, type]


def test_namedtuple_predicates() -> None:
    for any_, cls_, instance in zip(
        implementations("is_namedtuple"),
        implementations("is_namedtuple_class"),
        implementations("is_namedtuple_instance"),
    ):
        for cls in NAMEDTUPLES:
            tree = cls(*range(len(cls._fields)))
            assert any_(cls) is any_(tree) is True
            assert (cls_(cls), cls_(tree)) == (True, False)
            assert (instance(cls), instance(tree)) == (False, True)
        for cls in [*OTHERS, *STRUCTSEQS]:
            assert any_(cls) is cls_(cls) is instance(cls) is False
        for other in ((), (1, 2), [1], 1, None, time.gmtime(0), TupleSubclass((1,))):
            assert any_(other) is cls_(other) is instance(other) is False


def test_structseq_predicates() -> None:
    for any_, cls_, instance in zip(
        implementations("is_structseq"),
        implementations("is_structseq_class"),
        implementations("is_structseq_instance"),
    ):
        for cls in STRUCTSEQS:
            assert any_(cls) is cls_(cls) is True
            assert instance(cls) is False
        for tree in (time.gmtime(0), os.stat_result(range(10)), sys.version_info, sys.flags):
            assert any_(tree) is instance(tree) is True
            assert cls_(tree) is False
        for other in [*OTHERS, *NAMEDTUPLES, (), (1,), Point(1, 2), None, 1]:
            assert any_(other) is cls_(other) is instance(other) is False


def test_fields() -> None:
    for fields in implementations("namedtuple_fields"):
        assert fields(Point) == fields(Point(1, 2)) == ("x", "y")
        assert fields(Empty) == ()
        with pytest.raises(TypeError, match='^' + re.escape(
            f'Expected a collections.namedtuple type, got {int!r}.'
        )):  # fmt: skip
            fields(int)
        with pytest.raises(TypeError, match='^' + re.escape(
            'Expected an instance of collections.namedtuple type, got (1, 2).'
        )):  # fmt: skip
            fields((1, 2))
    for fields in implementations("structseq_fields"):
        assert fields(time.struct_time) == fields(time.gmtime(0)) == (
            'tm_year', 'tm_mon', 'tm_mday', 'tm_hour', 'tm_min', 'tm_sec', 'tm_wday', 'tm_yday',
            'tm_isdst',
        )  # fmt: skip
        stat = fields(os.stat_result)
        assert stat[:7] == (
            'st_mode', 'st_ino', 'st_dev', 'st_nlink', 'st_uid', 'st_gid', 'st_size',
        )  # fmt: skip
        assert stat[7:] == ("unnamed field",) * 3
        with pytest.raises(TypeError, match='^' + re.escape(
            f'Expected a PyStructSequence type, got {Point!r}.'
        )):  # fmt: skip
            fields(Point)
        with pytest.raises(TypeError, match='^' + re.escape(
            'Expected an instance of PyStructSequence type, got Point(x=1, y=2).'
        )):  # fmt: skip
            fields(Point(1, 2))


@pytest.mark.parametrize("name", PREDICATES)
def test_predicates_take_one_positional_argument(name: str) -> None:
    for function in implementations(name):
        for arguments, keywords in [((), {}), ((Point, Point), {}), ((), {"obj": Point})]:
            with pytest.raises(TypeError):
                function(*arguments, **keywords)


def test_queries_keep_no_strong_reference() -> None:
    cls = namedtuple("cls", ["x"])
    count = sys.getrefcount(cls)
    for name in PREDICATES[:3] + PREDICATES[4:7]:
        getattr(optree, name)(cls)
        getattr(optree._C, name)(cls)
    optree.tree_leaves(cls(1))
    gc.collect()
    assert sys.getrefcount(cls) <= count + 1  # the callback of a weak reference may hold one
    watched = weakref.ref(cls)
    del cls
    gc.collect()
    # Free-threaded builds before 3.14 never free a class once there are threads.
    assert watched() is None or (FREE_THREADED and sys.version_info < (3, 14))


def test_pytree_annotation() -> None:
    annotation = optree.PyTree[int]
    assert typing.get_origin(annotation) is typing.Union
    arguments = typing.get_args(annotation)
    assert arguments[0] is int
    assert [typing.get_origin(a) for a in arguments[1:5]][:2] == [tuple, list]
    assert optree.PyTree[optree.PyTree[int]] == optree.PyTree[int]
    assert typing.get_args(optree.PyTree[int, "Name"])[0] is int
    assert optree.PyTreeTypeVar("Ints", int) == optree.PyTree[int, "Ints"]
    for bad in ((int, 3), (int, "a", "b"), ()):
        with pytest.raises(
            TypeError,
            match=r"^PyTree\[\.\.\.\] only supports a tuple of 2 items, a parameter and a string of "  # noqa: E501
            r"type name, got ",
        ):
            optree.PyTree[bad]
    with pytest.raises(TypeError, match=r"^Cannot instantiate special typing classes\.$"):
        optree.PyTree()
    with pytest.raises(TypeError, match=r"^Cannot subclass special typing classes\.$"):

        class Sub(optree.PyTree):  # type: ignore[misc]
            pass


def test_custom_node_protocol() -> None:
    class Good:
        def __tree_flatten__(self) -> Any:
            return (), None

        @classmethod
        def __tree_unflatten__(cls, metadata: Any, children: Any) -> Any:
            return cls()

    assert isinstance(Good(), optree.CustomTreeNode)
    assert not isinstance([], optree.CustomTreeNode)


def test_struct_sequence_stand_in() -> None:
    cls = optree.typing.StructSequence
    assert isinstance(time.gmtime(0), cls)
    assert issubclass(time.struct_time, cls)
    assert not isinstance((1,), cls)
    assert not issubclass(Point, cls)
    with pytest.raises(NotImplementedError):
        cls([1])
    with pytest.raises(TypeError, match=r"^type 'StructSequence' is not an acceptable base type$"):

        class Sub(cls):  # type: ignore[misc, valid-type]
            pass


def test_names() -> None:
    for name in optree.typing.__all__:
        assert hasattr(optree.typing, name)
    assert optree.typing.PyTreeDef is optree.PyTreeSpec
    for name in optree.__all__:
        assert hasattr(optree, name), name
    stripped = [n[len("tree_") :] for n in optree.__all__ if n.startswith("tree_")]
    assert [n for n in optree.pytree.__all__ if n in stripped] == stripped


def test_short_module() -> None:
    # The published names are in this order, possibly with other names in between.
    names = optree.pytree.__all__
    assert names[:4] == ["reexport", "PyTreeSpec", "PyTreeKind", "PyTreeEntry"]
    assert names[-4:] == [
        'register_node', 'register_node_class', 'unregister_node', 'dict_insertion_ordered',
    ]  # fmt: skip
    for name in names[4:-4]:
        assert getattr(optree.pytree, name) is getattr(optree, f"tree_{name}")
    assert optree.pytree.register_node is optree.register_pytree_node
    assert optree.pytree.dataclasses is optree.dataclasses
    assert optree.pytree.functools is optree.functools


def test_reexport() -> None:
    import inspect

    module = optree.pytree.reexport(namespace="reexported", module="reexported_pytree")
    try:
        assert sys.modules["reexported_pytree"] is module
        assert isinstance(module, types.ModuleType)
        assert type(module).__name__ == "ReexportedModule"
        parameter = inspect.signature(module.flatten).parameters["namespace"]
        assert parameter.default == "reexported"
        assert module.flatten is module.flatten
        assert module.functools.partial is optree.functools.partial
        assert module.PyTreeSpec is optree.PyTreeSpec

        @module.dataclasses.dataclass
        class Local:
            a: Any

        assert module.leaves(Local(1)) == [1]
        assert len(optree.tree_leaves(Local(1))) == 1
        assert module.leaves(Local(1), namespace="")[0] == Local(1)
        assert module.register_node.get(Local) is not None
        assert "reexport" not in dir(module)
        assert {"dataclasses", "functools", "__version__"} <= set(dir(module))
        with pytest.raises(AttributeError, match="has no attribute 'nope'"):
            module.nope  # noqa: B018
        with pytest.raises(ValueError, match=r"^module 'reexported_pytree' already exists"):
            optree.pytree.reexport(namespace="x", module="reexported_pytree")
    finally:
        for name in [n for n in sys.modules if n.startswith("reexported_pytree")]:
            del sys.modules[name]
    with pytest.raises(TypeError, match="^The namespace must be a string, got "):
        optree.pytree.reexport(namespace=1)
    for bad in ("", "a b", "1a", "a..b"):
        with pytest.raises(ValueError, match="^invalid module name: "):
            optree.pytree.reexport(namespace="x", module=bad)


def test_module_constants() -> None:
    module = optree._C
    assert module.__doc__ == (
        "Optimized PyTree Utilities. (C extension module built from src/optree.cpp)"
    )
    assert issubclass(module.InternalError, SystemError)
    assert module.InternalError.__module__ == "optree._C"
    assert module.Py_TPFLAGS_BASETYPE == 1 << 10
    assert module.PyStructSequence_UnnamedField == "unnamed field"
    for name, value in module.BUILDTIME_METADATA.items():
        assert getattr(module, name) == value
    with pytest.raises(TypeError):
        module.BUILDTIME_METADATA["x"] = 1
    with pytest.raises(TypeError):
        module.CPYTHON_INTERNALS["x"] = True
    for name in ('OPTREE_HAS_FROZENDICT', 'OPTREE_HAS_SUBINTERPRETER_SUPPORT', 'Py_DEBUG',
                 'Py_GIL_DISABLED', 'PYBIND11_HAS_NATIVE_ENUM', 'PYBIND11_HAS_SUBINTERPRETER_SUPPORT',  # noqa: E501
                 'GLIBCXX_USE_CXX11_ABI', 'OPTREE_HAS_READ_WRITE_LOCK'):  # fmt: skip
        assert hasattr(module, name)
    assert bool(module.Py_DEBUG) is hasattr(sys, "gettotalrefcount")
    assert repr(module.PY_VERSION_HEX).startswith("0x")
    assert module.is_current_interpreter_main() is True
    assert module.get_current_interpreter_id() == module.get_main_interpreter_id()
    assert module.get_current_interpreter_id() in module.get_alive_interpreter_ids()
    assert module.get_num_interpreters_alive() >= 1
    assert module.get_num_interpreters_seen() >= module.get_num_interpreters_alive()
    assert optree.tree_flatten is not module.flatten


def test_reexport_refuses_the_global_namespace_and_names_the_argument() -> None:
    with pytest.raises(TypeError, match=r"got <GLOBAL NAMESPACE>.*`namespace`"):
        optree.pytree.reexport(namespace=optree.GLOBAL_NAMESPACE, module="global_pytree")  # type: ignore[arg-type]
    assert not any(name.startswith("global_pytree") for name in sys.modules)


def test_standard_dict_types_are_the_classes_of_dictionaries_that_match_each_other() -> None:
    types = optree.ops.STANDARD_DICT_TYPES
    assert {dict, OrderedDict, defaultdict} <= types
    for one in types:
        for other in types:
            trees = [cls(None, k=i) if cls is defaultdict else cls(k=i)
                     for i, cls in enumerate((one, other))]  # fmt: skip
            assert optree.tree_structure(trees[0]).flatten_up_to(trees[1]) == [1]


def test_unions_with_tree_types_are_not_tree_types() -> None:
    tree, pytree = optree.PyTree[int], optree.PyTree
    named = pytree.__class_getitem__((int, "Named"))
    for union in (
        typing.Union[str, tree],
        typing.Union[tree, str],
        typing.Union[str, named],
        typing.Union[tree, pytree[str]],
        typing.Optional[tree],
    ):
        made = pytree[union]
        assert made != union
        assert str in getattr(made, "__args__", ()) or type(None) in made.__args__
        assert pytree[made] == made  # but a type made from one is
    for same in (tree, named, pytree[typing.Union[int, str]], pytree[T]):
        assert pytree[same] == same
    assert pytree[int, None] == tree
    assert pytree[(int, None)] == tree
    with pytest.raises(TypeError, match="supports a tuple of 2 items"):
        pytree[int, 3]
