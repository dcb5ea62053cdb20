# SPDX-License-Identifier: Apache-2.0
"""The arguments of one call of an inner loop: a list of tensors, and trees with holes for them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base import GradientTransformation
from torchopt.diff.differences import Judge
from torchopt.diff.explicit.fingerprint import Fingerprint, fingerprint
from torchopt.diff.explicit.stepper import Stepper
from torchopt.diff.rebuild import rebuilt
from torchopt.tree import (
    PyTreeSpec,
    is_smooth,
    prefix_leaves,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from torchopt.tree_function import is_differentiated

__all__ = ["Call", "Dims", "Hole", "Inputs", "Template", "make_inputs"]

Dims = int | None
_ANY = torch.empty(0)
DICTS = (dict, defaultdict)  # their order is not part of the structure


@dataclass(frozen=True)
class Hole:
    """A place for a tensor in a tree: its index, and whether each step takes a slice of it."""

    index: int
    by_step: bool = False


_hole = functools.lru_cache(1024)(Hole)  # a lookup takes a tenth of the time


@dataclass(frozen=True)
class Template:
    """A tree with holes for its tensors.

    Attributes:
        leaves: Its leaves, with `Hole`s for tensors.
        spec: Its structure.
        known_orders: `orders`, if they are known.
    """

    leaves: tuple[Any, ...]
    spec: PyTreeSpec
    known_orders: tuple[tuple[Any, ...], ...] | None = None

    def fill(self, tensors: Sequence[Any], step: int = 0) -> Any:
        """Return the tree with these tensors; a tensor with a slice for each step is sliced."""
        return tree_unflatten(self.spec, self.filled(tensors, step))

    def filled(self, tensors: Sequence[Any], step: int = 0) -> list[Any]:
        """Return the leaves of the tree that `fill` returns."""
        return [
            x
            if not isinstance(x, Hole)
            else tensors[x.index][step]
            if x.by_step
            else tensors[x.index]
            for x in self.leaves
        ]

    @functools.cached_property
    def orders(self) -> tuple[tuple[Any, ...], ...]:
        """The keys of each dict in insertion order, which is not part of the structure."""
        if self.known_orders is not None:
            return self.known_orders
        found: list[tuple[Any, ...]] = []

        def noted(x: Any) -> bool:
            if type(x) in DICTS:
                found.append(tuple(x))
            return False

        # Tensors in the place of holes, because a class such as PackedSequence checks its leaves.
        leaves = [_ANY if isinstance(x, Hole) else x for x in self.leaves]
        tree_flatten(tree_unflatten(self.spec, leaves), is_leaf=noted, none_is_leaf=True)
        return tuple(found)

    def holes(self) -> list[Hole]:
        """Return the places of tensors."""
        return [x for x in self.leaves if isinstance(x, Hole)]


class Inputs:
    """All tensors that a call was given, in one list."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.dims: list[Dims] = []  # the dimension that counts tasks, not counting the one of steps

    def add(self, tree: Any, dims: Any = None, *, what: str, by_step: bool = False) -> Template:
        """Collect the tensors of a tree and return the tree with holes for them."""
        leaves, spec = tree_flatten(tree, none_is_leaf=True)
        along: Sequence[Any] = [dims] * len(leaves)
        if dims is not None and not isinstance(dims, int):
            along = prefix_leaves(dims, tree, f"tasks: the dimensions of {what}")
        made: list[Any] = []
        for x, dim in zip(leaves, along):
            if isinstance(x, Tensor):
                made.append(_hole(len(self.tensors), by_step))
                self.tensors.append(x)
                self.dims.append(dim)
            else:
                made.append(x)
        return Template(tuple(made), spec, _orders_if_flat(tree))


def _orders_if_flat(tree: Any) -> tuple[tuple[Any, ...], ...] | None:
    """Return the orders of a tree without inner trees; None for any other tree."""
    if isinstance(tree, Tensor):
        return ()
    is_dict = type(tree) in DICTS
    flat = is_dict or type(tree) in (list, tuple)
    if not (flat and all(type(x) is Tensor for x in (tree.values() if is_dict else tree))):
        return None
    return (tuple(tree),) if is_dict else ()


