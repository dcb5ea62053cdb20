# SPDX-License-Identifier: Apache-2.0
"""Functions whose derivatives are written by hand."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torchopt.errors import NotDifferentiableError
from torchopt.precision import without_autocast
from torchopt.torch_internals import (
    count_forward_modes,
    in_forward_mode,
    is_batched_by_old_vmap,
    is_traced,
    is_transforming,
    is_wrapped,
)
from torchopt.tree import is_smooth
from torchopt.tree_function.lists import require_entries
from torchopt.tree_function.modes import Tensors, forward_modes, over_batched, values

__all__ = ["Rule", "Sweep", "apply_releasable_rule", "apply_rule", "apply_sweep"]


def _require_one_forward_mode(rule: Rule) -> None:
    if count_forward_modes() > 1:
        raise NotDifferentiableError(
            f"{type(rule).__name__}: a forward mode inside a forward mode cannot see the tensors "
            "of a closure. Pass them as arguments (LinearOperator.from_function), or use reverse "
            "mode for one of the two."
        )


class Rule(Protocol):
    """A function of tensors whose derivatives are written by hand.

    An `Operation` gets its derivatives from a differentiable reference. A rule computes them from
    the inputs *and the outputs*, as for the solution of an equation, however it was found.
    `pull_back` and `push_forward` consist of differentiable operations (which may use
    `apply_rule`), so higher derivatives follow from them.

    Attributes:
        num_differentiable_inputs: How many inputs are differentiated, from the first on; the
            others are constants.
        num_differentiable_outputs: How many outputs have derivatives, from the first on.
        num_kept_inputs: How many inputs are saved for the derivatives, from the first on; the
            others may be changed in place before the backward pass.
        needs_its_closure: Whether its derivatives use tensors that are not inputs. Inside a vmap
            those no longer exist when a transform around the vmap needs the derivatives, so that
            raises.
    """

    @property
    def needs_its_closure(self) -> bool: ...  # noqa: D102 - above

    @property
    def num_differentiable_inputs(self) -> int: ...  # noqa: D102 - above

    @property
    def num_kept_inputs(self) -> int: ...  # noqa: D102 - above

    @property
    def num_differentiable_outputs(self) -> int: ...  # noqa: D102 - above

    def evaluate(self, *inputs: Tensor) -> Tensors:
        """Return the outputs. It runs outside of any graph, and gets batched tensors under vmap."""

    def pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
        """Return the cotangent of each differentiable input.

        Args:
            inputs: The inputs that are kept.
            outputs: The differentiable outputs.
            cotangents: One for each of these outputs.
        """

    def push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> Tensors:
        """Return the tangent of each differentiable output; the arguments are as above."""


@dataclass(frozen=True)
class _BatchedRule:
    """`rule` on a batch: each of its three methods under `torch.func.vmap`."""

    rule: Rule
    in_dims: tuple[int | None, ...]
    randomness: str

    @property
    def needs_its_closure(self) -> bool:
        return self.rule.needs_its_closure

    @property
    def num_differentiable_inputs(self) -> int:
        return self.rule.num_differentiable_inputs

    @property
    def num_kept_inputs(self) -> int:
        return self.rule.num_kept_inputs

    @property
    def num_differentiable_outputs(self) -> int:
        return self.rule.num_differentiable_outputs

    def evaluate(self, *inputs: Tensor) -> Tensors:
        batched = torch.func.vmap(self.rule.evaluate, self.in_dims, randomness=self.randomness)
        return tuple(batched(*inputs))

    def pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
        self._require_no_closure()
        in_dims = self.in_dims[: self.num_kept_inputs]
        batched = torch.func.vmap(self.rule.pull_back, (in_dims, 0, 0), randomness=self.randomness)
        slices = batched(tuple(inputs), tuple(outputs), tuple(cotangents))
        # An input that all entries share receives the cotangents of all of them.
        return tuple(
            x.sum(0) if dim is None else x.movedim(0, dim) for x, dim in zip(slices, self.in_dims)
        )

    def push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> Tensors:
        self._require_no_closure()
        n = self.num_differentiable_inputs
        batched = torch.func.vmap(
            self.rule.push_forward,
            (self.in_dims[: self.num_kept_inputs], 0, self.in_dims[:n]),
            randomness=self.randomness,
        )
        return tuple(batched(tuple(inputs), tuple(outputs), tuple(tangents)))

    def _require_no_closure(self) -> None:
        if self.needs_its_closure:
            raise NotDifferentiableError(
                f"{type(self.rule).__name__}: cannot be differentiated from outside of the vmap "
                "that it ran in, because it uses tensors of a closure and not only arguments. "
                "Pass them as arguments: linear_solve(LinearOperator.from_function(function, "
                "params, like), b, solver) for a linear solve."
            )


class _RuleFunction(torch.autograd.Function):
    """The bridge from `Rule` to autograd: reverse, forward and batched."""

    @staticmethod
    def forward(rule: Rule, *inputs: Tensor) -> Tensors:
        return rule.evaluate(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rule, *tensors = inputs
        ctx.rule = rule
        ctx.num_inputs, ctx.num_outputs = len(tensors), len(output)
        ctx.mark_non_differentiable(*output[rule.num_differentiable_outputs :])
        kept = (*tensors[: rule.num_kept_inputs], *output[: rule.num_differentiable_outputs])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        rule: Rule = ctx.rule
        saved, kept = ctx.saved_tensors, rule.num_kept_inputs
        inputs, outputs = saved[:kept], saved[kept:]
        if isinstance(rule, _Shared):
            outputs = rule.held_by(outputs)
        used = cotangents[: rule.num_differentiable_outputs]
        with without_autocast():
            pulled = over_batched(lambda *c: rule.pull_back(inputs, outputs, c), used)
        constants = ctx.num_inputs - rule.num_differentiable_inputs
        return (None, *pulled, *(None for _ in range(constants)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        rule: Rule = ctx.rule
        # Tangents of this level in a closure cannot be removed: forward mode then stays off.
        with contextlib.nullcontext() if rule.needs_its_closure else forward_modes():
            if rule.needs_its_closure:
                _require_one_forward_mode(rule)
            saved, kept = values(ctx.saved_tensors), rule.num_kept_inputs
            inputs, outputs = saved[:kept], saved[kept:]
            given = values(tangents[1 : 1 + rule.num_differentiable_inputs])
            dense = tuple(
                torch.zeros_like(x) if tangent is None else tangent
                for x, tangent in zip(inputs, given)
            )
            with without_autocast():
                pushed = over_batched(lambda *t: rule.push_forward(inputs, outputs, t), dense)
        return (*pushed, *(None for _ in range(ctx.num_outputs - len(pushed))))

    @staticmethod
    def vmap(info: Any, in_dims: Any, rule: Rule, *inputs: Tensor) -> Any:
        require_entries(info.batch_size)
        outputs = apply_rule(_BatchedRule(rule, tuple(in_dims[1:]), info.randomness), *inputs)
        return outputs, (0,) * len(outputs)


vars(_RuleFunction.forward)["__signature__"] = inspect.signature(_RuleFunction.forward)


def apply_rule(rule: Rule, *inputs: Tensor) -> Tensors:
    """Return the outputs of `rule`, differentiable to any order, batched and in forward mode."""
    outputs: Tensors = _RuleFunction.apply(rule, *inputs)  # type: ignore[no-untyped-call]
    return outputs


class _Shared:
    """A rule that the node of several outputs refers to; `release` makes the reference weak."""

    def __init__(self, rule: Rule) -> None:
        self._held: Rule | None = rule
        self._rule = weakref.ref(rule)

    def release(self) -> None:
        self._held = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule(), name)

    def held_by(self, outputs: Tensors) -> Tensors:
        """Return outputs whose nodes hold the rule once the common node does not."""
        hold, rule = _Holding.apply, self._rule()
        if self._held is not None or not torch.is_grad_enabled():
            return outputs
        return tuple(
            hold(rule, x) if x.requires_grad else x  # type: ignore[no-untyped-call]
            for x in outputs
        )


class _Holding(torch.autograd.Function):
    """The identity, whose node keeps an object alive."""

    @staticmethod
    def forward(held: Any, x: Tensor) -> Tensor:
        del held
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        ctx.held = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, *cotangents

    @staticmethod
    def vmap(info: Any, in_dims: Any, held: Any, x: Tensor) -> Any:
        del info
        return _Holding.apply(held, x), in_dims[1]  # type: ignore[no-untyped-call]


def apply_releasable_rule(rule: Rule, *inputs: Tensor) -> Tensors:
    """Return the same as `apply_rule`, for a rule that may refer to an object with the outputs.

    Python's collector finds such a cycle only if no two outputs share a node of the graph. So each
    output gets a node of its own, which holds the rule, and their common node does not hold it. So
    do the outputs that the graph of a derivative refers to.
    """
    if is_transforming() or in_forward_mode() or not torch.is_grad_enabled():
        return apply_rule(rule, *inputs)
    shared: Any = _Shared(rule)
    outputs = apply_rule(shared, *inputs)
    if sum(x.requires_grad for x in outputs) < 2:
        return outputs
    shared.release()
    held: Tensors = shared.held_by(outputs)
    return held


class Sweep(Protocol):
    """A computation that decides itself what it keeps for its derivative.

    It must be used outside of transforms and forward modes. Integer outputs are constants.
    """

    def evaluate(self, *inputs: Tensor) -> Tensors:
        """Return the outputs. It runs outside of any graph."""

    def pull_back(
        self, inputs: Tensors, cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangent of each input; None means zero.

        In grad mode the result is a differentiable function of inputs and cotangents.
        """


