# SPDX-License-Identifier: Apache-2.0
"""The update of a whole optimizer over all tensors in one native call, and its exact derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from torchopt import _C
from torchopt.kernels.registry import DTYPE_CODES, check_fused, placement
from torchopt.kernels.rules import CHAIN_HYPERS, RULES, FusedRule, as_number, reference_update
from torchopt.torch_internals import increment_versions
from torchopt.tree_function import Operation, any_watched, apply_operation, is_traced, is_watched

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


__all__ = ["FusedCall", "bump_versions", "decays", "fused_update", "fused_update_"]

T = TypeVar("T")


def _dense(x: Tensor) -> Tensor:
    """Return `x` as the kernels read it: contiguous, in memory, with no pending negation."""
    if x._is_zerotensor():
        return torch.zeros_like(x)
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


@dataclass(slots=True)
class FusedCall:
    """One call: what is computed, and how the flat list of tensors is to be read.

    The inputs are, one after the other: gradients, each role of the state, the parameters where
    `decayed`, and the hyper-parameters that are tensors. The constants are the distinct steps.

    Attributes:
        rule: The rule.
        size: The number of gradients.
        decayed: Whether the parameters are among the inputs: for weight decay, or for the rule.
        maximize: Go up instead of down.
        hypers: A number for each of `rule.all_hypers`; None stands for the next tensor.
        step_of: Which constant is the step of each gradient; empty: `step` is the step of all.
        step: The step, counted from 1.
    """

    rule: FusedRule
    size: int
    decayed: bool
    maximize: bool
    hypers: tuple[float | None, ...]
    step_of: tuple[int, ...]
    step: int

    @property
    def num_outputs(self) -> int:
        """The number of output roles: the update and the states."""
        return 1 + len(self.rule.states)

    @property
    def num_roles(self) -> int:
        """The number of input roles: the gradient, the states, the parameter where it is read."""
        return self.num_outputs + self.decayed

    @property
    def num_tensor_hypers(self) -> int:
        """The number of hyper-parameters that are tensors."""
        return self.hypers.count(None)

    @property
    def num_inputs(self) -> int:
        """The number of tensors that are differentiated."""
        return self.num_roles * self.size + self.num_tensor_hypers

    def roles(self, tensors: Sequence[T], count: int) -> list[list[T]]:
        """Return the first `count` roles of `tensors`."""
        return [list(tensors[r * self.size : (r + 1) * self.size]) for r in range(count)]

    def numbers(self, tensor_hypers: Sequence[Tensor]) -> list[float]:
        """Return all hyper-parameters as numbers."""
        rest = iter(tensor_hypers)
        return [float(next(rest)) if h is None else h for h in self.hypers]

    def launch(
        self,
        kind: int,
        inputs: Sequence[list[Any]],
        outputs: Sequence[list[Any]],
        tensor_hypers: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> Tensor | None:
        """Run a kernel over contiguous tensors; return the cotangents of the hyper-parameters."""
        numbers = self.numbers(tensor_hypers)
        total: Tensor | None = None
        for group in _groups(inputs[0]):
            first = inputs[0][group[0]]
            everything = len(group) == self.size
            device, stream = placement(first)
            partials = None
            if kind == _C.HYPER_VJP and device >= 0:
                blocks = sum(-(-inputs[0][i].numel() // _C.CUDA_BLOCK_ELEMENTS) for i in group)
                partials = torch.zeros(
                    blocks, len(numbers), dtype=torch.float64, device=first.device
                )
            found = _C.run(
                self.rule.name,
                kind,
                inputs if everything else [[role[i] for i in group] for role in inputs],
                outputs if everything else [[role[i] for i in group] for role in outputs],
                [constants[self.step_of[i]] for i in group] if self.step_of else self.step,
                DTYPE_CODES[first.dtype],
                numbers,
                maximize=self.maximize,
                num_threads=torch.get_num_threads(),
                device=device,
                stream=stream,
                partials=0 if partials is None else partials.data_ptr(),
            )
            if kind == _C.HYPER_VJP:
                here = torch.tensor(found, dtype=torch.float64)
                if partials is not None:
                    here = partials.sum(0).cpu()
                total = here if total is None else total + here
        return total

    def quick(
        self,
        kind: int,
        tensors: Sequence[Tensor | None],
        needed: Sequence[bool] | None,
        step: Any,
        *,
        record: bool = False,
    ) -> Any:
        """Return what `_C.fused_call` does; None where there is more than one step."""
        return _C.fused_call(
            self.rule.name,
            kind,
            tensors,
            self.size,
            needed,
            step,
            self.hypers,  # type: ignore[arg-type]  # there is no None among them
            self.maximize,
            torch.get_num_threads(),
            record,
        )

    def the_step(self, constants: Sequence[Tensor]) -> int | Tensor | None:
        """Return the step of all gradients, None where they differ."""
        if not self.step_of:
            return self.step
        return constants[0] if len(constants) == 1 else None

    def value(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the updates and each role of the new state, one after the other."""
        kind = _C.DECAYED_UPDATE if self.decayed else _C.UPDATE
        hypers = tensors[self.num_roles * self.size : self.num_inputs]
        step = self.the_step(tensors[self.num_inputs :])
        if not hypers and step is not None:
            quick = self.quick(kind, tensors, None, step)
            if quick is not None:
                return quick  # type: ignore[no-any-return]
        roles = [[_dense(x) for x in role] for role in self.roles(tensors, self.num_roles)]
        outputs = [[torch.empty_like(x) for x in roles[0]] for _ in range(self.num_outputs)]
        self.launch(kind, roles, outputs, hypers, tensors[self.num_inputs :])
        return tuple(x for role in outputs for x in role)

    def vjp(
        self, *tensors: Tensor | None, needed: tuple[bool, ...] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs, from the inputs and those of the outputs.

        A cotangent of an output may be None for zero; with `needed`, so are those of inputs that
        are not wanted.
        """
        last = self.num_inputs + self.num_outputs * self.size
        constants: Any = tensors[last:]
        step = self.the_step(constants)
        kind = _C.DECAYED_UPDATE_VJP if self.decayed else _C.UPDATE_VJP
        if self.num_tensor_hypers == 0 and step is not None:
            quick = self.quick(kind, tensors, needed, step)
            if quick is not None:
                return quick  # type: ignore[no-any-return]
        given: Any = tensors[: self.num_inputs]
        roles = [[_dense(x) for x in role] for role in self.roles(given, self.num_roles)]
        hypers = given[self.num_roles * self.size :]
        cotangents: list[list[Any]] = [
            [None if x is None else _dense(x) for x in role]
            for role in self.roles(tensors[self.num_inputs : last], self.num_outputs)
        ]
        wanted = self.roles(needed or [True] * self.num_inputs, self.num_roles)
        outputs: list[list[Any]] = [
            [torch.empty_like(x) if want else None for x, want in zip(roles[0], role)]
            for role in wanted
        ]
        if not hypers:
            self.launch(kind, [*roles, *cotangents], outputs, hypers, constants)
            return tuple(x for role in outputs for x in role)
        # The kernel always reads parameters. Where there is no decay anything finite does, and
        # what belongs to them is not asked for.
        extra = [] if self.decayed else [roles[0]]
        dropped: list[list[Any]] = [] if self.decayed else [[None] * self.size]
        found = self.launch(
            _C.HYPER_VJP,
            [*roles, *extra, *cotangents],
            [*outputs, *dropped],
            hypers,
            constants,
        )
        assert found is not None
        if not bool(torch.isfinite(found).all()):
            return self._vjp_of_reference(given, cotangents, constants, needed)
        where = [i for i, h in enumerate(self.hypers) if h is None]
        pulled = (
            found[i].to(dtype=h.dtype, device=h.device).reshape(h.shape)
            for i, h in zip(where, hypers)
        )
        return (*(x for role in outputs for x in role), *pulled)

    def _vjp_of_reference(
        self,
        given: Sequence[Tensor],
        cotangents: Sequence[Sequence[Tensor | None]],
        constants: Sequence[Tensor],
        needed: Sequence[bool] | None,
    ) -> tuple[Tensor | None, ...]:
        """Return what `vjp` does, in torch operations.

        The kernel multiplies each of its values with the derivatives in all directions, so that an
        infinite one makes NaN of a derivative of zero. Here it meets only those it belongs to.
        """
        wanted = list(needed or [True] * self.num_inputs)
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(want) for x, want in zip(given, wanted)]
            outputs = self.reference(*inputs, *constants)
            pairs = [
                (y, cotangent)
                for y, cotangent in zip(outputs, (x for role in cotangents for x in role))
                if cotangent is not None and y.requires_grad
            ]
            asked = [x for x, want in zip(inputs, wanted) if want]
            pulled = iter(
                torch.autograd.grad(
                    [y for y, _ in pairs],
                    asked,
                    [cotangent for _, cotangent in pairs],
                    materialize_grads=True,
                )
            )
        return tuple(next(pulled) if want else None for want in wanted)

    def differentiable(
        self, tensors: Sequence[Tensor], *, plain: bool = False
    ) -> tuple[Tensor, ...]:
        """Return the same as `value`, recorded for derivatives; see `apply_operation`."""
        size = self.size
        constant = self.rule.constant_derivative and self.num_tensor_hypers == 0

        def same_leaf(k: int) -> int:
            return k % size

        operation = Operation(
            self.value,
            self.vjp,
            self.reference,
            self.num_inputs,
            form_of=same_leaf,
            stand_in_of=same_leaf if constant else None,
        )
        return apply_operation(operation, *tensors, plain=plain)

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the same as `value`, in differentiable torch operations."""
        roles = self.roles(tensors, self.num_roles)
        rest = iter(tensors[self.num_roles * self.size : self.num_inputs])
        hypers: dict[str, Any] = {
            name: next(rest) if h is None else h
            for name, h in zip(self.rule.all_hypers, self.hypers)
        }
        constants = tensors[self.num_inputs :]
        steps: dict[torch.device, Tensor] = {}
        columns = []
        for i, g in enumerate(roles[0]):
            if self.step_of:
                step = constants[self.step_of[i]]
            else:
                if g.device not in steps:
                    steps[g.device] = torch.tensor(self.step, device=g.device)
                step = steps[g.device]
            columns.append(
                reference_update(
                    self.rule,
                    g,
                    [role[i] for role in roles[1 : self.num_outputs]],
                    roles[-1][i] if self.decayed else None,
                    step,
                    hypers,
                    maximize=self.maximize,
                )
            )
        return tuple(x for role in zip(*columns) for x in role)


def _groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of `tensors` that one launch can serve together: same dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, x in enumerate(tensors):
        groups.setdefault((x.dtype, x.device), []).append(index)
    return list(groups.values())


def _hyper(name: str, value: Any) -> float | None:
    if not isinstance(value, torch.Tensor):
        return as_number(name, value)
    if value.numel() != 1 or value.is_complex():
        raise ValueError(
            f"{name}: expected a number or a real tensor with one element, got a tensor of shape "
            f"{tuple(value.shape)} and {value.dtype}."
        )
    if not value.is_floating_point():
        return as_number(name, value)
    return None if torch.compiler.is_compiling() or is_watched(value) else as_number(name, value)


def decays(hypers: Mapping[str, Any]) -> bool:
    """Return whether there is weight decay. A tensor is one, whatever it holds."""
    values = (hypers.get(name, 0.0) for name in CHAIN_HYPERS[1:])
    return any(isinstance(value, torch.Tensor) or value != 0.0 for value in values)


def _make_call(
    rule: FusedRule,
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor] | None,
    steps: int | Sequence[Tensor],
    hypers: Mapping[str, Any],
    maximize: bool,
    *,
    decayed: bool,
) -> tuple[FusedCall, list[Tensor], list[Tensor], list[Tensor]]:
    """Return the call, the parameters it reads, its tensor hyper-parameters and its constants."""
    if set(hypers) != set(rule.all_hypers):
        raise ValueError(
            f"fused {rule.name}: expected the hyper-parameters {rule.all_hypers}, "
            f"got {tuple(hypers)}."
        )
    check_fused(grads)
    numbers = tuple(_hyper(name, hypers[name]) for name in rule.all_hypers)
    decayed = rule.reads_params or decayed
    if decayed and params is None:
        reader = "this transformation" if rule.reads_params else "weight decay"
        raise AssertionError(
            f"Parameters are required for {reader}. "
            "Call `update(updates, state, params=params)` instead."
        )
    if len(states) != len(rule.states):
        raise ValueError(
            f"fused {rule.name}: expected the states {rule.states}, got {len(states)} of them."
        )
    read = list(params) if decayed and params is not None else []
    others = [*zip(rule.states, states), *([("params", read)] if decayed else [])]
    for name, role in others:
        if len(role) != len(grads):
            raise ValueError(
                f"fused {rule.name}: expected {len(grads)} tensors in {name}, got {len(role)}."
            )
        for g, x in zip(grads, role):
            if g.shape != x.shape or g.dtype != x.dtype or g.device != x.device:
                raise ValueError(
                    f"fused {rule.name}: expected {name} of the shape, dtype and device of the "
                    f"gradient, {tuple(g.shape)} {g.dtype} {g.device}; got {tuple(x.shape)} "
                    f"{x.dtype} {x.device}."
                )
    constants: list[Tensor] = []
    step_of: tuple[int, ...] = ()
    step = 1
    if isinstance(steps, int):
        step = steps
    else:
        distinct: dict[int, int] = {}
        order = []
        for g, count in zip(grads, steps, strict=True):
            if id(count) not in distinct:
                if count.dtype != torch.int64 or count.dim() != 0 or count.device != g.device:
                    raise ValueError(
                        f"fused {rule.name}: expected steps as 0-dim int64 tensors on "
                        f"{g.device}, got {tuple(count.shape)} {count.dtype} on {count.device}."
                    )
                distinct[id(count)] = len(constants)
                constants.append(count)
            order.append(distinct[id(count)])
        step_of = tuple(order)
    call = FusedCall(rule, len(grads), decayed, maximize, numbers, step_of, step)
    # As they are now: they may be written to before the derivative is asked for.
    tensors = [hypers[n].clone().reshape(()) for n, h in zip(rule.all_hypers, numbers) if h is None]
    return call, read, tensors, constants


