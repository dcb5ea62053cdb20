# SPDX-License-Identifier: Apache-2.0
"""Typed paths: how a child is reached from its parent (entry) and from the root (accessor)."""

from __future__ import annotations

import builtins
import dataclasses
import keyword
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, SupportsIndex, TypeVar, overload

import optree._C as _C
from optree._C import PyTreeKind

if TYPE_CHECKING:
    from typing_extensions import Self

    from optree.typing import NamedTuple, StructSequence


__all__ = [  # noqa: RUF022 # grouped
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
]


_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)
_KT_co = TypeVar("_KT_co", covariant=True)
_VT_co = TypeVar("_VT_co", covariant=True)


@dataclasses.dataclass(init=True, repr=False, eq=False, frozen=True)
class PyTreeEntry:
    """One step of a path: how to get from a node to one of its children.

    An entry is a function of the node: ``entry(node)`` returns the child. It knows the node's type
    and can print itself as Python code. Subclass it and override :meth:`__call__` and
    :meth:`codify` to describe the children of your own node type.

    Args:
        entry: What identifies the child: an index, a key, an attribute name, ...
        type: The class of the node.
        kind: The kind of the node, neither a leaf nor ``None``.

    Raises:
        ValueError: If ``kind`` is ``LEAF`` or ``NONE``; neither has children.

    Examples:
        >>> entry = PyTreeEntry('weight', dict, PyTreeKind.DICT)
        >>> entry({'weight': 3})
        3
        >>> entry.codify('params')
        "params[<flat index 'weight'>]"
    """

    __slots__: ClassVar[tuple[str, ...]] = ("entry", "type", "kind")  # noqa: RUF023

    entry: Any
    type: builtins.type
    kind: PyTreeKind

    def __post_init__(self, /) -> None:
        """Reject kinds without children."""
        if self.kind == PyTreeKind.LEAF:
            raise ValueError("Cannot create a leaf path entry.")
        if self.kind == PyTreeKind.NONE:
            raise ValueError("Cannot create a path entry for None.")

    def __call__(self, obj: Any, /) -> Any:
        """Return the child of ``obj`` that this entry points at."""
        try:
            return obj[self.entry]
        except TypeError as ex:
            raise TypeError(
                f"{self.__class__!r} cannot access through {obj!r} via entry {self.entry!r}",
            ) from ex

    def __add__(self, other: object, /) -> PyTreeAccessor:
        """Join this entry with the entry or accessor that continues the path."""
        if isinstance(other, PyTreeEntry):
            return PyTreeAccessor((self, other))
        if isinstance(other, PyTreeAccessor):
            return PyTreeAccessor((self, *other))
        return NotImplemented

    def __eq__(self, other: object, /) -> bool:
        """Compare the fields and the access methods."""
        return isinstance(other, PyTreeEntry) and (
            self.entry,
            self.type,
            self.kind,
            self.__class__.__call__,
            self.__class__.codify,
        ) == (
            other.entry,
            other.type,
            other.kind,
            other.__class__.__call__,
            other.__class__.codify,
        )

    def __hash__(self, /) -> int:
        """Hash what is compared."""
        return hash(
            (
                self.entry,
                self.type,
                self.kind,
                self.__class__.__call__,
                self.__class__.codify,
            ),
        )

    def __repr__(self, /) -> str:
        """Show the entry and the node type."""
        return f"{self.__class__.__name__}(entry={self.entry!r}, type={self.type!r})"

    def codify(self, /, node: str = "") -> str:
        """Return Python code that gets the child from the expression ``node``."""
        return f"{node}[<flat index {self.entry!r}>]"

    # A frozen class with slots must restore its state without `__setattr__`.
    def __getstate__(self, /) -> tuple[Any, builtins.type, PyTreeKind]:
        return self.entry, self.type, self.kind

    def __setstate__(self, state: tuple[Any, builtins.type, PyTreeKind], /) -> None:
        for name, value in zip(("entry", "type", "kind"), state):
            object.__setattr__(self, name, value)


class GetItemEntry(PyTreeEntry):
    """A step through ``node[entry]``.

    Examples:
        >>> entry = GetItemEntry(1, tuple, PyTreeKind.TUPLE)
        >>> entry(('a', 'b')), entry.codify('pair')
        ('b', 'pair[1]')
    """

    __slots__: ClassVar[tuple[str, ...]] = ()

    def __call__(self, obj: Any, /) -> Any:
        """Return ``obj[entry]``."""
        return obj[self.entry]

    def codify(self, /, node: str = "") -> str:
        """Return Python code that gets the child from the expression ``node``."""
        return f"{node}[{self.entry!r}]"