@dataclass(frozen=True)
class Call:
    """One call of an inner loop.

    Attributes:
        loss: `loss(params, batch, *meta)`.
        optimizer: The transformation that takes the steps.
        derivative: `"reverse"`, `"mixed"`, `"differences"`, `"first_order"` or `"forward"`.
        steps: The number of steps.
        first: The first step that is differentiated.
        tasks: The number of tasks; None for one task without a dimension of its own.
        inputs: All tensors.
        dims: For each tensor, the dimension that counts tasks, or None.
        wanted: Positions of the inputs that are differentiated.
        params: Tree of the initial parameters.
        state: Tree of the initial state; None: `init` makes it from the parameters.
        batches: One tree for all steps, or one for each step.
        meta: Trees of further arguments of the loss.
        hypers: Positions of the inputs that are tensors of the optimizer.
        blocks: Modules whose activations are computed again, in `"mixed"` mode.
        compiled_blocks: Whether they run as compiled programs.
        host: Whether states are kept on the host.
        plain: Whether it is known that the loss depends only on its arguments and that none of its
            operations has to be replaced.
        judge: Computes and judges differences of gradients, for `"differences"`.
        reach: Returns the fingerprint of everything that loss and optimizer reach now.
        sizes: The bytes of the graph of a step, by the form of the inputs, from earlier calls.
        known_blocks: What is known about the blocks from earlier calls; see `rematerialised`.
        trail: A list that gets the record of the run, or has one that this call need not repeat.
        repeats: Gets what repetitions of this call need; None: it is not repeated.
    """

    loss: Callable[..., Any]
    optimizer: GradientTransformation
    derivative: str
    steps: int
    first: int
    tasks: int | None
    inputs: tuple[Tensor, ...]
    dims: tuple[Dims, ...]
    wanted: tuple[int, ...]
    params: Template
    state: Template | None
    batches: tuple[Template, ...]
    meta: tuple[Template, ...]
    hypers: tuple[int, ...]
    blocks: tuple[nn.Module, ...] = ()
    compiled_blocks: bool = False
    host: bool = False
    plain: bool = False
    judge: Judge | None = None
    reach: Callable[[], Fingerprint] = fingerprint
    sizes: dict[Any, int] = field(default_factory=dict)
    known_blocks: dict[int, Any] = field(default_factory=dict)
    trail: list[Any] | None = None
    repeats: list[Any] | None = None

    @property
    def second_order(self) -> bool:
        """Whether the gradient of the loss is differentiated by torch."""
        return self.derivative not in ("first_order", "differences")

    def batch(self, step: int) -> Template:
        """Return the batch of a step."""
        return self.batches[step if len(self.batches) > 1 else 0]

    def optimizer_with(self, tensors: Sequence[Tensor]) -> GradientTransformation:
        """Return the optimizer with its tensors replaced by these."""
        exchanged = {
            id(self.inputs[i]): tensors[i] for i in self.hypers if tensors[i] is not self.inputs[i]
        }
        found: GradientTransformation = rebuilt(self.optimizer, exchanged)
        return found

    def used_at(self, step: int) -> list[Hole]:
        """Return the inputs that the loss gets in a step."""
        holes = self.batch(step).holes()
        for tree in self.meta:
            holes += tree.holes()
        return holes

    @functools.cached_property
    def taken(self) -> dict[Any, Any]:
        """A cache for `torchopt.diff.explicit.taken`: which inputs the steps use."""
        return {}

    @functools.cached_property
    def alike(self) -> bool:
        """Whether every step gets the same tensors."""
        return len(self.batches) == 1 and not any(h.by_step for h in self.batches[0].holes())

    def by_step(self, index: int) -> bool:
        """Return whether each step takes a slice of this input."""
        return any(h.index == index and h.by_step for h in self.batches[0].holes())


def make_inputs(
    stepper: Stepper,
    params: Any,
    state: Any,
    batches: Sequence[Any],
    meta: Sequence[Any],
    dims: Sequence[Any],
    *,
    by_step: bool,
) -> tuple[Inputs, dict[str, Any]]:
    """Return the tensors of a call, and the fields of `Call` that refer to them.

    Args:
        stepper: The optimizer; its differentiated tensors are inputs too.
        params: Tree of the initial parameters.
        state: Tree of the initial state, or None.
        batches: One tree, or one for each step.
        meta: Trees of further arguments of the loss.
        dims: The dimensions that count tasks, for parameters, batch and each of `meta`.
        by_step: Whether the tensors of the only batch have a leading dimension of steps.

    Raises:
        TypeError: `params` is a module, or has no floating-point or complex tensor.
    """
    if isinstance(params, nn.Module):
        raise TypeError(
            "inner_loop: params: expected a tree of tensors, got the module "
            f"{type(params).__name__}; pass dict(module.named_parameters()), and a loss that calls "
            "torchopt.params.functional_call(module, params, batch)."
        )
    inputs = Inputs()
    fields: dict[str, Any] = {
        "params": inputs.add(params, dims[0], what="params"),
        "state": None if state is None else inputs.add(state, what="state"),
        "batches": tuple(inputs.add(b, dims[1], what="batch", by_step=by_step) for b in batches),
        "meta": tuple(
            inputs.add(m, dim, what=f"meta argument {i}")
            for i, (m, dim) in enumerate(zip(meta, dims[2:]))
        ),
    }
    start = len(inputs.tensors)
    for x in stepper.tensors():
        if is_smooth(x) and is_differentiated(x):
            inputs.tensors.append(x)
            inputs.dims.append(None)
    fields["hypers"] = tuple(range(start, len(inputs.tensors)))
    fields["wanted"] = tuple(
        i for i, x in enumerate(inputs.tensors) if is_smooth(x) and is_differentiated(x)
    )
    if not any(is_smooth(inputs.tensors[h.index]) for h in fields["params"].holes()):
        raise TypeError(
            "inner_loop: params: expected a tree with floating-point or complex tensors, found "
            f"none in a {type(params).__name__}{_first_leaf(params)}; of a module, pass "
            "dict(module.named_parameters())"
        )
    return inputs, fields


def _first_leaf(tree: Any) -> str:
    """Describe the first leaf of a tree for an error message."""
    found = tree_leaves(tree)
    if not found:
        return ""
    x = found[0]
    kind = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
    return f", whose first leaf is {kind}"
