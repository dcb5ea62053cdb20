# SPDX-License-Identifier: Apache-2.0
"""Types of trees, and predicates for named tuples and struct sequences."""

from __future__ import annotations

import functools
import sys
import types
from builtins import dict as Dict  # noqa: N812
from builtins import list as List  # noqa: N812
from builtins import tuple as Tuple  # noqa: N812
from collections import OrderedDict
from collections import defaultdict as DefaultDict  # noqa: N812
from collections import deque as Deque  # noqa: N812
from collections.abc import Hashable, Iterable, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    ForwardRef,
    Generic,
    Optional,
    Protocol,
    TypeVar,
    Union,
    runtime_checkable,
)

from typing_extensions import NamedTuple, Never, ParamSpec, Self, TypeAliasType, final

import optree._C as _C
from optree._C import (
    Py_TPFLAGS_BASETYPE,
    PyStructSequence_UnnamedField,
    PyTreeKind,
    PyTreeSpec,
)
from optree.accessors import (
    AutoEntry,
    DataclassEntry,
    FlattenedEntry,
    GetAttrEntry,
    GetItemEntry,
    MappingEntry,
    NamedTupleEntry,
    PyTreeAccessor,
    PyTreeEntry,
    SequenceEntry,
    StructSequenceEntry,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from typing_extensions import TypeAlias


__all__ = [  # noqa: RUF022 # grouped
    "PyTreeSpec",
    "PyTreeDef",
    "PyTreeKind",
    "PyTree",
    "PyTreeTypeVar",
    "CustomTreeNode",
    "Children",
    "MetaData",
    "FlattenFunc",
    "UnflattenFunc",
    "PyTreeEntry",
    "GetItemEntry",
    "GetAttrEntry",
    "FlattenedEntry",
    "AutoEntry",
    "SequenceEntry",
    "MappingEntry",
    "NamedTupleEntry",
    "StructSequenceEntry",
    "DataclassEntry",
    "PyTreeAccessor",
    "is_namedtuple",
    "is_namedtuple_class",
    "is_namedtuple_instance",
    "namedtuple_fields",
    "is_structseq",
    "is_structseq_class",
    "is_structseq_instance",
    "structseq_fields",
    "T",
    "S",
    "U",
    "KT",
    "VT",
    "P",
    "F",
    "Iterable",
    "Sequence",
    "Tuple",
    "List",
    "Dict",
    "NamedTuple",
    "OrderedDict",
    "DefaultDict",
    "Deque",
    "StructSequence",
]

PyTreeDef = PyTreeSpec  # the name that JAX uses

if _C.OPTREE_HAS_FROZENDICT:
    from builtins import frozendict as FrozenDict  # type: ignore[attr-defined,unused-ignore] # noqa: N812

    __all__.insert(__all__.index("Dict") + 1, "FrozenDict")


T = TypeVar("T")
S = TypeVar("S")
U = TypeVar("U")
KT = TypeVar("KT")
VT = TypeVar("VT")
P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])
_T_co = TypeVar("_T_co", covariant=True)
_T_contra = TypeVar("_T_contra", contravariant=True)


Children: TypeAlias = Iterable[T]
MetaData: TypeAlias = Optional[Hashable]


@runtime_checkable
class CustomTreeNode(Protocol[_T_co]):
    """The methods of a class that :func:`optree.register_pytree_node_class` registers.

    Examples:
        >>> class Pair:
        ...     def __init__(self, first, second):
        ...         self.first, self.second = first, second
        ...     def __tree_flatten__(self):
        ...         return (self.first, self.second), None, ('first', 'second')
        ...     @classmethod
        ...     def __tree_unflatten__(cls, metadata, children):
        ...         return cls(*children)
        >>> isinstance(Pair(1, 2), CustomTreeNode)
        True
    """

    def __tree_flatten__(
        self,
        /,
    ) -> (
        # `(children, metadata)` or `(children, metadata, entries)`
        tuple[Children[_T_co], MetaData] | tuple[Children[_T_co], MetaData, Iterable[Any] | None]
    ):
        """Return the children, the metadata, and optionally the path entry of each child."""

    @classmethod
    def __tree_unflatten__(cls, metadata: Any, children: Any, /) -> Self:
        """Rebuild an instance from the metadata and the children."""