class GetAttrEntry(PyTreeEntry):
    """A step through attributes: ``node.a``, or ``node.a.b`` for the entry ``'a.b'``.

    Examples:
        >>> entry = GetAttrEntry('real.numerator', complex, PyTreeKind.CUSTOM)
        >>> entry.codify('z')
        'z.real.numerator'
        >>> GetAttrEntry('two words', object, PyTreeKind.CUSTOM).codify('node')
        "getattr(node, 'two words')"
    """

    __slots__: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self, /) -> str:
        """The dotted attribute path."""
        name: str = self.entry
        return name

    def __call__(self, obj: Any, /) -> Any:
        """Follow the attributes of ``obj``."""
        for part in self.name.split("."):
            obj = getattr(obj, part)
        return obj

    def codify(self, /, node: str = "") -> str:
        """Return Python code that gets the child from the expression ``node``."""
        for part in self.name.split("."):
            is_name = part.isidentifier() and not keyword.iskeyword(part)
            node = f"{node}.{part}" if is_name else f"getattr({node}, {part!r})"
        return node


class FlattenedEntry(PyTreeEntry):
    """A step that is only known by the position of the child among the flattened children.

    A custom node has such entries if nothing better is known about it. Calling the entry tries
    ``node[entry]``; :meth:`codify` marks that this is a guess.

    Examples:
        >>> FlattenedEntry(0, set, PyTreeKind.CUSTOM).codify('node')
        'node[<flat index 0>]'
    """

    __slots__: ClassVar[tuple[str, ...]] = ()


class AutoEntry(PyTreeEntry):
    """The default entry type of custom nodes, which picks the entry class that suits the node type.

    ``AutoEntry(entry, type, PyTreeKind.CUSTOM)`` returns an instance of the first match:
    :class:`StructSequenceEntry`, :class:`NamedTupleEntry`, :class:`DataclassEntry`,
    :class:`MappingEntry` (subclasses of :class:`collections.abc.Mapping`),
    :class:`SequenceEntry` (subclasses of :class:`collections.abc.Sequence`), and otherwise
    :class:`FlattenedEntry`. Subclasses of :class:`AutoEntry` are created as they are.

    Raises:
        ValueError: If ``kind`` is not that of a custom node.

    Examples:
        >>> from collections import UserDict, UserList
        >>> AutoEntry('a', UserDict, PyTreeKind.CUSTOM)
        MappingEntry(key='a', type=<class 'collections.UserDict'>)
        >>> AutoEntry(0, UserList, PyTreeKind.CUSTOM)
        SequenceEntry(index=0, type=<class 'collections.UserList'>)
    """

    __slots__: ClassVar[tuple[str, ...]] = ()

    def __new__(  # type: ignore[misc] # it returns an instance of a sibling class
        cls,
        /,
        entry: Any,
        type: builtins.type,  # noqa: A002
        kind: PyTreeKind,
    ) -> PyTreeEntry:
        """Create an entry of the class that suits ``type``."""
        if cls is not AutoEntry:
            return object.__new__(cls)
        if kind != PyTreeKind.CUSTOM:
            raise ValueError(f"Cannot create an automatic path entry for PyTreeKind {kind!r}.")
        return _automatic_entry_type(type)(entry, type, kind)

    def __getnewargs__(self, /) -> tuple[Any, builtins.type, PyTreeKind]:
        """Return the arguments of ``__new__``, for copies and pickles of subclasses."""
        return self.entry, self.type, self.kind


def _automatic_entry_type(cls: builtins.type) -> builtins.type[PyTreeEntry]:
    # Imported from `optree.typing`, because `torch.compile()` cannot trace the extension module.
    from optree.typing import (  # pylint: disable=import-outside-toplevel,cyclic-import
        is_namedtuple_class,
        is_structseq_class,
    )

    if is_structseq_class(cls):
        return StructSequenceEntry
    if is_namedtuple_class(cls):
        return NamedTupleEntry
    if dataclasses.is_dataclass(cls):
        return DataclassEntry
    if issubclass(cls, Mapping):
        return MappingEntry
    if issubclass(cls, Sequence):
        return SequenceEntry
    return FlattenedEntry


class SequenceEntry(GetItemEntry, Generic[_T_co]):
    """A step through ``sequence[index]``.

    Examples:
        >>> SequenceEntry(2, list, PyTreeKind.LIST)
        SequenceEntry(index=2, type=<class 'list'>)
    """

    __slots__: ClassVar[tuple[str, ...]] = ()

    entry: int
    type: builtins.type[Sequence[_T_co]]

    @property
    def index(self, /) -> int:
        """The position in the sequence."""
        return self.entry

    # Overridden, not inherited: entries compare equal only if they share `__call__`.
    def __call__(self, obj: Sequence[_T_co], /) -> _T_co:
        """Return ``obj[index]``."""
        return obj[self.entry]

    def __repr__(self, /) -> str:
        """Show the index and the node type."""
        return f"{self.__class__.__name__}(index={self.entry!r}, type={self.type!r})"


