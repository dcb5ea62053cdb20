# SPDX-License-Identifier: Apache-2.0
"""The registry: which classes are nodes, and how nodes are taken apart and rebuilt."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from collections import namedtuple
from threading import RLock
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Final,
    TypeVar,
    overload,
)

import optree._C as _C
from optree._C import PyTreeKind
from optree.accessors import (
    AutoEntry,
    PyTreeEntry,
)
from optree.builtin_nodes import (
    _INSERTION_ORDERED_REGISTRY,
    _NODETYPE_REGISTRY,
    PyTreeNodeRegistryEntry,
)
from optree.builtin_nodes import DictMetaData as DictMetaData
from optree.typing import (
    FlattenFunc,
    StructSequence,
    UnflattenFunc,
    is_namedtuple_class,
    is_structseq_class,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from typing_extensions import Self

    from optree._C import Attributes


__all__ = [  # noqa: RUF022 # grouped
    "register_pytree_node",
    "register_pytree_node_class",
    "unregister_pytree_node",
    "dict_insertion_ordered",
]


_ClassT = TypeVar("_ClassT", bound=type)


class GlobalNamespace:
    """The type of :data:`optree.registry.GLOBAL_NAMESPACE`; there is one instance."""

    __slots__: ClassVar[tuple[()]] = ()

    def __new__(cls, /) -> Self:
        """Return the one instance."""
        return globals().get("GLOBAL_NAMESPACE") or super().__new__(cls)

    def __reduce__(self, /) -> str:
        """Pickle as a reference to the one instance."""
        return "GLOBAL_NAMESPACE"

    def __repr__(self, /) -> str:
        """Name the object."""
        return "<GLOBAL NAMESPACE>"


GLOBAL_NAMESPACE: Final[GlobalNamespace] = GlobalNamespace()
"""Pass it as ``namespace`` to register a class for all namespaces at once."""

# The name under which clients imported the object before it was public.
__GLOBAL_NAMESPACE = GLOBAL_NAMESPACE


def _namespace_name(namespace: str | GlobalNamespace, /) -> str:
    """Check a ``namespace`` argument and return the name that the extension module uses."""
    if isinstance(namespace, GlobalNamespace):
        return ""
    if not isinstance(namespace, str):
        raise TypeError(f"The namespace must be a string, got {namespace!r}.")
    if namespace == "":
        raise ValueError("The namespace cannot be an empty string.")
    return namespace


# Keeps `_NODETYPE_REGISTRY` consistent with the registry of the extension module. Error messages
# run user code (`repr` of classes), so they are made while the lock is not held.
_REGISTRY_LOCK: Final = RLock()

_PACKAGE_DIRECTORY: Final[str] = os.path.dirname(os.path.abspath(__file__)) + os.sep


def _warn_caller(message: str, /) -> None:
    """Emit a :class:`UserWarning` that names the line of code that called this package."""
    stacklevel = 1
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE_DIRECTORY):
        frame = frame.f_back
        stacklevel += 1
    del frame
    warnings.warn(message, UserWarning, stacklevel=stacklevel)


def _module_of_caller() -> str | None:
    """Return the name of the module whose code called this package."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE_DIRECTORY):
        frame = frame.f_back
    return None if frame is None else frame.f_globals.get("__name__")


def _registry_key(cls: type, namespace: str, /) -> Any:
    return (namespace, cls) if namespace else cls


def _override_warning(cls: type, namespace: str, /) -> str | None:
    """Return the warning for a class that is a node anyway, or ``None`` for other classes."""
    if is_structseq_class(cls):
        relation = "a class of `PyStructSequence`"
    elif is_namedtuple_class(cls):
        relation = "a subclass of `collections.namedtuple`"
    else:
        return None
    where = f" in namespace {namespace!r}" if namespace else ""
    return (
        f"PyTree type {cls!r} is {relation}, which is already registered in the global namespace. "
        f"Override it with custom flatten/unflatten functions{where}."
    )


