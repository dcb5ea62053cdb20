# SPDX-License-Identifier: Apache-2.0
"""The programs of a block: one for its values, one for the cotangents of its arguments.

Both come from one trace, in forward over reverse mode where arguments have tangents. The second
computes the block again, except products of matrices and softmaxes, which take the most time for
their memory. In a first derivative all products are kept. In forward over reverse mode, where the
states and their cotangents need memory too, they may take twice the memory of the arguments, or an
equal part of 64 MiB for all blocks if that is more. The softmaxes of a first derivative may take
half of this part.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.diff.closure import require_arguments
from torchopt.diff.explicit.block import HIDDEN
from torchopt.diff.explicit.dual import dual_gradient
from torchopt.diff.explicit.forms import WAY_OUT, WHERE
from torchopt.diff.explicit.products import parts_of
from torchopt.diff.explicit.trace import Program, Words, make_trace, ready, versions
from torchopt.diff.surroundings import Surroundings
from torchopt.diff.twice_differentiable import TwiceDifferentiable
from torchopt.errors import NotTraceableError
from torchopt.torch_internals import (
    draws_numbers,
    repeats_removed,
    split_graph,
    with_forward_mode,
    without_function_modes,
)
from torchopt.tree import is_smooth, tree_flatten

__all__ = ["WORDS", "BlockCode", "BlockTracing"]

# In forward over reverse mode, products may take so many times the memory of the arguments, or so
# many bytes in all blocks together.
SHARE = 2.0
ROOM = 64 << 20
WORDS = Words(WHERE, f"name the blocks without this one, or {WAY_OUT}", WAY_OUT)


@dataclass(frozen=True)
class BlockForm:
    """The results of the graph of a block.

    The graph returns the tensors of the value and their tangents, then the cotangents of the
    arguments and the tangents of these.

    Attributes:
        spec: The tree that the block returns.
        leaves: Its leaves, with None for tensors.
        smooth: Which of its tensors have a cotangent.
        pushed: Which of its tensors have a tangent.
        grads: Which arguments have a cotangent.
        given: Of which arguments it is returned; of the others only its tangent is needed.
        curved: Of which arguments the cotangent has a tangent.
    """

    spec: Any
    leaves: tuple[Any, ...]
    smooth: tuple[bool, ...]
    pushed: tuple[bool, ...]
    grads: tuple[bool, ...]
    given: tuple[bool, ...]
    curved: tuple[bool, ...]


class BlockCode:
    """The programs of one form of a block, each compiled when it is first needed.

    Args:
        graph: The graph of values and cotangents.
        form: Its results.
        size: The number of arguments before the cotangents.
        room: The bytes that products may take whatever the arguments take.
        curved: Whether some of these are tangents; then those of the cotangents are arguments too.
    """

    def __init__(
        self, graph: torch.fx.GraphModule, form: BlockForm, size: int, room: int, *, curved: bool
    ) -> None:
        self.form, self.curved = form, curved
        self._count = len(form.pushed) + sum(form.pushed)
        given = [n.meta["val"].nbytes for n in graph.graph.nodes if n.op == "placeholder"]
        softmaxes, room = room // 2, max(room, int(SHARE * sum(given[:size])))
        first, second, self._passed = split_graph(
            graph,
            self._count,
            range(size, len(given)),
            recompute=True,
            room=room if curved else sys.maxsize,
            softmaxes=softmaxes,
        )
        self._graphs = {"values": first, "cotangents": second}
        self._programs: dict[str, Program] = {}
        self._lock = threading.RLock()

    def values(self, arguments: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors of the value followed by their tangents, and the kept products."""
        found = self._run("values", arguments)
        results, kept = found[: self._count], found[self._count :]
        # The loss may write to results.
        seen = {x.untyped_storage()._cdata for x in results}
        return results, [x.clone() if x.untyped_storage()._cdata in seen else x for x in kept]

    def cotangents(
        self, kept: list[Tensor], arguments: list[Tensor], given: list[Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return the cotangents of the arguments, and the tangents of these.

        Args:
            kept: The kept products.
            arguments: The arguments of `values`.
            given: The cotangents of the values, then their tangents.
        """
        passed = (arguments[i] for i in self._passed)
        found = iter(self._run("cotangents", [*kept, *passed, *given]))
        grads = [next(found) if g else None for g in self.form.given]
        return grads, [next(found) if c else None for c in self.form.curved]

    def _run(self, name: str, arguments: list[Tensor]) -> list[Tensor]:
        program = self._programs.get(name)
        if program is None:
            with self._lock:
                program = self._programs.get(name) or self._compiled(name, arguments)
        with torch.no_grad():
            return list(program(arguments, ()))

    def _compiled(self, name: str, arguments: list[Tensor]) -> Program:
        # The compiler's no_grad would make the rest of the loss a constant.
        with without_function_modes(), with_forward_mode(False):
            made, _ = ready(self._graphs[name], arguments, (), None, WORDS, compiled=True)
        self._programs[name] = made
        del self._graphs[name]
        return made


class BlockTracing:
    """The graph of a block with the cotangents of its arguments.

    Args:
        forward: The block.
        function: The block as a function of inputs, parameters and buffers.
        wanted: Which inputs and parameters are differentiated.
        given: Of which the cotangent is needed, and not only its tangent.
        held: The number of buffers.
        tangents: The tangents of inputs and parameters.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        function: Callable[..., Any],
        wanted: Sequence[bool],
        given: Sequence[bool],
        held: int,
        tangents: Sequence[Tensor | None],
    ) -> None:
        self._forward, self._function = forward, function
        self._wanted, self._given, self._held = wanted, given, held
        self._pushed = [t is not None for t in tangents]

    def code(self, arguments: list[Tensor], seen: Surroundings, room: int) -> BlockCode:
        """Trace the block.

        Args:
            arguments: Inputs, parameters, buffers and tangents.
            seen: The surroundings of the block.
            room: See `BlockCode`.
        """
        copies = [x.clone() for x in arguments]
        held = copies[len(self._wanted) : len(self._wanted) + self._held]
        before = versions(held)
        with seen.retaken().replayed():
            _, results, _ = self._evaluated(copies)
            like = [torch.zeros_like(y.detach()) for y in results if _has_graph(y)]
            del results
        written = versions(held) != before
        like += [x.clone() for x in like if any(self._pushed)]
        if not written:
            with seen.retaken().replayed():
                states, examples = seen.retaken(), [*arguments, *like]
                trace = make_trace(self._joint, examples, (self._forward,), WORDS, states=states)
            written = trace.writes
        if written or draws_numbers(trace.graph):
            what = "writes to buffers" if written else "draws random numbers"
            raise NotTraceableError(
                f"{WHERE}: expected blocks without random numbers that write to no buffer, got a "
                f"block that {what}; {WORDS.way_out}."
            )
        if trace.held:
            raise NotTraceableError(
                f"{WHERE}: expected the tensors that a block uses among its arguments, parameters "
                f"and buffers, got one of shape {tuple(trace.held[0].shape)} that it holds "
                f"elsewhere; make it a buffer, or {WORDS.way_out}."
            )
        repeats_removed(trace.graph)
        curved = any(self._pushed)
        return BlockCode(trace.graph, trace.form, len(arguments), room, curved=curved)

    def _evaluated(self, arguments: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Any]:
        """Return the leaves of the graph, the tensors of the value, and its leaves and tree."""
        count = len(self._wanted)
        remaining = iter(arguments[count + self._held :])
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(w) for x, w in zip(arguments, self._wanted)]
            args = [
                forward_ad.make_dual(x, next(remaining)) if pushed else x
                for x, pushed in zip(leaves, self._pushed)
            ]
            with TwiceDifferentiable():
                value = self._function(*args, *arguments[count : count + self._held])
        out, spec = tree_flatten(value, none_is_leaf=True)
        tensors = [y for y in out if isinstance(y, Tensor)]
        return leaves, tensors, (spec, tuple(None if isinstance(y, Tensor) else (y,) for y in out))

    def _joint(self, *flat: Tensor) -> tuple[list[Tensor], BlockForm]:
        curved = any(self._pushed)
        size = len(self._wanted) + self._held + sum(self._pushed)
        leaves, values, (spec, others) = self._evaluated(flat[:size])
        smooth = [_has_graph(y) for y in values]
        used = [y for y, s in zip(values, smooth) if s]
        require_arguments(used, leaves, self._forward, "inner_loop: blocks", HIDDEN)
        cotangents, at = list(flat[size : size + len(used)]), [x for x in leaves if x.requires_grad]
        if curved:
            both = zip(cotangents, flat[size + len(used) :])
            cotangents = [forward_ad.make_dual(c, t) for c, t in both]
        # The mode of the loss would take this for a gradient inside of it, which is a constant.
        with without_function_modes():
            grads = dual_gradient(used, at, cotangents) if used and at else [None] * len(at)
        every = iter(grads)
        found = [next(every) if x.requires_grad else None for x in leaves]
        parts = [(None, None) if g is None else parts_of(g) for g in found]
        outer = [parts_of(y) for y in values]
        form = BlockForm(
            spec,
            others,
            tuple(smooth),
            tuple(t is not None for _, t in outer),
            tuple(g is not None for g in found),
            tuple(g is not None and need for g, need in zip(found, self._given)),
            tuple(t is not None for _, t in parts),
        )
        tensors = [y for y, _ in outer] + [t for _, t in outer if t is not None]
        tensors += [g for (g, _), need in zip(parts, self._given) if g is not None and need]
        tensors += [t for _, t in parts if t is not None]
        return [x.detach() for x in tensors], form


def _has_graph(x: Any) -> bool:
    return is_smooth(x) and bool(x.requires_grad)
