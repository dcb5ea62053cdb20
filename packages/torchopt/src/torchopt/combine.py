# SPDX-License-Identifier: Apache-2.0
"""Combine gradient transformations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torchopt.base import (
    Chain,
    ChainedGradientTransformation,
    GradientTransformation,
    IdentityGradientTransformation,
    identity,
    members_of,
    needs_tree,
    require_transformation,
)
from torchopt.errors import MismatchError
from torchopt.precision import as_given, is_special, widened
from torchopt.tree import flatten_up_to, located, tree_flatten, tree_unflatten
from torchopt.tree_function import is_traced

__all__ = ["chain", "chain_flat"]


class _ChainFunction(Protocol):
    flat: Any

    def __call__(self, *transformations: GradientTransformation) -> GradientTransformation: ...


def _chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Return the transformation that applies ``transformations`` from left to right.

    Args:
        transformations: Without any, the result is the identity; one is returned unchanged.

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
class FlatChain(Chain):
    """A chain whose members get lists of leaves: the tree is flattened once for all of them.

    The state keeps lists. Members that need the tree (see `needs_tree`) get it.

    Attributes:
        single: Whether the state is that of the only member instead of a tuple of one.
        rounds_once: Whether half types are rounded once after the last member.
    """

    single: bool = False
    rounds_once: bool = False

    def __repr__(self) -> str:
        return repr(self.transformations[0]) if self.single else super().__repr__()

    def init(self, params: Any) -> Any:
        """Return the states of the members for lists of leaves."""
        leaves, spec = tree_flatten(params, none_is_leaf=True)
        try:
            states = [t.init(params if needs_tree(t) else leaves) for t in self.transformations]
        except MismatchError as error:
            raise located(error, spec) if error.where is None else error from error.__cause__
        return states[0] if self.single else tuple(states)

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Apply the members one after the other to the leaves."""
        states = [state] if self.single else self.states_in(state)
        given, spec = tree_flatten(updates, none_is_leaf=True)
        leaves = list(map(widened, given)) if self.rounds_once and is_special(given) else given
        what, param_leaves, read = "update(updates, state, params=params)", None, None
        if params is not None:
            param_leaves = flatten_up_to(spec, params, what, spec_of="updates")
            read = lambda: param_leaves  # noqa: E731
        traced = is_traced()
        for first, last, part in self.parts:
            # Only the last call writes: if a member raises, no state may have changed.
            writes = inplace and last == len(states)
            if part and not traced:
                members = tuple(states[first:last])
                found = part.part.update(leaves, members, read, inplace=writes)
                if found:
                    leaves, states[first:last] = found
                    continue
            for i in range(first, last):
                member, writes_now = self.transformations[i], writes and i == last - 1
                if needs_tree(member):
                    tree, states[i] = member.update(
                        tree_unflatten(spec, leaves), states[i], params=params, inplace=writes_now
                    )
                    leaves = flatten_up_to(spec, tree, "updates")
                    continue
                try:
                    leaves, states[i] = member.update(
                        leaves, states[i], params=param_leaves, inplace=writes_now
                    )
                except MismatchError as error:
                    raise located(error, spec) from error.__cause__
        if self.rounds_once:
            leaves = as_given(leaves, given)
        if inplace and not self.single:
            first = self.parts[-1][0]  # the members of the last call, which has written
            states[:first] = self.written(state[:first], states[:first])
        return tree_unflatten(spec, leaves), states[0] if self.single else tuple(states)

    def written(self, old: Any, new: Any) -> Any:
        """Return the states `new`, with tensors written into those of `old` where members can."""
        if self.single:
            return super().written((old,), (new,))[0]
        return super().written(old, new)


def chain_flat(*transformations: GradientTransformation) -> GradientTransformation:
    """Return the chain of ``transformations``, which get lists of leaves instead of trees.

    The result is that of `chain`, with one walk over the tree in each update. Members that need
    the tree, such as masks, get it. The states of the members are those for a list.

    Args:
        transformations: As for `chain`.

    Raises:
        TypeError: A member is not a gradient transformation.

    Example:
        >>> import torch, torchopt
        >>> clipped = torchopt.chain.flat(torchopt.clip_grad_norm(1.0), torchopt.sgd(lr=0.1))
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> clipped.update(params, clipped.init(params), params=params)[0]
        {'w': tensor([-0.0600, -0.0800])}
    """
    if len(transformations) > 1:
        return FlatChain(members_of(transformations)).pair()
    one = _chain(*transformations)
    if isinstance(one, IdentityGradientTransformation):
        return one
    if isinstance(one, ChainedGradientTransformation):
        return FlatChain(one.transformations).pair()
    return FlatChain((one,), single=True).pair()


def with_parts(
    transformation: GradientTransformation,
    backend: str,
    plain: Callable[[GradientTransformation], GradientTransformation],
) -> GradientTransformation | None:
    """Return a chain with native calls for its members as `backend` says, or None.

    None means that it is not a chain, or that no member has a native call and `backend` is
    "native".

    Args:
        transformation: The chain.
        backend: See `torchopt.optimizers.native.with_backend`.
        plain: Returns a member that computes in plain torch operations, for "reference".
    """
    found: Any = getattr(transformation.update, "__self__", None)
    if type(found) not in (Chain, FlatChain):
        return None
    members = found.transformations
    if backend == "reference":
        members = tuple(map(plain, members))
    made = dataclasses.replace(found, transformations=members, backend=backend)
    native = any(part is not None for *_, part in made.parts)
    return None if backend == "native" and not native else made.pair()


chain = cast("_ChainFunction", _chain)
chain.flat = chain_flat
_chain.__name__ = _chain.__qualname__ = "chain"