class MappingEntry(GetItemEntry, Generic[_KT_co, _VT_co]):
    """A step through ``mapping[key]``.

    Examples:
        >>> MappingEntry('a', dict, PyTreeKind.DICT)
        MappingEntry(key='a', type=<class 'dict'>)
    """

    __slots__: ClassVar[tuple[str, ...]] = ()

    entry: _KT_co
    type: builtins.type[Mapping[_KT_co, _VT_co]]

    @property
    def key(self, /) -> _KT_co:
        """The key in the mapping."""
        return self.entry

    # Overridden, not inherited: entries compare equal only if they share `__call__`.
    def __call__(self, obj: Mapping[_KT_co, _VT_co], /) -> _VT_co:
        """Return ``obj[key]``."""
        return obj[self.entry]

    def __repr__(self, /) -> str:
        """Show the key and the node type."""
        return f"{self.__class__.__name__}(key={self.entry!r}, type={self.type!r})"


class NamedTupleEntry(SequenceEntry[_T]):
    """A step through a field of a namedtuple; the entry is the position of the field.

    Examples:
        >>> from collections import namedtuple
        >>> Point = namedtuple('Point', ('x', 'y'))
        >>> NamedTupleEntry(1, Point, PyTreeKind.NAMEDTUPLE).codify('point')
        'point.y'
    """

    __slots__: ClassVar[tuple[str, ...]] = ()

    entry: int
    type: builtins.type[NamedTuple[_T]]  # type: ignore[type-arg,assignment,unused-ignore]

    @property
    def fields(self, /) -> tuple[str, ...]:
        """The field names of the namedtuple class."""
        return _C.namedtuple_fields(self.type)

    @property
    def field(self, /) -> str:
        """The name of the field."""
        return self.fields[self.entry]

    def __repr__(self, /) -> str:
        """Show the field and the node type."""
        return f"{self.__class__.__name__}(field={self.field!r}, type={self.type!r})"

    def codify(self, /, node: str = "") -> str:
        """Return Python code that gets the child from the expression ``node``."""
        return f"{node}.{self.field}"


class StructSequenceEntry(SequenceEntry[_T]):
    """A step through a field of a ``PyStructSequence`` such as :class:`time.struct_time`.

    Some items have no name (three in :class:`os.stat_result`); they are shown by their index.

    Examples:
        >>> import os
        >>> StructSequenceEntry(6, os.stat_result, PyTreeKind.STRUCTSEQUENCE).codify('stat')
        'stat.st_size'
        >>> StructSequenceEntry(7, os.stat_result, PyTreeKind.STRUCTSEQUENCE).codify('stat')
        'stat[7]'
    """

    __slots__: ClassVar[tuple[str, ...]] = ()

    entry: int
    type: builtins.type[StructSequence[_T]]

    @property
    def fields(self, /) -> tuple[str, ...]:
        """The names of the sequence slots; unnamed slots have a marker instead of a name."""
        return _C.structseq_fields(self.type)

    @property
    def field(self, /) -> str:
        """The name of the slot."""
        return self.fields[self.entry]

    @property
    def is_unnamed(self, /) -> bool:
        """Whether the slot has no name."""
        return self.field == _C.PyStructSequence_UnnamedField

    def __repr__(self, /) -> str:
        """Show the field (the index if it has no name) and the node type."""
        shown = f"entry={self.entry!r}" if self.is_unnamed else f"field={self.field!r}"
        return f"{self.__class__.__name__}({shown}, type={self.type!r})"

    def codify(self, /, node: str = "") -> str:
        """Return Python code that gets the child from the expression ``node``."""
        return f"{node}[{self.entry!r}]" if self.is_unnamed else f"{node}.{self.field}"


class DataclassEntry(GetAttrEntry):
    """A step through a field of a dataclass.

    The entry is a field name, or an integer that counts the fields that are children.

    Examples:
        >>> import dataclasses
        >>> Point = dataclasses.make_dataclass('Point', ['x', 'y'])
        >>> entry = DataclassEntry('y', Point, PyTreeKind.CUSTOM)
        >>> entry(Point(1, 2)), entry.codify('point')
        (2, 'point.y')
    """

    __slots__: ClassVar[tuple[str, ...]] = ()

    entry: str | int

    @property
    def fields(self, /) -> tuple[str, ...]:
        """The names of all fields."""
        return tuple(f.name for f in dataclasses.fields(self.type))

    @property
    def init_fields(self, /) -> tuple[str, ...]:
        """The names of the fields that ``__init__`` accepts."""
        return tuple(f.name for f in dataclasses.fields(self.type) if f.init)

    @property
    def children_fields(self, /) -> tuple[str, ...]:
        """The names of the fields that are children (all fields if the class is not registered)."""
        registered = self.type.__dict__.get("__optree_dataclass_fields__")
        return self.fields if registered is None else tuple(registered[0])

    @property
    def field(self, /) -> str:
        """The name of the field."""
        entry = self.entry
        return self.children_fields[entry] if isinstance(entry, int) else entry

    @property
    def name(self, /) -> str:
        """The name of the field."""
        return self.field

    def __repr__(self, /) -> str:
        """Show the field and the node type."""
        return f"{self.__class__.__name__}(field={self.field!r}, type={self.type!r})"


