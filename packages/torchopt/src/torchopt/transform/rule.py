# SPDX-License-Identifier: Apache-2.0
"""A rule written for one tensor: its state, its hyper-parameters, its formula.

The formula runs eagerly, compiled and under vmap, and serves all derivatives without a kernel.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.kernels.native import is_writable
from torchopt.torch_internals import in_vmap
from torchopt.transform.counts import for_each_distinct, increment, shared_scalars, zero_counts
from torchopt.transform.leaf_rule import LeafRule, declared_in
from torchopt.transform.plan import Plan
from torchopt.transform.starts import filled_like, zeros_like
from torchopt.transform.validate import Hyper, at_least_zero, fraction, number, positive, unpacked
from torchopt.tree_function import is_traced

__all__ = ["Hyper", "Rule", "at_least_zero", "fraction", "number", "positive"]


@dataclass(frozen=True)
class Rule(LeafRule):
    """A rule that treats all tensors alike, written for one tensor.

    A subclass is a frozen dataclass. Its fields are the hyper-parameters, declared with
    `at_least_zero`, `fraction` or `number`, in the order of the kernel if there is one. Fields that
    are not declared in this way, such as flags, are not hyper-parameters.

    Attributes:
        State: The class of the state, a NamedTuple. Each of its fields holds a list with one tensor
            per leaf, of the shape of the parameter, with these exceptions: `count` holds the number
            of steps of each leaf, as 0-dim int64 tensors; `t` is the number of the next step, an
            int (traced and in vmap a tensor), which states of the published package have instead;
            and the fields of `shared`.
        shared: Fields with 0-dim float64 tensors that depend only on the count, so that leaves
            share them, and their initial values.
        kernel: The name of the rule in `csrc/math/rules.h`; None if there is none.
        constant_derivative: Whether the derivative with respect to gradient, state and parameter
            depends on none of them. Nothing is then saved for it.
        roles: The fields of the state with the shape of the parameter, in the order of the kernel.
        hypers: The hyper-parameters of a step, in the order of the kernel.
        starts: The hyper-parameter that is the initial value of a field of the state, by field.
        is_steady: Whether no coefficient depends on the step.
    """

    State: ClassVar[Any] = None
    shared: ClassVar[Mapping[str, float]] = {}
    kernel: ClassVar[str | None] = None
    constant_derivative: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ()
    hypers: ClassVar[tuple[str, ...]] = ()
    starts: ClassVar[Mapping[str, str]] = {}
    is_steady: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        starts = {name: data["starts"] for name, data in declared_in(cls).items()}
        cls.hypers += tuple(name for name, role in starts.items() if not role)
        cls.starts = {**cls.starts, **{role: name for name, role in starts.items() if role}}
        fields = cls.State._fields
        cls.roles = tuple(f for f in fields if f not in ("count", "t", *cls.shared))
        cls.leaf_fields = tuple(f for f in fields if f != "t")
        cls.overwritten_fields = cls.roles
        cls.later_fields = ("count",) if "t" in fields else ()
        cls.is_steady = cls.coefficients is Rule.coefficients
        if "kernel" not in vars(cls) and not {"apply", "coefficients", "following"}.isdisjoint(
            vars(cls)
        ):
            cls.kernel = None  # the inherited kernel is that of another formula

    @classmethod
    def from_betas(cls, betas: Any, *rest: Any) -> Rule:
        """Return the rule with the entries of `betas` for b1, b2, ..., followed by `rest`."""
        usual = tuple(getattr(cls, b) for b in ("b1", "b2", "b3") if hasattr(cls, b))
        make: Any = cls  # the fields are those of a subclass
        made: Rule = make(*unpacked(betas, "betas", usual), *rest)
        return made

    def join(self, plan: Plan) -> Plan | None:
        return None if self.kernel is None else plan.directed(self)

    def start(self, role: str, params: list[Tensor]) -> list[Tensor]:
        """Return the initial value of a role of the state: that of `starts`, or zeros."""
        if role in self.starts:
            return filled_like(params, getattr(self, self.starts[role]))
        return zeros_like(params, getattr(self, "moment_requires_grad", False))

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        """Return the values that depend on the step but not on the tensor, in float64.

        They are computed once for all tensors that have taken the same number of steps, and rounded
        to the dtype of the computation.

        Args:
            k: The number of this step, from 1, a 0-dim int64 tensor; None without a `count`.
            shared: The fields of `shared` before the step.
        """
        return ()

    def following(self, k: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        """Return the fields of `shared` after step k."""
        return ()

    @abstractmethod
    def apply(
        self, c: tuple[Any, ...], g: Tensor, state: tuple[Tensor, ...], p: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the direction and the new state of one tensor, without writing to any input.

        Args:
            c: The coefficients.
            g: The gradient.
            state: A tensor for each of `roles`.
            p: The parameter if the rule has `reads_params`, else None.
        """

    def init_leaves(self, params: list[Tensor]) -> Any:
        fields: dict[str, Any] = {role: self.start(role, params) for role in self.roles}
        for name, value in self.shared.items():
            fields[name] = shared_scalars(params, value, torch.float64)
        if "count" in self.State._fields:
            fields["count"] = zero_counts(params)
        if "t" in self.State._fields:
            followed = torch.compiler.is_compiling() or in_vmap()
            fields["t"] = _after(fields["count"]) if followed and params else 1
        return self.State(**fields)

    def complete(self, state: Any) -> Any:
        """Return the state with counts that follow from its `t`."""
        steps = int(state.t) - 1
        return state._replace(count=shared_scalars(getattr(state, self.roles[0]), steps))

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        counts: list[Any] = [None] * len(grads)
        new: dict[str, Any] = {}
        if "count" in self.leaf_fields:
            new["count"] = counts = increment(state.count)
        if "t" in state._fields:
            # torch.compile would compile again for the next int, and vmap cannot return one.
            new["t"] = _after(counts) if counts and (is_traced() or in_vmap()) else state.t + 1
        shared = [getattr(state, name) for name in self.shared]
        for name, values in zip(self.shared, self.follow(counts, shared)):
            new[name] = values
        roles = [getattr(state, name) for name in self.roles]
        updates, moved = self.directions(grads, roles, counts, shared, params, inplace=inplace)
        new.update(zip(self.roles, moved))
        return updates, state._replace(**new)

    def follow(
        self, counts: Sequence[Tensor], shared: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """Return the fields of `shared` after a step, computed once for each distinct count."""
        if not self.shared:
            return []
        rows = for_each_distinct(self.following, counts, *shared)
        return [[row[i] for row in rows] for i in range(len(shared))]

    def directions(
        self,
        grads: Sequence[Tensor],
        roles: Sequence[Sequence[Tensor]],
        counts: Sequence[Any],
        shared: Sequence[Sequence[Tensor]],
        params: Sequence[Tensor],
        *,
        inplace: bool = False,
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return the direction of each tensor, and the new roles of the state.

        Args:
            grads: The gradients.
            roles: For each role of the state, a tensor for each gradient.
            counts: The number of this step for each gradient.
            shared: For each field of `shared`, a tensor for each gradient.
            params: The parameters if the rule has `reads_params`.
            inplace: The caller copies the new state into the old one where that is writable, so
                that a new state may be the same tensor as a direction.
        """
        reads = self.reads_params
        scalars = self._scalars(grads, counts, shared)
        rows = [
            self.apply(c, g, state, params[i] if reads else None)
            for i, (c, g, state) in enumerate(
                zip(scalars, grads, zip(*roles) if roles else [()] * len(grads))
            )
        ]
        updates = [u for u, _ in rows]
        moved = [list(column) for column in zip(*(new for _, new in rows))] or [[] for _ in roles]
        # A state must not share a tensor with the caller, who may write to it.
        for role, old in zip(moved, roles):
            for i, x in enumerate(role):
                if x is grads[i]:
                    role[i] = x.clone()
                elif x is updates[i] and not (inplace and is_writable(old[i])):
                    updates[i] = x.clone()
        return updates, moved

    def _scalars(
        self, grads: Sequence[Tensor], counts: Sequence[Any], shared: Sequence[Sequence[Tensor]]
    ) -> list[tuple[Any, ...]]:
        """Return the coefficients for each gradient, computed once for each distinct count."""
        if self.is_steady:
            return [()] * len(grads)
        return for_each_distinct(self._rounded, [g.dtype for g in grads], counts, *shared)

    def _rounded(self, dtype: torch.dtype, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        return tuple(
            x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in self.coefficients(k, *shared)
        )


def _after(counts: Sequence[Tensor]) -> Tensor:
    """Return the largest count plus one."""
    last, *others = dict.fromkeys(counts)
    for count in others:
        last = torch.maximum(last, count.to(last.device))
    return last + 1
