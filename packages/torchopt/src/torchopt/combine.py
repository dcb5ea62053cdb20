# SPDX-License-Identifier: Apache-2.0
"""Combine gradient transformations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from torchopt.base import (
    ChainedGradientTransformation,
    Driver,
    GradientTransformation,
    IdentityGradientTransformation,
    Wrapper,
    _Chain,
    chain_parts,
    describe_state,
    identity,
    members_of,
    needs_tree,
    require_transformation,
)
from torchopt.errors import MismatchError
from torchopt.precision import as_given, is_special, widened
from torchopt.shown import shown
from torchopt.tree import flatten_up_to, located, tree_flatten, tree_unflatten

__all__ = ["chain", "chain_flat"]


class _ChainFunction(Protocol):
    flat: Any

    def __call__(self, *transformations: GradientTransformation) -> GradientTransformation: ...


def _chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Return the transformation that applies ``transformations`` from left to right.

    Args:
        transformations: None gives the identity, one is returned unchanged.

    Raises:
        TypeError: A member is not a gradient transformation.

    Example:
        >>> import torchopt
        >>> clipped = chain(torchopt.clip_grad_norm(1.0), torchopt.sgd(lr=0.1))
        >>> len(clipped.transformations)
        2
    """
    if not transformations:
        return identity()
    if len(transformations) == 1:
        require_transformation(transformations[0], "chain(*transformations)")
        return transformations[0]
    return ChainedGradientTransformation(*transformations)


@dataclass(frozen=True)
class _FlatChain(Driver):
    """A chain whose members see lists of leaves: the tree is taken apart once for all of them.

    The state stays in list form. Members that must see the tree (see `needs_tree`) get it.
    """

    inner: tuple[GradientTransformation, ...]
    backend: str = "auto"
    # Members (first, after the last) and what computes them in one call.
    parts: tuple[tuple[int, int, Any], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", chain_parts(self.inner, self.backend))

    def __repr__(self) -> str:
        return f"chain{shown(self.inner)}"

    @property
    def needs_tree(self) -> bool:
        """Whether a member has to see trees, as masks do."""
        return any(map(needs_tree, self.inner))

    def init(self, params: Any) -> tuple[Any, ...]:
        leaves, spec = tree_flatten(params, none_is_leaf=True)
        try:
            return tuple(t.init(params if needs_tree(t) else leaves) for t in self.inner)
        except MismatchError as error:
            raise located(error, spec) if error.where is None else error from error.__cause__

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        if not isinstance(state, (tuple, list)) or len(state) != len(self.inner):
            raise ValueError(
                "The number of updates and states has to be the same in chain! Make sure you have "
                "called init first! "
                f"Expected {len(self.inner)} states, got {describe_state(state)}.",
            )
        leaves, spec = tree_flatten(updates, none_is_leaf=True)
        param_leaves = (
            None
            if params is None
            else flatten_up_to(
                spec, params, "update(updates, state, params=params)", spec_of="updates"
            )
        )
        states: list[Any] = []
        read = None if param_leaves is None else lambda: param_leaves
        after = {first: (last, part) for first, last, part in self.parts if part is not None}
        for i, (transformation, member_state) in enumerate(zip(self.inner, state)):
            if i < len(states):
                continue  # a part of the call before
            last, part = after.get(i, (i + 1, None))
            found = part and part.part.update(leaves, tuple(state[i:last]), read, inplace=inplace)
            if found:
                leaves, members = found
                states += members
                continue
            if needs_tree(transformation):
                tree, member_state = transformation.update(
                    tree_unflatten(spec, leaves), member_state, params=params, inplace=inplace
                )
                leaves = flatten_up_to(spec, tree, "updates")
                states.append(member_state)
                continue
            try:
                leaves, member_state = transformation.update(
                    leaves, member_state, params=param_leaves, inplace=inplace
                )
            except MismatchError as error:
                raise located(error, spec) from error.__cause__
            states.append(member_state)
        return tree_unflatten(spec, leaves), tuple(states)


@dataclass(frozen=True)
class _FlatSingle(Driver):
    """A flat chain of one transformation, whose state is not wrapped in a tuple."""

    chain: _FlatChain

    def __repr__(self) -> str:
        return repr(self.chain.inner[0])

    @property
    def needs_tree(self) -> bool:
        """Whether the member has to see trees, as masks do."""
        return self.chain.needs_tree

    def init(self, params: Any) -> Any:
        return self.chain.init(params)[0]

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        updates, (state,) = self.chain.update(updates, (state,), params=params, inplace=inplace)
        return updates, state


def chain_flat(*transformations: GradientTransformation) -> GradientTransformation:
    """Return the chain of ``transformations``, which see lists of leaves instead of trees.

    Same result as `chain` for transformations that treat every leaf alike, with one walk over the
    tree in each update. The state is that of the members for a list.
    """
    return flat_chain(transformations, "auto")


def flat_chain(
    transformations: tuple[GradientTransformation, ...], backend: str
) -> GradientTransformation:
    """Return `chain_flat`, whose members are native calls together as `backend` says."""
    if len(transformations) > 1:
        flat: _FlatChain | _FlatSingle = _FlatChain(members_of(transformations), backend)
    else:
        single = _chain(*transformations)
        if isinstance(single, IdentityGradientTransformation):
            return single
        if isinstance(single, ChainedGradientTransformation):
            flat = _FlatChain(single.transformations, backend)
        else:
            flat = _FlatSingle(_FlatChain((single,), backend))
    return flat.pair()


@dataclass(frozen=True)
class _RoundedOnce(Wrapper):
    """Hands `inner` gradients of half types in float32 and rounds what it returns."""

    def __repr__(self) -> str:
        return repr(self.inner)

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        leaves, spec = tree_flatten(updates, none_is_leaf=True)
        if not is_special(leaves):
            return self.inner.update(updates, state, params=params, inplace=inplace)
        wide = [widened(g) for g in leaves]
        stepped, state = self.inner.update(
            tree_unflatten(spec, wide), state, params=params, inplace=inplace
        )
        return tree_unflatten(
            spec, as_given(flatten_up_to(spec, stepped, "updates"), leaves)
        ), state


def round_once(chained: GradientTransformation) -> GradientTransformation:
    """Return a chain of rules that rounds half types after the last one, not from rule to rule."""
    if isinstance(chained, IdentityGradientTransformation):
        return chained
    return _RoundedOnce(chained).pair()


def with_parts(
    transformation: GradientTransformation,
    backend: str,
    plain: Callable[[GradientTransformation], GradientTransformation],
) -> GradientTransformation | None:
    """Return a chain whose members are native calls together as `backend` says.

    None for something else than a chain, and for "native" where no members are one.

    Args:
        transformation: The chain.
        backend: See `torchopt.optimizers.native.with_backend`.
        plain: Makes a member compute in plain torch operations, for "reference".
    """
    found = getattr(transformation.update, "__self__", None)
    if isinstance(found, _FlatSingle):
        inner: Any = with_parts(found.chain.pair(), backend, plain)
        return inner and _FlatSingle(inner.update.__self__).pair()
    if not isinstance(found, (_Chain, _FlatChain)):
        return None
    name = "transformations" if isinstance(found, _Chain) else "inner"
    members = getattr(found, name)
    if backend == "reference":
        members = tuple(map(plain, members))
    made: Any = dataclasses.replace(found, **{name: members, "backend": backend})
    native = any(part is not None for *_, part in made.parts)
    return None if backend == "native" and not native else made.pair()


chain = cast("_ChainFunction", _chain)
chain.flat = chain_flat
_chain.__name__ = _chain.__qualname__ = "chain"