def fused_update(
    name: str,
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor] | None,
    steps: int | Sequence[Tensor],
    hypers: Mapping[str, Any],
    *,
    maximize: bool = False,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return (updates, states') of one step of an optimizer over all tensors, in one native call.

    The same function as `rules.reference_update` on each tensor, with the same conventions at
    points without a derivative, differentiable to any order with respect to gradients, states,
    parameters and hyper-parameters that are tensors. The first derivative is one native call too;
    it needs the inputs, which are all that is kept for it. Higher ones and forward mode are those
    of the reference. Half types are computed in float32.

    Args:
        name: A rule of `rules.RULES`.
        grads: Gradients.
        states: For each of the rule's states, one tensor for each gradient.
        params: Parameters; read only where there is weight decay, or by the rule.
        steps: The number of this step, from 1: one for all, or a 0-dim int64 tensor for each.
        hypers: A number or a 0-dim tensor for each of `rules.RULES[name].all_hypers`.
        maximize: Go up instead of down.

    Returns:
        New contiguous tensors.

    Raises:
        KernelUnavailableError: No kernel for a dtype, device or layout among `grads`.
        ValueError: Tensors that do not match, or hyper-parameters that are missing or left over.
        AssertionError: Weight decay without `params`.

    Example:
        >>> hypers = {"lr": 0.5, "weight_decay": 0.0, "decoupled_weight_decay": 0.0}
        >>> fused_update("sgd", [torch.ones(2)], [], None, 1, hypers)[0]
        [tensor([-0.5000, -0.5000])]
    """
    rule = RULES[name]
    call, read, tensor_hypers, constants = _make_call(
        rule, grads, states, params, steps, hypers, maximize, decayed=decays(hypers)
    )
    if not grads:
        return [], [[] for _ in states]
    flat = [*grads, *(x for role in states for x in role), *read, *tensor_hypers, *constants]
    if is_traced() or any(isinstance(x, FakeTensor) for x in flat):
        outputs = call.reference(*flat)  # a compiler fuses the plain statement itself
    elif any_watched(flat):
        outputs = call.differentiable(flat)
    else:
        with torch.no_grad():
            outputs = call.value(*flat)
    updates, *new_states = call.roles(outputs, call.num_outputs)
    return updates, new_states


def fused_update_(
    name: str,
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor] | None,
    steps: int | Sequence[Tensor],
    hypers: Mapping[str, Any],
    *,
    maximize: bool = False,
) -> list[Tensor]:
    """Return the updates of `fused_update` and write the new state into `states`.

    For states that nothing watches, contiguous; their versions are bumped.

    Raises:
        ValueError: A state that cannot be written to, and as for `fused_update`.
    """
    rule = RULES[name]
    constant = {
        key: value.detach() if isinstance(value, torch.Tensor) else value
        for key, value in hypers.items()
    }
    call, read, _, constants = _make_call(
        rule, grads, states, params, steps, constant, maximize, decayed=decays(hypers)
    )
    written = [x for role in states for x in role]
    if any_watched(written) or not all(x.is_contiguous() and not x.is_neg() for x in written):
        raise ValueError(
            f"fused {name}: expected states that are contiguous and outside of any graph to write "
            "to; use fused_update."
        )
    if is_traced() or any(isinstance(g, FakeTensor) for g in grads):
        with torch.no_grad():
            updates, new = fused_update(
                name, grads, states, params, steps, constant, maximize=maximize
            )
            for old, value in zip(states, new):
                for x, y in zip(old, value):
                    x.copy_(y)
        return updates
    roles = [[_dense(g.detach()) for g in grads], *map(list, states)]
    if read:
        roles.append([_dense(p.detach()) for p in read])
    updates = [torch.empty_like(g) for g in roles[0]]
    if grads:
        kind = _C.DECAYED_UPDATE if call.decayed else _C.UPDATE
        call.launch(kind, roles, [updates, *map(list, states)], (), constants)
    bump_versions(written)
    return updates


def _bump_one_by_one(tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        torch.autograd.graph.increment_version(x)


def _accepts_lists() -> bool:
    x = torch.zeros(())
    try:
        torch.autograd.graph.increment_version([x])  # since torch 2.6
    except (TypeError, RuntimeError, AttributeError):
        return False
    return x._version == 1


bump_versions = increment_versions if _accepts_lists() else _bump_one_by_one
"""Record in the versions of tensors that they were written to."""
