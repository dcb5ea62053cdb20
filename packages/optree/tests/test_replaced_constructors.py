# SPDX-License-Identifier: Apache-2.0
"""Objects are built without calling their class only while a call would give the same object.

Each test rebuilds once to fill the caches, then replaces a part of the class and compares the
rebuilt object with one that the class makes.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

import optree
from optree.accessors import PyTreeAccessor, PyTreeEntry

SPACE = "replaced constructors"


@pytest.fixture
def dataclass_(request: pytest.FixtureRequest) -> Iterator[Any]:
    frozen = getattr(request, "param", False)

    @optree.dataclasses.dataclass(namespace=SPACE, frozen=frozen)
    class Fields:
        x: Any
        y: Any
        z: Any = 2

    yield Fields
    optree.unregister_pytree_node(Fields, namespace=SPACE)


def check_rebuilt(cls: Any, arity: int) -> None:
    """Compare rebuilt objects with those the class makes, with empty and with filled caches."""
    tree = cls(*range(arity))
    treespec = optree.tree_structure(tree, namespace=SPACE)
    for _ in range(2):
        made = treespec.unflatten(list(range(10, 10 + treespec.num_leaves)))
        expected = cls(*range(10, 10 + treespec.num_leaves))
        assert type(made) is type(expected)
        assert vars_of(made) == vars_of(expected)


def vars_of(obj: Any) -> Any:
    return tuple(obj) if isinstance(obj, tuple) else vars(obj)


def patched_init(self: Any, x: Any, y: Any = 0, z: Any = 0) -> None:
    self.__dict__.update(x=("patched", x), y=y, z=z)


DATACLASS_CHANGES: dict[str, Callable[[Any], None]] = {
    "code": lambda cls: setattr(cls.__init__, "__code__", patched_init.__code__),
    "init": lambda cls: setattr(cls, "__init__", patched_init),
    "new": lambda cls: setattr(cls, "__new__", lambda cls, *a, **k: object.__new__(Other)),
    "setattr": lambda cls: setattr(
        cls, "__setattr__", lambda self, name, value: self.__dict__.update({name: [value]})
    ),
    "property": lambda cls: setattr(
        cls, "x", property(lambda self: 0, lambda self, value: self.__dict__.update(x=(value,)))
    ),
}


class Other:
    """The type of object that a patched ``__new__`` returns."""


@pytest.mark.parametrize("change", DATACLASS_CHANGES.values(), ids=DATACLASS_CHANGES)
@pytest.mark.parametrize("warm", [False, True])
def test_dataclasses_follow_what_is_replaced(
    dataclass_: Any, change: Callable[[Any], None], warm: bool
) -> None:
    tree = dataclass_(1, 2, 3)
    treespec = optree.tree_structure(tree, namespace=SPACE)
    if warm:
        check_rebuilt(dataclass_, 3)
        treespec.unflatten([0, 0, 0])
    change(dataclass_)
    for _ in range(2):
        made, expected = treespec.unflatten([4, 5, 6]), dataclass_(x=4, y=5, z=6)
        assert type(made) is type(expected)
        assert vars(made) == vars(expected)


@pytest.mark.parametrize("dataclass_", [True], indirect=True)
def test_frozen_dataclasses_follow_what_their_constructor_closes_over(dataclass_: Any) -> None:
    check_rebuilt(dataclass_, 3)
    init = dataclass_.__init__

    class Loud:
        @staticmethod
        def __setattr__(obj: Any, name: str, value: Any) -> None:  # noqa: PLE0302 # called as such
            object.__setattr__(obj, name, ("closed over", value))

    (cell,) = [cell for cell in init.__closure__ or () if cell.cell_contents is object] or [None]
    if cell is None:
        pytest.skip("the constructor of this Python version closes over other names")
    cell.cell_contents = Loud
    try:
        tree = dataclass_(1, 2, 3)
        assert optree.tree_map(lambda x: x, tree, namespace=SPACE).x == ("closed over", tree.x)
    finally:
        cell.cell_contents = object


@pytest.mark.parametrize("frozen", [False, True])
def test_the_placeholder_of_a_default_factory_is_replaced_as_in_a_call(frozen: bool) -> None:
    @optree.dataclasses.dataclass(namespace=SPACE, frozen=frozen)
    class Fields:
        x: Any
        y: Any = dataclasses.field(default_factory=lambda: "made")
        z: Any = optree.dataclasses.field(default_factory=list, pytree_node=False)

    placeholder = dataclasses._HAS_DEFAULT_FACTORY  # type: ignore[attr-defined]
    for metadata in (3, placeholder):
        treespec = optree.tree_structure(Fields(1, 2, 3), namespace=SPACE)
        for leaves in ([4, 5], [placeholder, placeholder], [4, placeholder]):
            assert vars(treespec.unflatten(leaves)) == vars(Fields(*leaves, 3))
        tree = Fields(1, 2)
        object.__setattr__(tree, "z", metadata)
        made = optree.tree_map(lambda x: x, tree, namespace=SPACE)
        assert made.z == ([] if metadata is placeholder else 3)
    optree.unregister_pytree_node(Fields, namespace=SPACE)


class Typed(NamedTuple):
    x: Any
    y: Any = 0


def named(name: str = "Named") -> Any:
    return collections.namedtuple(name, "x y")


def swapped_new(_cls: Any, x: Any, y: Any) -> Any:
    return _tuple_new(_cls, (y, x))  # type: ignore[name-defined] # noqa: F821


def marked_new(_cls: Any, x: Any, y: Any) -> Any:
    return _tuple_new(_cls, (("patched", x), y))  # type: ignore[name-defined] # noqa: F821


def mark_items(cls: Any, items: Any) -> Any:
    return tuple.__new__(cls, [("marked", item) for item in items])


kept: list[Any] = []


def replace_function(cls: Any, function: Callable[..., Any]) -> None:
    """Replace the function inside the `staticmethod` itself, while the old function stays alive."""
    kept.append(cls.__new__)
    vars(cls)["__new__"].__init__(function)


NAMEDTUPLE_CHANGES: dict[str, Callable[[Any], None]] = {
    "code": lambda cls: setattr(cls.__new__, "__code__", marked_new.__code__),
    "code_of_equal_names": lambda cls: setattr(cls.__new__, "__code__", swapped_new.__code__),
    "globals": lambda cls: cls.__new__.__globals__.update(_tuple_new=mark_items),
    "new": lambda cls: setattr(cls, "__new__", lambda cls, x, y: tuple.__new__(cls, (y, x))),
    "init": lambda cls: setattr(cls, "__init__", lambda self, x, y: seen.append((x, y))),
    "staticmethod": lambda cls: replace_function(cls, lambda cls, x, y: tuple.__new__(cls, (y, x))),
}
seen: list[Any] = []


@pytest.mark.parametrize("change", NAMEDTUPLE_CHANGES.values(), ids=NAMEDTUPLE_CHANGES)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("subclass", [False, True])
def test_namedtuples_follow_what_is_replaced(
    change: Callable[[Any], None], warm: bool, subclass: bool
) -> None:
    base = named()
    cls = type("Sub", (base,), {}) if subclass else base
    treespec = optree.tree_structure(cls(1, 2))
    if warm:
        assert treespec.unflatten([3, 4]) == cls(3, 4)
    change(base)
    for _ in range(2):
        seen.clear()
        made = treespec.unflatten([3, 4])
        calls = list(seen)
        seen.clear()
        expected = cls(3, 4)
        assert type(made) is cls
        assert tuple(made) == tuple(expected)
        assert calls == seen


def test_namedtuples_follow_what_is_replaced_between_two_of_them() -> None:
    cls = named()
    plain, swapped = cls.__new__.__code__, swapped_new.__code__

    def set_code(code: Any) -> None:
        cls.__new__.__code__ = code

    class Changing:
        """A class that replaces its constructor when an instance is rebuilt."""

    optree.register_pytree_node(
        Changing,
        lambda _: ((), None),
        lambda _, __: set_code(swapped) or Changing(),
        namespace=SPACE,
    )
    twice = [cls(1, 2), cls(1, 2)]
    tree = [*twice, Changing(), *twice, {"a": cls(1, 2)}]
    treespec = optree.tree_structure(tree, namespace=SPACE)
    for leaves in (list(range(10)), iter(range(10))):
        set_code(plain)
        made = treespec.unflatten(leaves)
        assert [tuple(x) for x in made[:2]] == [(0, 1), (2, 3)]
        assert [tuple(x) for x in (*made[3:5], made[5]["a"])] == [(5, 4), (7, 6), (9, 8)]
    optree.unregister_pytree_node(Changing, namespace=SPACE)

    def changing_leaves() -> Iterator[int]:
        set_code(plain)
        yield from range(5)
        set_code(swapped)
        yield from range(5, 8)

    made = optree.tree_unflatten(optree.tree_structure([*twice, *twice]), changing_leaves())
    assert [tuple(x) for x in made] == [(0, 1), (2, 3), (5, 4), (7, 6)]


def test_what_was_replaced_may_be_put_back() -> None:
    cls = named()
    treespec = optree.tree_structure(cls(1, 2))
    code, tuple_new = cls.__new__.__code__, cls.__new__.__globals__["_tuple_new"]
    for _ in range(3):
        assert tuple(treespec.unflatten([3, 4])) == (3, 4)
        cls.__new__.__code__ = swapped_new.__code__
        assert tuple(treespec.unflatten([3, 4])) == (4, 3)
        cls.__new__.__code__ = code
        del cls.__new__.__globals__["_tuple_new"]
        with pytest.raises(NameError):
            treespec.unflatten([3, 4])
        cls.__new__.__globals__["_tuple_new"] = tuple_new


@pytest.mark.parametrize("fields", ["", "x", "x y", " ".join(f"f{i}" for i in range(300))])
def test_namedtuples_of_any_size_are_rebuilt(fields: str) -> None:
    cls = collections.namedtuple("Any", fields)
    values = list(range(len(cls._fields)))
    for _ in range(2):
        made = optree.tree_map(lambda x: x + 1, cls(*values))
        assert type(made) is cls
        assert list(made) == [value + 1 for value in values]


def test_attribute_access_through_a_metaclass_is_respected() -> None:
    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            if name == "__new__" and armed:
                return lambda cls, *items: tuple.__new__(cls, items[::-1])
            return super().__getattribute__(name)

    armed = False
    cls = Meta("Sub", (named(),), {})
    treespec = optree.tree_structure(cls(1, 2))
    treespec.unflatten([3, 4])
    armed = True
    assert tuple(treespec.unflatten([3, 4])) == tuple(cls(3, 4)) == (4, 3)


TREE = [1, {"a": 2}, Typed(3, 4)]


@pytest.fixture
def entry_functions() -> Iterator[None]:
    kept = [
        (PyTreeEntry, name, PyTreeEntry.__dict__[name]) for name in ("__init__", "__post_init__")
    ]
    codes: list[Any] = [(PyTreeEntry.__init__, PyTreeEntry.__init__.__code__)]
    accessor_new = PyTreeAccessor.__dict__["__new__"]
    yield
    for cls, name, function in kept:
        setattr(cls, name, function)
    for function, code in codes:
        function.__code__ = code
    PyTreeAccessor.__new__ = accessor_new
    assert len(optree.tree_accessors(TREE)) == 4


def loud_init() -> Any:
    setter = object.__setattr__  # closed over, because the generated function has a closure as well

    def init(self: Any, entry: Any, type: Any, kind: Any) -> None:
        setter  # noqa: B018
        object.__setattr__(self, "entry", ("patched", entry))
        object.__setattr__(self, "type", type)
        object.__setattr__(self, "kind", kind)

    return init


@pytest.mark.usefixtures("entry_functions")
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", ["__init__", "__post_init__", "code"])
def test_path_entries_are_made_by_a_replaced_constructor(name: str, warm: bool) -> None:
    if warm:
        optree.tree_accessors(TREE)
    calls: list[Any] = []
    init = PyTreeEntry.__init__
    if name == "code":
        if len(init.__closure__ or ()) != 1:
            pytest.skip("the constructor of this Python version closes over other names")
        init.__code__ = loud_init().__code__
    else:
        old = getattr(PyTreeEntry, name)
        setattr(PyTreeEntry, name, lambda self, *args: (calls.append(args), old(self, *args))[1])
    accessors = optree.tree_accessors(TREE)
    assert [len(accessor) for accessor in accessors] == [1, 2, 2, 2]
    edges = {id(entry): entry for accessor in accessors for entry in accessor}
    if name == "code":
        assert all(entry.entry[0] == "patched" for entry in edges.values())
    else:
        assert len(calls) == len(edges) == 6


@pytest.mark.usefixtures("entry_functions")
def test_accessors_are_made_by_a_replaced_constructor() -> None:
    optree.tree_accessors(TREE)
    calls: list[Any] = []
    old = PyTreeAccessor.__new__

    def new(cls: Any, path: Any = ()) -> Any:
        calls.append(path)
        return old(cls, path)

    PyTreeAccessor.__new__ = new  # type: ignore[method-assign,assignment]
    assert len(optree.tree_accessors(TREE)) == 4
    assert len(calls) == 4
