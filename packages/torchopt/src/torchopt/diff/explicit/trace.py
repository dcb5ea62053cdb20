# SPDX-License-Identifier: Apache-2.0
"""Programs of straight-line code that are traced once and cached."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from torchopt import torch_internals
from torchopt.diff.explicit.fingerprint import Fingerprint, fingerprint
from torchopt.diff.explicit.program import Program, as_traced
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import NotTraceableError
from torchopt.precision import without_autocast

__all__ = [
    "Kept",
    "Program",
    "Programs",
    "Trace",
    "Words",
    "make_program",
    "make_trace",
    "programs",
    "ready",
    "traced",
    "versions",
]

MOST = 64  # programs that are kept
logger = logging.getLogger(__name__)
LIBRARIES = ("torch", "torchopt", "optree")
Made = TypeVar("Made")
_tracing = threading.RLock()  # torch.fx traces once at a time in a process


class Programs(NamedTuple):
    """How many programs were traced in this process, and how many are in the cache."""

    traced: int
    kept: int


@dataclass
class _Entry(Generic[Made]):
    """A value and when it was last used."""

    value: Made
    used: int


class Kept(Generic[Made]):
    """A cache by key; the least recently used entry is dropped.

    Entries are made by one thread at a time, those of all caches together. Finding one takes no
    lock, so no thread waits while another one traces.
    """

    def __init__(self) -> None:
        self._by_key: dict[Hashable, _Entry[Made]] = {}
        self._clock = itertools.count()
        self.made = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: Hashable, make: Callable[[], Made]) -> tuple[Made, bool]:
        """Return the entry for a key, and whether it was made now."""
        found = self._by_key.get(key)
        if found is None:
            with _tracing:
                found = self._by_key.get(key)  # another thread may have made it meanwhile
                if found is None:
                    return self._made(key, make()), True
        found.used = next(self._clock)
        return found.value, False

    def _made(self, key: Hashable, value: Made) -> Made:
        self._by_key[key] = _Entry(value, next(self._clock))
        self.made += 1
        while len(self._by_key) > MOST:
            del self._by_key[min(self._by_key, key=lambda k: self._by_key[k].used)]
        return value


_kept: Kept[Program] = Kept()


def programs() -> Programs:
    """Return how many programs were traced in this process, and how many are in the cache."""
    return Programs(_kept.made, len(_kept))


def traced(key: Hashable, what: Callable[[], str], make: Callable[[], Program]) -> Program:
    """Return the program for a key, from the cache or by tracing.

    Args:
        key: Everything that the program depends on.
        what: Returns a description for the log.
        make: Traces the program.
    """
    found, new = _kept.get(key, make)
    if new:
        logger.info("traced %s (program %d; %d kept)", what(), _kept.made, len(_kept))
    return found


@dataclass(frozen=True)
class Words:
    """How the messages about a trace begin and end.

    Attributes:
        where: The argument of the caller that asked for a trace.
        way_out: What to do if the function cannot be traced.
        interpreted: What to do if it cannot be compiled.
    """

    where: str
    way_out: str
    interpreted: str = 'use execute="trace"'


@dataclass(frozen=True)
class Trace:
    """A function as a graph of operations.

    Attributes:
        graph: Takes the arguments, then the held tensors.
        examples: The arguments that it was traced with.
        held: The tensors that the function uses without taking them as arguments.
        places: Their positions among all tensors that the function reaches.
        form: What the function returned with its results.
        writes: Whether it writes to buffers of modules.
    """

    graph: torch.fx.GraphModule
    examples: list[Tensor]
    held: list[Tensor]
    places: tuple[int, ...]
    form: Any
    writes: bool

    def program(self, words: Words, *, compiled: bool) -> Program:
        """Return the program of the graph."""
        given = [*self.examples, *(x.detach() for x in self.held)]
        made, _ = ready(self.graph, given, self.places, self.form, words, compiled=compiled)
        return replace(made, writes=self.writes)

    def parted(
        self, count: int, cotangents: range, words: Words, *, compiled: bool
    ) -> tuple[Program, Program]:
        """Split the graph into a program that needs no cotangents, and one for the rest.

        The first returns `count` results, then the tensors that the second takes before the
        cotangents.

        Args:
            count: How many of the results depend on no cotangent.
            cotangents: Positions of the cotangents, which are the last arguments.
            words: For messages.
            compiled: Whether to compile the code.
        """
        first, second, passed = torch_internals.split_graph(
            self.graph, count, cotangents, recompute=compiled
        )
        given = [*self.examples[: cotangents.start], *(x.detach() for x in self.held)]
        if compiled:
            torch_internals.pack_between(first, second, count)
        value, like = ready(first, given, self.places, self.form, words, compiled=compiled)
        if like is None:
            like = list(torch.no_grad()(value.function)([*given]))
        kept = [*like[count:], *(given[i] for i in passed)]
        if passed:
            value = replace(value, function=functools.partial(_with_passed, value.function, passed))
        given = [*kept, *self.examples[cotangents.start :]]
        pull, _ = ready(second, given, (), None, words, compiled=compiled)
        return value, replace(pull, begin=len(kept))


def _with_passed(
    function: Callable[[list[Tensor]], Any], passed: Sequence[int], arguments: list[Tensor]
) -> list[Tensor]:
    """Return the results of a function, followed by some of its arguments."""
    more = [arguments[i] for i in passed]
    return [*function(arguments), *more]


def ready(
    graph: torch.fx.GraphModule,
    examples: Sequence[Tensor],
    places: tuple[int, ...],
    form: Any,
    words: Words,
    *,
    compiled: bool,
) -> tuple[Program, list[Tensor] | None]:
    """Return a graph as a program, compiled or not, and tensors like its results if known.

    Raises:
        CompilerError: There is no C++ compiler, or it fails; so does the first call.
    """
    draws = torch_internals.draws_numbers(graph)
    if not compiled:
        return Program(as_traced(graph.forward, spread=True), places, (), draws, form), None
    strides = tuple(x.stride() for x in examples)
    with without_autocast():
        code = torch_internals.compiled_graph(
            graph, examples, lambda why: f"{words.where}: {why}, or {words.interpreted}."
        )
    return Program(as_traced(code.function), places, strides, draws, form), code.results


def make_trace(
    function: Callable[..., tuple[list[Tensor], Any]],
    examples: Sequence[Tensor],
    reach: tuple[Any, ...],
    words: Words,
    *,
    states: Surroundings,
) -> Trace:
    """Trace a function.

    Args:
        function: Maps tensors to a list of tensors and its form.
        examples: The arguments to trace it with.
        reach: The functions of the user that it calls.
        words: For messages.
        states: The current surroundings; buffers of modules are copies, so it may write to them.

    Raises:
        NotTraceableError: The function reads values on the host, has side effects, draws random
            numbers outside torch, or uses a tensor that a search does not find.
    """
    form: list[Any] = []

    def flat(*arguments: Tensor) -> list[Tensor]:
        tensors, found = function(*arguments)
        form[:] = [found]
        return tensors

    distinct = [x.detach().clone() for x in examples]
    before = fingerprint(*reach)
    counted = versions((*before.tensors, *distinct))
    graph = _graph(flat, distinct, before, words)
    if states.have_moved(outside=True):
        raise NotTraceableError(
            f"{words.where}: expected random numbers from torch, which a traced program draws "
            f"again, got some from random or numpy, which would become constants; {words.way_out}."
        )
    now = versions((*before.tensors, *distinct))
    names = (*before.names, *("an argument" for _ in distinct))
    modules = [m for m in before.visited if isinstance(m, nn.Module)]
    buffers = {id(b) for m in modules for b in m._buffers.values()}
    free = (*(id(x) in buffers for x in before.tensors), *(False for _ in distinct))
    written = [(n, f) for n, x, y, f in zip(names, counted, now, free) if x != y]
    after = fingerprint(*reach)
    exchanged = [n for n, x, y in zip(names, before.tensors, after.tensors) if x is not y]
    _require_unchanged([*(n for n, f in written if not f), *exchanged], before, after, words)
    held = torch_internals.lifted_constants(graph)
    places = _places(held, before, words)
    return Trace(graph, distinct, held, places, form[0], bool(written))


def make_program(
    function: Callable[..., tuple[list[Tensor], Any]],
    examples: Sequence[Tensor],
    seen: Surroundings,
    reach: tuple[Any, ...],
    words: Words,
    *,
    compiled: bool,
) -> Program:
    """Trace a function, compile it if asked, and leave its surroundings unchanged.

    Args:
        function: Maps tensors to a list of tensors and its form.
        examples: The arguments to trace it with.
        seen: Its surroundings.
        reach: The functions of the user that it calls.
        words: For messages.
        compiled: Whether to compile the code.

    Raises:
        NotTraceableError: See `make_trace`.
        CompilerError: See `ready`.
    """
    if compiled:
        torch_internals.prepare_compiler()
    with seen.retaken().replayed():
        states = seen.retaken()
        trace = make_trace(function, examples, reach, words, states=states)
        return trace.program(words, compiled=compiled)


def _graph(
    function: Callable[..., Any], examples: Sequence[Tensor], reach: Fingerprint, words: Words
) -> torch.fx.GraphModule:
    owned = {_storage(x): n for n, x in zip(reach.names, reach.tensors)}

    def read(x: Tensor) -> None:
        name = owned.get(_storage(x))
        if name is not None and x.numel():
            raise NotTraceableError(_read_message(words, f" of {name}", None))

    try:
        return torch_internals.traced_graph(function, examples, read)
    except (RuntimeError, torch_internals.HostReadError) as error:
        if not torch_internals.is_host_read(error):
            raise
        raise NotTraceableError(_read_message(words, "", error)) from error


def _read_message(words: Words, of: str, error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error else traceback.extract_stack()
    own = [f for f in frames if f.line and not _in(f.filename, *LIBRARIES)]
    ours = [f for f in frames if _in(f.filename, "torchopt") and "internals" not in f.filename]
    # In an optimizer of this package, the cause is not a line of the user.
    inside = ours and any(_in(f.filename, "optimizers", "transform") for f in ours[-4:])
    found = ours if inside or not own else own
    place = f" in {found[-1].name}: {(found[-1].line or '').strip()[:80]}" if found else ""
    told = error if isinstance(error, torch_internals.HostReadError) else None
    if any(_in(f.filename, "nn") and f.filename.endswith("rnn.py") for f in frames):
        told = torch_internals.packed_read()  # a layer reads only the lengths
    name, remedy = (str(told), told.remedy) if told else (".item()", "Use torch.where")
    return (
        f"{words.where}: expected the same operations in each run, got one that depends on a "
        f"value{of}{place} - a branch, {name} or the like. {remedy}, or {words.way_out}."
    )


def _in(path: str, *folders: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    return "tests" not in parts and any(name in parts for name in folders)


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return the version counters of tensors; 0 for tensors without one."""
    try:
        return [x._version for x in tensors]
    except RuntimeError:
        return [0 if x.is_inference() else x._version for x in tensors]