class PyTreeAccessor(tuple[PyTreeEntry, ...]):
    """The path from the root of a tree to one of its nodes: a tuple of entries.

    Calling the accessor with a tree walks the path. :meth:`codify` prints it as Python code.

    Args:
        path: The entries, from the root downwards.

    Raises:
        TypeError: If an item of ``path`` is not a :class:`PyTreeEntry`.

    Examples:
        >>> import optree
        >>> tree = {'b': (1, [2]), 'a': 3}
        >>> accessors, leaves, spec = optree.tree_flatten_with_accessor(tree)
        >>> [accessor.codify('tree') for accessor in accessors]
        ["tree['a']", "tree['b'][0]", "tree['b'][1][0]"]
        >>> [accessor(tree) for accessor in accessors]
        [3, 1, 2]
        >>> accessors[2][:1]
        PyTreeAccessor(*['b'], (MappingEntry(key='b', type=<class 'dict'>),))
    """

    __slots__: ClassVar[tuple[()]] = ()

    def __new__(cls, /, path: Iterable[PyTreeEntry] = ()) -> Self:
        """Create an accessor from its entries."""
        if not isinstance(path, (list, tuple)):
            path = tuple(path)
        for entry in path:
            if not isinstance(entry, PyTreeEntry):
                raise TypeError(f"Expected a path of PyTreeEntry, got {path!r}.")
        return super().__new__(cls, path)

    @property
    def path(self, /) -> tuple[Any, ...]:
        """The path without types: the tuple of ``entry.entry``."""
        return tuple(entry.entry for entry in self)

    def __call__(self, obj: Any, /) -> Any:
        """Return the node of ``obj`` at this path."""
        for entry in self:
            obj = entry(obj)
        return obj

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> PyTreeEntry: ...

    @overload
    def __getitem__(self, index: slice, /) -> PyTreeAccessor: ...

    def __getitem__(self, index: SupportsIndex | slice, /) -> PyTreeEntry | PyTreeAccessor:
        """Return an entry, or the accessor of a part of the path."""
        if isinstance(index, slice):
            return PyTreeAccessor(super().__getitem__(index))
        return super().__getitem__(index)

    def __add__(self, other: object, /) -> PyTreeAccessor:
        """Continue the path with an entry or an accessor."""
        if isinstance(other, PyTreeEntry):
            return PyTreeAccessor((*self, other))
        if isinstance(other, PyTreeAccessor):
            return PyTreeAccessor((*self, *other))
        return NotImplemented

    def __mul__(self, value: SupportsIndex, /) -> PyTreeAccessor:
        """Repeat the path."""
        return PyTreeAccessor(super().__mul__(value))

    def __rmul__(self, value: SupportsIndex, /) -> PyTreeAccessor:
        """Repeat the path."""
        return PyTreeAccessor(super().__rmul__(value))

    def __eq__(self, other: object, /) -> bool:
        """Compare with another accessor; a plain tuple is different."""
        return isinstance(other, PyTreeAccessor) and super().__eq__(other)

    def __ne__(self, other: object, /) -> bool:
        """Negate :meth:`__eq__`."""
        return not self.__eq__(other)

    def __hash__(self, /) -> int:
        """Hash the entries."""
        return super().__hash__()

    def __repr__(self, /) -> str:
        """Show the path as code and as entries."""
        return f"{self.__class__.__name__}({self.codify()}, {super().__repr__()})"

    def codify(self, /, root: str = "*") -> str:
        """Return Python code that gets the node from the expression ``root``."""
        code = root
        for entry in self:
            code = entry.codify(code)
        return code


# The public home of these classes is `optree`; the extension module exposes them too.
for _class in (
    PyTreeEntry,
    GetItemEntry,
    GetAttrEntry,
    FlattenedEntry,
    AutoEntry,
    SequenceEntry,
    MappingEntry,
    NamedTupleEntry,
    StructSequenceEntry,
    DataclassEntry,
    PyTreeAccessor,
):
    _class.__module__ = "optree"
    setattr(_C, _class.__name__, _class)
del _class

# The extension module makes instances of these classes without calling them, unless a program has
# replaced their constructors.
_C.set_stock_classes(
    (MappingEntry, NamedTupleEntry, StructSequenceEntry, SequenceEntry, PyTreeAccessor),
)
