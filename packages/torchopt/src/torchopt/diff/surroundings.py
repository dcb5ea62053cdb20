# SPDX-License-Identifier: Apache-2.0
"""The surroundings of a function: random numbers, buffers, training flags and counters.

To compute a derivative, the function is evaluated again, later and several times. Each of these
evaluations must find the same surroundings as the first one, and none may have a side effect.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.diff.closure import captured
from torchopt.diff.places import (
    Content,
    Elements,
    Slot,
    Source,
    contents,
    counted,
    has_no_graph,
    is_copied,
    numpy_source,
    slots,
    sources,
    table_of,
    what_varies,
)
from torchopt.diff.sealed import (
    MOST,
    draws_nothing,
    is_pure,
    is_simple,
    is_transparent,
    may_exchange,
)
from torchopt.errors import NotDifferentiableError
from torchopt.precision import Modes

__all__ = ["Surroundings", "fresh_buffers"]

CONTAINERS = (list, dict, set, deque)
# Attributes of a module that are not recorded: those swapped by name, and those of the solver.
APART = {"_parameters", "_buffers", "_modules", "_meta_parameters", "_meta_modules"} | {
    "_meta_inputs",
    "_solver_leaves",
    "_solving",
}
# Replaced during a call, perhaps by another thread.
PATCHED = {"forward"}
NOT_RECORDED = APART | PATCHED


@dataclass(frozen=True)
class _ModuleState:
    """The recorded attributes and buffers of a module, without its sub-modules."""

    module: nn.Module
    attributes: dict[str, Any]
    buffers: dict[str, Tensor | None]

    @staticmethod
    def of(module: nn.Module) -> _ModuleState:
        buffers = {k: None if b is None else b.detach().clone() for k, b in module._buffers.items()}
        return _ModuleState(module, _attributes(module), buffers)

    def put(self) -> Callable[[], None]:
        """Restore the recorded state; return a function that undoes this."""
        module, content = self.module, self.module.__dict__
        before = {k: v for k, v in list(content.items()) if k not in PATCHED}
        content.update(_copied(self.attributes))
        buffers_back = _put_copies(module, self.buffers)

        def back() -> None:
            buffers_back()
            for key in content.keys() - before.keys() - PATCHED:
                del content[key]
            content.update(before)

        return back


def _put_copies(module: nn.Module, buffers: dict[str, Tensor | None]) -> Callable[[], None]:
    """Replace buffers by copies; return a function that undoes this.

    A copy belongs to the transform in which it is made, so the transform may change it in place.
    """
    present, before = module._buffers, dict(module._buffers)
    present.update({k: None if b is None else b.clone() for k, b in buffers.items()})

    def back() -> None:
        for key in present.keys() - before.keys():
            del present[key]
        present.update(before)

    return back


@contextlib.contextmanager
def fresh_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Return a context in which the buffers of modules are replaced by copies."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(_put_copies(module, module._buffers))
        yield


def _has_state(module: nn.Module) -> bool:
    """Return whether a module has state that can be restored.

    Raises:
        NotDifferentiableError: The module is scripted and may write to buffers, which cannot be
            replaced.
    """
    if not isinstance(module, torch.jit.ScriptModule):
        return True
    if module.training and next(module.buffers(), None) is not None:
        raise NotDifferentiableError(
            "expected modules whose buffers can be restored, because a derivative computes steps "
            f"again, got a scripted {module.original_name} in training mode; pass the module that "
            "it was scripted from, or call eval() on it."
        )
    return False


def _attributes(module: nn.Module) -> dict[str, Any]:
    return _copied(
        {
            k: v
            for k, v in list(module.__dict__.items())
            if k not in NOT_RECORDED and not k.endswith("_hooks") and has_no_graph(v)
        }
    )


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes with containers copied, so that later additions are not seen."""
    return {k: v.copy() if type(v) in (list, dict, set) else v for k, v in attributes.items()}


