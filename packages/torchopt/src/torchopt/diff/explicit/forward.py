# SPDX-License-Identifier: Apache-2.0
"""A run that carries tangents forward; its memory does not depend on the number of steps.

For each scalar that is differentiated, the run carries a tangent and takes each step once more, in
forward over reverse mode. A complex number counts as two scalars, because a function of it need not
have a complex derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.base import GradientTransformation
from torchopt.diff.explicit.adjoint import gradient
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.dual import dual_gradient, forward_mode_explained, tangent_of
from torchopt.diff.explicit.run import Run
from torchopt.diff.explicit.step import Aux, Carry, losses_of, scattered, separate, start, update
from torchopt.diff.explicit.unrolled import Outputs
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import warn_caller
from torchopt.torch_internals import forward_mode
from torchopt.tree import is_smooth

__all__ = ["ForwardRun", "dual_step"]


@dataclass(frozen=True)
class _Direction:
    """One differentiated scalar: the inputs with its tangent, and an optimizer made from them."""

    tensors: list[Tensor]
    optimizer: GradientTransformation


class ForwardRun(Run):
    """A run with its tangents; each step is taken once more for each differentiated scalar.

    Attributes:
        tangents: For each scalar, the tangents of what `evaluate` returned.
    """

    def __init__(self, call: Call, **options: Any) -> None:
        super().__init__(call, 1, **options)
        self.tangents: list[list[Tensor | None]] = []
        scalars = len(self._scalars())
        size = sum(call.inputs[h.index].numel() for h in call.params.holes())
        if scalars > size:
            warn_caller(
                f'inner_loop: derivative="forward": expected fewer scalars to differentiate than '
                f"parameters ({size}), got {scalars}; each step is taken {scalars} more times, and "
                f'that many copies of parameters and state are kept. "reverse" or "mixed" takes '
                "each step about three times."
            )

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the result and keep their tangents."""
        call = self.call
        tensors = [x.detach() for x in inputs]
        optimizer = call.optimizer_with(tensors)
        self._seen = seen = Surroundings(call.loss, tensors, beside=call.optimizer).retaken()
        losses, aux = [], []
        with forward_mode():
            directions = [self._direction(tensors, *scalar) for scalar in self._scalars()]
            carry = start(call, optimizer, tensors).detached()
            duals = [self._start(d, seen) for d in directions]
            tangents: list[list[Any]] = [[] for _ in directions]
            for t in range(call.steps):
                seen = seen.retaken()
                before = carry
                grads, value, extra = gradient(call, carry, tensors, t)
                carry = update(call, optimizer, grads, carry).detached()
                losses.append(value)
                aux.append(extra)
                if t == call.first > 0:
                    duals = [before] * len(directions)
                for i, d in enumerate(directions if t >= call.first else ()):
                    with seen.replayed():
                        duals[i], value, extra = self._step(d, duals[i], t)
                    tangents[i].append((tangent_of(value), [tangent_of(x) for x in extra.leaves]))
            found = Outputs.of(call, carry, losses, aux)
            self.outputs = self._with(found, [x.new_empty(0) for x in self._flat(found)])
            self.tangents = [
                [*map(tangent_of, dual.tensors()), *self._columns(found, rows)]
                for dual, rows in zip(duals, tangents)
            ]
        return self._flat(found)

    def _scalars(self) -> list[tuple[int, int, complex]]:
        """Return (input, element, unit), with the units 1 and i for a complex element."""
        pairs = [(i, self.call.inputs[i]) for i in self.call.wanted]
        units: dict[bool, tuple[complex, ...]] = {False: (1,), True: (1, 1j)}
        return [
            (i, k, u) for i, x in pairs for k in range(x.numel()) for u in units[x.is_complex()]
        ]

    def _direction(
        self, tensors: Sequence[Tensor], index: int, element: int, unit: complex
    ) -> _Direction:
        out = list(tensors)
        tangent = torch.zeros_like(out[index], memory_format=torch.contiguous_format)
        tangent.view(-1)[element].fill_(unit)
        out[index] = forward_ad.make_dual(separate(out[index]), tangent)
        return _Direction(out, self.call.optimizer_with(out))

    def _start(self, direction: _Direction, seen: Surroundings) -> Carry:
        with seen.replayed():  # an optimizer may draw its state
            return start(self.call, direction.optimizer, direction.tensors)

    def _step(self, direction: _Direction, carry: Carry, step: int) -> tuple[Carry, Tensor, Aux]:
        return dual_step(self.call, direction.tensors, direction.optimizer, carry, step)

    def _columns(self, found: Outputs, rows: Sequence[Any]) -> list[Tensor | None]:
        """Return the tangents of losses and aux for one scalar."""
        call = self.call
        dim = 0 if call.tasks is None else 1
        skipped = [None] * call.first
        out = [_stacked([*skipped, *(r[0] for r in rows)], found.losses, dim)]
        for k, leaf in enumerate(found.aux.leaves):
            column = [*skipped, *(r[1][k] for r in rows)]
            if isinstance(leaf, Tensor):
                out.append(_stacked(column, leaf, dim))
            elif isinstance(leaf, tuple):
                out += [c for c, x in zip(column, leaf) if isinstance(x, Tensor)]
        return out

    def _swept(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None] * len(inputs)
        for i in self.call.wanted:
            out[i] = torch.zeros_like(inputs[i], memory_format=torch.contiguous_format)
        for (i, k, unit), tangents in zip(self._scalars(), self.tangents):
            column = out[i]
            assert column is not None
            for c, tangent in zip(cotangents, tangents):
                if c is not None and tangent is not None:
                    column.view(-1)[k] += (c.conj() * tangent).sum().real * unit
        return tuple(out)


def dual_step(
    call: Call,
    tensors: Sequence[Any],
    optimizer: GradientTransformation,
    carry: Carry,
    step: int,
) -> tuple[Carry, Tensor, Aux]:
    """Return the carry after a step, the loss and its aux, with their tangents."""
    where = [i for i, x in enumerate(carry.params) if is_smooth(x)]
    params = list(carry.params)
    with torch.enable_grad(), forward_mode_explained():
        for i in where:
            primal, tangent = forward_ad.unpack_dual(params[i])
            leaf = primal.detach().requires_grad_()
            params[i] = leaf if tangent is None else forward_ad.make_dual(leaf, tangent)
        value, aux = losses_of(call, params, tensors, step)
        at = [params[i] for i in where]
        found = dual_gradient([value.sum()], at)
    return update(call, optimizer, scattered(params, where, found), carry), value, aux


def _stacked(column: Sequence[Tensor | None], like: Tensor, dim: int) -> Tensor | None:
    if all(x is None for x in column) or not is_smooth(like):
        return None
    zero = torch.zeros_like(like.select(dim, 0))
    return torch.stack([zero if x is None else x for x in column], dim)