class FlattenFunc(Protocol[_T_co]):  # pylint: disable=too-few-public-methods
    """A function that takes a custom node apart."""

    def __call__(
        self,
        container: Any,
        /,
    ) -> tuple[Children[_T_co], MetaData] | tuple[Children[_T_co], MetaData, Iterable[Any] | None]:
        """Return the children, the metadata, and optionally the path entry of each child."""


class UnflattenFunc(Protocol[_T_contra]):  # pylint: disable=too-few-public-methods
    """A function that rebuilds a custom node."""

    def __call__(self, metadata: Any, children: tuple[_T_contra, ...], /) -> Any:
        """Return the node made of the metadata and the children."""


_CONTAINER_TYPES: tuple[Callable[[ForwardRef], Any], ...] = (
    lambda tree: tuple[tree, ...],  # type: ignore[valid-type]
    lambda tree: list[tree],  # type: ignore[valid-type]
    lambda tree: dict[Any, tree],  # type: ignore[valid-type]
    *(
        (lambda tree: FrozenDict[Any, tree],)  # type: ignore[valid-type,unused-ignore]
        if _C.OPTREE_HAS_FROZENDICT
        else ()
    ),
    lambda tree: Deque[tree],  # type: ignore[valid-type]
    lambda tree: CustomTreeNode[tree],  # type: ignore[valid-type]
)


def _containers_of(tree: ForwardRef, /) -> tuple[Any, ...]:
    return tuple(container_of(tree) for container_of in _CONTAINER_TYPES)


# For each name given as the second parameter of `PyTree[...]`: the names of the leaf types.
_NAMED_TREES: dict[str, set[tuple[str, ...]]] = {}


def _is_tree_type(param: object, /) -> bool:
    """Return whether ``param`` was made by ``PyTree[...]``."""
    # Neither a cache nor an attribute works, because unions are neither unique nor writable on
    # Python 3.14. Look at the members instead: the last ones are containers that refer to the union
    # by name, and the others are the leaf types.
    members: tuple[Any, ...] = getattr(param, "__args__", ())
    leaf_types, containers = members[: -len(_CONTAINER_TYPES)], members[-len(_CONTAINER_TYPES) :]
    if not leaf_types:
        return False
    (tree,) = getattr(containers[-1], "__args__", None) or (None,)
    if not isinstance(tree, ForwardRef) or containers != _containers_of(tree):
        return False
    name = tree.__forward_arg__
    return name == _default_name(Union[leaf_types]) or (
        tuple(map(_name_of_type, leaf_types)) in _NAMED_TREES.get(name, ())
    )


def _default_name(param: object, /) -> str:
    return f"PyTree[{_name_of_type(param)}]"


def _name_of_type(param: object, /) -> str:
    if isinstance(param, TypeVar):
        return param.__name__
    if type(param) is not types.GenericAlias and isinstance(param, type):
        if param.__module__ == "builtins":
            return param.__qualname__
        return f"{param.__module__}.{param.__qualname__}"
    return repr(param)


if TYPE_CHECKING:

    class _SequenceNode(Protocol[_T_co]):
        """Lists, tuples and deques, but not strings (by `__contains__`) or arrays (by `index`)."""

        def __contains__(self, item: object, /) -> bool: ...
        def __getitem__(self, index: int, /) -> _T_co: ...
        def __iter__(self) -> Iterator[_T_co]: ...
        def __len__(self) -> int: ...
        @property
        def index(self) -> object: ...

    # mypy follows a protocol only once on its way to a leaf, so sequences directly within sequences
    # need one protocol per level. All of them have the same instances.
    class _SequenceNode2(_SequenceNode[_T_co], Protocol[_T_co]): ...

    class _SequenceNode3(_SequenceNode[_T_co], Protocol[_T_co]): ...

    # The abstract types are covariant, unlike `list` and `dict`: a `list[int]` is a `PyTree[int]`.
    # Functions are overloaded with `PyTreeNode[T]` before `PyTree[T]`, because the leaf type of
    # `[1, 2]` is found only if the argument itself cannot be a leaf.
    PyTreeNode: TypeAlias = Union[
        "tuple[PyTree[T], ...]",
        "_SequenceNode[_PyTree2[T]]",
        "Mapping[Any, PyTree[T]]",
        "CustomTreeNode[PyTree[T]]",
    ]
    PyTree: TypeAlias = Union[T, PyTreeNode[T]]
    _PyTree2: TypeAlias = Union[
        T,
        "tuple[_PyTree2[T], ...]",
        "_SequenceNode2[_PyTree3[T]]",
        "Mapping[Any, _PyTree2[T]]",
        "CustomTreeNode[_PyTree2[T]]",
    ]
    _PyTree3: TypeAlias = Union[
        T,
        "tuple[_PyTree3[T], ...]",
        "_SequenceNode3[_PyTree3[T]]",
        "Mapping[Any, _PyTree3[T]]",
        "CustomTreeNode[_PyTree3[T]]",
    ]

    def PyTreeTypeVar(name: str, param: Any) -> Any: ...  # noqa: D103, N802