def register_pytree_node(
    cls: _ClassT,
    /,
    flatten_func: FlattenFunc[Any],
    unflatten_func: UnflattenFunc[Any],
    *,
    path_entry_type: type[PyTreeEntry] = AutoEntry,
    namespace: str | GlobalNamespace,
) -> _ClassT:
    """Make instances of a class nodes of trees.

    Objects of exactly this class become nodes, and only in calls with this ``namespace``; objects
    of subclasses do not. With namespaces, two libraries can treat one class differently.

    Args:
        cls: The class. Built-in node types cannot be registered.
        flatten_func: Takes an instance apart: ``flatten_func(obj)`` returns
            ``(children, metadata)`` or ``(children, metadata, entries)``. ``children`` is an
            iterable. ``metadata`` is whatever else is needed to rebuild the object. It is compared
            with ``==``. ``entries`` has one path entry per child, by default 0, 1, 2, and so on.
        unflatten_func: Rebuilds an object: called with the metadata and a tuple of children.
        path_entry_type: The class of the steps from an instance to its children.
        namespace: A non-empty string, or :data:`optree.registry.GLOBAL_NAMESPACE` to register the
            class in all namespaces.

    Returns:
        The class.

    Raises:
        TypeError: If ``cls`` is not a class, ``path_entry_type`` not a subclass of
            :class:`optree.PyTreeEntry`, ``namespace`` not a string, or a function not callable.
        ValueError: If ``namespace`` is empty, or if ``cls`` is a built-in node type or is already
            registered in the namespace.

    Warns:
        UserWarning: If the class is a namedtuple or struct sequence class, which is a node anyway.

    Examples:
        >>> import optree
        >>> _ = register_pytree_node(
        ...     set,
        ...     lambda s: (sorted(s), None),
        ...     lambda _, children: set(children),
        ...     namespace='sets',
        ... )
        >>> optree.tree_leaves([{2, 1}])
        [{1, 2}]
        >>> optree.tree_leaves([{2, 1}], namespace='sets')
        [1, 2]
        >>> _ = unregister_pytree_node(set, namespace='sets')
    """
    return _register_node(cls, flatten_func, unflatten_func, path_entry_type, namespace)


def _register_node(
    cls: _ClassT,
    flatten_func: FlattenFunc[Any],
    unflatten_func: UnflattenFunc[Any],
    path_entry_type: type[PyTreeEntry],
    namespace: str | GlobalNamespace,
    attributes: Attributes | None = None,
    /,
) -> _ClassT:
    """Register a class; with ``attributes`` its instances are flattened without the functions."""
    if not inspect.isclass(cls):
        raise TypeError(f"Expected a class, got {cls!r}.")
    if not (inspect.isclass(path_entry_type) and issubclass(path_entry_type, PyTreeEntry)):
        raise TypeError(f"Expected a subclass of PyTreeEntry, got {path_entry_type!r}.")
    name = _namespace_name(namespace)
    for parameter, func in (("flatten_func", flatten_func), ("unflatten_func", unflatten_func)):
        if not callable(func):
            raise TypeError(f"Expected a callable for `{parameter}`, got {func!r}.")

    entry: PyTreeNodeRegistryEntry[Any] = PyTreeNodeRegistryEntry(
        cls,
        flatten_func,
        unflatten_func,
        path_entry_type=path_entry_type,
        namespace=name,
    )
    key = _registry_key(cls, name)
    while True:
        with _REGISTRY_LOCK:
            if key not in _NODETYPE_REGISTRY and cls is not StructSequence:
                _C.register_node(
                    cls, flatten_func, unflatten_func, path_entry_type, name, attributes
                )
                _NODETYPE_REGISTRY[key] = entry
                break
        if cls is StructSequence:
            raise ValueError(f"PyTree type {cls!r} is a built-in type and cannot be re-registered.")
        _C.register_node(cls, flatten_func, unflatten_func, path_entry_type, name)
        # Another thread unregistered the class before this thread could report it.
        _C.unregister_node(cls, name)

    try:
        message = _override_warning(cls, name)
        if message is not None:
            _warn_caller(message)
    except BaseException:  # raised by `repr(cls)` or by the warning: undo the registration
        with _REGISTRY_LOCK:
            if _NODETYPE_REGISTRY.get(key) is entry:
                _C.unregister_node(cls, name)
                del _NODETYPE_REGISTRY[key]
        raise
    return cls


