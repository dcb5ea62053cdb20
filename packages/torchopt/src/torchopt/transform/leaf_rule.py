# SPDX-License-Identifier: Apache-2.0
"""Rules on lists of tensors, and how they are run.

The code here handles missing gradients, half types and steps in place, so that rules need not:
leaves without a gradient are left out, the rule runs on the others, and the results are put back.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from torchopt.base import EmptyState
from torchopt.errors import MismatchError
from torchopt.kernels.native import overwrite
from torchopt.lazy import lazy
from torchopt.precision import (
    as_computed,
    as_given,
    autocast_devices,
    dense,
    is_special,
    without_autocast,
)
from torchopt.shown import Described, options
from torchopt.transform.validate import require_params
from torchopt.tree import describe_mismatch, first_of_another_shape, require_tensors

if TYPE_CHECKING:
    from torchopt.transform.plan import Plan

__all__ = ["LeafRule", "as_of_now", "init_leaves", "overwrite", "put", "update_leaves"]


@dataclass(frozen=True)
class LeafRule(Described):
    """One transformation rule, written for lists of tensors.

    Its fields are the hyper-parameters, declared with `at_least_zero`, `fraction`, `number` and
    other functions of `transform.validate`, which check them. Hyper-parameters that are tensors are
    read in each step, because an outer optimizer may have changed them.

    Attributes:
        leaf_fields: The fields of the state that hold one tensor or number for each leaf. Other
            fields are shared by all leaves.
        later_fields: Those of `leaf_fields` that states of the published package do not have. They
            are None in such a state, and `complete` fills them.
        overwritten_fields: The fields whose tensors an in-place step writes into.
        compressed: Whether the tensors of `overwritten_fields` have other shapes than the leaves.
        reads_params: Whether `update_leaves` reads `params`.
        needs_params: What reads them, in messages.
        complex_numbers: How the rule gets complex tensors: as `"pairs"` of real numbers in a last
            dimension, as `"whole"` tensors, or `"refused"`, with an error.
        keeps_sparse: Whether `update_leaves` accepts sparse gradients. Other rules get them as
            dense tensors.
        widens: Whether half types are computed in float32.
        takes_directions: Whether a kernel is worthwhile for the rules before this one alone.
        checks: Pairs (hyper-parameter, check).
    """

    leaf_fields: ClassVar[tuple[str, ...]] = ()
    later_fields: ClassVar[tuple[str, ...]] = ()
    overwritten_fields: ClassVar[tuple[str, ...]] = ()
    compressed: ClassVar[bool] = False
    reads_params: ClassVar[bool] = False
    keeps_sparse: ClassVar[bool] = False
    complex_numbers: ClassVar[str] = "pairs"
    widens: ClassVar[bool] = True
    takes_directions: ClassVar[bool] = False
    checks: ClassVar[tuple[tuple[str, Callable[[Any], None]], ...]] = ()
    needs_params: ClassVar[str] = "this transformation"

    @lazy
    def fields_with_tensors(self) -> tuple[str, ...]:
        """The fields that are tensors, or tuples with tensors in them."""
        names = (field.name for field in dataclasses.fields(self))
        return tuple(name for name in names if _has_tensors(getattr(self, name)))

    def init_leaves(self, params: list[Tensor]) -> Any:
        """Return the state for a list of parameters."""
        return EmptyState()

    def hyper_parameters(self) -> dict[str, Any]:
        """Return the options of this rule by the names that optimizers give them."""
        return options(self)

    def complete(self, state: Any) -> Any:
        """Return a state of lists with a list in each of `later_fields`."""
        return state

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        checks = {name: data["check"] for name, data in declared_in(cls).items()}
        cls.checks += tuple((name, check) for name, check in checks.items() if check)
        if not {"update_leaves", "moved"}.isdisjoint(vars(cls)) and "join" not in vars(cls):
            vars_of: Any = cls
            vars_of.join = LeafRule.join  # the kernel of a base class is another formula

    def __post_init__(self) -> None:
        for name, check in self.checks:
            check(getattr(self, name))

    def join(self, plan: Plan) -> Plan | None:
        """Return the kernel for `plan` followed by this rule, or None if there is none."""
        return None

    def moved(self, g: Tensor, p: Any) -> Tensor:
        """Return the update of one tensor. A rule without a state may define only this."""
        raise NotImplementedError

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the updates and the next state.

        Args:
            grads: One gradient for each leaf. Must not be written to.
            state: The state, with a list in each of `leaf_fields`.
            params: The parameters when `reads_params`, else an empty list.
            inplace: Whether the caller overwrites the old state with the new one, so that the rule
                may write into the old one.
        """
        read = params if self.reads_params else [None] * len(grads)
        return [self.moved(*pair) for pair in zip(grads, read)], state