else:

    class PyTree(Generic[T]):
        """The type of trees with leaves of type ``T``.

        ``PyTree[T]`` is the union of ``T`` and of the containers of ``PyTree[T]``. The containers
        refer to the union by its name, ``'PyTree[T]'`` or the name that is given as the second
        parameter: ``PyTree[T, 'Name']``.

        Examples:
            >>> import torch  # doctest: +SKIP
            >>> TensorTree = PyTree[torch.Tensor, 'TensorTree']  # doctest: +SKIP
            >>> PyTree[int].__args__[:2]
            (<class 'int'>, tuple[ForwardRef('PyTree[int]'), ...])
            >>> PyTree[PyTree[int]] == PyTree[int]
            True
        """

        __slots__: ClassVar[tuple[()]] = ()

        @classmethod
        def __class_getitem__(cls, item: Any) -> Any:
            """Make the union."""
            if not isinstance(item, tuple):
                item = (item,)
            if len(item) == 1 or (len(item) == 2 and item[1] is None):
                item = (item[0], _default_name(item[0]))
            if len(item) != 2 or not isinstance(item[1], str):
                raise TypeError(
                    f"{cls.__name__}[...] only supports a tuple of 2 items, "
                    f"a parameter and a string of type name, got {item!r}.",
                )
            param, name = item
            if _is_tree_type(param):
                return param
            union = Union[(param, *_containers_of(ForwardRef(name)))]
            if name != _default_name(param):
                leaf_types = union.__args__[: -len(_CONTAINER_TYPES)]
                _NAMED_TREES.setdefault(name, set()).add(tuple(map(_name_of_type, leaf_types)))
            return union

        def __new__(cls, /) -> Never:
            """Refuse to make instances."""
            raise TypeError("Cannot instantiate special typing classes.")

        def __init_subclass__(cls, /, *args: Any, **kwargs: Any) -> Never:
            """Refuse to make subclasses."""
            raise TypeError("Cannot subclass special typing classes.")

        def __copy__(self, /) -> PyTree:
            """Return the object itself."""
            return self

        def __deepcopy__(self, memo: dict[int, Any], /) -> PyTree:
            """Return the object itself."""
            return self

    class PyTreeTypeVar:
        """``PyTreeTypeVar('Name', T)`` returns ``PyTree[T, 'Name']``.

        Examples:
            >>> PyTreeTypeVar('Ints', int).__args__[:3]
            (<class 'int'>, tuple[ForwardRef('Ints'), ...], list[ForwardRef('Ints')])
        """

        def __new__(cls, /, name: str, param: type | TypeAliasType) -> TypeAliasType:
            """Make the union."""
            if not isinstance(name, str):
                raise TypeError(
                    f"{cls.__name__} only supports a string of type name, got {name!r}."
                )
            return PyTree[param, name]

        def __init_subclass__(cls, /, *args: Any, **kwargs: Any) -> Never:
            """Refuse to make subclasses."""
            raise TypeError("Cannot subclass special typing classes.")

        def __copy__(self, /) -> TypeAliasType:
            """Return the object itself."""
            return self

        def __deepcopy__(self, memo: dict[int, Any], /) -> TypeAliasType:
            """Return the object itself."""
            return self


def _override_with_(
    cxx_implementation: Callable[[Any], Any],
    /,
) -> Callable[[Callable[[Any], T]], Callable[[Any], T]]:
    """Replace a Python function of one argument by its equivalent in the extension module.

    The result is still a Python function. Compilers of Python code such as TorchDynamo cannot trace
    the extension module. They find the replaced function in ``__python_implementation__``.
    """

    def decorator(python_implementation: Callable[[Any], T], /) -> Callable[[Any], T]:
        @functools.wraps(python_implementation)
        def wrapped(obj: Any, /) -> T:
            result: T = cxx_implementation(obj)
            return result

        wrapped.__cxx_implementation__ = cxx_implementation  # type: ignore[attr-defined]
        wrapped.__python_implementation__ = python_implementation  # type: ignore[attr-defined]
        return wrapped

    return decorator


