# SPDX-License-Identifier: Apache-2.0
"""Dataclasses that are nodes. All other names are re-exported from :mod:`dataclasses`."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from dataclasses import MISSING as MISSING
from dataclasses import Field as Field
from dataclasses import FrozenInstanceError as FrozenInstanceError
from dataclasses import InitVar as InitVar
from dataclasses import asdict as asdict
from dataclasses import astuple as astuple
from dataclasses import fields as fields
from dataclasses import is_dataclass as is_dataclass
from dataclasses import replace as replace
from typing import TYPE_CHECKING, Any, Callable, Final, Literal, Protocol, TypeVar, overload

from typing_extensions import dataclass_transform

from optree._field_nodes import (
    check_namespace,
    check_not_registered,
    register_fields,
    register_or_decorate,
    split_fields,
)
from optree.accessors import DataclassEntry, GetAttrEntry
from optree.registry import GlobalNamespace, _module_of_caller, _warn_caller

if TYPE_CHECKING:
    from collections.abc import Iterable


if sys.version_info >= (3, 10):
    from dataclasses import KW_ONLY as KW_ONLY


__all__ = ["DataclassEntry", "register_node", *dataclasses.__all__]  # noqa: PLE0604

# Names that only a newer standard library has.
for _name in dataclasses.__all__:
    globals().setdefault(_name, getattr(dataclasses, _name))
del _name


_FIELDS = "__optree_dataclass_fields__"
_PYTREE_NODE_DEFAULT: bool = True

_T = TypeVar("_T")
_U = TypeVar("_U")
_TypeT = TypeVar("_TypeT", bound=type)


def _reject_unsupported(function: str, options: dict[str, tuple[Any, bool]], /) -> dict[str, Any]:
    """Return the options to pass to the standard library of the running Python.

    Args:
        function: The name of the function, for the message.
        options: The value of each option and whether this Python has the option. The value
            :data:`dataclasses.MISSING` means that the option was not given.
    """
    supported: dict[str, Any] = {}
    for name, (value, is_supported) in options.items():
        if value is dataclasses.MISSING:
            continue
        if not is_supported:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        supported[name] = value
    return supported


def _given(value: Any, default: Any, /) -> Any:
    return dataclasses.MISSING if value is default else value


@overload
def field(
    *,
    default: _T,
    init: bool = True,
    repr: bool = True,
    hash: bool | None = None,
    compare: bool = True,
    metadata: dict[Any, Any] | None = None,
    kw_only: bool | Literal[dataclasses.MISSING] = dataclasses.MISSING,  # type: ignore[valid-type]
    doc: str | None = None,
    pytree_node: bool | None = None,
) -> _T: ...


@overload
def field(
    *,
    default_factory: Callable[[], _T],
    init: bool = True,
    repr: bool = True,
    hash: bool | None = None,
    compare: bool = True,
    metadata: dict[Any, Any] | None = None,
    kw_only: bool | Literal[dataclasses.MISSING] = dataclasses.MISSING,  # type: ignore[valid-type]
    doc: str | None = None,
    pytree_node: bool | None = None,
) -> _T: ...


@overload
def field(
    *,
    init: bool = True,
    repr: bool = True,
    hash: bool | None = None,
    compare: bool = True,
    metadata: dict[Any, Any] | None = None,
    kw_only: bool | Literal[dataclasses.MISSING] = dataclasses.MISSING,  # type: ignore[valid-type]
    doc: str | None = None,
    pytree_node: bool | None = None,
) -> Any: ...


def field(
    *,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
    init: bool = True,
    repr: bool = True,  # noqa: A002
    hash: bool | None = None,  # noqa: A002
    compare: bool = True,
    metadata: dict[Any, Any] | None = None,
    kw_only: bool | Literal[dataclasses.MISSING] = dataclasses.MISSING,  # type: ignore[valid-type]
    doc: str | None = None,
    pytree_node: bool | None = None,
) -> Any:
    """Return a description of a field of a dataclass, see :func:`dataclasses.field`.

    Args:
        default: The default of the field.
        default_factory: A function without arguments that returns the default.
        init: Whether ``__init__`` has a parameter for the field.
        repr: Whether ``__repr__`` shows the field.
        hash: Whether ``__hash__`` uses the field. ``None`` means that it does if comparisons do.
        compare: Whether comparisons use the field.
        metadata: A mapping to store with the field. Its item ``'pytree_node'`` has the same meaning
            as the parameter.
        kw_only: Whether the parameter is keyword-only.
        doc: The docstring of the field (Python 3.14+).
        pytree_node: Whether the field is a child of the node. Otherwise it is part of the metadata.
            By default it is a child.

    Returns:
        A :class:`dataclasses.Field`.

    Raises:
        TypeError: If a field is a child but not a parameter of ``__init__``, so that the node
            cannot be rebuilt.

    Examples:
        >>> import optree
        >>> @optree.dataclasses.dataclass(namespace='fields')
        ... class Layer:
        ...     weight: float
        ...     activation: str = optree.dataclasses.field(default='relu', pytree_node=False)
        >>> optree.tree_leaves(Layer(3.0), namespace='fields')
        [3.0]
    """
    metadata = {} if metadata is None else dict(metadata)
    if pytree_node is None:
        pytree_node = metadata.get("pytree_node", _PYTREE_NODE_DEFAULT)
    metadata["pytree_node"] = pytree_node
    if not init and pytree_node:
        raise TypeError(
            "`pytree_node=True` is not allowed for non-init fields. "
            f"Please explicitly set `{__name__}.field(init=False, pytree_node=False)`.",
        )
    options = _reject_unsupported(
        "field",
        {
            "kw_only": (kw_only, sys.version_info >= (3, 10)),
            "doc": (_given(doc, None), sys.version_info >= (3, 14)),
        },
    )
    return dataclasses.field(
        default=default,
        default_factory=default_factory,
        init=init,
        repr=repr,
        hash=hash,
        compare=compare,
        metadata=metadata,
        **options,
    )


@overload
@dataclass_transform(field_specifiers=(field,))
def dataclass(
    cls: None = None,
    /,
    *,
    init: bool = True,
    repr: bool = True,
    eq: bool = True,
    order: bool = False,
    unsafe_hash: bool = False,
    frozen: bool = False,
    match_args: bool = True,
    kw_only: bool = False,
    slots: bool = False,
    weakref_slot: bool = False,
    namespace: str | GlobalNamespace,
) -> Callable[[_TypeT], _TypeT]: ...


@overload
@dataclass_transform(field_specifiers=(field,))
def dataclass(
    cls: _TypeT,
    /,
    *,
    init: bool = True,
    repr: bool = True,
    eq: bool = True,
    order: bool = False,
    unsafe_hash: bool = False,
    frozen: bool = False,
    match_args: bool = True,
    kw_only: bool = False,
    slots: bool = False,
    weakref_slot: bool = False,
    namespace: str | GlobalNamespace,
) -> _TypeT: ...


@dataclass_transform(field_specifiers=(field,))
def dataclass(
    cls: _TypeT | None = None,
    /,
    *,
    init: bool = True,
    repr: bool = True,  # noqa: A002
    eq: bool = True,
    order: bool = False,
    unsafe_hash: bool = False,
    frozen: bool = False,
    match_args: bool = True,
    kw_only: bool = False,
    slots: bool = False,
    weakref_slot: bool = False,
    namespace: str | GlobalNamespace,
) -> _TypeT | Callable[[_TypeT], _TypeT]:
    """Make a class a dataclass, see :func:`dataclasses.dataclass`, and its instances nodes.

    Fields are children by default, see :func:`field`. Other fields that ``__init__`` accepts are
    metadata. A node is rebuilt with ``cls(**children, **metadata)``.

    Args:
        cls: The class. Without it a decorator is returned.
        init: Whether to add ``__init__``.
        repr: Whether to add ``__repr__``.
        eq: Whether to add ``__eq__``.
        order: Whether to add ``<``, ``<=``, ``>`` and ``>=``.
        unsafe_hash: Whether to add ``__hash__`` even if the fields can be assigned.
        frozen: Whether assigning to a field raises.
        match_args: Whether to add ``__match_args__``.
        kw_only: Whether all parameters of ``__init__`` are keyword-only.
        slots: Whether to add ``__slots__``.
        weakref_slot: Whether to add a slot for weak references.
        namespace: The namespace to register the class in; ``''`` is the global one.

    Returns:
        The dataclass, or a decorator.

    Raises:
        TypeError: If the argument is not a class or was decorated before, ``namespace`` is not a
            string, a child is not a parameter of ``__init__``, or there are ``InitVar`` fields.
        ValueError: If the class is already registered in the namespace.

    Examples:
        >>> import optree
        >>> @dataclass(namespace='points')
        ... class Point:
        ...     x: float
        ...     y: float
        ...     name: str = field(default='origin', pytree_node=False)
        >>> point = Point(1.0, 2.0, name='P')
        >>> optree.tree_map(lambda x: -x, point, namespace='points')
        Point(x=-1.0, y=-2.0, name='P')
        >>> optree.tree_structure(point, namespace='points')
        PyTreeSpec(CustomTreeNode(Point[(('name', 'P'),)], [*, *]), namespace='points')
    """
    options = _reject_unsupported(
        "dataclass",
        {
            "match_args": (_given(match_args, True), sys.version_info >= (3, 10)),
            "kw_only": (_given(kw_only, False), sys.version_info >= (3, 10)),
            "slots": (_given(slots, False), sys.version_info >= (3, 10)),
            "weakref_slot": (_given(weakref_slot, False), sys.version_info >= (3, 11)),
        },
    )

    def decorator(cls: _TypeT, /) -> _TypeT:
        if not inspect.isclass(cls):
            raise TypeError(
                f"@{__name__}.dataclass() can only be used with classes, not {cls!r}.",
            )
        if _FIELDS in cls.__dict__:
            raise TypeError(
                f"@{__name__}.dataclass() cannot be applied to {cls.__name__} more than once.",
            )
        check_namespace(namespace)
        new_cls: Any = dataclasses.dataclass(
            cls,
            init=init,
            repr=repr,
            eq=eq,
            order=order,
            unsafe_hash=unsafe_hash,
            frozen=frozen,
            **options,
        )
        registered: _TypeT = _register_dataclass(new_cls, namespace)
        return registered

    return decorator if cls is None else decorator(cls)


class _DataclassDecorator(Protocol[_TypeT]):
    """The type of functions such as :func:`dataclasses.dataclass`."""

    def __call__(self, cls: _TypeT, /, **kwargs: Any) -> _TypeT:
        """Return the dataclass."""


def make_dataclass(
    cls_name: str,
    fields: Iterable[str | tuple[str, Any] | tuple[str, Any, Any]],
    *,
    bases: tuple[type, ...] = (),
    ns: dict[str, Any] | None = None,
    init: bool = True,
    repr: bool = True,  # noqa: A002
    eq: bool = True,
    order: bool = False,
    unsafe_hash: bool = False,
    frozen: bool = False,
    match_args: bool = True,
    kw_only: bool = False,
    slots: bool = False,
    weakref_slot: bool = False,
    module: str | None = None,
    decorator: _DataclassDecorator[_TypeT] = dataclasses.dataclass,  # type: ignore[assignment]
    namespace: str | GlobalNamespace,
) -> Any:
    """Make a dataclass from a list of fields, and register it as a node type.

    Args:
        cls_name: The name of the class.
        fields: The names of the fields, or tuples of a name, a type and a :func:`field`. A field
            that is not a child needs a :func:`field`.
        bases: The base classes.
        ns: The members of the class. :func:`dataclasses.make_dataclass` calls this parameter
            ``namespace``.
        init: Whether to add ``__init__``.
        repr: Whether to add ``__repr__``.
        eq: Whether to add ``__eq__``.
        order: Whether to add ``<``, ``<=``, ``>`` and ``>=``.
        unsafe_hash: Whether to add ``__hash__`` even if the fields can be assigned.
        frozen: Whether assigning to a field raises.
        match_args: Whether to add ``__match_args__``.
        kw_only: Whether all parameters of ``__init__`` are keyword-only.
        slots: Whether to add ``__slots__``.
        weakref_slot: Whether to add a slot for weak references.
        module: The name of the module of the class.
        decorator: The function that makes a dataclass of the class.
        namespace: The namespace to register the class in; ``''`` is the global one.

    Returns:
        The dataclass.

    Raises:
        TypeError: See :func:`dataclass`.
        ValueError: See :func:`dataclass`.

    Examples:
        >>> import optree
        >>> Point = make_dataclass('Point', ['x', ('y', int)], namespace='made')
        >>> optree.tree_leaves(Point(1, 2), namespace='made')
        [1, 2]
    """
    if isinstance(namespace, dict) or namespace is None:
        # The standard library calls the members of the class `namespace`.
        if ns is None:
            raise TypeError("make_dataclass() missing 1 required keyword-only argument: 'ns'")
        ns, namespace = namespace, ns
    check_namespace(namespace)

    caller = None if module is not None else _module_of_caller()
    options = _reject_unsupported(
        "make_dataclass",
        {
            "match_args": (_given(match_args, True), sys.version_info >= (3, 10)),
            "kw_only": (_given(kw_only, False), sys.version_info >= (3, 10)),
            "slots": (_given(slots, False), sys.version_info >= (3, 10)),
            "weakref_slot": (_given(weakref_slot, False), sys.version_info >= (3, 11)),
            "module": (_given(module, None), sys.version_info >= (3, 12)),
            "decorator": (
                _given(decorator, dataclasses.dataclass),
                sys.version_info >= (3, 14),
            ),
        },
    )
    cls = dataclasses.make_dataclass(
        cls_name,
        fields,
        bases=bases,
        namespace=ns,
        init=init,
        repr=repr,
        eq=eq,
        order=order,
        unsafe_hash=unsafe_hash,
        frozen=frozen,
        **options,
    )
    # The standard library sets `__module__` to its caller, this module; before 3.12 it sets none.
    if caller is not None and (sys.version_info >= (3, 12) or "__module__" not in (ns or {})):
        cls.__module__ = caller
    return _register_dataclass(cls, namespace)


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
    """Make instances of an existing dataclass nodes.

    Args:
        cls: A dataclass. Without it, or with a namespace in its place, a decorator is returned.
        namespace: The namespace to register the class in; ``''`` is the global one.

    Returns:
        The dataclass, or a decorator.

    Raises:
        TypeError: If the argument is not a dataclass or was registered before, ``namespace`` is not
            a string, a child is not a parameter of ``__init__``, or there are ``InitVar`` fields.
        ValueError: If ``namespace`` is missing or given twice, or if the class is already
            registered in the namespace.

    Warns:
        UserWarning: If the class has no ``__init__`` made from its fields.

    Examples:
        >>> import dataclasses
        >>> import optree
        >>> @register_node('existing')
        ... @dataclasses.dataclass
        ... class Point:
        ...     x: float
        ...     y: float
        >>> optree.tree_map(lambda x: 2 * x, Point(1, 2), namespace='existing')
        Point(x=2, y=4)
    """
    result: _TypeT | Callable[[_TypeT], _TypeT] = register_or_decorate(
        _register_dataclass, cls, namespace
    )
    return result


def _register_dataclass(cls: _TypeT, namespace: str | GlobalNamespace, /) -> _TypeT:
    if not inspect.isclass(cls):
        raise TypeError(f"Expected a class, got {cls!r}.")
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls!r} is not a dataclass.")
    check_not_registered(cls, _FIELDS, __name__)
    check_namespace(namespace)
    children_fields, metadata_fields = _classify_fields(cls)
    if not cls.__dataclass_params__.init:  # type: ignore[attr-defined]
        _warn_caller(
            f"Dataclass {cls.__name__!r} was defined with `init=False`. "
            f"`tree_unflatten()` may fail because `{__name__}.register_node()` "
            f"reconstructs instances with `cls(**kwargs)`.",
        )

    return register_fields(
        cls,
        namespace,
        children_fields,
        metadata_fields,
        attribute=_FIELDS,
        path_entry_type=DataclassEntry,
        is_plain=_init_only_sets_fields,
        assigned=tuple([f.name for f in dataclasses.fields(cls) if f.init]),
        placeholder=_FACTORY_PLACEHOLDER,
    )


def register_dataclass(
    cls: _TypeT,
    /,
    data_fields: Iterable[str],
    meta_fields: Iterable[str] = (),
    *,
    namespace: str | GlobalNamespace,
) -> _TypeT:
    """Make instances of a class nodes; the attributes that are children are named here.

    Use it for classes of other libraries. The class need not be a dataclass. An instance is rebuilt
    with ``cls(**data, **meta)``.

    Args:
        cls: The class.
        data_fields: The names of the attributes that are children, in their order.
        meta_fields: The names of the attributes that are metadata.
        namespace: The namespace to register the class in; ``''`` is the global one.

    Returns:
        The class.

    Raises:
        TypeError: If ``cls`` is not a class or was registered before, or if a name or
            ``namespace`` is not a string.
        ValueError: If a name is given twice, or if the class is already registered in the
            namespace. For a dataclass also if a name is not a field that ``__init__`` accepts, or
            if such a field without a default is not named.

    Examples:
        >>> import dataclasses
        >>> import optree
        >>> @dataclasses.dataclass
        ... class Layer:
        ...     weight: float
        ...     activation: str
        >>> _ = register_dataclass(Layer, ['weight'], ['activation'], namespace='by-name')
        >>> optree.tree_map(lambda x: 2 * x, Layer(1.5, 'relu'), namespace='by-name')
        Layer(weight=3.0, activation='relu')
    """
    if not inspect.isclass(cls):
        raise TypeError(f"Expected a class, got {cls!r}.")
    check_not_registered(cls, _FIELDS, __name__)
    check_namespace(namespace)
    data, meta = list(data_fields), list(meta_fields)
    for name in (*data, *meta):
        if not isinstance(name, str):
            raise TypeError(f"Expected the names of fields, got {name!r}.")
        if (data + meta).count(name) > 1:
            raise ValueError(f"Expected each field once, got {name!r} more than once.")
    known: dict[str, Any] = {}
    if dataclasses.is_dataclass(cls):
        known = {f.name: f for f in dataclasses.fields(cls) if f.init}
        missing = [
            name
            for name, f in known.items()
            if name not in (*data, *meta)
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        unknown = [name for name in (*data, *meta) if name not in known]
        if missing or unknown:
            raise ValueError(
                f"Expected the fields of {cls.__name__} that `__init__()` accepts, {list(known)}, "
                f"in `data_fields` or `meta_fields`; unknown: {unknown}, missing: {missing}.",
            )
    registered: _TypeT = register_fields(
        cls,
        namespace,
        {name: known.get(name) for name in data},
        {name: known.get(name) for name in meta},
        attribute=_FIELDS,
        path_entry_type=GetAttrEntry,
    )
    return registered


# Given this argument, a generated `__init__` calls the default factory of the field instead.
_FACTORY_PLACEHOLDER: Final[object] = dataclasses._HAS_DEFAULT_FACTORY  # type: ignore[attr-defined]

# Two functions do the same with equal arguments if their code objects agree in these attributes.
_CODE: Final = (
    *("co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags"),
)


def _init_only_sets_fields(cls: Any, /) -> bool:
    """Return whether ``cls(**fields)`` only assigns each field of a new object, in order.

    This is so if ``__init__`` has the code that the standard library generates for a class whose
    fields are all parameters and that has no ``__post_init__``.
    """
    if cls.__new__ is not object.__new__ or type(cls).__call__ is not type.__call__:
        return False
    params = cls.__dataclass_params__
    if not params.init or not (params.frozen or cls.__setattr__ is object.__setattr__):
        return False
    twin_fields = []
    for f in dataclasses.fields(cls):
        if not f.init:  # if `__init__` assigns it nevertheless, its code differs from the twin's
            continue
        options: dict[str, Any] = {}
        if f.default is not dataclasses.MISSING:
            options["default"] = None
        elif f.default_factory is not dataclasses.MISSING:
            options["default_factory"] = list
        if sys.version_info >= (3, 10):
            options["kw_only"] = f.kw_only
        twin_fields.append((f.name, object, dataclasses.field(**options)))
    twin: Any = dataclasses.make_dataclass("Twin", twin_fields, frozen=params.frozen)
    init, expected = cls.__init__, twin.__init__
    code = getattr(init, "__code__", None)
    if code is None or any(getattr(code, n) != getattr(expected.__code__, n) for n in _CODE):
        return False
    # The closures must agree, except for the default values and factories.
    cells, expected_cells = _closure(init), _closure(expected)
    for i, name in enumerate(code.co_freevars):
        if cells[i] is not expected_cells[i] and not name.startswith(_FACTORY_NAMES):
            return False
    return True


_FACTORY_NAMES: Final = ("_dflt_", "__dataclass_dflt_")


def _closure(function: Any, /) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _classify_fields(
    cls: Any,
    /,
) -> tuple[dict[str, dataclasses.Field[Any]], dict[str, dataclasses.Field[Any]]]:
    """Return the fields of a dataclass that are children, and those that are metadata."""
    init_vars = [
        name
        for name, f in cls.__dataclass_fields__.items()
        if f._field_type is dataclasses._FIELD_INITVAR  # type: ignore[attr-defined]
    ]
    if init_vars:
        raise TypeError(
            f"Dataclass {cls.__name__!r} has `InitVar` field(s) {init_vars}, "
            f"which the auto-generated flatten/unflatten functions cannot round-trip "
            f"(`{__name__}.register_node()` reconstructs instances with `cls(**kwargs)` "
            f"and cannot restore `InitVar` values). "
            f"Use `optree.register_pytree_node()` or `optree.register_pytree_node_class()` "
            f"with explicit flatten/unflatten functions instead.",
        )
    return split_fields(dataclasses.fields(cls), _PYTREE_NODE_DEFAULT, __name__)