def declared_in(cls: type) -> dict[str, Mapping[str, Any]]:
    """Return the metadata of the hyper-parameters that a class of rules adds, by name."""
    fields = {k: v for k, v in vars(cls).items() if isinstance(v, dataclasses.Field)}
    return {name: field.metadata for name, field in fields.items() if "check" in field.metadata}


def put(old: Sequence[Any], where: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """Return `old` with `values` at the indices `where`."""
    out = list(old)
    for index, value in zip(where, values):
        out[index] = value
    return out


def _has_fractions(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def init_leaves(rule: LeafRule, leaves: list[Any]) -> Any:
    """Return the state of `rule` for a list of parameters, with None for missing ones."""
    present = [i for i, p in enumerate(leaves) if p is not None]
    if rule.leaf_fields:
        require_tensors(leaves, present, "init(params): a parameter")
    kept = [leaves[i] for i in present]
    _refuse_complex(rule, present, kept)
    state = _of_this_step(rule).init_leaves(kept)
    if len(present) == len(leaves):
        return state
    absent = [None] * len(leaves)
    return state._replace(**{f: put(absent, present, getattr(state, f)) for f in rule.leaf_fields})


def _of_this_step(rule: LeafRule) -> LeafRule:
    """Return `rule` with its tensors as they are now."""
    if not rule.fields_with_tensors:
        return rule
    return dataclasses.replace(
        rule, **{name: as_of_now(getattr(rule, name)) for name in rule.fields_with_tensors}
    )


def _has_tensors(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)


def as_of_now(value: Any) -> Any:
    """Return a hyper-parameter, or a tuple of them, as it is now: 0-dim where it holds one number.

    A tensor may be written to before the derivative of the step is taken.
    """
    if isinstance(value, tuple):
        return tuple(map(as_of_now, value))
    if not isinstance(value, Tensor):
        return value
    return (value.reshape(()) if value.numel() == 1 else value).clone()


_is_none = functools.partial(operator.is_, None)


def _apply(
    rule: LeafRule,
    grads: list[Tensor],
    state: Any,
    params: list[Tensor],
    present: Sequence[int],
    *,
    inplace: bool,
) -> tuple[list[Tensor], Any]:
    """Return `rule.update_leaves(...)`; name the leaf if tensors do not match."""
    if rule.reads_params:
        wrong = first_of_another_shape(params, grads)
        if wrong is not None:
            raise _unlike_parameter(present[wrong], params[wrong], grads[wrong])
    if not rule.compressed:
        for name in rule.overwritten_fields[:1]:
            state_leaves = getattr(state, name)
            wrong = first_of_another_shape(state_leaves, grads)
            if wrong is not None:
                raise _unlike_state(rule, name, present[wrong], grads[wrong], state_leaves[wrong])
    try:
        return _of_this_step(rule).update_leaves(grads, state, params, inplace=inplace)
    except RuntimeError as error:
        for i, g, p in zip(present, grads, params):
            if describe_mismatch(p, g) is not None:
                raise _unlike_parameter(i, p, g) from error
        fresh = rule.init_leaves([g.detach() for g in grads])
        for name in rule.leaf_fields:
            for i, new, old in zip(present, getattr(fresh, name), getattr(state, name)):
                if isinstance(new, Tensor) and describe_mismatch(new, old) is not None:
                    raise _unlike_state(rule, name, i, new, old) from error
        raise


def _refuse_complex(rule: LeafRule, present: Sequence[int], tensors: Sequence[Tensor]) -> None:
    for leaf, x in zip(present, tensors) if rule.complex_numbers == "refused" else ():
        if x.is_complex():
            raise MismatchError(
                leaf,
                f"{type(rule).__name__}: expected real tensors, got a complex one, whose "
                "statistics are not those of a pair of real ones; step it with an element-wise "
                "optimizer (transform.partition), or pass torch.view_as_real of it",
            )


def _unlike_parameter(leaf: int, p: Tensor, g: Tensor) -> MismatchError:
    reason = f"a gradient like the parameter: {describe_mismatch(p, g)}"
    return MismatchError(leaf, f"{reason}; pass the gradients of the parameters given")


def unlike_state(rule: LeafRule, state: Any) -> str:
    """Return the message for a `state` without the fields of the state of `rule`."""
    return (
        f"{type(rule).__name__}: expected the state that init(params) of this transformation "
        f"returned, with the fields {', '.join(rule.leaf_fields)}; got {type(state).__name__}, the "
        "state of another transformation or of none"
    )


def _unlike_state(rule: LeafRule, name: str, leaf: int, new: Tensor, old: Tensor) -> MismatchError:
    return MismatchError(
        leaf,
        f"{type(rule).__name__}: the state `{name}` was made for another tensor than this "
        f"gradient: {describe_mismatch(new, old)}; pass gradients like the parameters that "
        "init(params) saw, or call init(params) again",
    )


def _compute(
    rule: LeafRule,
    grads: list[Tensor],
    state: Any,
    params: list[Tensor],
    present: Sequence[int],
    *,
    inplace: bool,
) -> tuple[list[Tensor], Any]:
    """Return `_apply(...)` in the precision of rules: real numbers in at least float32.

    Updates are rounded to the dtype of their gradient and states to the dtype that they had.
    """
    if autocast_devices():
        with without_autocast():
            return _compute(rule, grads, state, params, present, inplace=inplace)
    given = {f: getattr(state, f) for f in rule.leaf_fields}
    if not (is_special(grads) or is_special(params) or any(map(is_special, given.values()))):
        updates, new_state = _apply(rule, grads, state, params, present, inplace=inplace)
    else:

        def seen(values: Sequence[Any]) -> list[Any]:
            pairs = rule.complex_numbers == "pairs"
            return [as_computed(x, pairs=pairs, widen=rule.widens) for x in values]

        updates, new_state = _apply(
            rule,
            seen(grads),
            state._replace(**{f: seen(values) for f, values in given.items()}),
            seen(params),
            present,
            inplace=inplace,
        )
    if given:
        new_state = new_state._replace(
            **{f: as_given(getattr(new_state, f), values) for f, values in given.items()}
        )
    return as_given(updates, grads), new_state


def update_leaves(
    rule: LeafRule,
    grads: list[Any],
    state: Any,
    params: list[Any] | None,
    *,
    inplace: bool,
) -> tuple[list[Any], Any]:
    """Return the updates and the next state for lists of leaves, with None for missing ones."""
    if rule.reads_params:
        require_params(params, rule.needs_params)
    if any(getattr(state, f, state) is None for f in rule.later_fields):
        state = rule.complete(state)
    try:
        old = {f: getattr(state, f) for f in rule.leaf_fields}
    except AttributeError:
        raise TypeError(unlike_state(rule, state)) from None
    for name, values in old.items():
        if len(values) != len(grads):
            kept = [i for i, g in enumerate(grads) if g is not None]
            require_tensors(grads, kept, "update(updates, state): a gradient")
            raise ValueError(
                f"{type(rule).__name__}: expected a state for {len(grads)} leaves, its field "
                f"`{name}` has {len(values)}; pass updates like the parameters that init(params) "
                "saw, with None for a missing gradient, or call init(params) again."
            )
    roles = (grads, *old.values())
    everything = not any(any(map(_is_none, role)) for role in roles)
    present: Sequence[int] = (
        range(len(grads))
        if everything
        else [i for i, row in enumerate(zip(*roles)) if not any(map(_is_none, row))]
    )
    if not present and grads:
        return [None] * len(grads), state

    def own(values: list[Any]) -> list[Any]:
        return values if everything else [values[i] for i in present]

    packed = own(grads)
    require_tensors(grads, present, "update(updates, state): a gradient")
    if not rule.keeps_sparse:
        packed = list(map(dense, packed))
    packed_state = state if everything else state._replace(**{f: own(v) for f, v in old.items()})
    packed_params: list[Any] = []
    if rule.reads_params and params is not None:
        require_tensors(params, present, "update(updates, state, params=params): a parameter")
        packed_params = own(params)

    if (old or rule.reads_params) and not all(map(_has_fractions, packed)):
        leaf = next(i for i, g in zip(present, packed) if not _has_fractions(g))
        raise MismatchError(
            leaf,
            f"{type(rule).__name__}: expected a floating-point or complex gradient, got "
            f"{grads[leaf].dtype}, which would be rounded; give None for leaves that are "
            "not trained",
        )
    _refuse_complex(rule, present, packed)
    updates, new_state = _compute(
        rule, packed, packed_state, packed_params, present, inplace=inplace
    )

    if rule.leaf_fields:
        fields = {f: getattr(new_state, f) for f in rule.leaf_fields}
        if inplace:
            for f in rule.overwritten_fields:
                written = getattr(packed_state, f)
                if fields[f] is not written:
                    fields[f] = list(map(overwrite, written, fields[f]))
        if not everything:
            fields = {f: put(old[f], present, v) for f, v in fields.items()}
        new_state = new_state._replace(**fields)
    if not everything:
        updates = put([None] * len(grads), present, updates)
    return updates, new_state
