# SPDX-License-Identifier: Apache-2.0
"""Run a function in float64 and record the result of every operation in it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from torchopt.torch_internals import in_forward_mode, is_wrapped, top_saved_tensor_hooks
from torchopt.tree import tree_flatten, tree_map, tree_unflatten

__all__ = [
    "Double",
    "NotJudgedError",
    "Record",
    "Watch",
    "arguments_from",
    "as_real",
    "is_recorded",
    "node_name",
    "projection",
]

_WIDE = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64)
_WIDE[torch.complex64] = torch.complex128
_CASTS = ("float", "half", "bfloat16")


class NotJudgedError(Exception):
    """The loss cannot be compared with finite differences; the message says why."""


@dataclasses.dataclass
class Record:
    """One value of a run, projected on fixed random weights."""

    name: str
    order: str
    checkpointed: bool
    value: Tensor  # the projection, differentiable in the first run
    size: float  # the sum of the magnitudes that the projection adds
    infinite: int  # how many elements are left out, such as those that a mask sets to -inf
    inside: list[tuple[Any, Any, Any]]  # the calls inside a transform that produced it

    def number(self) -> float:
        """Return the projection as a number."""
        return float(self.value.detach())


def _is_low(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in _WIDE


def _wide(x: Any) -> Any:
    return x.to(_WIDE[x.dtype]) if _is_low(x) else x


def is_recorded(x: Tensor) -> bool:
    """Return whether a value is compared with differences."""
    return x.dtype in (torch.float64, torch.complex128)


def as_real(x: Tensor) -> Tensor:
    """Return a complex tensor as a real one, `[*shape, 2]`, or a real tensor unchanged."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def arguments_from(spec: Any, leaves: list[Any]) -> Any:
    """Return the arguments and keyword arguments of a call from their leaves."""
    return tree_unflatten(spec, leaves)


def _same(x: Tensor) -> Tensor:
    return x


