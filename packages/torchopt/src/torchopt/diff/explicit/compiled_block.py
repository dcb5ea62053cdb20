# SPDX-License-Identifier: Apache-2.0
"""Calls of blocks by compiled programs, which equal blocks share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchopt.diff.closure import ATOMS
from torchopt.diff.explicit.block import Block, is_input
from torchopt.diff.explicit.block_code import WORDS, BlockCode, BlockTracing
from torchopt.diff.explicit.fingerprint import Fingerprint, Settings, form_of, settings
from torchopt.diff.explicit.forms import EMPTY, WHERE, present
from torchopt.diff.explicit.products import Products, parts_of
from torchopt.diff.explicit.reached import Reached
from torchopt.diff.explicit.step import separate
from torchopt.diff.explicit.trace import Kept, logger, versions
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import NotTraceableError
from torchopt.params.swap import Swap
from torchopt.torch_internals import forward_mode_enabled, graph_is_kept
from torchopt.tree import is_smooth, tree_unflatten
from torchopt.tree_function import apply_sweep, is_transforming

__all__ = ["ReachedByBlock", "call_compiled"]

_codes: Kept[BlockCode] = Kept()


def call_compiled(
    block: nn.Module,
    forward: Callable[..., Any],
    leaves: Sequence[Any],
    spec: Any,
    reached: ReachedByBlock,
    room: int,
) -> Any:
    """Return the result of a block, by the programs of its form.

    Args:
        block: The block.
        forward: Its own forward.
        leaves: The leaves of its arguments.
        spec: Their tree.
        reached: What the block reaches.
        room: See `BlockCode`.
    """
    if is_transforming():
        raise NotTraceableError(
            f"{WHERE}: expected compiled blocks outside of torch.func transforms, got a "
            f"{type(block).__name__} that the loss calls in one; {WORDS.way_out}."
        )
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    named, buffers = dict(block.named_parameters()), dict(block.named_buffers())
    names = (*named, *buffers)
    for name, buffer in buffers.items():
        if buffer.requires_grad or parts_of(buffer)[1] is not None:
            raise NotTraceableError(
                f"{WHERE}: expected constants in the buffers of a compiled block, got a "
                f"{type(block).__name__} whose buffer {name!r} is differentiated; {WORDS.way_out}."
            )
    tensors: list[Tensor] = [*(leaves[i] for i in where), *named.values()]
    held = [x.detach() for x in buffers.values()]
    others = [None if isinstance(x, Tensor) else x for x in leaves]
    for x in others:
        if not isinstance(x, ATOMS):
            raise NotTraceableError(
                f"{WHERE}: expected tensors, numbers and strings as the arguments of a compiled "
                f"block, got a {type(x).__name__}; {WORDS.way_out}."
            )

    def function(*inner: Tensor) -> Any:
        filled = list(others)
        for i, x in zip(where, inner):
            filled[i] = x
        rebuilt: Any = tree_unflatten(spec, filled)
        given, keywords = rebuilt
        with Swap(block, dict(zip(names, inner[len(where) :])), tie_weights=True):
            return forward(*given, **keywords)

    pairs = [parts_of(x) for x in tensors]
    values, tangents = [x for x, _ in pairs], [t for _, t in pairs]
    # Of a parameter that is an input of the loop, only the tangent of the cotangent is needed.
    curved = any(t is not None for t in tangents)
    needed = [not curved or i < len(where) or not is_input(x) for i, x in enumerate(tensors)]
    wanted = [x.requires_grad and is_smooth(x) for x in values]
    before = reached.now()
    key: Hashable = (
        before.key, spec, tuple(where), tuple((type(x), repr(x)) for x in others), settings(),
        names, tuple(form_of(x) for x in (*values, *held)), tuple(wanted),
        tuple(None if t is None else form_of(t.detach()) for t in tangents), tuple(needed), room,
    )  # fmt: skip
    arguments = [x.detach() for x in (*values, *held, *present(tangents))]

    def surroundings() -> Surroundings:
        apart = [*block.parameters(), *block.buffers()]
        return Surroundings(forward, beside=(), apart=apart).retaken()

    def make() -> BlockCode:
        trace = BlockTracing(forward, function, wanted, needed, len(held), tangents)
        code = trace.code(arguments, surroundings(), room)
        logger.info("traced a block, a %s, with its derivative", type(block).__name__)
        return code

    code, _ = _codes.get(key, make)
    results, kept = code.values(arguments)
    form, found = code.form, [y.detach() for y in results]
    results, pushed = found[: len(form.pushed)], iter(found[len(form.pushed) :])
    constant = [None if t is None else t.detach() for t in tangents]
    now = Settings()

    def eager(*given: Any) -> tuple[Tensor | None, ...]:
        with now.restored(WHERE, WORDS.way_out):
            before.require_same(reached.now(), WHERE, WORDS.way_out)
            seen = surroundings()
            made = Block(
                forward, lambda *x: function(*x, *held), constant, [], seen, Products(), ()
            )
            return made.pull_back(*given)

    call = _Called(code, eager, held, arguments[len(values) + len(held) :], kept, results)
    outputs = zip(apply_sweep(call, *values), form.pushed)
    dual = iter([forward_ad.make_dual(y, next(pushed)) if has else y for y, has in outputs])
    return tree_unflatten(form.spec, [next(dual) if x is None else x[0] for x in form.leaves])


class ReachedByBlock(Reached):
    """The fingerprint of what a block reaches besides its parameters and buffers.

    Args:
        block: The block.
        forward: Its own forward.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__((forward, block), exchanged=block)
        self._block = block

    def search(self) -> Fingerprint:
        """Return the current fingerprint, from a search."""
        block = self._block
        names = [name for name, _ in (*block.named_parameters(), *block.named_buffers())]
        with Swap(block, dict.fromkeys(names, EMPTY), tie_weights=True):
            return super().search()