@overload
def register_pytree_node_class(
    cls: str | GlobalNamespace | None = None,
    /,
    *,
    path_entry_type: type[PyTreeEntry] | None = None,
    namespace: str | GlobalNamespace | None = None,
) -> Callable[[_ClassT], _ClassT]: ...


@overload
def register_pytree_node_class(
    cls: _ClassT,
    /,
    *,
    path_entry_type: type[PyTreeEntry] | None = None,
    namespace: str | GlobalNamespace | None = None,
) -> _ClassT: ...


def register_pytree_node_class(
    cls: _ClassT | str | GlobalNamespace | None = None,
    /,
    *,
    path_entry_type: type[PyTreeEntry] | None = None,
    namespace: str | GlobalNamespace | None = None,
) -> _ClassT | Callable[[_ClassT], _ClassT]:
    """Make instances of a class nodes of trees, with the methods of the class itself.

    The class needs a method ``__tree_flatten__(self)`` and a class method
    ``__tree_unflatten__(cls, metadata, children)``, see :class:`optree.CustomTreeNode`. A class
    with ``tree_flatten`` and ``tree_unflatten``, as JAX expects them, gets the other two added.

    Args:
        cls: The class. Without it, or with a namespace in its place, a decorator is returned.
        path_entry_type: The class of the steps from an instance to its children, by default the
            attribute ``TREE_PATH_ENTRY_TYPE`` of the class, or :class:`optree.AutoEntry`.
        namespace: See :func:`register_pytree_node`.

    Returns:
        The class, or a decorator.

    Raises:
        TypeError: If ``cls`` is not a class or lacks the methods, ``path_entry_type`` is not a
            subclass of :class:`optree.PyTreeEntry`, or ``namespace`` is not a string.
        ValueError: If ``namespace`` is missing, empty, or given twice, or if the class is already
            registered in the namespace. The class is then left unchanged.

    Examples:
        >>> import optree
        >>> @register_pytree_node_class('shapes')
        ... class Circle:
        ...     TREE_PATH_ENTRY_TYPE = optree.GetAttrEntry
        ...     def __init__(self, center, radius):
        ...         self.center, self.radius = center, radius
        ...     def __tree_flatten__(self):
        ...         return (self.center, self.radius), None, ('center', 'radius')
        ...     @classmethod
        ...     def __tree_unflatten__(cls, metadata, children):
        ...         return cls(*children)
        >>> circle = optree.tree_map(lambda x: 2 * x, Circle((1, 2), 3), namespace='shapes')
        >>> circle.center, circle.radius
        ((2, 4), 6)
        >>> [a.codify('c') for a in optree.tree_accessors(circle, namespace='shapes')]
        ['c.center[0]', 'c.center[1]', 'c.radius']
    """
    if isinstance(cls, (str, GlobalNamespace)):
        if namespace is not None:
            raise ValueError("Cannot specify `namespace` when the first argument is a string.")
        namespace, cls = cls, None
    if namespace is None:
        raise ValueError("Must specify `namespace` when the first argument is a class.")
    _namespace_name(namespace)
    if cls is None:
        namespace_given = namespace

        def decorator(cls: _ClassT, /) -> _ClassT:
            return _register_class(cls, path_entry_type, namespace_given)

        return decorator
    return _register_class(cls, path_entry_type, namespace)


