# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose steps are native calls, and the choice of how steps are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchopt import _C
from torchopt.base import GradientTransformation
from torchopt.combine import FlatChain, with_parts
from torchopt.errors import KernelUnavailableError
from torchopt.kernels.devices import placement
from torchopt.kernels.fused_step import StepCache
from torchopt.kernels.missing import why_missing
from torchopt.lazy import lazy
from torchopt.shown import call, shown
from torchopt.torch_internals import bump_versions, in_forward_mode
from torchopt.transform.fused import BACKENDS, Backend, Part
from torchopt.transform.parts import TreePart, rule_of
from torchopt.transform.plan import Plan, longest_plan
from torchopt.tree import flatten_up_to, tree_flatten, tree_unflatten
from torchopt.tree_function import is_traced

__all__ = ["Backend", "FusedChain", "launch_step", "step_inplace", "with_backend"]


@dataclass(slots=True)
class _QuickStep:
    """A step in place like the previous one, on the state that it returned, on the CPU.

    That state still has its form and its lists, so only the tensors have to be checked.

    Attributes:
        chain: Whose step it is.
        numbers: All hyper-parameters.
        maximize: Go up instead of down.
        member: The member that counts steps, None where none does.
        place: Where its counts stand among its fields.
    """

    chain: FusedChain
    numbers: tuple[float, ...]
    maximize: bool
    member: int | None
    place: int

    def step(self, cache: StepCache, grads: list[Any], state: Any, launch: bool) -> Any:
        """Return the next state, or None, having done nothing, where the plan does not fit."""
        plan = cache.plan
        assert plan is not None  # set together with this object
        threads = torch.get_num_threads()
        if self.member is None:
            device, stream = placement(cache.params[0])
            if not plan.run(grads, 1, self.numbers, self.maximize, threads, device, stream, launch):
                return None
            if launch:
                bump_versions(cache.written)
            return state
        counted = state[self.member]
        counts = counted[self.place]
        following = plan.advance(grads, counts, self.numbers, self.maximize, threads, launch)
        if following is None:
            return None
        if launch:
            bump_versions(cache.written)
        values = list(counted)
        values[self.place] = [following] * len(counts)
        return (*state[: self.member], counted._make(values), *state[self.member + 1 :])


