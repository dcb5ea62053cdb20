# SPDX-License-Identifier: Apache-2.0
"""attrs classes that are nodes. All other names are re-exported from :mod:`attrs`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Callable, ClassVar, TypeVar, overload

import attrs
from attrs import (
    NOTHING,
    Attribute,
    Factory,
    asdict,
    astuple,
    cmp_using,
    converters,
    evolve,
    exceptions,
    fields,
    fields_dict,
    filters,
    has,
    resolve_types,
    setters,
    validate,
    validators,
)

from optree._field_nodes import (
    check_namespace,
    check_not_registered,
    register_fields,
    register_or_decorate,
    split_fields,
)
from optree.accessors import GetAttrEntry
from optree.registry import GlobalNamespace, _module_of_caller, _warn_caller

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform


__all__ = [  # noqa: RUF022 # grouped
    "AttrsEntry",
    "field",
    "define",
    "frozen",
    "mutable",
    "make_class",
    "register_node",
    "NOTHING",
    "Attribute",
    "Factory",
    "asdict",
    "astuple",
    "cmp_using",
    "converters",
    "evolve",
    "exceptions",
    "fields",
    "fields_dict",
    "filters",
    "has",
    "resolve_types",
    "setters",
    "validate",
    "validators",
]


_FIELDS = "__optree_attrs_fields__"
_PYTREE_NODE_DEFAULT: bool = True

_TypeT = TypeVar("_TypeT", bound=type)


class AttrsEntry(GetAttrEntry):
    """A step through an attribute of an instance of an attrs class.

    The entry is an attribute name, or an integer that counts the attributes that are children.

    Examples:
        >>> import optree
        >>> @define(namespace='entries')
        ... class Point:
        ...     x: float
        ...     y: float
        >>> [a.codify('point') for a in optree.tree_accessors(Point(1, 2), namespace='entries')]
        ['point.x', 'point.y']
    """

    __slots__: ClassVar[tuple[()]] = ()

    entry: str | int

    @property
    def fields(self, /) -> tuple[str, ...]:
        """The names of all attributes."""
        return tuple(a.name for a in _attributes(self.type))

    @property
    def init_fields(self, /) -> tuple[str, ...]:
        """The names of the attributes that ``__init__`` accepts."""
        return tuple(a.name for a in _attributes(self.type) if a.init)

    @property
    def children_fields(self, /) -> tuple[str, ...]:
        """The names of the attributes that are children (all if the class is not registered)."""
        registered = self.type.__dict__.get(_FIELDS)
        return self.fields if registered is None else tuple(registered[0])

    @property
    def field(self, /) -> str:
        """The name of the attribute."""
        entry = self.entry
        return self.children_fields[entry] if isinstance(entry, int) else entry

    @property
    def name(self, /) -> str:
        """The name of the attribute."""
        return self.field

    def __repr__(self, /) -> str:
        """Show the attribute and the node type."""
        return f"{self.__class__.__name__}(field={self.field!r}, type={self.type!r})"


def _attributes(cls: Any, /) -> tuple[Attribute[Any], ...]:
    if not has(cls):
        raise exceptions.NotAnAttrsClassError(f"{cls!r} is not an attrs-decorated class.")
    attributes: tuple[Attribute[Any], ...] = fields(cls)
    return attributes


def field(**kwargs: Any) -> Any:
    """Return a description of an attribute, see :func:`attrs.field`.

    Args:
        **kwargs: See :func:`attrs.field`. In addition, ``pytree_node`` says whether the attribute
            is a child of the node. Otherwise it is part of the metadata. By default it is a child.

    Returns:
        The description.

    Raises:
        TypeError: If an attribute is a child but not a parameter of ``__init__``, so that the node
            cannot be rebuilt.

    Examples:
        >>> import optree
        >>> @define(namespace='fields')
        ... class Layer:
        ...     weight: float
        ...     activation: str = field(default='relu', pytree_node=False)
        >>> optree.tree_leaves(Layer(3.0), namespace='fields')
        [3.0]
    """
    pytree_node = kwargs.pop("pytree_node", None)
    metadata = dict(kwargs.pop("metadata", None) or {})
    if pytree_node is None:
        pytree_node = metadata.get("pytree_node", _PYTREE_NODE_DEFAULT)
    metadata["pytree_node"] = pytree_node
    if not kwargs.get("init", True) and pytree_node:
        raise TypeError(
            "`pytree_node=True` is not allowed for non-init fields. "
            f"Please explicitly set `{__name__}.field(init=False, pytree_node=False)`.",
        )
    return attrs.field(metadata=metadata, **kwargs)


if not TYPE_CHECKING:

    def dataclass_transform(**_: Any) -> Callable[[Any], Any]:
        return lambda function: function


@overload
@dataclass_transform(field_specifiers=(attrs.field, field))
def define(
    cls: None = None,
    /,
    *,
    namespace: str | GlobalNamespace,
    **kwargs: Any,
) -> Callable[[_TypeT], _TypeT]: ...


@overload
@dataclass_transform(field_specifiers=(attrs.field, field))
def define(cls: _TypeT, /, *, namespace: str | GlobalNamespace, **kwargs: Any) -> _TypeT: ...


def define(
    cls: _TypeT | None = None,
    /,
    *,
    namespace: str | GlobalNamespace,
    **kwargs: Any,
) -> _TypeT | Callable[[_TypeT], _TypeT]:
    """Make an attrs class, see :func:`attrs.define`, whose instances are nodes.

    Attributes are children by default, see :func:`field`. Other attributes that ``__init__``
    accepts are metadata. A node is rebuilt by calling the class.

    Args:
        cls: The class. Without it a decorator is returned.
        namespace: The namespace to register the class in; ``''`` is the global one.
        **kwargs: See :func:`attrs.define`.

    Returns:
        The attrs class, or a decorator.

    Raises:
        TypeError: If the argument is not a class or was registered before, ``namespace`` is not a
            string, or a child is not a parameter of ``__init__``.
        ValueError: If the class is already registered in the namespace.

    Examples:
        >>> import optree
        >>> @define(namespace='points')
        ... class Point:
        ...     x: float
        ...     y: float
        >>> optree.tree_map(lambda x: -x, Point(1.0, 2.0), namespace='points')
        Point(x=-1.0, y=-2.0)
    """

    def decorator(cls: _TypeT, /) -> _TypeT:
        if not inspect.isclass(cls):
            raise TypeError(f"@{__name__}.define() can only be used with classes, not {cls!r}.")
        check_not_registered(cls, _FIELDS, __name__)
        check_namespace(namespace)
        return _register_attrs_class(attrs.define(cls, **kwargs), namespace)

    return decorator if cls is None else decorator(cls)


mutable = define


@overload
@dataclass_transform(frozen_default=True, field_specifiers=(attrs.field, field))
def frozen(
    cls: None = None,
    /,
    *,
    namespace: str | GlobalNamespace,
    **kwargs: Any,
) -> Callable[[_TypeT], _TypeT]: ...


@overload
@dataclass_transform(frozen_default=True, field_specifiers=(attrs.field, field))
def frozen(cls: _TypeT, /, *, namespace: str | GlobalNamespace, **kwargs: Any) -> _TypeT: ...


def frozen(
    cls: _TypeT | None = None,
    /,
    *,
    namespace: str | GlobalNamespace,
    **kwargs: Any,
) -> _TypeT | Callable[[_TypeT], _TypeT]:
    """Make an immutable attrs class, see :func:`attrs.frozen`, whose instances are nodes.

    Args:
        cls: The class. Without it a decorator is returned.
        namespace: The namespace to register the class in; ``''`` is the global one.
        **kwargs: See :func:`attrs.frozen`.

    Returns:
        The attrs class, or a decorator.

    Raises:
        TypeError: See :func:`define`.
        ValueError: See :func:`define`.

    Examples:
        >>> import optree
        >>> @frozen(namespace='frozen-points')
        ... class Point:
        ...     x: float
        ...     y: float
        >>> optree.tree_map(lambda x: -x, Point(1.0, 2.0), namespace='frozen-points')
        Point(x=-1.0, y=-2.0)
    """
    kwargs.setdefault("frozen", True)
    kwargs.setdefault("on_setattr", None)
    return define(cls, namespace=namespace, **kwargs)


def make_class(
    name: str,
    attrs: Any,  # the name of the parameter of `attrs.make_class()`
    /,
    *,
    namespace: str | GlobalNamespace,
    **kwargs: Any,
) -> type:
    """Make an attrs class from its attributes, see :func:`attrs.make_class`, and register it.

    Args:
        name: The name of the class.
        attrs: The names of the attributes, or a dictionary of names and :func:`field`.
        namespace: The namespace to register the class in; ``''`` is the global one.
        **kwargs: See :func:`attrs.make_class`.

    Returns:
        The attrs class.

    Raises:
        TypeError: See :func:`define`.
        ValueError: See :func:`define`.

    Examples:
        >>> import optree
        >>> Point = make_class('Point', ['x', 'y'], namespace='made-by-attrs')
        >>> optree.tree_leaves(Point(1, 2), namespace='made-by-attrs')
        [1, 2]
    """
    check_namespace(namespace)
    cls: type = _attrs_make_class(name, attrs, **kwargs)
    caller = _module_of_caller()
    if caller is not None:
        cls.__module__ = caller  # attrs names the module that called it: this one
    return _register_attrs_class(cls, namespace)


_attrs_make_class: Callable[..., type] = attrs.make_class


@overload
def register_node(
    cls: str | GlobalNamespace | None = None,
    /,
    *,
    namespace: str | GlobalNamespace | None = None,
) -> Callable[[_TypeT], _TypeT]: ...


@overload
def register_node(
    cls: _TypeT,
    /,
    *,
    namespace: str | GlobalNamespace | None = None,
) -> _TypeT: ...


def register_node(
    cls: _TypeT | str | GlobalNamespace | None = None,
    /,
    *,
    namespace: str | GlobalNamespace | None = None,
) -> _TypeT | Callable[[_TypeT], _TypeT]:
    """Make instances of an existing attrs class nodes.

    Args:
        cls: An attrs class. Without it, or with a namespace in its place, a decorator is returned.
        namespace: The namespace to register the class in; ``''`` is the global one.

    Returns:
        The class, or a decorator.

    Raises:
        TypeError: If the argument is not an attrs class or was registered before, ``namespace`` is
            not a string, or a child is not a parameter of ``__init__``.
        ValueError: If ``namespace`` is missing or given twice, or if the class is already
            registered in the namespace.

    Warns:
        UserWarning: If the class has no ``__init__`` made by attrs.

    Examples:
        >>> import attrs
        >>> import optree
        >>> @register_node('existing-attrs')
        ... @attrs.define
        ... class Point:
        ...     x: float
        ...     y: float
        >>> optree.tree_map(lambda x: 2 * x, Point(1, 2), namespace='existing-attrs')
        Point(x=2, y=4)
    """
    result: _TypeT | Callable[[_TypeT], _TypeT] = register_or_decorate(
        _register_attrs_class, cls, namespace
    )
    return result


def _register_attrs_class(cls: _TypeT, namespace: str | GlobalNamespace, /) -> _TypeT:
    if not inspect.isclass(cls):
        raise TypeError(f"Expected a class, got {cls!r}.")
    if not attrs.has(cls):
        raise TypeError(f"{cls!r} is not an attrs-decorated class.")
    check_not_registered(cls, _FIELDS, __name__)
    check_namespace(namespace)

    children, metadata = split_fields(_attributes(cls), _PYTREE_NODE_DEFAULT, __name__)
    _warn_about_init(cls)
    # The parameters of `__init__` are the aliases: `x` for the attribute `_x`.
    registered: _TypeT = register_fields(  # type: ignore[assignment]
        cls,
        namespace,
        children,
        metadata,
        attribute=_FIELDS,
        path_entry_type=AttrsEntry,
        parameters={name: field.alias for name, field in {**children, **metadata}.items()},
    )
    return registered


def _warn_about_init(cls: Any, /) -> None:
    # Only a generated `__init__` has such a file name.
    code = getattr(cls.__init__, "__code__", None)
    if code is None or not code.co_filename.startswith("<attrs generated"):
        _warn_caller(
            f"Attrs class {cls.__name__!r} does not use an attrs-generated `__init__` "
            f"(for example, `init=False`). "
            f"`tree_unflatten()` may fail because `{__name__}.register_node()` "
            f"reconstructs instances with `cls(**kwargs)`.",
        )
