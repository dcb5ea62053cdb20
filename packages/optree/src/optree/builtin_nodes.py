# SPDX-License-Identifier: Apache-2.0
"""How Python code takes nodes of built-in types apart and rebuilds them."""

from __future__ import annotations

import builtins
import dataclasses
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Generic

import optree._C as _C
from optree._C import PyTreeKind
from optree.accessors import (
    AutoEntry,
    MappingEntry,
    NamedTupleEntry,
    PyTreeEntry,
    SequenceEntry,
    StructSequenceEntry,
)
from optree.typing import KT, VT, FlattenFunc, StructSequence, T, UnflattenFunc
from optree.utils import safe_zip, total_order_sorted, unzip2

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclasses.dataclass(init=False, repr=True, eq=True, frozen=True)
class PyTreeNodeRegistryEntry(Generic[T]):
    """The registration of a class: its functions, path entry type, kind and namespace.

    Examples:
        >>> import optree
        >>> entry = optree.register_pytree_node.get(list)
        >>> entry.kind, entry.path_entry_type
        (<PyTreeKind.LIST: 4>, <class 'optree.SequenceEntry'>)
    """

    __slots__: ClassVar[tuple[str, ...]] = (  # noqa: RUF023
        "type",
        "flatten_func",
        "unflatten_func",
        "path_entry_type",
        "kind",
        "namespace",
    )

    __match_args__: ClassVar[tuple[str, ...]] = ("type", "flatten_func", "unflatten_func")

    type: builtins.type[Any]
    flatten_func: FlattenFunc[T]
    unflatten_func: UnflattenFunc[T]
    path_entry_type: builtins.type[PyTreeEntry]
    kind: PyTreeKind
    namespace: str

    def __init__(
        self,
        /,
        type: builtins.type[Any],  # noqa: A002
        flatten_func: FlattenFunc[T],
        unflatten_func: UnflattenFunc[T],
        *,
        path_entry_type: builtins.type[PyTreeEntry] = AutoEntry,
        kind: PyTreeKind = PyTreeKind.CUSTOM,
        namespace: str = "",
    ) -> None:
        """Set the fields."""
        object.__setattr__(self, "type", type)
        object.__setattr__(self, "flatten_func", flatten_func)
        object.__setattr__(self, "unflatten_func", unflatten_func)
        object.__setattr__(self, "path_entry_type", path_entry_type)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "namespace", namespace)

    def __getstate__(self, /) -> list[Any]:
        """Return the values of the fields, for copies and pickles."""
        return [getattr(self, name) for name in self.__slots__]

    def __setstate__(self, state: list[Any], /) -> None:
        """Set the fields, which are frozen otherwise."""
        for name, value in zip(self.__slots__, state):
            object.__setattr__(self, name, value)


# The flatten and unflatten functions of the built-in node types. The extension module does not use
# them: they serve `tree_flatten_one_level()` and compilers that look for Python code.


def _none_flatten(_: None, /) -> tuple[tuple[()], None]:
    return (), None


def _none_unflatten(_: None, children: Iterable[Any], /) -> None:
    sentinel = object()
    if next(iter(children), sentinel) is not sentinel:
        raise ValueError("Expected no children.")


def _tuple_flatten(tup: tuple[T, ...], /) -> tuple[tuple[T, ...], None]:
    return tup, None


def _tuple_unflatten(_: None, children: Iterable[T], /) -> tuple[T, ...]:
    return tuple(children)


def _list_flatten(lst: list[T], /) -> tuple[list[T], None]:
    return lst, None


def _list_unflatten(_: None, children: Iterable[T], /) -> list[T]:
    return list(children)


class DictMetaData(list[KT]):
    """The metadata of a dict: the keys in traversal order, and in the order of the dict.

    It compares like the list of the keys in traversal order.

    Args:
        keys: The keys in traversal order.
        original_keys: The keys in the order of the dict, by default the same.
        check_keys_consistency: Whether to check that both orders have the same keys.

    Raises:
        ValueError: If the two orders have different keys, and ``check_keys_consistency`` is true.

    Examples:
        >>> from optree.registry import DictMetaData
        >>> metadata = DictMetaData(['a', 'b'], original_keys=['b', 'a'])
        >>> metadata, list(metadata.original_keys)
        (['a', 'b'], ['b', 'a'])
    """

    __slots__: ClassVar[tuple[str, ...]] = ("original_keys",)

    original_keys: dict[KT, None]

    def __init__(
        self,
        keys: Iterable[KT] = (),
        /,
        *,
        original_keys: Iterable[KT] | None = None,
        check_keys_consistency: bool = True,
    ) -> None:
        """Set the keys in both orders."""
        super().__init__(keys)
        if original_keys is None:
            self.original_keys = dict.fromkeys(self)
            return
        self.original_keys = dict.fromkeys(original_keys)
        if check_keys_consistency:
            if len(self.original_keys) != len(self):
                raise ValueError(
                    f"`original_keys` must have the same length as `keys`, "
                    f"got {len(self.original_keys)} != {len(self)}.",
                )
            if set(self.original_keys) != set(self):
                raise ValueError(
                    f"`original_keys` must have the same keys as `keys`, "
                    f"got {set(self.original_keys)} != {set(self)}.",
                )

    # By default copies and pickles contain only the items; this adds the original order.
    def __reduce_ex__(self, protocol: Any, /) -> tuple[Any, ...]:
        return _restore_dict_metadata, (type(self), list(self), list(self.original_keys))