class _SweepFunction(torch.autograd.Function):
    """The bridge from `Sweep` to autograd."""

    @staticmethod
    def forward(ctx: Any, sweep: Sweep, *inputs: Tensor) -> Tensors:
        with forward_modes():  # the computation may use forward mode itself
            outputs = sweep.evaluate(*inputs)
        ctx.sweep = sweep
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in outputs if not is_smooth(x)))
        ctx.save_for_backward(*inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        given = [i for i, c in enumerate(cotangents) if c is not None]
        if not any(is_batched_by_old_vmap(c) for c in cotangents if c is not None):
            return (None, *ctx.sweep.pull_back(inputs, cotangents))

        def pulled(*present: Tensor) -> Tensors:
            every: list[Tensor | None] = [None] * len(cotangents)
            for i, c in zip(given, present):
                every[i] = c
            found = ctx.sweep.pull_back(inputs, tuple(every))
            where[:] = [i for i, c in enumerate(found) if c is not None]
            return tuple(c for c in found if c is not None)

        where: list[int] = []
        out: list[Tensor | None] = [None] * len(inputs)
        for i, c in enumerate(over_batched(pulled, tuple(c for c in cotangents if c is not None))):
            out[where[i]] = c
        return (None, *out)


# What `Function.apply` calls after it has looked for wrappers of transforms.
_apply_plain: Callable[..., Tensors] = getattr(
    super(torch.autograd.Function, _SweepFunction), "apply", _SweepFunction.apply
)


def apply_sweep(sweep: Sweep, *inputs: Tensor) -> Tensors:
    """Return the outputs of `sweep`, differentiable to any order."""
    plain = not (is_transforming() or is_traced() or any(map(is_wrapped, inputs)))
    outputs: Tensors = (_apply_plain if plain else _SweepFunction.apply)(sweep, *inputs)
    return outputs
