# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose steps are native calls, and the choice between backends."""

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
    """A repeated step in place on the CPU, on the state that the previous step returned.

    The form and the lists of that state are known, so only the tensors have to be checked.

    Attributes:
        chain: The optimizer.
        numbers: All hyper-parameters.
        maximize: Maximise the objective instead of minimising it.
        member: The member that counts steps; None if there is none.
        place: The index of the counts among the fields of its state.
    """

    chain: FusedChain
    numbers: tuple[float, ...]
    maximize: bool
    member: int | None
    place: int

    def step(self, cache: StepCache, grads: list[Any], state: Any, launch: bool) -> Any:
        """Return the next state; None, with nothing done, if the plan does not fit."""
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
    """A chain of stages that is one native call if possible.

    If only the first stages have a kernel, the others, such as LAMB's trust ratio, run one by one.

    Attributes:
        transformations: The stages.
        backend: See `with_backend`.
        name: The name in its `repr`.
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
        """The first stages as one call; None if there is no kernel for them.

        It is looked up in the first step, because some optimizers never take one.
        """
        plan = longest_plan([rule_of(member) for member in self.transformations])
        return None if plan is None else Part(plan, self.backend)

    @property
    def stages(self) -> tuple[tuple[int, int, Any], ...]:
        """All stages one by one; not kept, since a program would be traced again after that."""
        return tuple((i, i + 1, None) for i in range(len(self.transformations)))

    @property
    def parts(self) -> tuple[tuple[int, int, Any], ...]:
        """The stages of `part` as one, unless `step` has tried it, and the others one by one."""
        # torch.compile cannot trace how a plan is made.
        if is_traced() or self.part is None or self.is_whole:
            return self.stages
        size = self.part.plan.size
        return ((0, size, TreePart(self.part, ())), *self.stages[size:])

    @lazy
    def is_whole(self) -> bool:
        """Whether `part` covers all stages."""
        return self.part is not None and self.part.plan.size == len(self.transformations)

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
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

        Without `launch` the step is only prepared, for `launch_step`.
        """
        if self.backend == "reference" or why_missing(_C) is not None or is_traced():
            return False, state
        part = self.part
        # In forward mode gradients may have tangents, which the parameters must get.
        if part is None or not self.is_whole or in_forward_mode():
            return False, state
        members = tuple(state)
        lists = part.lists_of(members, len(params))
        if lists is None or not part.in_step(lists) or part.plan.has_arrays():
            return False, state
        found = part.together(grads, members, lists, params, into=cache, launch=launch)
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
        transformation: An optimizer of `torchopt`, such as `torchopt.adam(1e-3)`, or a chain.
        backend: "native": one native call for all tensors, or an error if there is none.
            "reference": plain torch operations. "auto": a native call for plain tensors if there
            is a kernel, otherwise plain torch operations.

    Raises:
        ValueError: An unknown backend.
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
    """Step in place if `transformation` is a `FusedChain` that can; see `FusedChain.step_`."""
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
    """Take the step that `step_inplace` has prepared; `state` is the state after it."""
    assert cache.plan is not None
    cache.plan.launch()
    bump_versions(cache.written)
    cache.state = state