# A Python function rather than `operator.methodcaller()`, so that `torch.compile()` can trace it.
def _flatten_by_method(obj: Any, /) -> Any:
    return obj.__tree_flatten__()


# The methods added to a class that has those of JAX. They look the methods up when they are called,
# so that overrides in subclasses and later changes take effect.
def _call_tree_flatten(self: Any, /) -> Any:
    """Return the children and the metadata."""
    return self.tree_flatten()


def _call_tree_unflatten(cls: Any, metadata: Any, children: Any, /) -> Any:
    """Rebuild an instance from the metadata and the children."""
    return cls.tree_unflatten(metadata, children)


_FORWARDING_METHODS: Final[dict[str, Any]] = {
    "__tree_flatten__": _call_tree_flatten,
    "__tree_unflatten__": classmethod(_call_tree_unflatten),
}


def _register_class(
    cls: _ClassT,
    path_entry_type: type[PyTreeEntry] | None,
    namespace: str | GlobalNamespace,
    /,
) -> _ClassT:
    if not inspect.isclass(cls):
        raise TypeError(f"Expected a class, got {cls!r}.")
    if path_entry_type is None:
        path_entry_type = getattr(cls, "TREE_PATH_ENTRY_TYPE", AutoEntry)
    if not (inspect.isclass(path_entry_type) and issubclass(path_entry_type, PyTreeEntry)):
        raise TypeError(f"Expected a subclass of PyTreeEntry, got {path_entry_type!r}.")

    def has_methods(flatten: str, unflatten: str, /) -> bool:
        return callable(getattr(cls, flatten, None)) and callable(getattr(cls, unflatten, None))

    added: list[str] = []
    try:
        if not has_methods("__tree_flatten__", "__tree_unflatten__"):
            if not has_methods("tree_flatten", "tree_unflatten"):
                raise TypeError(
                    f"{cls!r} must define both `__tree_flatten__` and `__tree_unflatten__` methods "
                    f"for registration as a pytree node.",
                )
            for name, method in _FORWARDING_METHODS.items():
                if name not in cls.__dict__:
                    setattr(cls, name, method)
                    added.append(name)
        register_pytree_node(
            cls,
            _flatten_by_method,
            cls.__tree_unflatten__,  # type: ignore[attr-defined]
            path_entry_type=path_entry_type,
            namespace=namespace,
        )
    except BaseException:  # undo the changes
        for name in added:
            delattr(cls, name)
        raise
    return cls


def register_static(cls: _ClassT, /, *, namespace: str | GlobalNamespace) -> _ClassT:
    """Make instances of a class part of the structure of a tree: nodes without children.

    Functions of leaves skip them, and two structures are equal only if the instances in them are.
    Use it for options among the leaves of a tree, such as the name of an activation. Instances are
    compared with ``==``.

    Args:
        cls: The class.
        namespace: See :func:`register_pytree_node`.

    Returns:
        The class.

    Raises:
        TypeError: See :func:`register_pytree_node`.
        ValueError: See :func:`register_pytree_node`.

    Examples:
        >>> import optree
        >>> class Activation(str): pass
        >>> _ = register_static(Activation, namespace='static')
        >>> layer = {'weight': 1.5, 'activation': Activation('relu')}
        >>> optree.tree_map(lambda x: 2 * x, layer, namespace='static')
        {'weight': 3.0, 'activation': 'relu'}
        >>> optree.tree_leaves(layer, namespace='static')
        [1.5]
    """
    return _register_node(cls, _flatten_static, _unflatten_static, AutoEntry, namespace)


def _flatten_static(obj: Any, /) -> tuple[tuple[()], Any]:
    return (), obj


def _unflatten_static(obj: Any, children: Any, /) -> Any:
    return obj