class _Called:
    """One call of a compiled block, an implementation of `torchopt.tree_function.Sweep`.

    Args:
        code: The programs.
        eager: Does what `pull_back` does, operation by operation.
        held: The buffers.
        tangents: The tangents of the inputs.
        kept: What the first program kept for the second.
        values: The results.
    """

    def __init__(
        self,
        code: BlockCode,
        eager: Callable[..., tuple[Tensor | None, ...]],
        held: list[Tensor],
        tangents: list[Tensor],
        kept: list[Tensor],
        values: list[Tensor],
    ) -> None:
        self._code, self._eager, self._held = code, eager, held
        self._values, self._rest, self._kept = values, [*held, *tangents], kept
        self._forms = [(y.shape, y.dtype, y.device) for y in values]
        self._versions = versions(held)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the results, which are already computed."""
        values, self._values = self._values, []
        return tuple(values)

    def pull_back(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs, with their tangents."""
        code = self._code
        if versions(self._held) != self._versions:
            raise RuntimeError(
                f"{WHERE}: expected blocks whose buffers are not changed in place before the "
                f"backward pass, got one with a buffer that was; {WORDS.way_out}."
            )
        if torch.is_grad_enabled() or (code.curved and not forward_mode_enabled()):
            return self._eager(inputs, cotangents)
        arguments, kept = [*(x.detach() for x in inputs), *self._rest], self._kept
        if not graph_is_kept():  # the node itself lives until the whole pass is done
            self._rest = self._kept = []
            del self._eager
        values, tangents = self._dense(cotangents)
        if not code.curved:
            grads, found = code.cotangents(kept, arguments, values)
            if tangents is not None:  # a product is linear in the cotangents
                found, _ = code.cotangents(kept, arguments, tangents)
        else:
            both = [*values, *(map(torch.zeros_like, values) if tangents is None else tangents)]
            grads, found = code.cotangents(kept, arguments, both)
        return tuple(map(_joined, grads, found))

    def _dense(
        self, cotangents: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the cotangents that the program takes, and their tangents if there are any."""
        smooth = self._code.form.smooth
        pairs = [(None, None) if c is None else parts_of(c) for c in cotangents]
        found = []
        for pair, form, has in zip(pairs, self._forms, smooth):
            shape, dtype, device = form
            zeros = functools.partial(torch.zeros, shape, dtype=dtype, device=device)
            if has:
                found.append([zeros() if x is None else x.detach() for x in pair])
        is_dual = any(t is not None for _, t in pairs)
        return [x for x, _ in found], [t for _, t in found] if is_dual else None


def _joined(cotangent: Tensor | None, tangent: Tensor | None) -> Tensor | None:
    if tangent is None:
        return cotangent
    x = torch.zeros_like(tangent) if cotangent is None else separate(cotangent)
    dual: Tensor = forward_ad.make_dual(x, tangent)
    return dual
