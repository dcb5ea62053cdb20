# SPDX-License-Identifier: Apache-2.0
"""Programs of straight-line code, traced once, and kept for as long as they are in use."""

from __future__ import annotations

import logging
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt import torch_internals
from torchopt.diff.explicit.fingerprint import Fingerprint, fingerprint
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import NotTraceableError

__all__ = ["Program", "Programs", "programs", "traced"]

MOST = 64  # programs that are kept
logger = logging.getLogger(__name__)
LIBRARIES = ("torch", "torchopt", "optree")
WAY_OUT = 'use execute="eager"'


@dataclass(frozen=True)
class Program:
    """A traced function of a list of tensors.

    Attributes:
        function: The code.
        held: Which of the tensors that the traced function reaches are further arguments.
        strides: The strides that the code is made for; empty if it takes any.
        draws: Whether it draws random numbers.
        form: What its caller needs to make sense of the list that it returns.
    """

    function: Callable[..., Any]
    held: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    draws: bool
    form: Any

    def __call__(self, tensors: Sequence[Tensor], held: Sequence[Tensor]) -> Sequence[Any]:
        """Return the results for these arguments, given all tensors that the function reaches."""
        arguments = [*tensors, *(held[i] for i in self.held)]
        for i, stride in enumerate(self.strides):
            if arguments[i].stride() != stride:
                arguments[i] = _with_stride(arguments[i], stride)
        found: Sequence[Any] = self.function(*arguments)
        return found


def _with_stride(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    return x.new_empty_strided(x.shape, stride).copy_(x)


class Programs(NamedTuple):
    """How many programs were traced in this process, and how many of them are kept."""

    traced: int
    kept: int


class _Kept:
    """The programs by what they depend on; the one that was not used for longest goes first."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.by_key: OrderedDict[Hashable, Program] = OrderedDict()
        self.traced = 0


_kept = _Kept()


def programs() -> Programs:
    """Return how many programs were traced in this process, and how many are kept."""
    return Programs(_kept.traced, len(_kept.by_key))


def traced(key: Hashable, what: str, make: Callable[[], Program]) -> Program:
    """Return the program for a key; make it unless it is kept.

    Args:
        key: Everything that the program depends on.
        what: What it is, for the log.
        make: Traces it.
    """
    with _kept.lock:
        found = _kept.by_key.get(key)
        if found is not None:
            _kept.by_key.move_to_end(key)
            return found
        found = make()
        _kept.by_key[key] = found
        _kept.traced += 1
        while len(_kept.by_key) > MOST:
            _kept.by_key.popitem(last=False)
        logger.info("traced %s (program %d; %d kept)", what, _kept.traced, len(_kept.by_key))
        return found


def make_program(
    function: Callable[..., tuple[list[Tensor], Any]],
    examples: Sequence[Tensor],
    seen: Surroundings,
    reach: tuple[Any, ...],
    *,
    where: str,
    compiled: bool,
) -> Program:
    """Trace a function.

    Args:
        function: From tensors to a list of tensors, and the form of it.
        examples: What it is traced with.
        seen: Its surroundings; they are left as they are.
        reach: What it calls that is the user's own.
        where: What messages start with.
        compiled: Whether the code is compiled.

    Raises:
        NotTraceableError: It reads values on the host, changes something that is no argument, draws
            random numbers outside of torch, or uses a tensor that is held out of sight.
    """
    form: list[Any] = []

    def flat(*arguments: Tensor) -> list[Tensor]:
        tensors, found = function(*arguments)
        form[:] = [found]
        return tensors

    distinct = [x.detach().clone() for x in examples]
    with seen.retaken().replayed():
        before = fingerprint(*reach)
        versions = [x._version for x in before.tensors]
        states = seen.retaken()
        graph = _graph(flat, distinct, before, where)
        if states.moved_outside_torch():
            raise NotTraceableError(
                f"{where}: expected random numbers of torch, which a traced program draws anew, "
                f"got some of random or numpy, which would be constants; {WAY_OUT}."
            )
        _require_unchanged(before, versions, fingerprint(*reach), where)
        held = torch_internals.lifted_constants(graph)
        places = _places(held, before, where)
        draws = torch_internals.draws_numbers(graph)
        code: Callable[..., Any] = graph.forward
        strides: tuple[tuple[int, ...], ...] = ()
        if compiled:
            given = [*distinct, *(x.detach() for x in held)]
            code = torch_internals.compiled_graph(graph, given)
            strides = tuple(x.stride() for x in given)
    return Program(code, places, strides, draws, form[0])


def _graph(
    function: Callable[..., Any], examples: Sequence[Tensor], reach: Fingerprint, where: str
) -> torch.fx.GraphModule:
    owned = {x.untyped_storage().data_ptr(): n for n, x in zip(reach.names, reach.tensors)}

    def read(x: Tensor) -> None:
        name = owned.get(x.untyped_storage().data_ptr())
        if name is not None and x.numel():
            raise NotTraceableError(_read_message(where, f" of {name}", None))

    try:
        return torch_internals.traced_graph(function, examples, read)
    except RuntimeError as error:
        if not torch_internals.is_host_read(error):
            raise
        raise NotTraceableError(_read_message(where, "", error)) from error


def _read_message(where: str, of: str, error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error else traceback.extract_stack()
    own = [f for f in frames if f.line and not _in(f.filename, *LIBRARIES)]
    ours = [f for f in frames if _in(f.filename, "torchopt") and "internals" not in f.filename]
    # Of an optimizer of this package, no line of the user's is to blame.
    inside = ours and any(_in(f.filename, "optimizers", "transform") for f in ours[-4:])
    found = ours if inside or not own else own
    place = f" in {found[-1].name}: {(found[-1].line or '').strip()[:80]}" if found else ""
    return (
        f"{where}: expected the same operations in each run, got one that depends on a value{of}"
        f"{place} - a branch, .item() or the like. Use torch.where, or {WAY_OUT}."
    )


def _in(path: str, *folders: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    return "tests" not in parts and any(name in parts for name in folders)


def _require_unchanged(
    before: Fingerprint, versions: Sequence[int], after: Fingerprint, where: str
) -> None:
    changed = [n for n, x, v in zip(before.names, before.tensors, versions) if x._version != v]
    name = changed[0] if changed else before.difference(after)
    if name is not None:
        raise NotTraceableError(
            f"{where}: expected a step that changes nothing beside what it returns, got one that "
            f"changes {name}, which a traced program would not do again; {WAY_OUT}, or for a "
            "BatchNorm, module.eval()."
        )


def _places(held: Sequence[Tensor], reach: Fingerprint, where: str) -> tuple[int, ...]:
    """Return where the constants of a graph are among the tensors that the function reaches."""
    by_identity = {id(x): i for i, x in enumerate(reach.tensors)}
    by_memory = {_memory(x): i for i, x in enumerate(reach.tensors)}
    out = []
    for x in held:
        place = by_identity.get(id(x), by_memory.get(_memory(x)))
        if place is None:
            raise NotTraceableError(
                f"{where}: expected the tensors that the loss uses among its arguments, in its "
                f"closure or in a module, got one of shape {tuple(x.shape)} that is out of sight: "
                "it would be a constant of the program. Pass it after the batch."
            )
        out.append(place)
    return tuple(out)


def _memory(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage().data_ptr(), x.shape, x.stride(), x.storage_offset(), x.dtype
