# SPDX-License-Identifier: Apache-2.0
"""Classes made by :mod:`attrs` that are nodes. Other members are those of :mod:`attrs`."""

from __future__ import annotations

import inspect
import sys
from types import MappingProxyType
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

from optree.accessors import GetAttrEntry
from optree.registry import (
    GLOBAL_NAMESPACE,
    GlobalNamespace,
    _warn_caller,
    register_pytree_node,
    unregister_pytree_node,
)

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
            is a child of the node; otherwise it is part of the metadata. By default it is a child.

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

    Attributes are children by default, see :func:`field`. Other attributes that ``__init__`` has
    are metadata. A node is rebuilt by calling the class.

    Args:
        cls: The class. Without it a decorator is returned.
        namespace: The namespace to register the class in; ``''`` is the global one.
        **kwargs: See :func:`attrs.define`.

    Returns:
        The attrs class, or a decorator.

    Raises:
        TypeError: If the argument is not a class or was registered before, ``namespace`` is not a
            string, or a child is not a parameter of ``__init__``.
        ValueError: If the class is registered in the namespace already.

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
        _check_not_registered(cls)
        _check_namespace(namespace)
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

    Examples:
        >>> import optree
        >>> Point = make_class('Point', ['x', 'y'], namespace='made-by-attrs')
        >>> optree.tree_leaves(Point(1, 2), namespace='made-by-attrs')
        [1, 2]
    """
    _check_namespace(namespace)
    cls: type = _attrs_make_class(name, attrs, **kwargs)
    # attrs names the module that called it, which is this one.
    caller = sys._getframe(1).f_globals.get("__name__")
    if caller is not None:
        cls.__module__ = caller
    return _register_attrs_class(cls, namespace)


_attrs_make_class: Callable[..., type] = attrs.make_class


@overload
def register_node(
    cls: str | None = None,
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
    cls: _TypeT | str | None = None,
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
        ValueError: If ``namespace`` is missing or given twice, or if the class is registered in the
            namespace already.

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
    if isinstance(cls, str):
        if namespace is not None:
            raise ValueError("Cannot specify `namespace` when the first argument is a string.")
        if cls == "":
            raise ValueError("The namespace cannot be an empty string.")
        namespace, cls = cls, None
    if namespace is None:
        raise ValueError("Must specify `namespace` when the first argument is a class.")
    if cls is None:
        namespace_given = namespace

        def decorator(cls: _TypeT, /) -> _TypeT:
            return _register_attrs_class(cls, namespace_given)

        return decorator
    return _register_attrs_class(cls, namespace)


def _check_namespace(namespace: object, /) -> None:
    if not isinstance(namespace, (str, GlobalNamespace)):
        raise TypeError(f"The namespace must be a string, got {namespace!r}.")


def _check_not_registered(cls: type, /) -> None:
    if _FIELDS in cls.__dict__:
        raise TypeError(
            f"Cannot register {cls.__name__} as a pytree node more than once "
            f"with `{__name__}.register_node()`. "
            f"Use `optree.register_pytree_node()` or `optree.register_pytree_node_class()` "
            f"with explicit flatten/unflatten functions to register it in a different namespace.",
        )


def _register_attrs_class(cls: _TypeT, namespace: str | GlobalNamespace, /) -> _TypeT:
    if not inspect.isclass(cls):
        raise TypeError(f"Expected a class, got {cls!r}.")
    if not attrs.has(cls):
        raise TypeError(f"{cls!r} is not an attrs-decorated class.")
    _check_not_registered(cls)
    _check_namespace(namespace)

    children_fields: dict[str, Attribute[Any]] = {}
    metadata_fields: dict[str, Attribute[Any]] = {}
    for attribute in _attributes(cls):
        if attribute.metadata.get("pytree_node", _PYTREE_NODE_DEFAULT):
            if not attribute.init:
                raise TypeError(
                    f"PyTree node field {attribute.name!r} must be included in `__init__()`. "
                    f"Or you can explicitly set "
                    f"`{__name__}.field(init=False, pytree_node=False)`.",
                )
            children_fields[attribute.name] = attribute
        elif attribute.init:
            metadata_fields[attribute.name] = attribute
    _warn_about_init(cls)

    children_names, metadata_names = tuple(children_fields), tuple(metadata_fields)
    # `__init__` has aliases as parameters: `x` for the attribute `_x`.
    children_aliases = tuple(a.alias for a in children_fields.values())
    metadata_aliases = {name: a.alias for name, a in metadata_fields.items()}

    def flatten_func(
        obj: Any,
        /,
    ) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...], tuple[str, ...]]:
        children = tuple([getattr(obj, name) for name in children_names])
        metadata = tuple([(name, getattr(obj, name)) for name in metadata_names])
        return children, metadata, children_names

    def unflatten_func(metadata: tuple[tuple[str, Any], ...], children: tuple[Any, ...], /) -> Any:
        kwargs: dict[Any, Any] = dict(zip(children_aliases, children))
        kwargs.update((metadata_aliases[name], value) for name, value in metadata)
        return cls(**kwargs)

    registered_namespace: Any = GLOBAL_NAMESPACE if namespace == "" else namespace
    register_pytree_node(
        cls,
        flatten_func,
        unflatten_func,
        path_entry_type=AttrsEntry,
        namespace=registered_namespace,
    )
    try:
        setattr(
            cls,
            _FIELDS,
            (MappingProxyType(children_fields), MappingProxyType(metadata_fields)),
        )
    except BaseException:
        unregister_pytree_node(cls, namespace=registered_namespace)
        raise
    registered: _TypeT = cls  # type: ignore[assignment]
    return registered


def _warn_about_init(cls: Any, /) -> None:
    # A generated `__init__` has a file name of its own; others are user code or that of `object`.
    code = getattr(cls.__init__, "__code__", None)
    if code is None or not code.co_filename.startswith("<attrs generated"):
        _warn_caller(
            f"Attrs class {cls.__name__!r} does not use an attrs-generated `__init__` "
            f"(for example, `init=False`). "
            f"`tree_unflatten()` may fail because `{__name__}.register_node()` "
            f"reconstructs instances with `cls(**kwargs)`.",
        )
