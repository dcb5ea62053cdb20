# SPDX-License-Identifier: Apache-2.0
"""Dataclasses as tree nodes."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import inspect
import pickle
import sys
from typing import Any, Callable

import pytest

import optree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL

SPACE = "dataclass tests"


def make(**options: Any) -> Any:
    @optree.dataclasses.dataclass(namespace=SPACE, **options)
    class Local:
        a: Any
        b: Any = optree.dataclasses.field(default=2, pytree_node=False)
        c: Any = 3
        d: Any = optree.dataclasses.field(default=4, init=False, pytree_node=False)

    return Local


def test_children_metadata_and_round_trip() -> None:
    cls = make()
    tree = cls([1], "meta", {"k": 5})
    leaves, treespec = optree.tree_flatten(tree, namespace=SPACE)
    assert leaves == [1, 5]
    assert treespec.entries() == ["a", "c"]
    assert treespec.paths() == [("a", 0), ("c", "k")]
    assert [a.codify("t") for a in treespec.accessors()] == ["t.a[0]", "t.c['k']"]
    assert type(treespec.accessors()[0][0]) is optree.DataclassEntry
    assert "(('b', 'meta'),)" in repr(treespec)
    assert treespec.unflatten(leaves) == tree
    assert optree.tree_leaves(tree)[0] is tree
    assert treespec != optree.tree_structure(cls([1], "other", {"k": 5}), namespace=SPACE)


def test_marker_attribute() -> None:
    children, metadata = make().__optree_dataclass_fields__
    assert list(children) == ["a", "c"]
    assert list(metadata) == ["b"]
    with pytest.raises(TypeError):
        children["x"] = 1


def test_subclasses_are_not_registered() -> None:
    class Sub(make()):  # type: ignore[misc]
        pass

    sub = Sub(1)
    assert optree.tree_leaves(sub, namespace=SPACE)[0] is sub


def test_everything_else_is_the_standard_library() -> None:
    own = {"dataclass", "field", "make_dataclass"}
    for name in dataclasses.__all__:
        assert name in optree.dataclasses.__all__
        same = getattr(optree.dataclasses, name) is getattr(dataclasses, name)
        assert same is (name not in own)
    assert "register_node" in optree.dataclasses.__all__
    assert "DataclassEntry" in optree.dataclasses.__all__


def test_parameters_extend_those_of_the_standard_library() -> None:
    for name, extra, renamed in [
        ("field", ["pytree_node"], {}),
        ("dataclass", ["namespace"], {}),
        ("make_dataclass", ["namespace"], {"namespace": "ns"}),
    ]:
        ours = list(inspect.signature(getattr(optree.dataclasses, name)).parameters)
        theirs = list(inspect.signature(getattr(dataclasses, name)).parameters)
        expected = [renamed.get(parameter, parameter) for parameter in theirs]
        assert ours[-len(extra) :] == extra
        assert [p for p in ours[: -len(extra)] if p in expected] == expected


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="`doc` is supported")
def test_unsupported_flags() -> None:
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'doc'"):
        optree.dataclasses.field(doc="text")


def test_field_errors() -> None:
    with pytest.raises(TypeError, match="^`pytree_node=True` is not allowed for non-init fields"):
        optree.dataclasses.field(init=False, pytree_node=True)
    with pytest.raises(
        TypeError, match=r"^PyTree node field 'x' must be included in `__init__\(\)`"
    ):

        @optree.dataclasses.dataclass(namespace=SPACE)
        class Local:
            x: Any = dataclasses.field(default=1, init=False, metadata={"pytree_node": True})

    with pytest.raises(ValueError, match="cannot specify both default and default_factory"):
        optree.dataclasses.field(default=1, default_factory=list)


def test_namespace_argument() -> None:
    class Plain:
        a: int = 1

    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'namespace'"):
        optree.dataclasses.dataclass(Plain)
    for namespace in (1, None, b"x"):
        with pytest.raises(TypeError, match="^The namespace must be a string, got "):
            optree.dataclasses.dataclass(Plain, namespace=namespace)


@pytest.mark.parametrize("namespace", ["", GLOBAL], ids=["empty", "sentinel"])
def test_the_empty_namespace_is_the_global_one(namespace: Any) -> None:
    @optree.dataclasses.dataclass(namespace=namespace)
    class Everywhere:
        a: Any

    try:
        assert optree.tree_leaves(Everywhere(1)) == [1]
        assert optree.tree_leaves(Everywhere(1), namespace="any") == [1]
    finally:
        optree.unregister_pytree_node(Everywhere, namespace=GLOBAL)


def test_class_errors() -> None:
    with pytest.raises(
        TypeError,
        match=r"^@optree\.dataclasses\.dataclass\(\) can only be used with classes, not ",
    ):
        optree.dataclasses.dataclass(1, namespace=SPACE)
    cls = make()
    with pytest.raises(
        TypeError,
        match=r"^@optree\.dataclasses\.dataclass\(\) cannot be applied to .*Local more than once\.$",  # noqa: E501
    ):
        optree.dataclasses.dataclass(cls, namespace=SPACE)
    with pytest.raises(TypeError, match="more than once with `optree.dataclasses.register_node"):
        optree.dataclasses.register_node(cls, namespace=SPACE)
    with pytest.raises(TypeError, match=r"is not a dataclass\.$"):
        optree.dataclasses.register_node(int, namespace=SPACE)


def test_register_node_forms() -> None:
    for use in (
        lambda cls: optree.dataclasses.register_node(cls, namespace=SPACE),
        lambda cls: optree.dataclasses.register_node(namespace=SPACE)(cls),
        lambda cls: optree.dataclasses.register_node(SPACE)(cls),
    ):

        @dataclasses.dataclass
        class Local:
            a: Any
            b: Any = dataclasses.field(default=1, metadata={"pytree_node": False})

        assert use(Local) is Local
        assert optree.tree_leaves(Local(5, 6), namespace=SPACE) == [5]


def test_init_variables_cannot_round_trip() -> None:
    with pytest.raises(
        TypeError, match=r"^Dataclass '.*' has `InitVar` field\(s\) \['x'\], which "
    ):

        @optree.dataclasses.dataclass(namespace=SPACE)
        class Local:
            x: dataclasses.InitVar[int]


def test_classes_without_init_warn() -> None:
    with pytest.warns(UserWarning, match=r"^Dataclass '.*' was defined with `init=False`\. "):

        @optree.dataclasses.dataclass(init=False, namespace=SPACE)
        class Local:
            x: int = 1


@pytest.mark.parametrize("options", [{"frozen": True}, {"eq": False}, {"order": True}])
def test_flags_reach_the_standard_library(options: dict[str, bool]) -> None:
    cls = make(**options)
    params = cls.__dataclass_params__
    for name, value in options.items():
        assert getattr(params, name) is value
    assert optree.tree_leaves(cls(1), namespace=SPACE) == [1, 3]
    doubled = optree.tree_map(lambda x: 2 * x, cls(1), namespace=SPACE)
    assert (doubled.a, doubled.b, doubled.c) == (2, 2, 6)


@pytest.mark.skipif(sys.version_info < (3, 10), reason="since Python 3.10")
def test_slots_and_keyword_only_fields() -> None:
    @optree.dataclasses.dataclass(slots=True, kw_only=True, namespace=SPACE)
    class Local:
        a: Any
        b: Any = optree.dataclasses.field(default=1, pytree_node=False)

    assert optree.tree_map(str, Local(a=5), namespace=SPACE) == Local(a="5")
    assert not hasattr(Local(a=1), "__dict__")


def test_make_dataclass() -> None:
    cls = optree.dataclasses.make_dataclass(
        'Made', ['x', ('y', int, 5), ('z', int, optree.dataclasses.field(default=1, pytree_node=False))],  # noqa: E501
        ns={'total': lambda self: self.x + self.y}, namespace=SPACE,
    )  # fmt: skip
    assert cls(1).total() == 6
    assert optree.tree_leaves(cls(1, 2), namespace=SPACE) == [1, 2]
    assert cls.__name__ == "Made"
    with pytest.raises(TypeError, match="'ns'"):
        optree.dataclasses.make_dataclass("Made", ["x"], namespace={"a": 1})


def test_a_failing_registration_leaves_nothing() -> None:
    class Meta(type):
        def __setattr__(cls, name: str, value: Any) -> None:
            if name == "__optree_dataclass_fields__":
                raise LookupError(name)
            super().__setattr__(name, value)

    @dataclasses.dataclass
    class Stubborn(metaclass=Meta):
        a: int = 1

    size = optree._C.get_registry_size()
    with pytest.raises(LookupError):
        optree.dataclasses.register_node(Stubborn, namespace=SPACE)
    assert optree._C.get_registry_size() == size
    tree = Stubborn()
    assert optree.tree_leaves(tree, namespace=SPACE)[0] is tree


# ---- the extension module gives the same results as the registered functions

NO_CHILD = {"pytree_node": False}


def plain() -> Any:
    @dataclasses.dataclass
    class Plain:
        a: Any
        note: Any = dataclasses.field(default="note", metadata=NO_CHILD)
        b: Any = dataclasses.field(default_factory=list)

    return Plain, True


def frozen() -> Any:
    @dataclasses.dataclass(frozen=True, order=True)
    class Frozen:
        note: Any = dataclasses.field(metadata=NO_CHILD)
        a: Any
        b: Any = 3

    return Frozen, True


def slots_and_keywords() -> Any:
    if sys.version_info < (3, 10):
        pytest.skip("since Python 3.10")

    @dataclasses.dataclass(slots=True)
    class Slotted:
        a: Any
        note: Any = dataclasses.field(kw_only=True, metadata=NO_CHILD)
        b: Any = 2

    return Slotted, True


def frozen_slots() -> Any:
    if sys.version_info < (3, 10):
        pytest.skip("since Python 3.10")

    @dataclasses.dataclass(slots=True, frozen=True)
    class FrozenSlotted:
        a: Any
        note: Any = dataclasses.field(default="x", metadata=NO_CHILD)
        b: Any = 2

    return FrozenSlotted, True


def inherited() -> Any:
    class Sub(plain()[0]):  # type: ignore[misc]
        pass

    return Sub, True


def property_field() -> Any:
    @dataclasses.dataclass
    class Checked:
        a: Any
        b: Any
        note: Any = dataclasses.field(default="n", metadata=NO_CHILD)

    def setter(self: Any, value: Any) -> None:
        self.__dict__["log"] = [*self.__dict__.get("log", []), value]
        self.__dict__["a"] = value

    Checked.a = property(lambda self: self.__dict__["a"], setter)  # type: ignore[assignment]
    return Checked, True


def post_init() -> Any:
    @dataclasses.dataclass
    class Post:
        a: Any
        b: Any
        note: Any = dataclasses.field(default="n", metadata=NO_CHILD)

        def __post_init__(self) -> None:
            self.sum = (self.a, self.b)

    return Post, False


def init_false() -> Any:
    @dataclasses.dataclass
    class Partial:
        a: Any
        b: Any
        note: Any = dataclasses.field(default="n", metadata=NO_CHILD)
        made: Any = dataclasses.field(default_factory=list, init=False, metadata=NO_CHILD)

    return Partial, False


def own_init() -> Any:
    @dataclasses.dataclass(init=False)
    class Own:
        a: Any
        b: Any
        note: Any = dataclasses.field(default="n", metadata=NO_CHILD)

        def __init__(self, *, b: Any, a: Any, **others: Any) -> None:
            self.others = others
            self.note, self.a, self.b = others["note"], (a, 1), b

    return Own, False


def own_setattr() -> Any:
    @dataclasses.dataclass
    class Setting:
        a: Any
        b: Any
        note: Any = dataclasses.field(default="n", metadata=NO_CHILD)

        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, (name, value))

    return Setting, False


def own_new() -> Any:
    @dataclasses.dataclass
    class New:
        a: Any
        b: Any
        note: Any = dataclasses.field(default="n", metadata=NO_CHILD)

        def __new__(cls, **kwargs: Any) -> Any:
            made = object.__new__(cls)
            made.seen = list(kwargs)
            return made

    return New, False


def own_call() -> Any:
    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().__call__(*args, **kwargs)
            made.called = list(kwargs)
            return made

    @dataclasses.dataclass
    class Called(metaclass=Meta):
        a: Any
        b: Any
        note: Any = dataclasses.field(default="n", metadata=NO_CHILD)

    return Called, False


KINDS: list[Callable[[], Any]] = [
    *(plain, frozen, slots_and_keywords, frozen_slots, inherited, property_field),
    *(post_init, init_false, own_init, own_setattr, own_new, own_call),
]


def state(obj: Any) -> Any:
    """The attributes of an instance, in order."""
    if hasattr(obj, "__dict__"):
        return list(vars(obj).items())
    return [(f.name, getattr(obj, f.name)) for f in dataclasses.fields(obj)]


def registered(cls: Any) -> Any:
    made = cls.__dataclass_params__.init
    with contextlib.nullcontext() if made else pytest.warns(UserWarning, match="init=False"):
        optree.dataclasses.register_node(cls, namespace=SPACE)
    return optree.register_pytree_node.get(cls, namespace=SPACE)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_native_nodes_do_what_the_functions_do(kind: Any) -> None:
    cls, is_plain = kind()
    entry = registered(cls)
    tree = cls(a=[1, 2], b=(3,), note="meta")
    children, metadata, entries = entry.flatten_func(tree)
    assert optree.tree_flatten_one_level(tree, namespace=SPACE)[:3] == (
        list(children),
        metadata,
        entries,
    )
    treespec = optree.tree_structure(tree, namespace=SPACE, is_leaf=lambda x: x is not tree)
    assert treespec.entries() == list(entries)
    assert optree.tree_leaves(tree, namespace=SPACE, is_leaf=lambda x: x is not tree) == [*children]
    new = treespec.unflatten(["x", "y"])
    expected = entry.unflatten_func(metadata, ("x", "y"))
    assert type(new) is cls
    assert state(new) == state(expected)
    assert optree.dataclasses._init_only_sets_fields(cls) is is_plain


def test_changes_of_the_class_are_noticed() -> None:
    cls, _ = plain()
    entry = registered(cls)
    tree = cls(1, "m", 2)
    leaves, treespec = optree.tree_flatten(tree, namespace=SPACE)

    def check() -> Any:
        new = treespec.unflatten(leaves)
        expected = entry.unflatten_func((("note", "m"),), (1, 2))
        assert state(new) == state(expected)
        return new

    check()
    generated = cls.__init__

    def tripled(self: Any, a: Any, note: Any, b: Any) -> None:
        generated(self, 3 * a, note, 3 * b)

    cls.__init__ = tripled
    assert check().a == 3
    cls.__init__ = generated
    assert check().a == 1
    cls.__setattr__ = lambda self, name, value: object.__setattr__(self, name, -len(name))
    assert check().a == -1
    del cls.__setattr__
    assert check().a == 1
    cls.__new__ = lambda cls, **kwargs: object.__new__(cls)
    check()
    cls.b = property(lambda self: 7, lambda self, value: None)
    assert check().b == 7
    assert optree.tree_leaves(tree, namespace=SPACE) == [1, 7]


def test_errors_are_those_of_the_functions() -> None:
    cls, _ = plain()
    entry = registered(cls)
    tree = cls(1)
    del tree.b
    with pytest.raises(AttributeError) as theirs:
        entry.flatten_func(tree)
    with pytest.raises(AttributeError) as ours:
        optree.tree_leaves(tree, namespace=SPACE)
    assert str(ours.value) == str(theirs.value)

    def refuse(self: Any, value: Any) -> None:
        raise LookupError(value)

    treespec = optree.tree_structure(cls(1, b=2), namespace=SPACE)
    cls.a = property(lambda self: 1, refuse)
    with pytest.raises(LookupError, match="^5$"):
        treespec.unflatten([5, 6])


@pytest.mark.skipif(sys.version_info < (3, 10), reason="since Python 3.10")
def test_abstract_classes_have_no_instances() -> None:
    class Base(abc.ABC):
        @abc.abstractmethod
        def method(self) -> None: ...

    @optree.dataclasses.dataclass(namespace=SPACE)
    class Concrete(Base):
        a: Any

        def method(self) -> None: ...

    treespec = optree.tree_structure(Concrete(1), namespace=SPACE)
    assert treespec.unflatten([1]) == Concrete(1)
    del Concrete.method
    abc.update_abstractmethods(Concrete)
    with pytest.raises(TypeError, match="abstract"):
        treespec.unflatten([1])


def test_attributes_are_checked() -> None:
    def take(obj: Any) -> Any:
        raise AssertionError

    for attributes, error in [
        ([], TypeError),
        ((("a",), (), ("a",), (0,)), TypeError),
        ((["a"], (), ("a",), (0,), None, None), TypeError),
        (((1,), (), ("a",), (0,), None, None), TypeError),
        ((("a",), (), (), (0,), None, None), ValueError),
        ((("a",), (), ("a",), (1,), None, None), IndexError),
        ((("a",), (), ("a",), ("x",), None, None), TypeError),
    ]:
        with pytest.raises(error):
            optree._C.register_node(
                type("Local", (), {}), take, take, optree.AutoEntry, SPACE, attributes
            )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("default", [False, True])
def test_a_field_that_init_does_not_have_may_stand_anywhere(frozen: bool, default: bool) -> None:
    options = {"default_factory": list} if default else {}

    @optree.dataclasses.dataclass(namespace=SPACE, frozen=frozen)
    class Local:
        cache: Any = optree.dataclasses.field(init=False, pytree_node=False, **options)
        x: Any
        y: Any

    leaves, treespec = optree.tree_flatten(Local(1, 2), namespace=SPACE)
    assert leaves == [1, 2]
    made = treespec.unflatten([3, 4])
    assert (made.x, made.y) == (3, 4)
    assert vars(made) == vars(Local(3, 4))
    assert ("cache" in vars(made)) == default


def test_classes_made_through_a_copy_of_the_module_can_be_pickled() -> None:
    pytest.importorskip("attrs")
    module = optree.pytree.reexport(namespace="pickled", module="pickled_pytree")
    try:
        made = {
            "Direct": optree.dataclasses.make_dataclass("Direct", ["x"], namespace="pickled"),
            "Reexported": module.dataclasses.make_dataclass("Reexported", ["x"]),
            "ByAttrs": optree.integrations.attrs.make_class("ByAttrs", ["x"], namespace="pickled"),
        }
        globals().update(made)
        for name, cls in made.items():
            assert cls.__module__ == __name__
            copy = pickle.loads(pickle.dumps(cls(1)))
            assert copy == cls(1)
            assert optree.tree_leaves(copy, namespace="pickled") == [1]
            del globals()[name]
            optree.unregister_pytree_node(cls, namespace="pickled")
        named = optree.dataclasses.make_dataclass(
            "Named", ["x"], ns={"__module__": "elsewhere"}, namespace="pickled"
        )
        # This is how the standard library sets it.
        assert named.__module__ == (__name__ if sys.version_info >= (3, 12) else "elsewhere")
    finally:
        for name in [n for n in sys.modules if n.startswith("pickled_pytree")]:
            del sys.modules[name]


def test_fields_may_share_one_metadata_dict() -> None:
    shared = {"unit": "m"}

    @optree.dataclasses.dataclass(namespace=SPACE)
    class Shared:
        a: Any = optree.dataclasses.field(metadata=shared)
        b: Any = optree.dataclasses.field(metadata=shared, pytree_node=False)
        c: Any = optree.dataclasses.field(metadata=shared)

    assert shared == {"unit": "m"}
    leaves, treespec = optree.tree_flatten(Shared(1, 2, 3), namespace=SPACE)
    assert leaves == [1, 3]
    assert optree.tree_unflatten(treespec, [4, 5]) == Shared(4, 2, 5)
    nodes = [f.metadata["pytree_node"] for f in dataclasses.fields(Shared)]
    assert nodes == [True, False, True]
