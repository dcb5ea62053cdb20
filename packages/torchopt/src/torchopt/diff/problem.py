# SPDX-License-Identifier: Apache-2.0
"""One call of an inner problem, split into differentiated tensors and the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.closure import captured
from torchopt.diff.engine import Engine
from torchopt.diff.rebuild import rebuilt
from torchopt.tree import (
    is_smooth,
    prefix_leaves,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from torchopt.tree_function import is_differentiated

__all__ = ["InnerCall", "over_tasks", "require_verify"]


def require_verify(value: Any, kind: type) -> None:
    """Raise unless the value is None or a `Verify`."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(
            "inner_loop: verify: expected torchopt.diff.Verify(other, rate, limit) or None, got "
            f"{type(value).__name__}."
        )


def over_tasks(
    function: Callable[..., Any], tasks: Sequence[Any], args: tuple[Any, ...], state: Any = None
) -> Any:
    """Return the results of a function for a batch of tasks, stacked in the first dimension.

    Args:
        function: Maps the state and the arguments of a task to a tree; leaves other than tensors
            are the same for all tasks.
        tasks: The dimension that counts tasks, or None, for each argument.
        args: The arguments.
        state: A tree. The first dimension of its tensors counts tasks; 0-dim tensors are shared.
    """
    if len(tasks) != len(args):
        raise ValueError(
            "inner_loop: tasks: expected a dimension, or None, for params, batch and each further "
            f"argument ({len(args)}), got {len(tasks)}."
        )
    form: list[Any] = []
    given, whole = tree_flatten((state, args), none_is_leaf=True)
    of_state = tree_leaves(state, none_is_leaf=True)
    dims = [0 if isinstance(x, Tensor) and x.ndim else None for x in of_state]
    for i, (tree, dim) in enumerate(zip(args, tasks)):
        dims += prefix_leaves(dim, tree, f"tasks: the dimensions of argument {i}")
    # Only these go through vmap, whose trees have leaves of None and take no numbers.
    where = [i for i, x in enumerate(given) if isinstance(x, Tensor) and dims[i] is not None]

    def tensors(own: list[Tensor]) -> tuple[Tensor, ...]:
        filled = list(given)
        for i, x in zip(where, own):
            filled[i] = x
        rebuilt: Any = tree_unflatten(whole, filled)
        found = function(rebuilt[0], *rebuilt[1])
        leaves, spec = tree_flatten(found, none_is_leaf=True)
        form[:] = [spec, *leaves]
        return tuple(x for x in leaves if isinstance(x, Tensor))

    run = torch.func.vmap(tensors, ([dims[i] for i in where],), randomness="different")
    batched = run([given[i] for i in where])
    results, (spec, *leaves) = iter(batched), form
    return tree_unflatten(spec, [next(results) if isinstance(x, Tensor) else x for x in leaves])


class InnerCall:
    """The arguments of a call, split into distinct differentiated tensors and the rest.

    Args:
        value: The engine over its problem.
        args: `(params, batch, *meta)`.
        kwargs: `batches`, `state` and hyper-parameters.

    Attributes:
        wanted: The differentiated tensors, including those of the optimizer, each once.
    """

    def __init__(self, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leaves: list[Any]
        self._leaves, self._spec = tree_flatten((args, kwargs), none_is_leaf=True)
        held = [x for _, x in captured(value.optimizer, Tensor)]
        found = [*self._leaves, *held]
        self.wanted = list(
            {id(x): x for x in found if is_smooth(x) and is_differentiated(x)}.values()
        )
        self._held = {id(x) for x in held}
        self._place = {id(x): i for i, x in enumerate(self.wanted)}

    def run(self, tensors: Sequence[Tensor], function: Any, trail: list[Any] | None = None) -> Any:
        """Return the result of the call with `wanted` replaced by these tensors.

        Args:
            tensors: As many as `wanted`.
            function: An engine over the problem, or a function like one.
            trail: A list that gets the record of the run, or has that of another engine over the
                same problem; None: no record.
        """
        new = {key: tensors[i] for key, i in self._place.items()}
        filled: Any = tree_unflatten(self._spec, [new.get(id(x), x) for x in self._leaves])
        args, kwargs = filled
        if not isinstance(function, Engine):
            return function(*args, **kwargs)
        optimizer = rebuilt(
            function.optimizer, {key: x for key, x in new.items() if key in self._held}
        )
        # A copy has a new report, so the run is neither counted nor checked; errors are kept.
        engine: Any = function
        inner = dataclasses.replace(engine, optimizer=optimizer)
        inner.report.differences = function.report.differences
        if trail is not None:
            inner.record_in(trail)
        return inner.run_inner(*args, **kwargs)