def unregister_pytree_node(
    cls: type, /, *, namespace: str | GlobalNamespace
) -> PyTreeNodeRegistryEntry[Any]:
    """Undo :func:`register_pytree_node`: instances of the class are leaves again.

    Specs that were made before can still be unflattened.

    Args:
        cls: The class.
        namespace: The namespace of the registration.

    Returns:
        The removed entry, with the functions that were registered.

    Raises:
        TypeError: If ``cls`` is not a class or ``namespace`` not a string.
        ValueError: If ``namespace`` is empty, or ``cls`` is a built-in node type or not registered
            in the namespace.

    Examples:
        >>> import optree
        >>> _ = register_pytree_node(
        ...     set,
        ...     lambda s: (sorted(s), None),
        ...     lambda _, children: set(children),
        ...     namespace='temporary',
        ... )
        >>> unregister_pytree_node(set, namespace='temporary').type
        <class 'set'>
        >>> optree.tree_leaves({2, 1}, namespace='temporary')
        [{1, 2}]
    """
    if not inspect.isclass(cls):
        raise TypeError(f"Expected a class, got {cls!r}.")
    name = _namespace_name(namespace)
    key = _registry_key(cls, name)
    while True:
        with _REGISTRY_LOCK:
            entry = _NODETYPE_REGISTRY.get(key)
            if entry is not None and entry.kind == PyTreeKind.CUSTOM:
                _C.unregister_node(cls, name)
                del _NODETYPE_REGISTRY[key]
                return entry
        if cls is StructSequence:
            raise ValueError(f"PyTree type {cls!r} is a built-in type and cannot be unregistered.")
        # Raises, because the class is not registered. If it does not raise, another thread
        # registered the class in the meantime: try again.
        _C.unregister_node(cls, name)


# True until the replacements are registered with TorchDynamo. A global, so that a compiled function
# that looks up an entry sees a constant.
_torch_dynamo_is_unaware: bool = True


def _introduce_to_torch_dynamo() -> None:
    """Register the Python versions of builtins with TorchDynamo, once it has been imported."""
    global _torch_dynamo_is_unaware  # pylint: disable=global-statement
    if "torch._dynamo.polyfills.pytree" not in sys.modules:
        return
    _torch_dynamo_is_unaware = False  # before registering, which looks up entries itself
    try:
        from optree import _torch_dynamo  # pylint: disable=import-outside-toplevel

        _torch_dynamo.register()
    except Exception as ex:  # pylint: disable=broad-exception-caught
        warnings.warn(
            f"`torch.compile()` will not see through tree functions of optree: "
            f"registering them with TorchDynamo failed with {ex!r}.",
            RuntimeWarning,
            stacklevel=3,
        )


@overload
def pytree_node_registry_get(
    cls: None = None,
    /,
    *,
    namespace: str | GlobalNamespace = "",
) -> dict[type, PyTreeNodeRegistryEntry[Any]]: ...


@overload
def pytree_node_registry_get(
    cls: Any,
    /,
    *,
    namespace: str | GlobalNamespace = "",
) -> PyTreeNodeRegistryEntry[Any] | None: ...


