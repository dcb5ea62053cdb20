# SPDX-License-Identifier: Apache-2.0
"""Build specs from specs."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, Any, Callable

import optree._C as _C
from optree.typing import is_namedtuple_instance, is_structseq_instance

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from optree.typing import NamedTuple, PyTreeSpec, StructSequence


def treespec_leaf(*, none_is_leaf: bool = False, namespace: str = "") -> PyTreeSpec:
    """Return the spec of a leaf.

    Args:
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: Accepted as in the other functions. The spec of a leaf has no namespace.

    Raises:
        TypeError: If ``namespace`` is not a string.

    Examples:
        >>> treespec_leaf()
        PyTreeSpec(*)
        >>> treespec_leaf(none_is_leaf=True)
        PyTreeSpec(*, NoneIsLeaf)
    """
    return _C.make_leaf(none_is_leaf, namespace)


def treespec_none(*, none_is_leaf: bool = False, namespace: str = "") -> PyTreeSpec:
    """Return the spec of ``None``.

    Args:
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: Accepted as in the other functions. The spec of ``None`` has no namespace.

    Raises:
        TypeError: If ``namespace`` is not a string.

    Examples:
        >>> treespec_none()
        PyTreeSpec(None)
        >>> treespec_none(none_is_leaf=True)
        PyTreeSpec(*, NoneIsLeaf)
    """
    return _C.make_none(none_is_leaf, namespace)


def treespec_tuple(
    iterable: Iterable[PyTreeSpec] = (),
    /,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTreeSpec:
    """Return the spec of a tuple from the specs of its items.

    Args:
        iterable: The specs of the items.
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Raises:
        ValueError: If an item is not a spec, or has another ``none_is_leaf`` or namespace.

    Examples:
        >>> treespec_tuple([treespec_leaf(), treespec_list([treespec_leaf()])])
        PyTreeSpec((*, [*]))
    """
    return _C.make_from_collection(tuple(iterable), none_is_leaf, namespace)


def treespec_list(
    iterable: Iterable[PyTreeSpec] = (),
    /,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTreeSpec:
    """Return the spec of a list from the specs of its items.

    Args:
        iterable: The specs of the items.
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Raises:
        ValueError: If an item is not a spec, or has another ``none_is_leaf`` or namespace.

    Examples:
        >>> treespec_list([treespec_leaf(), treespec_none()])
        PyTreeSpec([*, None])
    """
    return _C.make_from_collection(list(iterable), none_is_leaf, namespace)


def treespec_dict(
    mapping: Mapping[Any, PyTreeSpec] | Iterable[tuple[Any, PyTreeSpec]] = (),
    /,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
    **kwargs: PyTreeSpec,
) -> PyTreeSpec:
    """Return the spec of a dictionary from the specs of its values.

    Args:
        mapping: The specs by key, as for :class:`dict`.
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).
        **kwargs: More specs. The names ``none_is_leaf`` and ``namespace`` are taken.

    Raises:
        ValueError: If a value is not a spec, or has another ``none_is_leaf`` or namespace.

    Examples:
        >>> treespec_dict({'b': treespec_leaf()}, a=treespec_tuple())
        PyTreeSpec({'a': (), 'b': *})
    """
    return _C.make_from_collection(dict(mapping, **kwargs), none_is_leaf, namespace)


def treespec_namedtuple(
    namedtuple: NamedTuple[PyTreeSpec],  # type: ignore[type-arg,valid-type,unused-ignore]
    /,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTreeSpec:
    """Return the spec of a namedtuple from a namedtuple of specs.

    Args:
        namedtuple: An instance of the namedtuple class with a spec in each field.
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Raises:
        ValueError: If the argument is not a namedtuple, or if a field is not a spec or has another
            ``none_is_leaf`` or namespace.

    Examples:
        >>> from collections import namedtuple
        >>> Point = namedtuple('Point', ('x', 'y'))
        >>> treespec_namedtuple(Point(treespec_leaf(), treespec_tuple()))
        PyTreeSpec(Point(x=*, y=()))
    """
    if not is_namedtuple_instance(namedtuple):
        raise ValueError(f"Expected a namedtuple of PyTreeSpec(s), got {namedtuple!r}.")
    return _C.make_from_collection(namedtuple, none_is_leaf, namespace)


def treespec_ordereddict(
    mapping: Mapping[Any, PyTreeSpec] | Iterable[tuple[Any, PyTreeSpec]] = (),
    /,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
    **kwargs: PyTreeSpec,
) -> PyTreeSpec:
    """Return the spec of an :class:`collections.OrderedDict` from the specs of its values.

    Args:
        mapping: The specs by key, as for :class:`dict`.
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).
        **kwargs: More specs. The names ``none_is_leaf`` and ``namespace`` are taken.

    Raises:
        ValueError: If a value is not a spec, or has another ``none_is_leaf`` or namespace.

    Examples:
        >>> treespec_ordereddict({'b': treespec_leaf()}, a=treespec_tuple())
        PyTreeSpec(OrderedDict({'b': *, 'a': ()}))
    """
    return _C.make_from_collection(OrderedDict(mapping, **kwargs), none_is_leaf, namespace)


def treespec_defaultdict(
    default_factory: Callable[[], Any] | None = None,
    mapping: Mapping[Any, PyTreeSpec] | Iterable[tuple[Any, PyTreeSpec]] = (),
    /,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
    **kwargs: PyTreeSpec,
) -> PyTreeSpec:
    """Return the spec of a :class:`collections.defaultdict` from the specs of its values.

    Args:
        default_factory: The factory of missing values of the dictionary.
        mapping: The specs by key, as for :class:`dict`.
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).
        **kwargs: More specs. The names ``none_is_leaf`` and ``namespace`` are taken.

    Raises:
        TypeError: If ``default_factory`` is neither callable nor ``None``.
        ValueError: If a value is not a spec, or has another ``none_is_leaf`` or namespace.

    Examples:
        >>> treespec_defaultdict(int, {'b': treespec_leaf()}, a=treespec_tuple())
        PyTreeSpec(defaultdict(<class 'int'>, {'a': (), 'b': *}))
    """
    return _C.make_from_collection(
        defaultdict(default_factory, mapping, **kwargs),
        none_is_leaf,
        namespace,
    )


def treespec_deque(
    iterable: Iterable[PyTreeSpec] = (),
    /,
    maxlen: int | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTreeSpec:
    """Return the spec of a :class:`collections.deque` from the specs of its items.

    Args:
        iterable: The specs of the items.
        maxlen: The maximum length of the deque.
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Raises:
        ValueError: If an item is not a spec, or has another ``none_is_leaf`` or namespace.

    Examples:
        >>> treespec_deque([treespec_leaf(), treespec_none()], maxlen=5)
        PyTreeSpec(deque([*, None], maxlen=5))
    """
    return _C.make_from_collection(deque(iterable, maxlen=maxlen), none_is_leaf, namespace)


def treespec_structseq(
    structseq: StructSequence[PyTreeSpec],
    /,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTreeSpec:
    """Return the spec of a ``PyStructSequence`` from a struct sequence of specs.

    Args:
        structseq: An instance of the class with a spec in each field.
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Raises:
        ValueError: If the argument is not a struct sequence, or if a field is not a spec or has
            another ``none_is_leaf`` or namespace.

    Examples:
        >>> import time
        >>> treespec_structseq(time.struct_time([treespec_leaf()] * 9)).num_leaves
        9
    """
    if not is_structseq_instance(structseq):
        raise ValueError(f"Expected a PyStructSequence of PyTreeSpec(s), got {structseq!r}.")
    return _C.make_from_collection(structseq, none_is_leaf, namespace)


def treespec_frozendict(
    mapping: Mapping[Any, PyTreeSpec] | Iterable[tuple[Any, PyTreeSpec]] = (),
    /,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
    **kwargs: PyTreeSpec,
) -> PyTreeSpec:
    """Return the spec of a ``frozendict`` from the specs of its values.

    Args:
        mapping: The specs by key, as for :class:`dict`.
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).
        **kwargs: More specs. The names ``none_is_leaf`` and ``namespace`` are taken.

    Raises:
        RuntimeError: If this Python has no ``frozendict``.
        ValueError: If a value is not a spec, or has another ``none_is_leaf`` or namespace.

    Examples:
        >>> treespec_frozendict(a=treespec_leaf())  # doctest: +SKIP
        PyTreeSpec(frozendict({'a': *}))
    """
    if not _C.OPTREE_HAS_FROZENDICT:
        raise RuntimeError(
            "`optree.treespec_frozendict` requires Python 3.15+ with `frozendict` support.",
        )
    from optree.typing import FrozenDict  # type: ignore[attr-defined,unused-ignore]

    return _C.make_from_collection(FrozenDict(mapping, **kwargs), none_is_leaf, namespace)


def treespec_from_collection(
    collection: Collection[PyTreeSpec],
    /,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTreeSpec:
    """Return the spec of a node from a node of the same type with specs as children.

    Args:
        collection: A node of any type, registered ones included, with a spec for each child.
        none_is_leaf: Whether ``None`` is a leaf in the trees that the spec describes.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Raises:
        ValueError: If a child is not a spec, or has another ``none_is_leaf`` or namespace.

    Warns:
        UserWarning: If the argument is a leaf; the result is then the spec of a leaf.

    Examples:
        >>> treespec_from_collection({'a': treespec_leaf(), 'b': treespec_tuple()})
        PyTreeSpec({'a': *, 'b': ()})
    """
    return _C.make_from_collection(collection, none_is_leaf, namespace)