class Surroundings:
    """The surroundings of a function, as they were for one call.

    The states of random number generators are recorded at construction, modules when `settle` is
    called. So a solver that draws its batch first, and the function that draws the same batch,
    get the same numbers.

    Example:
        >>> import torch
        >>> from torchopt.diff.surroundings import Surroundings
        >>> seen = Surroundings(lambda: torch.rand(()))
        >>> with seen.replayed():
        ...     first = torch.rand(())
        >>> with seen.replayed():
        ...     second = torch.rand(())
        >>> bool(first == second)
        True
    """

    not_searched = True  # by `captured`: it holds nothing of its own

    def __init__(
        self,
        function: Any,
        tensors: Iterable[Tensor] = (),
        beside: Any = None,
        apart: Iterable[Tensor] = (),
    ) -> None:
        """Record the states of all random number generators.

        Args:
            function: The function, whose closure is searched.
            tensors: Tensors whose devices may have generators of their own.
            beside: Another object that runs, such as an optimizer; see `what_varies`. It may draw
                random numbers from torch's or its own generators.
            apart: Tensors that the function reaches but does not change.
        """
        self._apart = {id(x) for x in apart}
        varying = [] if beside is None else what_varies(beside)
        self._function = (function, *(x for _, x in varying)) if varying else function
        self._varying = {id(x): name for name, x in varying}
        self._sources: list[Source] = []
        self._states: list[_ModuleState] = []
        self._elements: list[Elements] = []
        self._modes = Modes.now()
        self._fresh, self._counting, self._silent = True, False, False
        self._value: Tensor | None = None
        self._watched: list[tuple[str, Tensor, int]] = []
        self._search(first=True)
        named = () if self.is_sealed else self._tensors
        buffers = {id(b) for module in self._modules for b in module._buffers.values()}
        named = [(name, x) for name, x in named if id(x) not in buffers and not x.is_inference()]
        self._begun = [(name, x, x._version) for name, x in named]
        self._constant: set[int] = set()  # tensors that the function was seen not to change
        for _, found in () if beside is None else captured(beside, object):
            self._sources += sources(found)
        if beside is not None or not (self.is_sealed and draws_nothing(function)):
            self._record_generators(tensors)

    def _record_generators(self, tensors: Iterable[Tensor]) -> None:
        if not self._transparent:
            self._sources.append(Source.of(random.getstate, random.setstate))
            if (numpy := sys.modules.get("numpy")) is not None:
                self._sources.append(numpy_source(numpy.random))
        known = {id(torch.default_generator): torch.default_generator}
        for device in {x.device for x in tensors} - {torch.device("cpu")}:
            own = getattr(torch.get_device_module(device), "default_generators", ())
            known.update({id(g): g for g in own[device.index or 0 :][:1]})
        for generator in known.values():
            self._sources.append(Source.of(generator.get_state, generator.set_state))

    def _search(self, *, first: bool) -> None:
        self._modules: list[nn.Module] = []
        self._tensors: list[tuple[str, Tensor]] = []
        self._slots: list[Slot] = []
        self._containers: list[Any] = []
        self._contents: list[Content] = []
        self._transparent, self.is_sealed = True, not self._varying
        if is_simple(self._function):
            self.may_exchange = may_exchange(self._function)
            return
        self.may_exchange, count = False, 0
        for name, found in captured(self._function, object):
            count += 1
            self._transparent = self._transparent and is_transparent(found)
            self.is_sealed = self.is_sealed and self._transparent and is_pure(found)
            self.may_exchange = self.may_exchange or may_exchange(found)
            if isinstance(found, Tensor):
                self._tensors.append((self._varying.get(id(found), name), found))
                continue
            if isinstance(found, nn.Module):
                self._modules.append(found)
            elif isinstance(found, CONTAINERS) or type(found).__module__ == "numpy":
                self._containers.append(found)
            else:
                self._slots += slots(found, has_no_graph)
                if (table := table_of(found)) is not None:
                    self._containers.append(table)
            if first:
                self._sources += sources(found)
        if count > MOST:
            self._transparent, self.is_sealed, self.may_exchange = False, False, True

    def settle(self) -> None:
        """Record the state of everything that the function reaches."""
        if any(slot.read() is not slot.value for slot in self._slots):
            self._search(first=False)
        self._states = [_ModuleState.of(module) for module in self._modules if _has_state(module)]
        self._contents = [x for found in self._containers for x in contents(found)]

    def retaken(self, *, silent: bool = False) -> Surroundings:
        """Return the current surroundings of the same function.

        Their replays leave no trace, with one exception: an int in a closure that increases during
        a replay counts calls, and goes on counting. Generators that have not moved share their
        recorded state with this object.

        Args:
            silent: Leave no trace at all: counters and entries added to lists or dicts are undone
                too.
        """
        taken = [
            s if s.is_at(state := s.get()) else Source(s.get, s.set, state) for s in self._sources
        ]
        written = any(x.is_written for x in self._elements)
        mutable = self._slots or self._modules or self._containers or written
        is_static = not (self._fresh or mutable)
        if is_static and all(x is s for x, s in zip(taken, self._sources)):
            return self  # the step draws no numbers and reaches nothing that changes
        now = copy.copy(self)
        now._fresh, now._counting, now._silent, now._sources = False, not silent, silent, taken
        if any(slot.read() is not slot.value for slot in self._slots):
            now._search(first=False)
        now.settle()
        if not now.is_sealed:
            known = {id(x.holder): x for x in self._elements}
            buffers = (b for module in now._modules for b in module._buffers.values())
            apart = now._apart.union(map(id, buffers))
            small = [x for _, x in now._tensors if id(x) not in apart and is_copied(x)]
            now._elements = [Elements.of(x, known.get(id(x))) for x in small]
        return now

    def generators(self) -> list[Tensor]:
        """Return the current states of the random generators of torch."""
        return [x for source in self._sources if isinstance(x := source.get(), Tensor)]

    def have_moved(self, *, outside: bool = False) -> bool:
        """Return whether a random generator has moved since; `outside`: one that is not torch's."""
        return any(
            not source.is_at(source.get())
            for source in self._sources
            if not (outside and isinstance(source.state, Tensor))
        )

    def freeze(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with each evaluation inside `replayed`."""

        @functools.wraps(function)
        def frozen(*args: Any, **kwargs: Any) -> Any:
            with self.replayed():
                return function(*args, **kwargs)

        return frozen

    def replayed(self, *, anew: bool = False) -> contextlib.AbstractContextManager[None]:
        """Return a context in which everything is as it was recorded, and which leaves no trace.

        The first context is an exception: a source of random numbers that was not used in the
        meantime advances, as in a single evaluation. Later contexts leave alone the sources that
        the first one did not use.

        Args:
            anew: Draw new random numbers, which advances the generators.
        """
        sources = [] if anew else self._sources
        held = self._states or self._slots or self._contents or self._elements
        if sources or held or self._modes != Modes.now():
            return self._replayed(sources, first=self._fresh and not anew)
        return contextlib.nullcontext()

    def replayed_beside(self) -> contextlib.AbstractContextManager[None]:
        """Return `replayed()` for the object `beside` alone, if it draws no random numbers."""
        if self._varying or self._modes != Modes.now():
            return self.replayed()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _replayed(self, sources: list[Source], *, first: bool) -> Iterator[None]:
        present = [source.get() for source in sources]
        with self._modes.entered(), contextlib.ExitStack() as stack:
            for state in self._states:
                stack.callback(state.put())
            for elements in self._elements:
                if id(elements.holder) not in self._constant:
                    stack.callback(elements.put(always=self._silent))
            for content in self._contents:
                stack.callback(content.put(counting=self._counting, silent=self._silent))
            if self._slots:
                stack.callback(self._undo_slots, [slot.read() for slot in self._slots])
                self._write_slots([slot.value for slot in self._slots])
            for source, now in zip(sources, present):
                if not (first and source.is_at(now)):
                    stack.callback(source.set, now)
                source.set(source.state)
            yield
            if first and self._fresh:
                self._sources = [s for s in self._sources if not s.is_at(s.get())]
                self._fresh = False

    def _undo_slots(self, before: list[Any]) -> None:
        if self._counting:
            before = [
                counted(value, slot.value, slot.read()) for slot, value in zip(self._slots, before)
            ]
        self._write_slots(before)

    def _write_slots(self, values: list[Any]) -> None:
        for slot, value in zip(self._slots, values):
            slot.write(value)

    def watch(self, value: Tensor) -> None:
        """Record the value of the function, and the versions of the tensors that it reaches."""
        self._value = value
        same = {id(x) for _, x, version in self._begun if x._version == version}
        self._constant.update(same - self._varying.keys())
        self._watched = [(name, x, x._version) for name, x in self._tensors if not x.is_inference()]

    def require_copied(self) -> None:
        """Raise if a tensor that is too large to be copied was changed since construction.

        Raises:
            NotDifferentiableError: Such a tensor was changed.
        """
        for name, x, version in self._begun:
            if x._version != version and not is_copied(x):
                raise NotDifferentiableError(
                    f"expected a function that changes no large tensor in place, got {name} of "
                    f"shape {tuple(x.shape)}: a step that is computed again would see it changed. "
                    'Make it a buffer of a module, or use derivative="reverse" and keep="all".'
                )

    def is_touched(self) -> bool:
        """Return whether a tensor was changed in place since `watch`."""
        return any(x._version != version for _, x, version in self._watched)

    def changed(self, value: Tensor) -> list[str]:
        """Return the names of tensors whose changes since `watch` make a replay wrong.

        These are all changed tensors if the function returns another value now, else the changed
        tensors of the object `beside` that cannot be restored.
        """
        changed = [(name, x) for name, x, version in self._watched if x._version != version]
        same = self._value is None or torch.equal(value, self._value)
        lost = [name for name, x in changed if id(x) in self._varying and not is_copied(x)]
        return lost if same else [name for name, _ in changed]
