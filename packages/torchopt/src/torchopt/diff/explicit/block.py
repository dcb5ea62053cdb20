# SPDX-License-Identifier: Apache-2.0
"""One call of a block whose activations are computed again in the backward pass.

The block is one operation of the graph, which keeps its inputs, their tangents and its matrix
products. Let g(x; c) be its vector-Jacobian product, and v and w the tangents of the inputs x and
of the cotangent c. Then the tangent of g is

    d/dx <g(x; c), v> + g(x; w).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.diff.closure import require_arguments
from torchopt.diff.explicit.products import Products, parts_of
from torchopt.diff.explicit.step import separate
from torchopt.diff.surroundings import Surroundings
from torchopt.diff.twice_differentiable import TwiceDifferentiable
from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import AccumulateGrad, forward_mode_enabled, graph_is_kept
from torchopt.tree import is_smooth, tree_flatten, tree_unflatten
from torchopt.tree_function import apply_sweep

__all__ = ["HIDDEN", "Block", "call_block", "is_input"]

_SAME = {"AliasBackward0", "ViewBackward0"}
HIDDEN = "Pass it to the block, or leave this one out of blocks, as in blocks=()."


def call_block(
    forward: Callable[..., Any],
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    inputs: int,
) -> Any:
    """Return the tree `function(*tensors)` without keeping its activations.

    Args:
        forward: The block.
        function: The block as a function of all tensors that it depends on.
        tensors: These tensors.
        inputs: How many of them are inputs; the others are parameters.
    """
    seen = Surroundings(forward, beside=(), apart=tensors[inputs:]).retaken()
    pairs = [parts_of(x) for x in tensors]
    tangents = [None if t is None else t.detach() for _, t in pairs]
    # Nothing here requires a gradient, so no_grad is not needed; it would stop the tangents.
    with Products() as products, TwiceDifferentiable(), _told():
        result = function(*(_dual(x.detach(), t) for (x, _), t in zip(pairs, tangents)))
    out, spec = tree_flatten(result, none_is_leaf=True)
    values = [parts_of(y) for y in _tensors(out)]
    kept = [y.detach() for y, _ in values]
    # Of an input of the loop, only the derivative of the cotangent is needed.
    known = [i for i in range(inputs, len(tensors)) if is_input(tensors[i])]
    block = Block(forward, function, tangents, kept, seen, products, known)
    outputs = apply_sweep(block, *(x for x, _ in pairs))
    remaining = iter([_dual(y, t) for y, (_, t) in zip(outputs, values)])
    return tree_unflatten(spec, [next(remaining) if isinstance(y, Tensor) else y for y in out])


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Replace torch's error for a block that calls `torch.autograd.grad` by one with a remedy."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise NotDifferentiableError(
            "inner_loop: blocks: expected blocks that take gradients by torch.func.grad, got one "
            "that calls torch.autograd.grad, outside of a graph; leave it out of blocks, as in "
            "blocks=()."
        ) from error


def is_input(x: Tensor) -> bool:
    """Return whether a tensor is a leaf of the graph, or the same with a tangent."""
    node: Any = x.grad_fn
    while node is not None and node.name() in _SAME:
        node = node.next_functions[0][0]
    return node is None or isinstance(node, AccumulateGrad)


def _dual(x: Tensor, tangent: Tensor | None) -> Tensor:
    """Return x with a tangent, or x itself if the tangent is None."""
    return x if tangent is None else forward_ad.make_dual(x, tangent)


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]


class Block:
    """One call of a block, an implementation of `torchopt.tree_function.Sweep`."""

    def __init__(
        self,
        forward: Callable[..., Any],
        function: Callable[..., Any],
        tangents: list[Tensor | None],
        values: list[Tensor],
        seen: Surroundings,
        products: Products,
        known: Sequence[int],
    ) -> None:
        self._forward, self._function = forward, function
        self._known, self._tangents = known, tangents
        self._values, self._seen, self._products = values, seen, products

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the results, which are already computed."""
        values, self._values = self._values, []
        return tuple(values)

    def pull_back(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs, with their tangents."""
        graph = torch.is_grad_enabled()
        given = {i: c for i, c in enumerate(cotangents) if c is not None}
        with torch.enable_grad(), self._seen.replayed():
            if graph:
                return self._attached(inputs, given)
            leaves = [x.detach().requires_grad_(is_smooth(x)) for x in inputs]
            # Outside forward mode nobody needs the tangent of a gradient.
            tangents = self._tangents if forward_mode_enabled() else [None for _ in leaves]
            if not graph_is_kept():
                self._tangents = []  # the node itself lives until the whole pass is done
            return self._swept(leaves, tangents, given)

    def _evaluated(self, args: Sequence[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
        with self._products.again(known), TwiceDifferentiable():
            result = self._function(*args)
        return _tensors(tree_flatten(result, none_is_leaf=True)[0])

    def _attached(
        self, inputs: Sequence[Tensor], given: dict[int, Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs with a graph, so that they can be differentiated."""
        aliases = [x.view_as(x) for x in inputs]
        args = [_dual(x, t) for x, t in zip(aliases, self._tangents)]
        with TwiceDifferentiable():
            result = self._function(*args)
        results = _tensors(tree_flatten(result, none_is_leaf=True)[0])
        return _pulled([(results[i], c) for i, c in given.items()], aliases, create_graph=True)

    def _swept(
        self,
        leaves: list[Tensor],
        tangents: Sequence[Tensor | None],
        given: dict[int, Tensor],
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs by reverse over reverse mode within the block.

        With dual tensors, the tangents and the tensors they were computed from would keep each
        other alive until the forward mode ends.
        """
        curved = any(t is not None for t in tangents)
        known = [leaves[i] for i in self._known] if curved else []
        # Modules may get hooks on their inputs, which torch refuses on the leaves of a gradient.
        args = [x if i in self._known else x.view_as(x) for i, x in enumerate(leaves)]
        results = self._evaluated(args, known)
        used = [results[i] for i in given]
        require_arguments(used, leaves, self._forward, "inner_loop: blocks", HIDDEN)
        parts = [parts_of(c) for c in given.values()]
        ends = not curved and all(w is None for _, w in parts)
        found = _pulled(
            [(y, c) for y, (c, _) in zip(used, parts)], leaves, create_graph=curved, last=ends
        )
        terms: list[tuple[Tensor | None, Tensor | None]] = [
            (y, w) for y, (_, w) in zip(used, parts)
        ]
        terms += [(g, t) for g, t in zip(found, tangents)]
        pushed = _pulled(terms, leaves, last=True)
        return tuple(
            None if g is None else g.detach() if t is None else _dual(separate(g.detach()), t)
            for g, t in zip(found, pushed)
        )


def _pulled(
    pairs: Sequence[tuple[Tensor | None, Tensor | None]],
    inputs: Sequence[Tensor],
    *,
    create_graph: bool = False,
    last: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the vector-Jacobian product, None for inputs that require no gradient.

    Args:
        pairs: Outputs and their cotangents.
        inputs: The inputs.
        create_graph: Whether the product is differentiated again.
        last: Whether the graph may be freed.
    """
    used = [(y, c) for y, c in pairs if y is not None and c is not None and y.requires_grad]
    where = [i for i, x in enumerate(inputs) if x.requires_grad]
    out: list[Tensor | None] = [None] * len(inputs)
    if used and where:
        found = torch.autograd.grad(
            [y for y, _ in used],
            [inputs[i] for i in where],
            [c for _, c in used],
            create_graph=create_graph,
            retain_graph=not last,
            allow_unused=True,
        )
        for i, g in zip(where, found):
            out[i] = g
    return tuple(out)
