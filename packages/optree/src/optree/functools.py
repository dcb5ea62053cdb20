# SPDX-License-Identifier: Apache-2.0
"""Counterparts of :mod:`functools` for trees."""

from __future__ import annotations

import functools
import reprlib
import sys
from typing import TYPE_CHECKING, Any, Callable, ClassVar

from optree.accessors import GetAttrEntry
from optree.ops import tree_reduce as reduce
from optree.registry import GLOBAL_NAMESPACE, register_pytree_node_class
from optree.typing import T

if TYPE_CHECKING:
    from typing_extensions import Self


__all__ = ["partial", "reduce"]

if sys.version_info >= (3, 14):
    from functools import Placeholder

    __all__ += ["Placeholder"]


class _HashablePartialShim:
    """Wraps a partial function so that :class:`functools.partial` does not merge with it.

    ``functools.partial(functools.partial(f, x), y)`` is ``functools.partial(f, x, y)``, which would
    make ``x`` a child of the outer node.
    """

    __slots__: ClassVar[tuple[str, ...]] = ("args", "func", "keywords", "partial_func")

    def __init__(self, partial_func: functools.partial[Any], /) -> None:
        self.partial_func = partial_func
        self.func: Callable[..., Any] = partial_func.func
        self.args: tuple[Any, ...] = partial_func.args
        self.keywords: dict[str, Any] = partial_func.keywords

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self.partial_func(*args, **kwargs)

    def __eq__(self, other: object, /) -> bool:
        if isinstance(other, _HashablePartialShim):
            return self.partial_func == other.partial_func
        return self.partial_func == other

    def __hash__(self, /) -> int:
        return hash(self.partial_func)

    def __repr__(self, /) -> str:
        return repr(self.partial_func)

    def __reduce__(self, /) -> tuple[Any, ...]:
        return type(self), (self.partial_func,)


class partial(functools.partial[T]):  # noqa: N801
    """A partial function that is a node: its bound arguments are its children.

    Use it to pass a function, together with the tensors or trees that it depends on, through code
    that handles trees. The function itself is metadata: specs of partial functions are equal only
    if the functions are. A partial function of a partial function is not merged with it; the
    arguments of the inner one belong to the function.

    Args:
        func: A function.
        *args: Positional arguments to bind.
        **keywords: Keyword arguments to bind.

    Raises:
        TypeError: If ``func`` is not callable.

    Examples:
        >>> import optree
        >>> def affine(x, weight, bias):
        ...     return x * weight + bias
        >>> layer = partial(affine, weight=3, bias=1)
        >>> layer(2)
        7
        >>> optree.tree_map(lambda parameter: 10 * parameter, layer)(2)
        70
        >>> optree.tree_paths(layer)
        [('keywords', 'bias'), ('keywords', 'weight')]
        >>> optree.tree_leaves(partial(layer, 2))
        [2]
    """

    __slots__: ClassVar[tuple[()]] = ()

    TREE_PATH_ENTRY_TYPE: ClassVar[type[GetAttrEntry]] = GetAttrEntry

    def __new__(cls, func: Callable[..., T], /, *args: Any, **keywords: Any) -> Self:
        """Bind arguments to a function."""
        if isinstance(func, functools.partial):
            func = _HashablePartialShim(func)
        return super().__new__(cls, func, *args, **keywords)

    @reprlib.recursive_repr()
    def __repr__(self, /) -> str:
        """Show the function and the bound arguments."""
        shown = [repr(self.func)]
        shown.extend(repr(arg) for arg in self.args)
        shown.extend(f"{name}={value!r}" for name, value in self.keywords.items())
        cls = type(self)
        return f"{cls.__module__}.{cls.__qualname__}({', '.join(shown)})"

    def __tree_flatten__(
        self,
        /,
    ) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Callable[..., Any], tuple[str, str]]:
        """Return the arguments as children and the function as metadata."""
        return (self.args, self.keywords), self.func, ("args", "keywords")

    @classmethod
    def __tree_unflatten__(
        cls,
        metadata: Callable[..., Any],
        children: tuple[tuple[Any, ...], dict[str, Any]],
        /,
    ) -> Self:
        """Bind new arguments to the function."""
        args, keywords = children
        return cls(metadata, *args, **keywords)


register_pytree_node_class(partial, namespace=GLOBAL_NAMESPACE)
