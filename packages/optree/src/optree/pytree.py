# SPDX-License-Identifier: Apache-2.0
"""The functions ``optree.tree_*`` under short names, and a way to bind them to a namespace.

Examples:
    >>> import optree
    >>> import optree.pytree as pt
    >>> pt.map(lambda x: -x, {'a': 1, 'b': (2, 3)})
    {'a': -1, 'b': (-2, -3)}
    >>> pt.map is optree.tree_map
    True
"""

from __future__ import annotations

import functools as _functools
import inspect as _inspect
import sys as _sys
from builtins import all as _all
from types import BuiltinFunctionType as _BuiltinFunctionType
from types import FunctionType as _FunctionType
from types import ModuleType as _ModuleType
from typing import Any as _Any

import optree.dataclasses as dataclasses
import optree.functools as functools
import optree.ops as _ops
from optree.accessors import PyTreeEntry
from optree.ops import tree_accessors as accessors
from optree.ops import tree_all as all  # noqa: A004
from optree.ops import tree_any as any  # noqa: A004
from optree.ops import tree_broadcast_common as broadcast_common
from optree.ops import tree_broadcast_map as broadcast_map
from optree.ops import tree_broadcast_map_with_accessor as broadcast_map_with_accessor
from optree.ops import tree_broadcast_map_with_path as broadcast_map_with_path
from optree.ops import tree_broadcast_prefix as broadcast_prefix
from optree.ops import tree_flatten as flatten
from optree.ops import tree_flatten_one_level as flatten_one_level
from optree.ops import tree_flatten_with_accessor as flatten_with_accessor
from optree.ops import tree_flatten_with_path as flatten_with_path
from optree.ops import tree_is_leaf as is_leaf
from optree.ops import tree_iter as iter  # noqa: A004
from optree.ops import tree_leaves as leaves
from optree.ops import tree_map as map  # noqa: A004
from optree.ops import tree_map_ as map_
from optree.ops import tree_map_with_accessor as map_with_accessor
from optree.ops import tree_map_with_accessor_ as map_with_accessor_
from optree.ops import tree_map_with_path as map_with_path
from optree.ops import tree_map_with_path_ as map_with_path_
from optree.ops import tree_max as max  # noqa: A004
from optree.ops import tree_min as min  # noqa: A004
from optree.ops import tree_partition as partition
from optree.ops import tree_paths as paths
from optree.ops import tree_reduce as reduce
from optree.ops import tree_replace_nones as replace_nones
from optree.ops import tree_structure as structure
from optree.ops import tree_sum as sum  # noqa: A004
from optree.ops import tree_transpose as transpose
from optree.ops import tree_transpose_map as transpose_map
from optree.ops import tree_transpose_map_with_accessor as transpose_map_with_accessor
from optree.ops import tree_transpose_map_with_path as transpose_map_with_path
from optree.ops import tree_unflatten as unflatten
from optree.registry import GlobalNamespace as _GlobalNamespace
from optree.registry import dict_insertion_ordered
from optree.registry import register_pytree_node as register_node
from optree.registry import register_pytree_node_class as register_node_class
from optree.registry import register_static as _register_static
from optree.registry import unregister_pytree_node as unregister_node
from optree.summary import tree_summary as _tree_summary
from optree.typing import PyTreeKind, PyTreeSpec
from optree.version import __version__

__all__ = [  # noqa: RUF022 # grouped
    "reexport",
    "PyTreeSpec",
    "PyTreeKind",
    "PyTreeEntry",
    "flatten",
    "flatten_with_path",
    "flatten_with_accessor",
    "unflatten",
    "iter",
    "leaves",
    "structure",
    "paths",
    "accessors",
    "is_leaf",
    "map",
    "map_",
    "map_with_path",
    "map_with_path_",
    "map_with_accessor",
    "map_with_accessor_",
    "replace_nones",
    "partition",
    "transpose",
    "transpose_map",
    "transpose_map_with_path",
    "transpose_map_with_accessor",
    "broadcast_prefix",
    "broadcast_common",
    "broadcast_map",
    "broadcast_map_with_path",
    "broadcast_map_with_accessor",
    "reduce",
    "sum",
    "max",
    "min",
    "all",
    "any",
    "flatten_one_level",
    "register_node",
    "register_node_class",
    "unregister_node",
    "dict_insertion_ordered",
]


all_leaves = _ops.all_leaves
all_only = _ops.tree_all_only
any_only = _ops.tree_any_only
combine = _ops.tree_combine
keystr = _ops.keystr
leaves_with_path = _ops.tree_leaves_with_path
map_only = _ops.tree_map_only
prefix_errors = _ops.prefix_errors
register_dataclass = dataclasses.register_dataclass
register_static = _register_static
replace_at = _ops.tree_replace_at
summary = _tree_summary
treespec_dumps = _ops.treespec_dumps
treespec_loads = _ops.treespec_loads

# Members that the published package does not have. They are not in `__all__`, because clients
# compare that with the one of the published package.
_MORE_MEMBERS = (
    "all_leaves",
    "all_only",
    "any_only",
    "combine",
    "keystr",
    "leaves_with_path",
    "map_only",
    "prefix_errors",
    "register_dataclass",
    "register_static",
    "replace_at",
    "summary",
    "treespec_dumps",
    "treespec_loads",
)

_GLOBAL_NAMESPACE_TEXT = "(default: :const:`''`, i.e., the global namespace)"