def _restore_dict_metadata(
    cls: type[DictMetaData[KT]],
    keys: list[KT],
    original_keys: list[KT],
    /,
) -> DictMetaData[KT]:
    return cls(keys, original_keys=original_keys, check_keys_consistency=False)


# Not `zip()`, which shows a half-filled tuple to the garbage collector.
def _items(keys: Iterable[KT], values: Iterable[VT], /) -> list[tuple[KT, VT]]:
    keys, values = list(keys), list(values)
    if len(keys) != len(values):
        safe_zip(keys, values)  # raises
    return [(key, values[i]) for i, key in enumerate(keys)]


def _dict_flatten(
    dct: dict[KT, VT],
    /,
) -> tuple[tuple[VT, ...], list[KT], tuple[KT, ...]]:
    keys = total_order_sorted(dct)
    metadata = DictMetaData(keys, original_keys=dct, check_keys_consistency=False)
    return tuple([dct[key] for key in keys]), metadata, tuple(keys)


def _dict_unflatten(metadata: list[KT], values: Iterable[VT], /) -> dict[KT, VT]:
    items = _items(metadata, values)
    dct: dict[KT, Any] = {}
    if isinstance(metadata, DictMetaData):
        dct.update(metadata.original_keys)
    dct.update(items)
    return dct


def _dict_insertion_ordered_flatten(
    dct: dict[KT, VT],
    /,
) -> tuple[tuple[VT, ...], list[KT], tuple[KT, ...]]:
    keys, values = unzip2(dct.items())
    return values, DictMetaData(keys), keys


def _dict_insertion_ordered_unflatten(
    metadata: list[KT],
    values: Iterable[VT],
    /,
) -> dict[KT, VT]:
    return dict(_items(metadata, values))


def _ordereddict_flatten(
    dct: OrderedDict[KT, VT],
    /,
) -> tuple[tuple[VT, ...], list[KT], tuple[KT, ...]]:
    keys, values = unzip2(dct.items())
    return values, list(keys), keys


def _ordereddict_unflatten(keys: list[KT], values: Iterable[VT], /) -> OrderedDict[KT, VT]:
    return OrderedDict(_items(keys, values))


def _defaultdict_flatten(
    dct: defaultdict[KT, VT],
    /,
) -> tuple[tuple[VT, ...], tuple[Callable[[], VT] | None, list[KT]], tuple[KT, ...]]:
    values, metadata, entries = _dict_flatten(dct)
    return values, (dct.default_factory, metadata), entries


def _defaultdict_unflatten(
    metadata: tuple[Callable[[], VT] | None, list[KT]],
    values: Iterable[VT],
    /,
) -> defaultdict[KT, VT]:
    default_factory, dict_metadata = metadata
    return defaultdict(default_factory, _dict_unflatten(dict_metadata, values))


def _defaultdict_insertion_ordered_flatten(
    dct: defaultdict[KT, VT],
    /,
) -> tuple[tuple[VT, ...], tuple[Callable[[], VT] | None, list[KT]], tuple[KT, ...]]:
    values, metadata, entries = _dict_insertion_ordered_flatten(dct)
    return values, (dct.default_factory, metadata), entries


def _defaultdict_insertion_ordered_unflatten(
    metadata: tuple[Callable[[], VT] | None, list[KT]],
    values: Iterable[VT],
    /,
) -> defaultdict[KT, VT]:
    default_factory, dict_metadata = metadata
    return defaultdict(default_factory, _dict_insertion_ordered_unflatten(dict_metadata, values))


def _deque_flatten(deq: deque[T], /) -> tuple[deque[T], int | None]:
    return deq, deq.maxlen


def _deque_unflatten(maxlen: int | None, children: Iterable[T], /) -> deque[T]:
    return deque(children, maxlen=maxlen)


def _namedtuple_flatten(tup: tuple[T, ...], /) -> tuple[tuple[T, ...], type[tuple[T, ...]]]:
    return tup, type(tup)