def _require_unchanged(
    changed: Sequence[str], before: Fingerprint, after: Fingerprint, words: Words
) -> None:
    name = changed[0] if changed else before.difference(after)
    if name is not None:
        raise NotTraceableError(
            f"{words.where}: expected a function that changes nothing besides what it returns, got "
            f"one that changes {name}, which a traced program would not do again; {words.way_out}."
        )


def _places(held: Sequence[Tensor], reach: Fingerprint, words: Words) -> tuple[int, ...]:
    """Return the positions of a graph's constants among the tensors that the function reaches."""
    by_identity = {id(x): i for i, x in enumerate(reach.tensors)}
    by_memory: dict[Any, set[int]] = {}
    for x in reach.tensors:
        by_memory.setdefault(_memory(x), set()).add(by_identity[id(x)])
    out = []
    for x in held:
        alike = sorted(by_memory.get(_memory(x), ()))
        place = by_identity.get(id(x), alike[0] if alike else None)
        if id(x) not in by_identity and len(alike) > 1:
            names = " and ".join(reach.names[i] for i in alike[:2])
            raise NotTraceableError(
                f"{words.where}: expected the tensors that a function holds, got an alias, such as "
                f"nn.Parameter(x), of memory that two of them share ({names}), so that a later run "
                f"cannot tell which one to read; use the tensor itself, or {words.way_out}."
            )
        if place is None:
            raise NotTraceableError(
                f"{words.where}: expected the tensors that a function uses among its arguments, "
                f"in its closure or in a module, got one of shape {tuple(x.shape)} that a search "
                "does not find; it would become a constant. Pass it as a further argument."
            )
        out.append(place)
    return tuple(out)


def _memory(x: Tensor) -> tuple[Any, ...]:
    if x.layout is not torch.strided:
        return (_storage(x),)
    signs = x.is_neg(), x.is_conj()
    return _storage(x), x.shape, x.stride(), x.storage_offset(), x.dtype, *signs


def _storage(x: Tensor) -> int:
    """Return a key for the memory of a tensor, unique among live tensors."""
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else id(x)
