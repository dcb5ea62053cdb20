# SPDX-License-Identifier: Apache-2.0
"""Trees of JAX arrays as one flat array."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Generic, TypeVar

import jax.numpy as jnp
from jax import Array, dtypes, lax
from jax.typing import ArrayLike

from optree.ops import tree_flatten, tree_unflatten
from optree.typing import PyTreeSpec, PyTreeTypeVar

if TYPE_CHECKING:
    from typing_extensions import TypeAlias


__all__ = ["ArrayLikeTree", "ArrayTree", "tree_ravel"]


ArrayLikeTree: TypeAlias = PyTreeTypeVar("ArrayLikeTree", ArrayLike)  # type: ignore[valid-type]
ArrayTree: TypeAlias = PyTreeTypeVar("ArrayTree", Array)  # type: ignore[valid-type]

_T = TypeVar("_T")


class HashablePartial(Generic[_T]):
    """A partial function with ``==`` and a hash by its parts, so that it can be a static argument.

    Args:
        func: A function.
        *args: The hashable arguments to bind, before those of the call.
        **kwargs: The hashable keyword arguments to bind.

    Examples:
        >>> HashablePartial(max, 3)(5)
        5
        >>> HashablePartial(max, 3) == HashablePartial(max, 3)
        True
    """

    __slots__: ClassVar[tuple[str, ...]] = ("args", "func", "kwargs")

    def __init__(self, func: Callable[..., _T], /, *args: Any, **kwargs: Any) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs

    def __call__(self, /, *args: Any, **kwargs: Any) -> _T:
        return self.func(*self.args, *args, **{**self.kwargs, **kwargs})

    def __eq__(self, other: object, /) -> bool:
        return (
            type(other) is type(self)
            and self.func == other.func
            and self.args == other.args
            and self.kwargs == other.kwargs
        )

    def __hash__(self, /) -> int:
        return hash((self.func, self.args, frozenset(self.kwargs.items())))

    def __repr__(self, /) -> str:
        shown = [repr(self.func), *map(repr, self.args)]
        shown.extend(f"{name}={value!r}" for name, value in self.kwargs.items())
        return f"{type(self).__name__}({', '.join(shown)})"


def tree_ravel(
    tree: ArrayLikeTree,
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[Array, HashablePartial[ArrayTree]]:
    """Return the leaves of a tree as one flat array, and a function that restores the tree.

    Both directions work under the transformations of JAX.

    Args:
        tree: A tree of arrays and numbers, of any shapes. If their types differ, they are cast to
            the common type of JAX.
        is_leaf: See :func:`optree.tree_flatten`.
        none_is_leaf: See :func:`optree.tree_flatten`.
        namespace: See :func:`optree.tree_flatten`.

    Returns:
        A new array ``[number of elements]`` and a hashable function from such an array to a tree of
        arrays with the original shapes and types. If all types were the same, that function does
        not check the type.

    Raises:
        ValueError: Raised by the returned function if its argument has the wrong shape or type.
        Exception: The errors of :func:`optree.tree_flatten`.

    Examples:
        >>> import jax.numpy as jnp
        >>> tree = {'bias': jnp.array(5.0), 'weight': jnp.array([[1.0, 2.0], [3.0, 4.0]])}
        >>> flat, unravel = tree_ravel(tree)
        >>> flat.tolist()
        [5.0, 1.0, 2.0, 3.0, 4.0]
        >>> unravel(10 * flat)['weight'].tolist()
        [[10.0, 20.0], [30.0, 40.0]]
    """
    leaves, treespec = tree_flatten(
        tree,
        is_leaf=is_leaf,
        none_is_leaf=none_is_leaf,
        namespace=namespace,
    )
    flat, unravel = _ravel_leaves(leaves)
    return flat, HashablePartial(_tree_unravel, treespec, unravel)


ravel_pytree = tree_ravel


def _tree_unravel(
    treespec: PyTreeSpec,
    unravel: Callable[[Any], list[Array]],
    flat: Array,
) -> ArrayTree:
    return tree_unflatten(treespec, unravel(flat))


def _ravel_leaves(leaves: list[Any]) -> tuple[Array, HashablePartial[list[Array]]]:
    if not leaves:
        return jnp.zeros(0), HashablePartial(_unravel_empty)

    from_dtypes = tuple(dtypes.result_type(leaf) for leaf in leaves)
    to_dtype = dtypes.result_type(*from_dtypes)
    shapes = tuple(jnp.shape(leaf) for leaf in leaves)
    sizes = [jnp.size(leaf) for leaf in leaves]
    offsets = tuple(itertools.accumulate(sizes))
    if all(dtype == to_dtype for dtype in from_dtypes):
        # No cast: it would make weak types strong.
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
        return flat, HashablePartial(_unravel_leaves_single_dtype, offsets, shapes)
    flat = jnp.concatenate(
        [jnp.ravel(lax.convert_element_type(leaf, to_dtype)) for leaf in leaves],
    )
    return flat, HashablePartial(_unravel_leaves, offsets, shapes, from_dtypes, to_dtype)


def _check_shape(flat: Array, size: int) -> None:
    if jnp.shape(flat) != (size,):
        raise ValueError(
            f"The unravel function expected an array of shape {(size,)}, "
            f"got shape {jnp.shape(flat)}.",
        )


def _unravel_empty(flat: Array) -> list[Array]:
    _check_shape(flat, 0)
    return []


def _unravel_leaves_single_dtype(
    offsets: tuple[int, ...],
    shapes: tuple[tuple[int, ...], ...],
    flat: Array,
) -> list[Array]:
    _check_shape(flat, offsets[-1])
    parts = jnp.split(flat, offsets[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes)]


def _unravel_leaves(
    offsets: tuple[int, ...],
    shapes: tuple[tuple[int, ...], ...],
    from_dtypes: tuple[Any, ...],
    to_dtype: Any,
    flat: Array,
) -> list[Array]:
    _check_shape(flat, offsets[-1])
    flat_dtype = dtypes.result_type(flat)
    if flat_dtype != to_dtype:
        raise ValueError(
            f"The unravel function expected an array of dtype {to_dtype}, got dtype {flat_dtype}.",
        )
    parts = jnp.split(flat, offsets[:-1])
    return [
        # A real leaf among complex ones drops its imaginary part on purpose, without a warning.
        lax.convert_element_type(
            part.real
            if jnp.iscomplexobj(part) and not jnp.issubdtype(dtype, jnp.complexfloating)
            else part,
            dtype,
        ).reshape(shape)
        for part, shape, dtype in zip(parts, shapes, from_dtypes)
    ]