def projection(like: Tensor, seed: int) -> Tensor:
    """Return fixed random weights of the shape of `like`; 1 if it is 0-dim."""
    if not like.ndim:
        return torch.ones((), dtype=torch.float64, device=like.device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(like.device)


class Double(TorchFunctionMode):
    """A mode that runs every operation in float64, whatever its arguments and autocast say."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if name.endswith((".__get__", ".__set__")):
            found = func(*args, **(kwargs or {}))
            return _WIDE.get(found, found) if name.endswith("dtype.__get__") else found
        leaves, spec = tree_flatten((args, kwargs or {}))
        short = name.rpartition(".")[2]
        # A tensor that is written to must remain the same object.
        into = (kwargs or {}).get("out")
        writes = short.endswith("_") and not short.endswith("__")
        written = leaves[0] if writes else into
        leaves = self._before(name, leaves, written)
        for i, x in enumerate(leaves):
            if isinstance(x, torch.dtype):
                leaves[i] = _WIDE.get(x, x)
            elif x is not written:
                leaves[i] = _wide(x)
        new_args, new_kwargs = arguments_from(spec, leaves)
        if short in _CASTS and "Tensor" in name:
            out = new_args[0].double()
        else:
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                out = func(*new_args, **new_kwargs)
        if written is None:
            out = tree_map(_wide, out)
        self._after(name, func, (new_args, new_kwargs), out)
        return out

    def _before(self, name: str, leaves: list[Any], written: Any) -> list[Any]:
        return leaves

    def _after(self, name: str, func: Any, given: Any, out: Any) -> None:
        pass


_UNWATCHED = Double()


def _in_jvp() -> bool:
    """Return whether the caller is part of the `jvp` of an autograd.Function."""
    frame = sys._getframe() if in_forward_mode() else None
    while frame is not None:
        code = frame.f_code
        if code.co_name == "jvp":
            given = map(frame.f_locals.get, code.co_varnames[: code.co_argcount])
            if any(isinstance(x, torch.autograd.function.FunctionCtx) for x in given):
                return True
        frame = frame.f_back
    return False


class Watch(Double):
    """A mode that records each result, and repeats the values that have been cut from the graph.

    A value computed without a graph (by `detach`, under `no_grad`, by a comparison) is a constant
    for autograd. Later runs reuse these values from the first run, so that the differences treat
    them as constants too.
    """

    def __init__(self, points: Sequence[Tensor], held: list[list[Tensor]] | None) -> None:
        super().__init__()
        self.records: list[Record] = []
        self.names: list[str] = []
        self.held: list[list[Tensor]] = []
        self._given = held
        self._cut: dict[int, Tensor] = {}
        self._copies: dict[tuple[int, int], Tensor] = {}
        self._seen: set[Any] = {x.grad_fn for x in points}
        self._inside: list[tuple[Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; a row of an embedding that stands for padding has no gradient."""
        if _in_jvp():  # which only forward mode runs
            return Double.__torch_function__(_UNWATCHED, func, types, args, kwargs)
        row = (kwargs or {}).get("padding_idx")
        if func is torch.nn.functional.embedding and row is not None and torch.is_grad_enabled():
            args = (args[0], self._with_constant_row(args[1], row), *args[2:])
        return super().__torch_function__(func, types, args, kwargs)

    def _with_constant_row(self, weight: Tensor, row: int) -> Tensor:
        call, value = len(self.names), weight[row].detach().clone()
        self.names.append("padding")
        self.held.append([value])
        if self._given is not None:
            if call >= len(self._given) or len(self._given[call]) != 1:
                raise NotJudgedError("the loss takes another path at nearby parameters")
            (value,) = self._given[call]
        rows = torch.arange(len(weight), device=weight.device) == row % len(weight)
        return torch.where(rows[:, None], value, weight)

    def _before(self, name: str, leaves: list[Any], written: Any) -> list[Any]:
        if not torch.is_grad_enabled():
            return leaves
        for x in leaves:  # results of an autograd.Function, which are not seen as results of calls
            self._see(x)
        places = [
            i
            for i, x in enumerate(leaves)
            if isinstance(x, Tensor)
            and self._cut.get(id(x)) is x
            and not is_wrapped(x)
            and not x.requires_grad
            and x is not written
        ]
        call = len(self.names)
        self.names.append(name)
        self.held.append([self._copy(leaves[i]) for i in places])
        if self._given is not None:
            if call >= len(self._given) or len(self._given[call]) != len(places):
                raise NotJudgedError("the loss takes another path at nearby parameters")
            for i, value in zip(places, self._given[call]):
                leaves[i] = value
        return leaves

    def _copy(self, x: Tensor) -> Tensor:
        # Equal objects must stay equal: attention checks whether its query is its key.
        key = (id(x), x._version)
        if key not in self._copies:
            self._copies[key] = x.detach().clone()
        return self._copies[key]

    def _see(self, x: Any) -> None:
        if not isinstance(x, Tensor) or is_wrapped(x) or x.grad_fn is None:
            return
        if x.grad_fn not in self._seen and is_recorded(x):
            self._seen.add(x.grad_fn)
            self.add(node_name(x.grad_fn), "first", [x])

    def _after(self, name: str, func: Any, given: Any, out: Any) -> None:
        tensors = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        if any(is_wrapped(x) for x in tensors):
            self._inside.append((name, func, given))
            return
        for x in tensors:
            if not x.requires_grad:
                self._cut[id(x)] = x
        if not torch.is_grad_enabled():
            return
        kept = [x for x in tensors if x.requires_grad and is_recorded(x)]
        if kept:
            self._seen.update(x.grad_fn for x in kept)
            self.add(name, "first", kept)

    def add(self, name: str, order: str, tensors: Sequence[Tensor]) -> None:
        """Record the results of the operation `name`.

        Args:
            name: The name of the operation.
            order: "first" or "second": the derivative of the operation that the results test.
            tensors: The results.
        """
        value: Any = 0.0
        size, infinite = 0.0, 0
        checkpointed = top_saved_tensor_hooks(True) is not None
        # A checkpoint counts the tensors that it saves; those saved here must not be among them.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            for x in map(as_real, tensors):
                if order == "first" and x.ndim and bool((left_out := x.detach().isinf()).any()):
                    infinite += int(left_out.sum())
                    x = x.masked_fill(left_out, 0.0)
                weighted = x * projection(x, len(self.records))
                value = value + weighted.sum()
                size += float(weighted.detach().abs().sum())
        inside, self._inside = self._inside, []
        self.records.append(Record(name, order, checkpointed, value, size, infinite, inside))


def node_name(node: Any) -> str:
    """Return the name of a graph node without its C++ namespace."""
    return str(node.name()).rpartition("::")[2]