def pytree_node_registry_get(
    cls: Any = None,
    /,
    *,
    namespace: str | GlobalNamespace = "",
) -> dict[type, PyTreeNodeRegistryEntry[Any]] | PyTreeNodeRegistryEntry[Any] | None:
    """Return the registration of a class, or those of all classes.

    This function is available as ``register_pytree_node.get``.

    Args:
        cls: A class, or the function :func:`collections.namedtuple` for all namedtuple classes.
        namespace: The namespace to look in; classes registered globally are found in each.

    Returns:
        The entry of the class, or ``None`` if instances of the class are leaves. Without a class, a
        new dictionary of all entries.

    Raises:
        TypeError: If ``cls`` is not a class or ``namespace`` not a string.

    Examples:
        >>> register_pytree_node.get(dict).path_entry_type
        <class 'optree.MappingEntry'>
        >>> register_pytree_node.get(int) is None
        True
        >>> list in register_pytree_node.get()
        True
    """
    if _torch_dynamo_is_unaware:
        _introduce_to_torch_dynamo()

    if cls is not None and cls is not namedtuple and not inspect.isclass(cls):
        raise TypeError(f"Expected a class or None, got {cls!r}.")
    if isinstance(namespace, GlobalNamespace):
        namespace = ""
    elif not isinstance(namespace, str):
        raise TypeError(f"The namespace must be a string, got {namespace!r}.")

    if cls is None:
        return _entries_visible_in(namespace)

    if namespace != "":
        entry = _NODETYPE_REGISTRY.get((namespace, cls))
        if entry is not None:
            return entry
    if cls in _INSERTION_ORDERED_REGISTRY and _C.is_dict_insertion_ordered(namespace):
        return _INSERTION_ORDERED_REGISTRY[cls]
    entry = _NODETYPE_REGISTRY.get(cls)
    if entry is not None:
        return entry
    if is_structseq_class(cls):
        return _NODETYPE_REGISTRY[StructSequence]
    if is_namedtuple_class(cls):
        return _NODETYPE_REGISTRY[namedtuple]
    return None


def _entries_visible_in(namespace: str, /) -> dict[type, PyTreeNodeRegistryEntry[Any]]:
    with _REGISTRY_LOCK:
        entries = list(_NODETYPE_REGISTRY.items())
    visible = {key: entry for key, entry in entries if not isinstance(key, tuple)}
    if _C.is_dict_insertion_ordered(namespace):
        visible.update(_INSERTION_ORDERED_REGISTRY)
    for key, entry in entries:
        if isinstance(key, tuple) and key[0] == namespace:
            visible[key[1]] = entry
    return visible


register_pytree_node.get = pytree_node_registry_get  # type: ignore[attr-defined]


@contextlib.contextmanager
def dict_insertion_ordered(
    mode: bool,
    /,
    *,
    namespace: str | GlobalNamespace,
) -> Generator[None]:
    """Within the context, visit dictionaries in insertion order instead of sorted order.

    It applies to ``dict``, ``defaultdict`` and ``frozendict`` nodes in calls with this
    ``namespace``. The setting is global to the interpreter: other threads see it too.

    Args:
        mode: Whether to keep the insertion order. ``False`` cannot override a ``True`` for
            :data:`optree.registry.GLOBAL_NAMESPACE`.
        namespace: A non-empty string, or :data:`optree.registry.GLOBAL_NAMESPACE` for all.

    Raises:
        TypeError: If ``namespace`` is not a string, on entry.
        ValueError: If ``namespace`` is empty, on entry.

    Examples:
        >>> import optree
        >>> tree = {'b': 1, 'a': 2}
        >>> optree.tree_leaves(tree)
        [2, 1]
        >>> with dict_insertion_ordered(True, namespace='ordered'):
        ...     optree.tree_leaves(tree, namespace='ordered')
        [1, 2]
    """
    name = _namespace_name(namespace)
    previous = _C.is_dict_insertion_ordered(name, inherit_global_namespace=False)
    _C.set_dict_insertion_ordered(bool(mode), name)
    try:
        yield
    finally:
        _C.set_dict_insertion_ordered(previous, name)


def clear_caches() -> None:
    """Empty the cache of dictionary keys.

    The sorted order of keys that were seen before is cached, so flattening a dictionary with these
    keys takes a fraction of the time. The cache holds up to 16 MiB of keys that are strings, bytes,
    numbers, ``None``, or tuples of these. Call this function to free that memory, for example after
    working with dictionaries that will not be used again. Results do not depend on the cache.

    Examples:
        >>> import optree
        >>> clear_caches()
        >>> optree.tree_leaves({'b': 2, 'a': 1})
        [1, 2]
    """
    _C.clear_caches()