@dataclass(frozen=True)
class FusedChain(FlatChain):
    """A chain of stages that is one native call where that is possible.

    Whatever follows the stages that are a kernel, such as LAMB's trust ratio, runs stage by stage.

    Attributes:
        transformations: The stages.
        backend: See `with_backend`.
        name: What `repr` calls it.
    """

    name: str = field(default="chain", compare=False)

    def __repr__(self) -> str:
        rules = [rule for rule in map(rule_of, self.transformations) if rule is not None]
        if self.name == "chain" or len(rules) < len(self.transformations):
            return f"{self.name}{shown(self.transformations)}"
        found: dict[str, Any] = {"lr": None}
        for rule in rules:
            for key, value in rule.hyper_parameters().items():
                if found.get(key) is None:
                    found[key] = value
        if self.backend != "auto":
            found["backend"] = self.backend
        return call(self.name, {k: v for k, v in found.items() if v is not None and v is not False})

    @lazy
    def part(self) -> Part | None:
        """The first stages as one call, None where there is no kernel for them.

        It is found by the first step: many optimizers are made, and some never take one.
        """
        plan = longest_plan([rule_of(member) for member in self.transformations])
        return None if plan is None else Part(plan, self.backend)

    @property
    def parts(self) -> tuple[tuple[int, int, Any], ...]:
        """The stages of `part`, unless it is tried before, and the others one by one."""
        first: tuple[Any, ...] = ()
        # A compiler cannot follow how a plan is made.
        if not (is_traced() or self.part is None or self.is_whole):
            first = ((0, self.part.plan.size, TreePart(self.part, ())),)
        start = first[0][1] if first else 0
        return (*first, *((i, i + 1, None) for i in range(start, len(self.transformations))))

    @lazy
    def is_whole(self) -> bool:
        """Whether `part` is all stages."""
        return self.part is not None and self.part.plan.size == len(self.transformations)

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Return the updates and the next state; see `GradientTransformation`."""
        part = None if self.backend == "reference" or is_traced() else self.part
        if part is None or not self.is_whole:
            return super().step(updates, state, params, inplace)
        leaves, spec = tree_flatten(updates, none_is_leaf=True)
        found = read = None
        if params is not None and part.plan.reads_params:
            what = "update(updates, state, params=params)"

            def read() -> list[Any]:
                return flatten_up_to(spec, params, what, spec_of="updates")

        if isinstance(state, (tuple, list)) and len(state) == part.plan.size:
            found = part.update(leaves, tuple(state), read, inplace=inplace)
        if found is None:
            return super().step(updates, state, params, inplace)
        return tree_unflatten(spec, found[0]), found[1]

    def step_(
        self, cache: StepCache, params: Sequence[Tensor], grads: list[Any], state: Any, launch: bool
    ) -> tuple[bool, Any]:
        """Step `params` and the state in place; return whether it was done, and the next state.

        Without `launch` the step is prepared only, for `launch_step`.
        """
        if self.backend == "reference" or why_missing(_C) is not None or is_traced():
            return False, state
        part = self.part
        # In forward mode gradients may have tangents, which parameters take over.
        if part is None or not self.is_whole or in_forward_mode():
            return False, state
        members = tuple(state)
        roles = part.roles_of(members, len(params))
        if roles is None or not part.in_step(members) or part.plan.has_arrays():
            return False, state
        found = part.together(grads, members, roles, params, into=cache, launch=launch)
        if found is None or isinstance(found, Exception):
            return False, state
        if launch:
            cache.state = found[1]
        cache.quick = self._quick(part.plan, members)
        return True, found[1]

    def _quick(self, plan: Plan, members: tuple[Any, ...]) -> _QuickStep | None:
        if plan.numbers is None:
            return None
        member = plan.step
        fields = () if member is None else members[member]._fields
        if "t" in fields:
            return None  # there is a second count to keep
        place = fields.index("count") if fields else 0
        return _QuickStep(self, plan.numbers, plan.maximize, member, place)


def with_backend(
    transformation: GradientTransformation, backend: Backend
) -> GradientTransformation:
    """Return an optimizer that computes its steps as `backend` says.

    Args:
        transformation: What an optimizer of `torchopt` returned, such as `torchopt.adam(1e-3)`, or
            a chain.
        backend: "native": one native call for all tensors, or an error where there is none.
            "reference": plain torch operations. "auto": native for plain tensors that have
            kernels, else plain torch operations.

    Raises:
        ValueError: No such backend.
        KernelUnavailableError: "native" for a transformation that is not a fused rule.

    Example:
        >>> import torchopt
        >>> optimizer = with_backend(torchopt.adam(0.1, eps=0.0), "native")
        >>> params = (torch.tensor([1.0]),)
        >>> optimizer.update((torch.tensor([2.0]),), optimizer.init(params), inplace=False)[0]
        (tensor([-0.1000]),)
    """
    if backend not in BACKENDS:
        raise ValueError(f"with_backend: expected one of {BACKENDS}, got {backend!r}.")
    fused = getattr(transformation.update, "__self__", None)
    if isinstance(fused, FusedChain) and fused.part is not None:
        return dataclasses.replace(fused, backend=backend).pair()
    chained = None
    if backend != "auto":
        chained = with_parts(transformation, backend, lambda t: with_backend(t, "reference"))
    if chained is not None:
        return chained
    if backend == "native":
        names = ", ".join(sorted(getattr(_C, "RULES", ())))
        raise KernelUnavailableError(
            "with_backend(..., 'native'): expected an optimizer of torchopt that is one fused rule "
            f"({names}), got {_described(transformation)}; use 'auto' or 'reference' for it."
        )
    return transformation


def _described(transformation: GradientTransformation) -> str:
    owner = getattr(transformation.update, "__self__", None)
    rule = rule_of(transformation)
    if rule is not None:
        return type(rule).__name__
    if isinstance(owner, FusedChain):
        return f"a chain of {', '.join(map(_described, owner.transformations))}"
    if owner is None:
        return getattr(transformation.update, "__qualname__", "another one")
    return type(owner).__name__.lstrip("_")


def step_inplace(
    transformation: GradientTransformation,
    cache: StepCache,
    params: Sequence[Tensor],
    grads: list[Any],
    state: Any,
    *,
    launch: bool = True,
) -> tuple[bool, Any]:
    """Step in place where `transformation` is a `FusedChain` that can; see `FusedChain.step_`."""
    fused = getattr(transformation.update, "__self__", None)
    quick = cache.quick
    if (
        quick is not None
        and quick.chain is fused
        and state is cache.state
        and params is cache.params
        and not in_forward_mode()
        and not is_traced()
    ):
        following = quick.step(cache, grads, state, launch)
        if following is not None:
            if launch:
                cache.state = following
            return True, following
    if isinstance(fused, FusedChain):
        return fused.step_(cache, params, grads, state, launch)
    return False, state


def launch_step(cache: StepCache, state: Any) -> None:
    """Take the step that `step_inplace` prepared and that leads to `state`."""
    assert cache.plan is not None
    cache.plan.launch()
    bump_versions(cache.written)
    cache.state = state