@_override_with_(_C.is_namedtuple)
def is_namedtuple(obj: object | type, /) -> bool:
    """Return whether the argument is a namedtuple class or an instance of one.

    Examples:
        >>> from collections import namedtuple
        >>> Point = namedtuple('Point', ('x', 'y'))
        >>> is_namedtuple(Point), is_namedtuple(Point(1, 2)), is_namedtuple((1, 2))
        (True, True, False)
    """
    cls = obj if isinstance(obj, type) else type(obj)
    return is_namedtuple_class(cls)


@_override_with_(_C.is_namedtuple_instance)
def is_namedtuple_instance(obj: object, /) -> bool:
    """Return whether the argument is an instance of a namedtuple class.

    Examples:
        >>> from collections import namedtuple
        >>> Point = namedtuple('Point', ('x', 'y'))
        >>> is_namedtuple_instance(Point), is_namedtuple_instance(Point(1, 2))
        (False, True)
    """
    return is_namedtuple_class(type(obj))


@_override_with_(_C.is_namedtuple_class)
def is_namedtuple_class(cls: object, /) -> bool:
    """Return whether the argument is a namedtuple class.

    A namedtuple class is a subclass of :class:`tuple` with a tuple of strings ``_fields`` and the
    methods ``_make`` and ``_asdict``. Subclasses of namedtuple classes qualify.

    Examples:
        >>> from collections import namedtuple
        >>> Point = namedtuple('Point', ('x', 'y'))
        >>> is_namedtuple_class(Point), is_namedtuple_class(Point(1, 2)), is_namedtuple_class(tuple)
        (True, False, False)
    """
    return (
        isinstance(cls, type)
        and issubclass(cls, tuple)
        and type(getattr(cls, "_fields", None)) is tuple
        # pylint: disable-next=unidiomatic-typecheck
        and all(type(field) is str for field in cls._fields)  # type: ignore[attr-defined]
        and callable(getattr(cls, "_make", None))
        and callable(getattr(cls, "_asdict", None))
    )


@_override_with_(_C.namedtuple_fields)
def namedtuple_fields(obj: tuple[Any, ...] | type[tuple[Any, ...]], /) -> tuple[str, ...]:
    """Return the field names of a namedtuple class or instance.

    Raises:
        TypeError: If the argument is neither a namedtuple class nor an instance of one.

    Examples:
        >>> from collections import namedtuple
        >>> Point = namedtuple('Point', ('x', 'y'))
        >>> namedtuple_fields(Point), namedtuple_fields(Point(1, 2))
        (('x', 'y'), ('x', 'y'))
    """
    if isinstance(obj, type):
        cls = obj
        if not is_namedtuple_class(cls):
            raise TypeError(f"Expected a collections.namedtuple type, got {cls!r}.")
    else:
        cls = type(obj)
        if not is_namedtuple_class(cls):
            raise TypeError(f"Expected an instance of collections.namedtuple type, got {obj!r}.")
    fields: tuple[str, ...] = cls._fields  # type: ignore[attr-defined]
    return fields


class StructSequenceMeta(type):
    """Makes :func:`isinstance` and :func:`issubclass` work with :class:`StructSequence`."""

    def __subclasscheck__(cls, subclass: type, /) -> bool:
        """Return whether ``subclass`` is a ``PyStructSequence`` class."""
        return is_structseq_class(subclass)

    def __instancecheck__(cls, instance: Any, /) -> bool:
        """Return whether ``instance`` is an instance of a ``PyStructSequence`` class."""
        return is_structseq_instance(instance)


@final
class StructSequence(tuple[_T_co, ...], metaclass=StructSequenceMeta):
    """The common type of all ``PyStructSequence`` classes, for annotations and type checks.

    The classes themselves, such as :class:`time.struct_time` and :class:`os.stat_result`, are made
    by the C function ``PyStructSequence_NewType`` and have no common base but :class:`tuple`.

    Examples:
        >>> import time
        >>> isinstance(time.gmtime(0), StructSequence), isinstance((1, 2), StructSequence)
        (True, False)
    """

    __slots__: ClassVar[tuple[()]] = ()

    n_fields: ClassVar[int]
    """Number of fields, visible by index or only by name."""
    n_sequence_fields: ClassVar[int]
    """Number of items of the tuple."""
    n_unnamed_fields: ClassVar[int]
    """Number of items of the tuple that have no name."""

    def __init_subclass__(cls, /) -> Never:
        """Refuse to make subclasses."""
        raise TypeError("type 'StructSequence' is not an acceptable base type")

    def __new__(
        cls,
        /,
        sequence: Iterable[_T_co],
        dict: Dict[str, Any] = ...,  # noqa: A002
    ) -> Self:
        """Refuse to make instances."""
        raise NotImplementedError


