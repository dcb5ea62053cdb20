# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations: pairs (init, update), chains of them, and the identity."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

from torchopt.lazy import lazy
from torchopt.shown import Described, call, shown

__all__ = [
    "ChainedGradientTransformation",
    "EmptyState",
    "GradientTransformation",
    "IdentityGradientTransformation",
    "UninitializedState",
    "describe_state",
    "identity",
    "needs_tree",
    "require_transformation",
]


class EmptyState(NamedTuple):
    """The state of a transformation that has no state."""


class UninitializedState(NamedTuple):
    """The state of an optimizer before its first step."""


class TransformInitFn(Protocol):
    """The signature of `init`."""

    def __call__(self, params: Any) -> Any:
        """Return the state for `params`."""


class TransformUpdateFn(Protocol):
    """The signature of `update`."""

    def __call__(
        self,
        updates: Any,
        state: Any,
        *,
        params: Any | None = None,
        inplace: bool = True,
    ) -> tuple[Any, Any]:
        """Return the transformed updates and the next state."""


class GradientTransformation(NamedTuple):
    """A pair of pure functions that turns gradients into updates.

    The state is a value, so a transformation can be used for any number of parameter trees at once.

    Attributes:
        init: ``init(params) -> state``.
        update: ``update(updates, state, *, params=None, inplace=True) -> (updates, state)``. With
            ``inplace=True`` the tensors of ``state`` are overwritten; with ``inplace=False`` every
            input is left untouched. Updates already carry the minus sign: they are applied as
            ``params + updates``. Autograd records the step if gradients, or parameters that it
            reads, require a gradient. The state then keeps the graph of all steps, so train under
            ``torch.no_grad()``.

    Example:
        >>> import torch, torchopt
        >>> optimizer = torchopt.sgd(lr=0.5)
        >>> params = {'w': torch.tensor([1.0, 2.0])}
        >>> grads = {"w": torch.tensor([1.0, 1.0])}
        >>> updates, state = optimizer.update(grads, optimizer.init(params), inplace=False)
        >>> torchopt.apply_updates(params, updates, inplace=False)["w"]
        tensor([0.5000, 1.5000])
    """

    init: TransformInitFn
    update: TransformUpdateFn

    def chain(self, next: GradientTransformation) -> ChainedGradientTransformation:  # noqa: A002 - published name
        """Return the transformation that applies this one and then ``next``."""
        return ChainedGradientTransformation(self, next)

    def __repr__(self) -> str:
        driver = getattr(self.update, "__self__", None)
        if is_dataclass(driver):
            return repr(driver)
        return call(type(self).__name__, self._asdict())


def _no_attribute(self: GradientTransformation, name: str) -> NoReturn:
    """Raise AttributeError, with what to use instead of the attributes of torch's optimizers."""
    text = f"{type(self).__name__!r} object has no attribute {name!r}"
    if name in ("step", "zero_grad", "param_groups", "state_dict", "load_state_dict"):
        text += (
            "; it is a pair of functions: call update(grads, state, params=params), or use a class "
            "with the interface of torch.optim, such as torchopt.Adam(params, lr)"
        )
    raise AttributeError(text, name=name, obj=self)


# Not in the class, where type checkers would accept every name.
GradientTransformation.__getattr__ = _no_attribute  # type: ignore[attr-defined]


def require_transformation(value: Any, what: str, *, duck: bool = True) -> None:
    """Raise TypeError unless `value` is a gradient transformation.

    Args:
        value: The argument.
        what: The call it was passed to; the message starts with it.
        duck: Accept any object with functions `init` and `update`.
    """
    if isinstance(value, GradientTransformation):
        return
    if duck and callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)):
        return
    kind = type(value).__name__
    name = getattr(value, "__name__", None)
    module = str(getattr(value, "__module__", None) or type(value).__module__)
    if module.startswith("torch.optim"):
        advice = "take the function of that name from torchopt, such as torchopt.adam(lr)"
    elif name is not None and callable(value):
        advice = f"call it: {_constructor(value, name)}"
    elif isinstance(value, (list, tuple)):
        advice = "unpack it: chain(*transformations)"
    elif isinstance(value, (int, float)):
        advice = f"to multiply by a number, pass torchopt.transform.scale({value!r})"
    else:
        advice = "pass what a function such as torchopt.adam(lr) returns"
    shown = f"`{(name or kind):.40}` (type: {kind})"
    raise TypeError(
        f"{what}: {shown} is not a GradientTransformation, a pair of init and update; {advice}"
    )


def refuse_positional(given: tuple[Any, ...]) -> NoReturn:
    """Raise TypeError: `update` got the parameters by position, as in optax."""
    raise TypeError(
        "update(updates, state, *, params=None, inplace=True): expected 2 positional arguments, "
        f"got {len(given) + 2}; pass the parameters by name: update(updates, state, params=params)"
    )


def _constructor(value: Any, name: str) -> str:
    """Return the call that makes a transformation, for a function or the class of its name."""
    if isinstance(value, type) and any(base.__name__ == "Optimizer" for base in value.__mro__):
        return f"{name.lower()}(...), the function, instead of the class {name}"
    code = getattr(value, "__code__", None)
    first = "lr" if code is not None and code.co_varnames[:1] == ("lr",) else "..."
    return f"{name}({first})"


def describe_state(state: Any) -> str:
    """Describe in a message a state that is not that of a chain."""
    if type(state) in (tuple, list):
        return str(len(state))
    return f"the state of another transformation, {type(state).__name__}"


def needs_tree(candidate: GradientTransformation) -> bool:
    """Return whether a transformation needs trees even in a flat chain, as masks do."""
    return bool(getattr(getattr(candidate.update, "__self__", None), "needs_tree", False))