def _namedtuple_unflatten(cls: Any, children: Iterable[T], /) -> Any:
    return cls(*children)


def _structseq_flatten(
    seq: StructSequence[T],
    /,
) -> tuple[tuple[T, ...], type[StructSequence[T]]]:
    return seq, type(seq)


def _structseq_unflatten(
    cls: type[StructSequence[T]],
    children: Iterable[T],
    /,
) -> StructSequence[T]:
    return cls(children)


def _frozendict_unflatten(metadata: list[KT], values: Iterable[VT], /) -> Any:
    return _frozendict(_dict_unflatten(metadata, values))


def _frozendict_insertion_ordered_unflatten(
    metadata: list[KT],
    values: Iterable[VT],
    /,
) -> Any:
    return _frozendict(_dict_insertion_ordered_unflatten(metadata, values))


_Functions = tuple[Callable[..., Any], Callable[..., Any]]

_frozendict: Any = getattr(builtins, "frozendict", None) if _C.OPTREE_HAS_FROZENDICT else None

# One row per kind: its class, the kind, the class of path entries, the functions that take a node
# apart and rebuild it, and the functions for insertion-ordered dictionaries where they differ.
# The function `namedtuple` and the class `StructSequence` represent all classes of their kinds.
_BUILTIN_KINDS: tuple[tuple[Any, PyTreeKind, type[PyTreeEntry], _Functions, _Functions | None], ...]
_BUILTIN_KINDS = (
    (type(None), PyTreeKind.NONE, PyTreeEntry, (_none_flatten, _none_unflatten), None),
    (tuple, PyTreeKind.TUPLE, SequenceEntry, (_tuple_flatten, _tuple_unflatten), None),
    (list, PyTreeKind.LIST, SequenceEntry, (_list_flatten, _list_unflatten), None),
    (
        dict,
        PyTreeKind.DICT,
        MappingEntry,
        (_dict_flatten, _dict_unflatten),
        (_dict_insertion_ordered_flatten, _dict_insertion_ordered_unflatten),
    ),
    (
        namedtuple,
        PyTreeKind.NAMEDTUPLE,
        NamedTupleEntry,
        (_namedtuple_flatten, _namedtuple_unflatten),
        None,
    ),
    (
        OrderedDict,
        PyTreeKind.ORDEREDDICT,
        MappingEntry,
        (_ordereddict_flatten, _ordereddict_unflatten),
        None,
    ),
    (
        defaultdict,
        PyTreeKind.DEFAULTDICT,
        MappingEntry,
        (_defaultdict_flatten, _defaultdict_unflatten),
        (_defaultdict_insertion_ordered_flatten, _defaultdict_insertion_ordered_unflatten),
    ),
    (deque, PyTreeKind.DEQUE, SequenceEntry, (_deque_flatten, _deque_unflatten), None),
    (
        StructSequence,
        PyTreeKind.STRUCTSEQUENCE,
        StructSequenceEntry,
        (_structseq_flatten, _structseq_unflatten),
        None,
    ),
    (
        _frozendict,
        PyTreeKind.FROZENDICT,
        MappingEntry,
        (_dict_flatten, _frozendict_unflatten),
        (_dict_insertion_ordered_flatten, _frozendict_insertion_ordered_unflatten),
    ),
)


def _entry_of_builtin(
    cls: Any,
    kind: PyTreeKind,
    path_entry_type: type[PyTreeEntry],
    functions: _Functions,
    /,
) -> PyTreeNodeRegistryEntry[Any]:
    return PyTreeNodeRegistryEntry(cls, *functions, path_entry_type=path_entry_type, kind=kind)


# Keys are `cls` for the global namespace and `(namespace, cls)` for the others.
# TorchDynamo and its polyfills read this dictionary.
_NODETYPE_REGISTRY: dict[Any, PyTreeNodeRegistryEntry[Any]] = {
    cls: _entry_of_builtin(cls, kind, entry, functions)
    for cls, kind, entry, functions, _ in _BUILTIN_KINDS
    if cls is not None  # `frozendict` exists from Python 3.15 on
}

# What replaces an entry of `_NODETYPE_REGISTRY` while dictionaries keep their insertion order.
_INSERTION_ORDERED_REGISTRY: dict[Any, PyTreeNodeRegistryEntry[Any]] = {
    cls: _entry_of_builtin(cls, kind, entry, functions)
    for cls, kind, entry, _, functions in _BUILTIN_KINDS
    if cls is not None and functions is not None
}

# The public home of these classes.
PyTreeNodeRegistryEntry.__module__ = "optree.registry"
DictMetaData.__module__ = "optree.registry"