structseq = StructSequence
StructSequenceFieldType: type[Any] = type(vars(type(sys.version_info))["major"])
if sys.implementation.name == "pypy":
    from _structseq import structseqfield as StructSequenceFieldType  # type: ignore[import-not-found,no-redef,unused-ignore] # noqa: N812


@_override_with_(_C.is_structseq)
def is_structseq(obj: object | type, /) -> bool:
    """Return whether the argument is a ``PyStructSequence`` class or an instance of one.

    Examples:
        >>> import time
        >>> is_structseq(time.struct_time), is_structseq(time.gmtime(0)), is_structseq((1, 2))
        (True, True, False)
    """
    cls = obj if isinstance(obj, type) else type(obj)
    return is_structseq_class(cls)


@_override_with_(_C.is_structseq_instance)
def is_structseq_instance(obj: object, /) -> bool:
    """Return whether the argument is an instance of a ``PyStructSequence`` class.

    Examples:
        >>> import time
        >>> is_structseq_instance(time.struct_time), is_structseq_instance(time.gmtime(0))
        (False, True)
    """
    return is_structseq_class(type(obj))


@_override_with_(_C.is_structseq_class)
def is_structseq_class(cls: object, /) -> bool:
    """Return whether the argument is a ``PyStructSequence`` class.

    Such a class derives from :class:`tuple` alone, cannot be subclassed, and has the integer
    attributes ``n_fields``, ``n_sequence_fields`` and ``n_unnamed_fields``.

    Examples:
        >>> import time
        >>> is_structseq_class(time.struct_time), is_structseq_class(time.gmtime(0))
        (True, False)
    """
    if not (
        isinstance(cls, type)
        and cls.__bases__ == (tuple,)
        and type(getattr(cls, "n_fields", None)) is int
        and type(getattr(cls, "n_sequence_fields", None)) is int
        and type(getattr(cls, "n_unnamed_fields", None)) is int
    ):
        return False
    if sys.implementation.name == "pypy":
        try:
            types.new_class("subclass", bases=(cls,))
        except (AssertionError, TypeError):
            return True
        return False
    return not cls.__flags__ & Py_TPFLAGS_BASETYPE


@_override_with_(_C.structseq_fields)
def structseq_fields(obj: tuple[Any, ...] | type[tuple[Any, ...]], /) -> tuple[str, ...]:
    """Return the names of the items of a ``PyStructSequence`` class or instance.

    There is one name per item of the tuple. Items without a name have the marker
    ``'unnamed field'``. Fields that are not items, and can only be read by name, are left out.

    Raises:
        TypeError: If the argument is neither a ``PyStructSequence`` class nor an instance of one.

    Examples:
        >>> import time
        >>> structseq_fields(time.struct_time)[:3]
        ('tm_year', 'tm_mon', 'tm_mday')
    """
    if isinstance(obj, type):
        cls = obj
        if not is_structseq_class(cls):
            raise TypeError(f"Expected a PyStructSequence type, got {cls!r}.")
    else:
        cls = type(obj)
        if not is_structseq_class(cls):
            raise TypeError(f"Expected an instance of PyStructSequence type, got {obj!r}.")

    n_items: int = cls.n_sequence_fields  # type: ignore[attr-defined]
    members = [
        name for name, member in vars(cls).items() if isinstance(member, StructSequenceFieldType)
    ]
    if not cls.n_unnamed_fields:  # type: ignore[attr-defined]
        return tuple(members[:n_items])
    # A member does not know its position, but its value in an instance with known items is one.
    positions = cls(range(cls.n_fields))  # type: ignore[attr-defined]
    fields = [PyStructSequence_UnnamedField] * n_items
    for name in members:
        position = getattr(positions, name)
        if position < n_items:
            fields[position] = name
    return tuple(fields)