class Driver(Described):
    """The base class of objects whose methods are the two functions of a transformation.

    A subclass is a frozen dataclass with `init(params)` and `step`, so that it can be pickled and
    compared.
    """

    def init(self, params: Any) -> Any:
        """Return the state for `params`."""
        return EmptyState()

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Return the transformed updates and the next state; see `GradientTransformation`."""
        raise NotImplementedError

    def update(
        self,
        updates: Any,
        state: Any,
        *positional: Any,
        params: Any | None = None,
        inplace: bool = True,
    ) -> tuple[Any, Any]:
        """Return the result of `step`."""
        if positional:
            refuse_positional(positional)
        return self.step(updates, state, params, inplace)

    def written(self, old: Any, new: Any) -> Any:
        """Return the state `new`, written into the tensors of `old` if the class supports that."""
        return new

    def pair(self) -> GradientTransformation:
        """Return the pair of functions."""
        return GradientTransformation(self.init, self.update)


def chain_parts(
    members: tuple[GradientTransformation, ...], backend: Any
) -> tuple[tuple[int, int, Any], ...]:
    """Return ranges of members (first, after the last), each with the native call for it or None.

    Members that have rules know which of them can be one native call.
    """
    for member in members if backend != "reference" else ():
        split = getattr(getattr(member.update, "__self__", None), "parts_of", None)
        if split is not None:
            found: tuple[tuple[int, int, Any], ...] = split(members, backend)
            return found
    return tuple((i, i + 1, None) for i in range(len(members)))


@dataclass(frozen=True)
class Chain(Driver):
    """The two functions of a chain, as an object that can be pickled."""

    transformations: tuple[GradientTransformation, ...]
    backend: Any = "auto"

    @lazy
    def parts(self) -> tuple[tuple[int, int, Any], ...]:
        """Ranges of members (first, after the last), each with the native call for it or None."""
        return chain_parts(self.transformations, self.backend)

    def __repr__(self) -> str:
        return f"chain{shown(self.transformations)}"

    @property
    def needs_tree(self) -> bool:
        """Whether a member needs trees, as masks do."""
        return any(map(needs_tree, self.transformations))

    def init(self, params: Any) -> Any:
        """Return the states of the members."""
        return tuple(transformation.init(params) for transformation in self.transformations)

    def states_in(self, state: Any) -> list[Any]:
        """Return the state of each member."""
        if not isinstance(state, (tuple, list)) or len(state) != len(self.transformations):
            raise ValueError(
                "The number of updates and states has to be the same in chain! Make sure you have "
                "called init first! "
                f"Expected {len(self.transformations)} states, got {describe_state(state)}.",
            )
        return list(state)

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Apply the members one after the other."""
        states = self.states_in(state)
        for first, last, part in self.parts:
            # Only the last call writes: if a member raises, no state may have changed.
            writes = inplace and last == len(states)
            members = tuple(states[first:last])
            found = part and part.update(updates, members, params, inplace=writes)
            if found:
                updates, states[first:last] = found
                continue
            for i in range(first, last):
                updates, states[i] = self.transformations[i].update(
                    updates, states[i], params=params, inplace=writes and i == last - 1
                )
        if inplace:
            first = self.parts[-1][0]  # the members of the last call, which has written
            states[:first] = self.written(state[:first], states[:first])
        return updates, tuple(states)

    def written(self, old: Any, new: Any) -> Any:
        """Return the states `new`, with tensors written into those of `old` where members can."""
        drivers = (getattr(t.update, "__self__", None) for t in self.transformations)
        return tuple(
            driver.written(o, n) if isinstance(driver, Driver) else n
            for driver, o, n in zip(drivers, old, new)
        )


def members_of(
    transformations: tuple[GradientTransformation, ...],
) -> tuple[GradientTransformation, ...]:
    """Return the members of a chain, with nested chains opened and identities removed."""
    members: list[GradientTransformation] = []
    for transformation in transformations:
        require_transformation(transformation, "chain(*transformations)")
        if isinstance(transformation, ChainedGradientTransformation):
            members.extend(transformation.transformations)
        else:
            members.append(transformation)
    kept = tuple(m for m in members if not isinstance(m, IdentityGradientTransformation))
    return kept or (identity(),)


class ChainedGradientTransformation(GradientTransformation):
    """Transformations applied one after the other.

    Nested chains are flattened and identities are dropped; an empty chain is the identity.

    Attributes:
        transformations: The members, in the order in which they are applied.
    """

    transformations: tuple[GradientTransformation, ...]

    def __new__(cls, *transformations: GradientTransformation) -> ChainedGradientTransformation:
        """Chain ``transformations``."""
        kept = members_of(transformations)
        chain = Chain(kept)
        self = super().__new__(cls, chain.init, chain.update)
        self.transformations = kept
        return self

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ChainedGradientTransformation):
            return self.transformations == other.transformations
        if isinstance(other, GradientTransformation):
            return self.transformations == (other,)
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.transformations)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.transformations


class _Identity(Driver):
    """Returns its updates."""

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        return updates, state


_returned = _Identity()


class IdentityGradientTransformation(GradientTransformation):
    """The transformation that returns its updates."""

    def __new__(cls) -> IdentityGradientTransformation:
        """Return an identity; all identities are equal."""
        return super().__new__(cls, cls.init_fn, cls.update_fn)

    # Methods of one object, so that all identities are equal.
    init_fn = staticmethod(_returned.init)
    update_fn = staticmethod(_returned.update)

    def __repr__(self) -> str:
        return "identity()"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def identity() -> IdentityGradientTransformation:
    """Return the transformation that returns its updates.

    Example:
        >>> identity() == identity()
        True
    """
    return IdentityGradientTransformation()
