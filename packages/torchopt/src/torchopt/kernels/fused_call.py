# SPDX-License-Identifier: Apache-2.0
"""One native call over all tensors: its value, its exact derivative, and its torch reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from torchopt import _C
from torchopt.kernels.devices import DTYPE_CODES, placement
from torchopt.kernels.fused_rule import FusedRule
from torchopt.torch_internals import bump_versions, is_zero_tensor
from torchopt.tree_function import Operation, apply_operation

__all__ = ["FusedCall"]

T = TypeVar("T")


def _dense(x: Tensor) -> Tensor:
    """Return `x` in the form that kernels read: contiguous, in memory, with no pending negation."""
    if is_zero_tensor(x):
        return torch.zeros_like(x)
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


@dataclass(slots=True)
class FusedCall:
    """One call: what it computes, and the layout of its flat list of tensors.

    The inputs are, in this order: gradients, each role of the state, the parameters if `decayed`,
    and the hyper-parameters that are tensors. The constant, which follows them, is the step if that
    is a tensor. A role is a list with one tensor for each gradient.

    Attributes:
        rule: The update rule.
        size: The number of gradients.
        decayed: Whether the parameters are among the inputs, for weight decay or for the rule.
        maximize: Whether to ascend.
        hypers: A number for each of `rule.all_hypers`; None stands for the next tensor.
        step: The number of the step, from 1, or a 0-dim int64 tensor with it.
        known: The value, if it was computed before; used once.
    """

    rule: FusedRule
    size: int
    decayed: bool
    maximize: bool
    hypers: tuple[float | None, ...]
    step: Any
    known: tuple[Tensor, ...] | None = None

    @property
    def num_outputs(self) -> int:
        """The number of output roles: the update and the states."""
        return 1 + len(self.rule.states)

    @property
    def num_roles(self) -> int:
        """The number of input roles: the gradient, the states, and the parameter if it is read."""
        return self.num_outputs + self.decayed

    @property
    def num_tensor_hypers(self) -> int:
        """The number of hyper-parameters that are tensors."""
        return self.hypers.count(None)

    @property
    def num_inputs(self) -> int:
        """The number of tensors that have derivatives: all but the constants."""
        return self.num_roles * self.size + self.num_tensor_hypers

    def roles(self, tensors: Sequence[T], count: int) -> list[list[T]]:
        """Return the first `count` roles in the flat list `tensors`."""
        return [list(tensors[r * self.size : (r + 1) * self.size]) for r in range(count)]

    def launch(
        self,
        kind: int,
        inputs: Sequence[list[Any]],
        outputs: Sequence[list[Any]],
        tensor_hypers: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> Tensor | None:
        """Run a kernel over contiguous tensors.

        Returns:
            The cotangents of all hyper-parameters, for the kernel HYPER_VJP; else None.
        """
        rest = iter(tensor_hypers)
        numbers = [float(next(rest)) if h is None else h for h in self.hypers]
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
                [*constants] * len(group) or self.step,
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

    def value(
        self, *tensors: Tensor, into: Sequence[Sequence[Tensor]] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the flat list of the updates and the roles of the new state.

        The new state is written into `into` if given: contiguous tensors, whose versions are
        bumped.
        """
        if self.known is not None:
            known, self.known = self.known, None
            return known
        hypers = tensors[self.num_roles * self.size : self.num_inputs]
        roles = [[_dense(x) for x in role] for role in self.roles(tensors, self.num_roles)]
        new = self.num_outputs if into is None else 1
        outputs = [[torch.empty_like(x) for x in roles[0]] for _ in range(new)]
        outputs += map(list, into or ())
        kind = _C.DECAYED_UPDATE if self.decayed else _C.UPDATE
        self.launch(kind, roles, outputs, hypers, tensors[self.num_inputs :])
        if into is not None:
            bump_versions([x for role in into for x in role])
        return tuple(x for role in outputs for x in role)

    def vjp(
        self, *tensors: Tensor | None, needed: tuple[bool, ...] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs, given the inputs and the cotangents of the outputs.

        A cotangent of an output may be None, which means zero. With `needed`, the cotangents of
        inputs that are not needed are None.
        """
        last = self.num_inputs + self.num_outputs * self.size
        constants: Any = tensors[last:]
        kind = _C.DECAYED_UPDATE_VJP if self.decayed else _C.UPDATE_VJP
        if not self.num_tensor_hypers:
            step = constants[0] if constants else self.step
            numbers, threads = cast("Any", self.hypers), torch.get_num_threads()
            name, size, up = self.rule.name, self.size, self.maximize
            found: Any = _C.fused_call(
                name, kind, tensors, size, needed, step, numbers, up, threads, False
            )
            if found is not None:
                return found[0]  # type: ignore[no-any-return]
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
        # The kernel always reads parameters. Without decay any finite numbers will do, and their
        # cotangents are not requested.
        extra = [] if self.decayed else [roles[0]]
        dropped: list[list[Any]] = [] if self.decayed else [[None] * self.size]
        slopes = self.launch(
            _C.HYPER_VJP,
            [*roles, *extra, *cotangents],
            [*outputs, *dropped],
            hypers,
            constants,
        )
        assert slopes is not None
        if not bool(torch.isfinite(slopes).all()):
            return self._vjp_of_reference(given, cotangents, constants, needed)
        where = [i for i, h in enumerate(self.hypers) if h is None]
        pulled = (
            slopes[i].to(dtype=h.dtype, device=h.device).reshape(h.shape)
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
        """Return the result of `vjp`, computed with torch operations.

        The kernel multiplies each of its values by the derivatives in all directions, so an
        infinite value turns a derivative of zero into NaN. Here a value is multiplied only by the
        derivatives of the operations that it goes through.
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
        self, tensors: Sequence[Tensor], known: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the result of `value`, recorded for derivatives; see `apply_operation`.

        Args:
            tensors: The inputs and the constants.
            known: The value, if it was computed before from plain tensors.
        """
        size = self.size
        constant = self.rule.constant_derivative and self.num_tensor_hypers == 0

        def same_leaf(k: int) -> int:
            return k % size

        self.known = known
        operation = Operation(
            self.value,
            self.vjp,
            self.reference,
            self.num_inputs,
            form_of=same_leaf,
            stand_in_of=same_leaf if constant else None,
        )
        return apply_operation(operation, *tensors, plain=known is not None)

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the result of `value`, computed with differentiable torch operations."""
        roles = self.roles(tensors, self.num_roles)
        rest = iter(tensors[self.num_roles * self.size : self.num_inputs])
        hypers: dict[str, Any] = {
            name: next(rest) if h is None else h
            for name, h in zip(self.rule.all_hypers, self.hypers)
        }
        constants = tensors[self.num_inputs :]
        by_device: dict[torch.device, Tensor] = {}
        steps = [
            constants[0]
            if constants
            else by_device.setdefault(g.device, torch.tensor(self.step, device=g.device))
            for g in roles[0]
        ]
        columns = self.rule.statement(
            roles[0],
            roles[1 : self.num_outputs],
            roles[-1] if self.decayed else [],
            steps,
            hypers,
            self.maximize,
        )
        return tuple(x for role in columns for x in role)


def _groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return groups of indices that one launch can process: tensors of one dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, x in enumerate(tensors):
        groups.setdefault((x.dtype, x.device), []).append(index)
    return list(groups.values())