def _bind_namespace(func: _Any, namespace: str, /) -> _Any:
    """Return ``func`` with another default of its parameter ``namespace``."""
    signature = _inspect.signature(func)
    parameter = signature.parameters.get("namespace")
    if parameter is None:
        return func

    if parameter.kind == parameter.KEYWORD_ONLY:

        @_functools.wraps(func)
        def wrapped(*args: _Any, namespace: str = namespace, **kwargs: _Any) -> _Any:
            return func(*args, namespace=namespace, **kwargs)

    else:
        index = list(signature.parameters).index("namespace")

        @_functools.wraps(func)
        def wrapped(*args: _Any, **kwargs: _Any) -> _Any:
            if len(args) <= index:
                kwargs.setdefault("namespace", namespace)
            return func(*args, **kwargs)

    bound: _Any = wrapped
    bound.__signature__ = signature.replace(
        parameters=[
            p.replace(default=namespace) if p is parameter else p
            for p in signature.parameters.values()
        ],
    )
    if func.__doc__ is not None:
        bound.__doc__ = func.__doc__.replace(
            _GLOBAL_NAMESPACE_TEXT,
            f"(default: :const:`{namespace!r}`)",
        )
    if isinstance(getattr(func, "get", None), _FunctionType):
        bound.get = _bind_namespace(func.get, namespace)
    return bound


class ReexportedModule(_ModuleType):
    """A module like another one, with functions whose ``namespace`` has another default.

    Members are made when they are first used.
    """

    def __init__(
        self,
        name: str,
        /,
        *,
        namespace: str,
        original: _ModuleType,
        extra_members: dict[str, _Any] | None = None,
    ) -> None:
        """Make a module that is not in :data:`sys.modules` yet."""
        super().__init__(
            name,
            doc=(
                f"Re-exports :mod:`{original.__name__}` as :mod:`{name}` "
                f"with namespace :const:`{namespace!r}`."
            ),
        )
        extra_members = {} if extra_members is None else extra_members
        self.__namespace = namespace
        self.__original = original
        self.__all = [name for name in sorted(original.__all__) if name != "reexport"]
        self.__dir = sorted({*self.__all, *extra_members})
        self.__dict__.update(extra_members)

    @property
    def __all__(self, /) -> list[str]:
        """The names that ``from ... import *`` binds."""
        return list(self.__all)

    def __dir__(self, /) -> list[str]:
        """The names of all members."""
        return list(self.__dir)

    def __getattr__(self, name: str, /) -> _Any:
        """Make a member."""
        more: tuple[str, ...] = getattr(self.__original, "_MORE_MEMBERS", ())
        if name.startswith("_ReexportedModule__") or (name not in self.__all and name not in more):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        member = getattr(self.__original, name)
        if isinstance(member, (_FunctionType, _BuiltinFunctionType)):
            member = _bind_namespace(member, self.__namespace)
        # If several threads get here, all return the member that was stored first.
        return self.__dict__.setdefault(name, member)


def reexport(*, namespace: str, module: str | None = None) -> _ModuleType:
    """Make a copy of this module in which ``namespace`` has another default.

    A library that registers its own node types under its own namespace calls it once, and uses the
    copy instead of repeating the namespace in each call. The copies of ``optree.pytree``,
    ``optree.dataclasses`` and ``optree.functools`` can be imported like other modules.

    Args:
        namespace: The default namespace; ``namespace=''`` in a call still means the global one.
        module: The name of the copy, by default ``'<name of the calling module>.pytree'``.

    Returns:
        The module. It is in :data:`sys.modules`.

    Raises:
        TypeError: If ``namespace`` or ``module`` is not a string.
        ValueError: If ``module`` is not a dotted name, or a module of this name exists.

    Examples:
        >>> import optree
        >>> pytree = reexport(namespace='my-library', module='my_library.pytree')
        >>> @pytree.dataclasses.dataclass
        ... class Point:
        ...     x: float
        ...     y: float
        >>> pytree.map(lambda x: 2 * x, Point(1, 2))
        Point(x=2, y=4)
        >>> optree.tree_leaves(Point(1, 2), namespace='my-library')
        [1, 2]
    """
    if not isinstance(namespace, str):
        hint = (
            "The argument `namespace` cannot be the global one: use `optree.pytree` itself."
            if isinstance(namespace, _GlobalNamespace)
            else "Pass a name as the argument `namespace`."
        )
        raise TypeError(f"The namespace must be a string, got {namespace!r}. {hint}")
    if module is None:
        module = f"{_sys._getframe(1).f_globals['__name__']}.pytree"
    if not isinstance(module, str):
        raise TypeError(f"The module name must be a string, got {module!r}.")
    if not _all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"invalid module name: {module!r}")

    this = _sys.modules[__name__]
    submodules = {
        name: ReexportedModule(f"{module}.{name}", namespace=namespace, original=original)
        for name, original in (("dataclasses", dataclasses), ("functools", functools))
    }
    copy = ReexportedModule(
        module,
        namespace=namespace,
        original=this,
        extra_members={**submodules, "__version__": __version__},
    )
    copies = [copy, *submodules.values()]
    for new in copies:
        if new.__name__ in _sys.modules:
            raise ValueError(f"module {new.__name__!r} already exists")
    for new in copies:
        _sys.modules[new.__name__] = new
    return copy
