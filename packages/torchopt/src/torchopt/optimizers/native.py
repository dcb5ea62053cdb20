# SPDX-License-Identifier: Apache-2.0
"""Chains of an optimizer's stages as one native call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt import _C
from torchopt.base import GradientTransformation, identity, needs_tree
from torchopt.errors import KernelUnavailableError, MismatchError
from torchopt.kernels.fused_step import StepCache, fused_step_
from torchopt.kernels.fused_update import (
    FusedCall,
    bump_versions,
    decays,
    fused_update,
    fused_update_,
)
from torchopt.kernels.missing import why_missing
from torchopt.kernels.registry import explain_unavailable, placement
from torchopt.kernels.rules import RULES, as_number
from torchopt.optimizers.rule import Rule
from torchopt.transform.add_decayed_weights import AddDecayedWeights
from torchopt.transform.base import LeafRule, overwrite
from torchopt.transform.counts import increment
from torchopt.transform.scale import Scale
from torchopt.transform.scale_by_adadelta import ScaleByAdadelta
from torchopt.transform.scale_by_adamax import ScaleByAdamax
from torchopt.transform.scale_by_adan import ScaleByAdan
from torchopt.transform.scale_by_amsgrad import ScaleByAmsgrad
from torchopt.transform.scale_by_asgd import ScaleByAsgd
from torchopt.transform.scale_by_nadam import ScaleByNadam
from torchopt.transform.scale_by_radam import ScaleByRAdam
from torchopt.transform.scale_by_rms import ScaleByRms
from torchopt.transform.scale_by_rprop import ScaleByRprop
from torchopt.transform.scale_by_rss import ScaleByRss
from torchopt.transform.scale_by_schedule import ScaleBySchedule
from torchopt.transform.scale_by_stddev import ScaleByStdDev
from torchopt.transform.scale_by_trust_ratio import ScaleByTrustRatio
from torchopt.transform.trace import DampenedTrace, Trace
from torchopt.tree import flatten_up_to, located, tree_flatten, tree_unflatten
from torchopt.tree_function import PLAIN, any_watched, is_traced, is_transforming

__all__ = ["Backend", "FusedChain", "fuse", "launch_step", "step_inplace", "with_backend"]

Backend = Literal["auto", "native", "reference"]
BACKENDS = ("auto", "native", "reference")

# Up to so many tensors, torch's own multiplications take less time than one native node when plain
# SGD is differentiated: 21 us instead of 35 for one tensor, as much as it for six.
FEW = 4

# Fields that say how a state starts.
_WITHOUT_EFFECT = {
    *("moment_requires_grad", "initial_scale", "initial_accumulator_value", "initial_size"),
}

# Rule class: (name of the fused rule, hyper-parameters, fields of the state, whether it depends on
# the `count` in the state). A hyper-parameter of the fused rule that the class does not have is 0.
_DIRECTIONS: dict[type, tuple[str, tuple[str, ...], tuple[str, ...], bool]] = {
    ScaleByAdamax: ("adamax", ("b1", "b2", "eps"), ("mu", "nu"), True),
    ScaleByAdan: (
        "adan",
        ("b1", "b2", "b3", "eps"),
        ("mu", "delta", "nu", "previous"),
        True,
    ),
    ScaleByAmsgrad: ("amsgrad", ("b1", "b2", "eps"), ("mu", "nu", "nu_max"), True),
    ScaleByAsgd: ("asgd", ("eta", "lambd", "alpha", "t0"), ("average",), True),
    ScaleByNadam: ("nadam", ("b1", "b2", "eps", "momentum_decay"), ("mu", "nu"), True),
    ScaleByRAdam: ("radam", ("b1", "b2", "eps"), ("mu", "nu"), True),
    ScaleByRprop: (
        "rprop",
        ("eta_minus", "eta_plus", "min_step", "max_step"),
        ("previous", "step_size"),
        False,
    ),
    ScaleByAdadelta: ("adadelta", ("rho", "eps"), ("mu", "nu"), False),
    ScaleByRms: ("rmsprop", ("alpha", "eps"), ("nu",), False),
    ScaleByStdDev: ("rmsprop_centered", ("alpha", "eps"), ("mu", "nu"), False),
    ScaleByRss: ("adagrad", ("eps",), ("sum_of_squares",), False),
}


@dataclass(frozen=True)
class Recipe:
    """How a chain of stages is one fused rule.

    Attributes:
        rule: Name of the fused rule.
        hypers: Its hyper-parameters, but for the step size.
        lr: The step size; multiplied by the value of each of `schedules`.
        schedules: Pairs (member, function of the count).
        maximize: Go up instead of down.
        states: Pairs (member, field) for each of the rule's states.
        step: The member that counts the steps; None where the rule does not depend on them.
        nadam: (member, stage) where the rule reads NAdam's product of momenta.
        size: The number of members that the rule stands for, from the first on.
    """

    rule: str
    hypers: dict[str, Any]
    lr: Any
    schedules: tuple[tuple[int, Any], ...]
    maximize: bool
    states: tuple[tuple[int, str], ...]
    step: int | None
    nadam: tuple[int, ScaleByNadam] | None
    size: int

    @functools.cached_property
    def counted(self) -> tuple[int, ...]:
        """The members that count the steps of each leaf."""
        counted = [i for i, _ in self.schedules]
        if self.step is not None:
            counted.append(self.step)
        return tuple(dict.fromkeys(counted))

    @functools.cached_property
    def reads_params(self) -> bool:
        """Whether parameters matter to the updates."""
        return RULES[self.rule].reads_params or decays(self.hypers)

    @functools.cached_property
    def numbers(self) -> tuple[float, ...] | None:
        """All hyper-parameters in the order of the kernels, None where one of them may change."""
        hypers = {**self.hypers, "lr": self.lr}
        fixed = all(isinstance(h, (int, float)) for h in hypers.values())
        if self.schedules or self.nadam or not fixed:
            return None
        return tuple(as_number(name, hypers[name]) for name in RULES[self.rule].all_hypers)

    def has_arrays(self) -> bool:
        """Return whether a hyper-parameter is a tensor with other than one element.

        The stages broadcast it; the kernels take numbers.
        """
        return self.numbers is None and any(
            isinstance(h, Tensor) and h.numel() != 1 for h in (*self.hypers.values(), self.lr)
        )


def _rule_of(member: GradientTransformation) -> LeafRule | None:
    rule = getattr(getattr(member.update, "__self__", None), "rule", None)
    return rule if isinstance(rule, LeafRule) else None


def _knows_all_fields(rule: LeafRule, hypers: Sequence[str]) -> bool:
    """Return whether `rule` has no setting that the kernels would not see."""
    names = {field.name for field in dataclasses.fields(rule)}
    return names - _WITHOUT_EFFECT == set(hypers)


def _recipe(members: Sequence[GradientTransformation], penalty: type[LeafRule]) -> Recipe | None:
    """Return how `members` are one fused rule, None where they are not."""
    rules = [_rule_of(member) for member in members]
    if not rules or any(rule is None for rule in rules):
        return None
    hypers: dict[str, Any] = {"weight_decay": 0.0, "decoupled_weight_decay": 0.0}
    maximize = False
    name, step, nadam = "sgd", None, None
    states: tuple[tuple[int, str], ...] = ()
    schedules: list[tuple[int, Any]] = []
    i = 0
    first: Any = rules[0]
    starts_with_penalty: bool = type(first) is penalty
    if starts_with_penalty:
        hypers["weight_decay"], maximize, i = first.weight_decay, first.maximize, 1
    elif type(first) is Scale and len(rules) > 1 and not isinstance(first.step_size, Tensor):
        if first.sign * first.step_size != -1.0:
            return None
        maximize, i = True, 1

    def current() -> Any:
        return rules[i] if i < len(rules) else None

    rule = current()
    if isinstance(rule, Rule) and rule.kernel is not None:
        name = rule.kernel
        hypers.update({key: getattr(rule, key) for key in rule.hypers})
        states = tuple((i, role) for role in rule.roles)
        step = i if "count" in rule.leaf_fields else None
        i += 1
    elif type(current()) in _DIRECTIONS:
        name, keys, fields, counts = _DIRECTIONS[type(current())]
        if not _knows_all_fields(current(), keys):
            return None
        hypers.update(dict.fromkeys(RULES[name].hypers, 0.0))
        hypers.update({key: getattr(current(), key) for key in keys})
        nadam = (i, current()) if name == "nadam" else None
        states = tuple((i, field) for field in fields)
        step = i if counts else None
        i += 1
    if type(current()) in (Trace, DampenedTrace):
        trace = current()
        dampened = type(trace) is DampenedTrace
        keys = ("momentum", "nesterov", "dampening") if dampened else ("momentum", "nesterov")
        names = {"sgd": "nesterov" if trace.nesterov else "momentum"}
        if not trace.nesterov and not dampened:
            names |= {key: f"{key}_momentum" for key in ("rmsprop", "rmsprop_centered")}
        if name not in names or not _knows_all_fields(trace, keys):
            return None
        name = names[name]
        hypers.update(momentum=trace.momentum, dampening=trace.dampening if dampened else 0.0)
        states = (*states, (i, "trace"))
        step = i if dampened else step
        i += 1
    if type(current()) is ScaleBySchedule and current().sign == 1.0 and i + 1 < len(rules):
        schedules.append((i, current().step_size_fn))
        i += 1
    if type(current()) is AddDecayedWeights and current().factor is None:
        hypers["decoupled_weight_decay"] = current().weight_decay
        i += 1
    last = current()
    if type(last) is ScaleByTrustRatio and name != "sgd":
        # The ratio needs the norms of whole tensors: what stands before it is the fused part.
        return Recipe(name, hypers, -1.0, (), maximize, states, step, nadam, i)
    if i != len(rules) - 1:
        return None
    if type(last) is ScaleBySchedule and last.sign == -1.0:
        schedules.append((i, last.step_size_fn))
        lr: Any = 1.0
    elif type(last) is Scale:
        if last.sign == 1 and isinstance(last.step_size, Tensor):
            return None  # its negative would be that of today
        lr = last.step_size if last.sign == -1 else -last.step_size
    else:
        return None
    return Recipe(name, hypers, lr, tuple(schedules), maximize, states, step, nadam, i + 1)


@dataclass(slots=True)
class _QuickStep:
    """A step in place like the one before, on the state that it returned; with counts, on the CPU.

    That state has the form and the lists it was made with, so only tensors have to be looked at.

    Attributes:
        chain: Whose step it is.
        numbers: All hyper-parameters.
        maximize: Go up instead of down.
        single: Whether the state is that of one member.
        member: The member that counts steps, None where none does.
        place: Where its counts stand among its fields.
    """

    chain: FusedChain
    numbers: tuple[float, ...]
    maximize: bool
    single: bool
    member: int | None
    place: int

    def step(self, cache: StepCache, grads: list[Any], state: Any, launch: bool) -> Any:
        """Return the next state, or None, having done nothing, where the plan does not fit."""
        plan = cache.plan
        assert plan is not None  # it goes together with this object
        threads = torch.get_num_threads()
        if self.member is None:
            device, stream = placement(cache.params[0])
            if not plan.run(grads, 1, self.numbers, self.maximize, threads, device, stream, launch):
                return None
            if launch:
                bump_versions(cache.written)
            return state
        counted = state if self.single else state[self.member]
        counts = counted[self.place]
        following = plan.advance(grads, counts, self.numbers, self.maximize, threads, launch)
        if following is None:
            return None
        if launch:
            bump_versions(cache.written)
        values = list(counted)
        values[self.place] = [following] * len(counts)
        counted = counted._make(values)
        if self.single:
            return counted
        return (*state[: self.member], counted, *state[self.member + 1 :])


@dataclass(frozen=True)
class FusedChain:
    """A chain of stages that is one native call where that is possible.

    Attributes:
        chain: The same stages one by one.
        single: Whether the state of `chain` is that of its one member.
        recipe: How the first stages are one rule.
        tail: The stages after those.
        backend: "reference": never native. "native": always, or an error. "auto": native for plain
            tensors that have kernels, where that is faster.
    """

    chain: GradientTransformation
    single: bool
    recipe: Recipe
    tail: tuple[GradientTransformation, ...]
    backend: Backend

    @property
    def needs_tree(self) -> bool:
        """Whether a stage has to see trees, as masks do."""
        return needs_tree(self.chain)

    def init(self, params: Any) -> Any:
        """Return the state of the stages."""
        return self.chain.init(params)

    def update(
        self, updates: Any, state: Any, *, params: Any | None = None, inplace: bool = True
    ) -> tuple[Any, Any]:
        """Return the updates and the next state; see `GradientTransformation`."""
        if self.backend == "reference" or is_traced():
            return self.chain.update(updates, state, params=params, inplace=inplace)
        leaves, spec = tree_flatten(updates, none_is_leaf=True)
        if self.backend == "auto" and (
            (not inplace and self._is_brief(leaves)) or self.recipe.has_arrays()
        ):
            return self.chain.update(updates, state, params=params, inplace=inplace)
        members = (state,) if self.single else state
        if not isinstance(members, (tuple, list)):
            return self.chain.update(updates, state, params=params, inplace=inplace)  # it raises
        members = tuple(members)
        read = "update(updates, state, params=params)"
        leaves_of_params = (
            None if params is None else lambda: flatten_up_to(spec, params, read, spec_of="updates")
        )
        together = self._together(leaves, members, leaves_of_params, inplace)
        if together is not None:
            return tree_unflatten(spec, together[0]), together[1]
        if not self._complete(members, len(leaves)):
            return self.chain.update(updates, state, params=params, inplace=inplace)
        present = [
            i
            for i, g in enumerate(leaves)
            if g is not None and all(role[i] is not None for role in self._roles(members))
        ]
        param_leaves = (
            None if params is None else flatten_up_to(spec, params, read, spec_of="updates")
        )
        if not present or (
            self.backend == "auto" and not self._suits(leaves, members, param_leaves, present)
        ):
            return self.chain.update(updates, state, params=params, inplace=inplace)
        out: list[Any] = [None] * len(leaves)
        roles = [list(role) for role in self._roles(members)]  # filled in below
        advanced = self._advance(members, roles, present)
        groups = self._groups(members, present)
        # Several calls write when all of them are known to be right.
        at_once = inplace and len(groups) == 1 and not self.tail
        for group in groups:
            steps = self._steps(advanced, group)
            values, new_roles = self._run(
                leaves, members, param_leaves, group, steps, inplace=at_once
            )
            for k, i in enumerate(group):
                out[i] = values[k]
                for role, new in zip(roles, new_roles):
                    role[i] = new[k]
        for i, stage in enumerate(self.tail, self.recipe.size):
            try:
                out, rest = stage.update(out, members[i], params=param_leaves, inplace=at_once)
            except MismatchError as error:
                raise located(error, spec) from error.__cause__
            advanced = (*advanced[:i], rest, *advanced[i + 1 :])
        if inplace and not at_once:
            for role, old in zip(roles, self._roles(members)):
                role[:] = [overwrite(o, n) if n is not o else o for o, n in zip(old, role)]
        return tree_unflatten(spec, out), advanced[0] if self.single else advanced

    def _is_brief(self, leaves: list[Any]) -> bool:
        """Return whether a graph is recorded of less than a node for many tensors is worth."""
        return (
            self.recipe.rule == "sgd"
            and len(leaves) <= FEW
            and torch.is_grad_enabled()
            and any(isinstance(g, Tensor) and g.requires_grad for g in leaves)
        )

    def _together(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        params: Callable[[], list[Any]] | None,
        inplace: bool,
    ) -> tuple[list[Any], Any] | None:
        """Return what `update` does but for the tree, in the shortest way; None where it is closed.

        It is open where all leaves step together and are plain tensors on the CPU.
        """
        if self.tail or not leaves or why_missing(_C) is not None:
            return None
        if not self._complete(members, len(leaves)):
            return None
        if forward_ad._current_level >= 0 or is_transforming() or not self._in_step(members):
            return None
        numbers = self._numbers(members)
        if numbers is None:
            return None
        recipe = self.recipe
        decayed = recipe.reads_params
        if decayed and params is None:
            return None
        advanced = self._advance(members, None, range(len(leaves)), together=True)
        step = self._step(advanced)
        flat = [*leaves]
        for role in self._roles(members):
            flat += role
        if decayed and params is not None:
            flat += params()
        size = len(leaves)
        constants = [step] if isinstance(step, Tensor) else []
        call = FusedCall(
            RULES[recipe.rule],
            size,
            decayed,
            recipe.maximize,
            tuple(numbers),
            (0,) * size if constants else (),
            1 if isinstance(step, Tensor) else step,
        )
        kind = _C.DECAYED_UPDATE if decayed else _C.UPDATE
        found = call.quick(kind, flat, None, step, record=torch.is_grad_enabled())
        if found is None:
            return None
        if found is False:  # a graph follows one of the tensors, and they are plain
            if inplace:
                return None
            found = call.differentiable((*flat, *constants), plain=True)
        outputs = list(found)
        if inplace and recipe.states:
            # Two native calls for all tensors; checking each before one that writes takes longer.
            last = size * (1 + len(recipe.states))
            torch._foreach_copy_(flat[size:last], outputs[size:])
            outputs[size:] = flat[size:last]
        changes: dict[int, dict[str, Any]] = {}
        for k, (i, field) in enumerate(recipe.states, 1):
            changes.setdefault(i, {})[field] = outputs[k * size : (k + 1) * size]
        new = list(advanced)
        for i, change in changes.items():
            new[i] = new[i]._replace(**change)
        return outputs[:size], new[0] if self.single else tuple(new)

    def step_(
        self, cache: StepCache, params: Sequence[Tensor], grads: list[Any], state: Any, launch: bool
    ) -> tuple[bool, Any]:
        """Step `params` and the state in place; return whether it was done, and the next state.

        Without `launch` the step is prepared only, for `launch_step`.
        """
        if self.backend == "reference" or self.tail or why_missing(_C) is not None or is_traced():
            return False, state
        if forward_ad._current_level >= 0:
            return False, state  # gradients may have tangents, which parameters take over
        members = (state,) if self.single else tuple(state)
        # A state that the last step returned has the form it was made in.
        if state is not cache.state and not self._complete(members, len(params)):
            return False, state
        if not self._in_step(members) or self.recipe.has_arrays():
            return False, state
        numbers = self._numbers(members)
        if numbers is None:
            return False, state
        advanced = self._advance(members, None, range(len(params)), together=True)
        done = fused_step_(
            cache,
            self.recipe.rule,
            params,
            grads,
            self._roles(members),
            self._step(advanced),
            numbers,
            maximize=self.recipe.maximize,
            launch=launch,
        )
        if not done:
            return False, state
        following = advanced[0] if self.single else advanced
        if launch:
            cache.state = following
        cache.quick = self._quick(members)
        return True, following

    def _quick(self, members: tuple[Any, ...]) -> _QuickStep | None:
        recipe = self.recipe
        if recipe.numbers is None:
            return None
        member = recipe.step
        fields = () if member is None else members[member]._fields
        if "t" in fields:
            return None  # there is a second count to keep
        place = fields.index("count") if fields else 0
        return _QuickStep(self, recipe.numbers, recipe.maximize, self.single, member, place)

    def _numbers(self, members: tuple[Any, ...]) -> Sequence[float] | None:
        """Return the hyper-parameters in the order of the kernels, None where one is watched or
        has no value, as on the meta device.
        """
        constant = self.recipe.numbers
        if constant is not None:
            return constant
        hypers = self._hypers(members, 0)
        tensors = [h for h in hypers.values() if isinstance(h, Tensor)]
        if any(h.is_meta or type(h) not in PLAIN for h in tensors) or any_watched(tensors):
            return None
        return [as_number(name, hypers[name]) for name in RULES[self.recipe.rule].all_hypers]

    def _in_step(self, members: tuple[Any, ...]) -> bool:
        """Return whether all leaves took the same number of steps."""
        return all(map(_are_equal, self._count_lists(members)))

    def _step(self, advanced: tuple[Any, ...]) -> int | Tensor:
        """Return the step of leaves that took the same number of steps."""
        if self.recipe.step is None:
            return 1
        step: Tensor = advanced[self.recipe.step].count[0]
        return step

    def _complete(self, members: tuple[Any, ...], size: int) -> bool:
        """Return whether the state has the form the recipe was made for."""
        if len(members) != self.recipe.size + len(self.tail):
            return False
        try:
            lists = (*self._roles(members), *self._count_lists(members))
        except AttributeError:
            return False  # the state of something else; the stages say so
        return all(isinstance(role, list) and len(role) == size for role in lists)

    def _roles(self, members: tuple[Any, ...]) -> list[list[Any]]:
        return [getattr(members[i], field) for i, field in self.recipe.states]

    def _count_lists(self, members: tuple[Any, ...]) -> list[list[Any]]:
        """Return what has to be the same for leaves that are served by one call."""
        lists = [members[i].count for i in self.recipe.counted]
        if self.recipe.nadam is not None:
            lists.append(members[self.recipe.nadam[0]].mu_product)
        return lists

    def _groups(self, members: tuple[Any, ...], present: list[int]) -> list[list[int]]:
        """Return the leaves that took the same number of steps."""
        lists = self._count_lists(members)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in present:
            groups.setdefault(tuple(id(counts[i]) for counts in lists), []).append(i)
        return list(groups.values())

    def _hypers(self, members: tuple[Any, ...], leaf: int) -> dict[str, Any]:
        lr = self.recipe.lr
        for i, schedule in self.recipe.schedules:
            lr = lr * schedule(members[i].count[leaf])
        hypers = {**self.recipe.hypers, "lr": lr}
        if self.recipe.nadam is not None:
            hypers["mu_product"] = members[self.recipe.nadam[0]].mu_product[leaf]
        return hypers

    def _steps(self, advanced: tuple[Any, ...], group: Sequence[int]) -> int | list[Tensor]:
        if self.recipe.step is None:
            return 1
        count = advanced[self.recipe.step].count
        return [count[i] for i in group]

    def _advance(
        self,
        members: tuple[Any, ...],
        roles: Sequence[list[Any]] | None,
        present: Sequence[int],
        *,
        together: bool = False,
    ) -> tuple[Any, ...]:
        """Return the members with one step more for the leaves in `present`.

        Args:
            members: State of each member.
            roles: What replaces the rule's states; None: they stay.
            present: Indices of leaves.
            together: Whether these are all leaves, and all counts of a member are one tensor.
        """
        changes: dict[int, dict[str, Any]] = {}
        for (i, field), role in zip(self.recipe.states, roles or ()):
            changes.setdefault(i, {})[field] = role
        for i in self.recipe.counted:
            counts = members[i].count
            if together or (len(present) == len(counts) and _are_equal(counts)):
                new: list[Any] = [_following(counts[0])] * len(counts)
            else:
                new = list(counts)
                for k, value in zip(present, increment([counts[k] for k in present])):
                    new[k] = value
            changes.setdefault(i, {})["count"] = new
            if "t" in members[i]._fields:
                changes[i]["t"] = members[i].t + 1
        if self.recipe.nadam is not None:
            i, stage = self.recipe.nadam
            products = list(members[i].mu_product)
            following = stage.multiply(
                [products[k] for k in present], [changes[i]["count"][k] for k in present]
            )
            for k, value in zip(present, following):
                products[k] = value
            changes[i]["mu_product"] = products
        advanced = list(members)
        for i, change in changes.items():
            advanced[i] = members[i]._replace(**change)
        return tuple(advanced)

    def _suits(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        params: list[Any] | None,
        present: list[int],
    ) -> bool:
        """Return whether native calls serve these leaves: plain tensors that have kernels."""
        roles = self._roles(members)
        grads = [leaves[i] for i in present]
        if params is not None and self.recipe.reads_params:
            roles = [*roles, params]
        if any(type(x) not in PLAIN for role in (grads, *roles) for x in role if x is not None):
            return False
        if any(g.layout is not torch.strided for g in grads) or any(
            explain_unavailable(*kind) is not None for kind in {(g.device, g.dtype) for g in grads}
        ):
            return False
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        if any(map(wrapped, grads)) or _any_dual(grads):
            return False
        for role in roles:
            states = [role[i] for i in present]
            if any(map(wrapped, states)) or _any_dual(states):
                return False
            for g, x in zip(grads, states):
                if x.dtype != g.dtype or x.device != g.device or x.shape != g.shape:
                    return False
        return True

    def _run(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        params: list[Any] | None,
        group: list[int],
        steps: int | list[Tensor],
        *,
        inplace: bool,
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        recipe = self.recipe
        grads = [leaves[i] for i in group]
        states = [[role[i] for i in group] for role in self._roles(members)]
        arguments = (
            recipe.rule,
            grads,
            states,
            None if params is None else [params[i] for i in group],
            steps,
            self._hypers(members, group[0]),
        )
        if inplace:
            tensors = [x for role in (grads, *states) for x in role]
            others = [h for h in arguments[-1].values() if isinstance(h, Tensor)]
            if params is not None:
                others.extend(params[i] for i in group)
            free = not any_watched((*tensors, *others))
            if free and all(x.is_contiguous() for x in tensors):
                return fused_update_(*arguments, maximize=recipe.maximize), states
        updates, new = fused_update(*arguments, maximize=recipe.maximize)
        if inplace:
            new = [list(map(overwrite, *pair)) for pair in zip(states, new)]
        return updates, new


def _following(count: Tensor) -> Tensor:
    """Return the count plus one, a new tensor."""
    made = _C.successor(count)
    return count + 1 if made is None else made


def _are_equal(counts: list[Any]) -> bool:
    """Return whether all leaves are there and took the same number of steps, on one device."""
    if _C.are_one(counts):
        return not counts or counts[0] is not None
    if any(c is None for c in counts):
        return False
    first = counts[0]
    return all(c.device == first.device for c in counts) and counts.count(first) == len(counts)


def _any_dual(tensors: Sequence[Tensor]) -> bool:
    """Return whether forward mode follows one of the tensors."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def fuse(
    chain: GradientTransformation,
    members: Sequence[GradientTransformation],
    penalty: type[LeafRule],
    backend: Backend,
) -> GradientTransformation:
    """Return the flat `chain` of `members` with one native call where there is a fused rule for it.

    Whatever follows the stages that are a rule, such as LAMB's trust ratio, runs stage by stage.

    Args:
        chain: What `chain.flat(*members)` returned.
        members: The stages.
        penalty: The class of the stage that flips the sign and adds weight decay.
        backend: See `FusedChain`.
    """
    kept = [m for m in members if m != identity()]
    recipe = _recipe(kept, penalty)
    if recipe is None:
        return chain
    fused = FusedChain(chain, len(kept) == 1, recipe, tuple(kept[recipe.size :]), backend)
    return GradientTransformation(fused.init, fused.update)


def with_backend(
    transformation: GradientTransformation, backend: Backend
) -> GradientTransformation:
    """Return an optimizer that computes its steps as `backend` says.

    Args:
        transformation: What an optimizer of `torchopt` returned, such as `torchopt.adam(1e-3)`.
        backend: "native": one native call for all tensors, or an error where there is none.
            "reference": plain torch operations. "auto": native for plain tensors that have
            kernels, else plain torch operations.

    Raises:
        ValueError: No such backend.
        KernelUnavailableError: "native" for a transformation that is no fused rule.

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
    if isinstance(fused, FusedChain):
        fused = dataclasses.replace(fused, backend=backend)
        return GradientTransformation(fused.init, fused.update)
    if backend == "native":
        raise KernelUnavailableError(
            "with_backend(..., 'native'): expected an optimizer of torchopt that is one fused rule "
            f"({', '.join(sorted(RULES))}), got {transformation!r}; "
            "use 'auto' or 'reference' for it."
        )
    return transformation


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
        and forward_ad._current_level < 0
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
