# SPDX-License-Identifier: Apache-2.0
"""Register classes with fields as nodes: the part that dataclasses and attrs classes share."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, TypeVar

from optree.registry import (
    GLOBAL_NAMESPACE,
    GlobalNamespace,
    _register_node,
    unregister_pytree_node,
)

if TYPE_CHECKING:
    from optree.accessors import PyTreeEntry

_TypeT = TypeVar("_TypeT", bound=type)
_Register = Callable[[Any, Any], Any]


def check_namespace(namespace: object, /) -> None:
    """Raise TypeError if this is not a namespace."""
    if not isinstance(namespace, (str, GlobalNamespace)):
        raise TypeError(f"The namespace must be a string, got {namespace!r}.")


def check_not_registered(cls: type, attribute: str, module: str, /) -> None:
    """Raise TypeError if the class itself, not only a base class, is registered."""
    if attribute in cls.__dict__:
        raise TypeError(
            f"Cannot register {cls.__name__} as a pytree node more than once "
            f"with `{module}.register_node()`. "
            f"Use `optree.register_pytree_node()` or `optree.register_pytree_node_class()` "
            f"with explicit flatten/unflatten functions to register it in a different namespace.",
        )


def split_fields(
    fields: Any, default: bool, module: str, /
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two dictionaries by name: the fields that are children, and those that are metadata.

    Raises:
        TypeError: If a child is not a parameter of ``__init__``.
    """
    children: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    for field in fields:
        if field.metadata.get("pytree_node", default):
            if not field.init:
                raise TypeError(
                    f"PyTree node field {field.name!r} must be included in `__init__()`. "
                    f"Or you can explicitly set "
                    f"`{module}.field(init=False, pytree_node=False)`.",
                )
            children[field.name] = field
        elif field.init:
            metadata[field.name] = field
    return children, metadata


def register_or_decorate(register: _Register, cls: Any, namespace: Any, /) -> Any:
    """Register a class, or return a decorator; the namespace may take the place of the class.

    Raises:
        ValueError: If the namespace is missing, given twice, or an empty first argument.
    """
    if isinstance(cls, (str, GlobalNamespace)):
        if namespace is not None:
            raise ValueError("Cannot specify `namespace` when the first argument is a string.")
        if cls == "":
            raise ValueError("The namespace cannot be an empty string.")
        namespace, cls = cls, None
    if namespace is None:
        raise ValueError("Must specify `namespace` when the first argument is a class.")
    if cls is None:
        return lambda cls, /: register(cls, namespace)
    return register(cls, namespace)


def register_fields(
    cls: _TypeT,
    namespace: str | GlobalNamespace,
    children: dict[str, Any],
    metadata: dict[str, Any],
    /,
    *,
    attribute: str,
    path_entry_type: type[PyTreeEntry],
    parameters: dict[str, str] | None = None,
    is_plain: Callable[[type], bool] | None = None,
    assigned: tuple[str, ...] = (),
    placeholder: object = None,
) -> _TypeT:
    """Register a class whose children and metadata are fields, and return it.

    The extension module flattens and rebuilds instances without calling the two functions below;
    they define the result, and serve classes that it does not recognise.

    Args:
        cls: The class, rebuilt by ``cls(**fields)``.
        namespace: The namespace to register it in; ``''`` is the global one.
        children: The fields that are children, by name.
        metadata: The fields that are metadata, by name.
        attribute: The class gets both dictionaries as an attribute of this name.
        path_entry_type: The entry that leads to a field.
        parameters: The parameter of ``__init__`` for each field, if the names differ.
        is_plain: Returns whether ``__init__`` only assigns the fields, in the order ``assigned``.
            It is called again whenever the class has changed.
        assigned: The names of all fields in that order.
        placeholder: An argument that ``__init__`` replaces by another value, if there is one.
    """
    names, metadata_names = tuple(children), tuple(metadata)
    keywords = names if parameters is None else tuple([parameters[name] for name in names])

    def flatten_func(
        obj: Any,
        /,
    ) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...], tuple[str, ...]]:
        found = tuple([getattr(obj, name) for name in names])
        return found, tuple([(name, getattr(obj, name)) for name in metadata_names]), names

    def unflatten_func(metadata: tuple[tuple[str, Any], ...], children: tuple[Any, ...], /) -> Any:
        values = list(children)
        kwargs = {name: values[i] for i, name in enumerate(keywords[: len(values)])}
        if parameters is None:
            kwargs.update(metadata)
        else:
            kwargs.update((parameters[name], value) for name, value in metadata)
        return cls(**kwargs)

    where: Any = GLOBAL_NAMESPACE if namespace == "" else namespace
    fields = (*names, *metadata_names)
    _register_node(
        cls,
        flatten_func,
        unflatten_func,
        path_entry_type,
        where,
        (
            names,
            metadata_names,
            fields if parameters is None else tuple([parameters[name] for name in fields]),
            tuple(map(fields.index, assigned)),
            is_plain,
            placeholder,
        ),
    )
    try:
        setattr(cls, attribute, (MappingProxyType(children), MappingProxyType(metadata)))
    except BaseException:
        unregister_pytree_node(cls, namespace=where)
        raise
    return cls
