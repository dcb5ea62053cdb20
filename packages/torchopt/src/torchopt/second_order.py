# SPDX-License-Identifier: Apache-2.0
"""Compile functions whose value contains a gradient, together with their derivative.

Examples are a force that is compared with data, a gradient penalty, and the residual of a
differential equation. Training on these differentiates a gradient once more, which `torch.compile`
refuses ("double backward"). Here the value and its gradient are traced together into first-order
programs, which the compiler accepts.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchopt.diff.closure import ATOMS, graph_of
from torchopt.diff.explicit.call import DICTS
from torchopt.diff.explicit.evaluation import Form, Prepared
from torchopt.diff.explicit.fingerprint import Fingerprint, form_of, settings
from torchopt.diff.explicit.given import Given, Pattern
from torchopt.diff.explicit.reached import Reached
from torchopt.diff.explicit.trace import Program, Words, make_trace, traced
from torchopt.diff.surroundings import Surroundings
from torchopt.diff.twice_differentiable import TwiceDifferentiable
from torchopt.errors import NotTraceableError
from torchopt.torch_internals import in_forward_mode_of_this_thread, prepare_compiler
from torchopt.tree import is_smooth, tree_flatten, tree_leaves, tree_unflatten
from torchopt.tree_function import PLAIN, is_transforming

__all__ = ["compile"]

WORDS = Words("second_order.compile", "call the function itself")
EXECUTE = ("trace", "compile")
MOST = 8  # how many sets of objects among the arguments are watched: those used last


def compile(  # noqa: A001 - the word of the field
    function: Callable[..., Any], *, execute: str = "compile"
) -> Callable[..., Any]:
    """Return a function with the same values and gradients, computed by one program.

    The gradient is exact. It covers every tensor among the arguments that requires one, and every
    parameter that the function or an argument holds, such as those of a module; `backward()` and
    any optimizer work as with the function itself. The program is traced at the first call, and
    again for each other shape, dtype, mode or number that the function depends on; the logger
    `torchopt.diff.explicit.trace` reports that, and the 64 programs used last are kept.

    Args:
        function: From trees of tensors, modules and anything else, to a tree of tensors. It may
            take derivatives inside, by `torch.autograd.grad(..., create_graph=True)` or
            `torch.func`. The gradient of a 0-dim result is computed together with the value, that
            of other results once the cotangents are known.
        execute: `"compile"`: by torch's inductor, which needs a C++ compiler and takes seconds at
            the first call. `"trace"`: operation by operation, without a compiler.

    Returns:
        A function of the same arguments. It draws the random numbers of torch that the function
        itself would draw, and writes to the buffers that the function writes to, such as those of a
        BatchNorm. Values that the function gets from elsewhere, such as the time or a generator of
        numpy that it creates, stay those of the run that was traced.

    Raises:
        CompilerError: From a call or its backward pass, if there is no C++ compiler or it fails.
        NotTraceableError: From a call, if the function reads a value on the host or has side
            effects other than writing to buffers, or if the call is differentiated twice or made
            inside a transform; the message says which.
        TypeError: `function` is not callable, or, from a call, it does not return tensors.
        ValueError: An unknown `execute`.

    Example:
        >>> import torch, torchopt
        >>> def loss(k, x, force):  # the force of a spring against data
        ...     x = x.detach().requires_grad_()
        ...     (slope,) = torch.autograd.grad((k * x**2 / 2).sum(), x, create_graph=True)
        ...     return ((-slope - force) ** 2).sum()
        >>> k = torch.tensor(2.0, requires_grad=True)
        >>> fast = torchopt.second_order.compile(loss, execute="trace")
        >>> fast(k, torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])).backward()
        >>> k.grad  # 2 (k - 1) (1 + 4)
        tensor(10.)
    """
    if not callable(function):
        raise TypeError(f"{WORDS.where}: expected a function, got {type(function).__name__}.")
    if execute not in EXECUTE:
        raise ValueError(
            f"{WORDS.where}: execute: expected one of {', '.join(map(repr, EXECUTE))}, got "
            f"{execute!r}."
        )
    watched: OrderedDict[tuple[int, ...], tuple[Reached, Any]] = OrderedDict()

    def reach(objects: Sequence[Any]) -> tuple[Fingerprint, Any]:
        """Return what the function and objects among its arguments reach, and both as one."""
        where = tuple(map(id, objects))
        found = watched.pop(where, None)
        if found is None:
            whole = functools.partial(function, *objects) if objects else function
            found = Reached(whole), whole
        watched[where] = found
        while len(watched) > MOST:
            watched.popitem(last=False)
        return found[0].now(), found[1]

    known: list[tuple[Pattern, Fingerprint, Prepared]] = []

    def fast(*args: Any, **kwargs: Any) -> Any:
        call = Given.of((args, kwargs), {})
        if call is not None and known:
            found = _repeated(known, call, reach(())[0])
            if found is not None:
                return found(call.tensors)
        return _called(function, reach, args, kwargs, call, known, compiled=execute == "compile")

    return functools.update_wrapper(fast, function, updated=())


def _called(
    function: Any,
    reach: Any,
    args: Any,
    kwargs: Any,
    call: Given | None,
    known: list[Any],
    *,
    compiled: bool,
) -> Any:
    if is_transforming() or in_forward_mode_of_this_thread():
        raise NotTraceableError(
            f"{WORDS.where}: expected a call outside of torch.func transforms and forward mode, "
            f"got one inside; {WORDS.way_out} there."
        )
    orders: list[Hashable] = []  # the orders of dicts, in which their specs do not differ

    def noted(x: Any) -> bool:
        if type(x) in DICTS:
            orders.append(tuple(x))
        return False

    leaves, spec = tree_flatten(
        (args, kwargs),
        is_leaf=noted,
        none_is_leaf=True,
    )
    others = [x for x in leaves if not isinstance(x, Tensor)]
    reached, whole = reach([x for x in others if not isinstance(x, ATOMS)])
    tensors, places = _distinct(leaves, reached.tensors)
    differentiated = torch.is_grad_enabled()
    wanted = [x.requires_grad for x in tensors]
    held = [x for x in reached.tensors if x.requires_grad]
    atoms = tuple((type(x), repr(x)) for x in others if isinstance(x, ATOMS))
    given = tuple(map(form_of, tensors))
    key: Hashable = (
        WORDS.where, reached.key, settings(), spec, tuple(orders), tuple(places), atoms, compiled,
        differentiated, given,
    )  # fmt: skip

    def filled(inputs: Sequence[Tensor]) -> Any:
        present = [x if i is None or i < 0 else inputs[i] for i, x in zip(places, leaves)]
        return tree_unflatten(spec, present)

    def make() -> Program:
        names = {id(x): n for n, x in zip(reached.names, reached.tensors)}
        traced_call = _Tracing(function, filled, tensors, wanted, held, names)
        return traced_call.program(whole, compiled=compiled)

    name = getattr(function, "__qualname__", type(function).__name__)
    program = traced(key, lambda: f"{name} with its gradient", make)
    if program.form.inside:
        _require_apart({id(x): x for x in (*tensors, *held)})
    found = Prepared(program, reached.tensors, wanted, WORDS)
    if call is not None and call.forms is not None and len(tensors) == len(call.tensors):
        # They are all distinct, and none is held.
        known[:] = [(Pattern(call), reached, found), *known[: MOST - 1]]
    return found(tensors)


def _repeated(
    known: list[tuple[Pattern, Fingerprint, Prepared]], call: Given, reached: Fingerprint
) -> Prepared | None:
    """Return what the call of an earlier call can use, if it only has other values."""
    if known[0][1] is not reached:  # what the function reached before does not stay alive
        known[:] = [x for x in known if x[1] is reached]
    found = next((x for like, r, x in list(known) if r is reached and like.matches(call)), None)
    if found is None:
        return None
    ids = {id(x): x for x in (*call.tensors, *found.leaves)}
    if len(ids) < len(call.tensors) + len(found.leaves):
        return None
    _require_apart(ids if found.program.form.inside else {id(x): x for x in call.tensors})
    return found


def _distinct(
    leaves: Sequence[Any], reached: Sequence[Tensor]
) -> tuple[list[Tensor], list[int | None]]:
    """Return the distinct tensors among the leaves, and for each leaf the index of its tensor.

    Parameters that the function reaches anyway are left out; their indices are negative.
    """
    tensors: list[Tensor] = []
    known = {id(x): ~i for i, x in enumerate(reached) if x.requires_grad and x.is_leaf}
    for x in leaves:
        if isinstance(x, Tensor) and id(x) not in known:
            known[id(x)] = len(tensors)
            tensors.append(x)
    for x in tensors:
        if type(x) not in PLAIN:
            raise NotTraceableError(
                f"{WORDS.where}: expected plain tensors, got a {type(x).__name__}; {WORDS.way_out}."
            )
    _require_apart({id(x): x for x in tensors})
    return tensors, [known[id(x)] if isinstance(x, Tensor) else None for x in leaves]


def _require_apart(tensors: dict[int, Tensor]) -> None:
    """Raise if one tensor was computed from another, which a derivative inside would ignore."""
    smooth = [x for x in tensors.values() if x.requires_grad]
    ends = {id(x) if x.grad_fn is None else x.grad_fn: x for x in smooth}
    if len(ends) < 2 or all(x.grad_fn is None for x in smooth):
        return
    for end, x in ends.items():
        if x.grad_fn is not None:
            nodes, leaves = graph_of([x])
            if any(other is not end and (other in nodes or other in leaves) for other in ends):
                raise NotTraceableError(
                    f"{WORDS.where}: expected arguments that are not computed from each other, got "
                    f"one of shape {tuple(x.shape)} that is computed from another one; compute it "
                    f"inside, or {WORDS.way_out}."
                )


class _Tracing:
    """The trace of a function with its derivative.

    Args:
        function: The function.
        filled: Maps tensors to the arguments of the function.
        tensors: The tensors of the call.
        wanted: Which of them are differentiated.
        held: The tensors that the function reaches and that are differentiated.
        names: The names of tensors that the function reaches, by identity.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        filled: Callable[[Sequence[Tensor]], Any],
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
        held: Sequence[Tensor],
        names: dict[int, str],
    ) -> None:
        self._function, self._filled, self._tensors = function, filled, tensors
        self._wanted, self._held, self._names = wanted, held, names

    def program(self, whole: Any, *, compiled: bool) -> Program:
        """Return the program for the value and for what its derivative needs.

        Args:
            whole: The function with the objects among its arguments.
            compiled: Whether it is compiled.
        """
        if compiled:
            prepare_compiler()
        seen = Surroundings(whole, self._tensors)
        with seen.retaken().replayed():
            values = [x for x in self._values(self._leaves(self._tensors))[0] if _has_graph(x)]
            cotangents = [torch.ones_like(x, requires_grad=False) for x in values]
        alone = len(values) == 1 and values[0].ndim == 0 and not values[0].is_complex()
        given = [] if alone else cotangents
        with seen.retaken().replayed():
            trace = make_trace(
                functools.partial(self._joint, len(given)),
                [*self._tensors, *given],
                (whole,),
                WORDS,
                states=seen.retaken(),
            )
            if alone or not values:
                return trace.program(WORDS, compiled=compiled)
            size = len(self._tensors)
            value, pull = trace.parted(
                len(trace.form.graph), range(size, size + len(given)), WORDS, compiled=compiled
            )
            return replace(value, form=replace(trace.form, pull=pull))

    def _leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of the tensors of the call that are leaves of the graph."""
        return [
            x.detach().requires_grad_(like.requires_grad) for x, like in zip(tensors, self._tensors)
        ]

    def _values(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Any, tuple[Any, ...]]:
        args, kwargs = self._filled(inputs)
        with TwiceDifferentiable():
            value = self._function(*args, **kwargs)
        leaves, spec = tree_flatten(value, none_is_leaf=True)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not tensors or any(isinstance(x, nn.Module) for x in leaves):
            raise TypeError(
                f"{WORDS.where}: expected a function that returns tensors, got "
                f"{type(value).__name__}."
            )
        return tensors, spec, tuple(None if isinstance(x, Tensor) else (x,) for x in leaves)

    def _joint(self, count: int, *flat: Tensor) -> tuple[list[Tensor], Form]:
        """Return the value and its gradient for the last `count` tensors, the cotangents."""
        inputs = self._leaves(flat[: len(self._tensors)])
        cotangents = flat[len(self._tensors) :]
        with _Inside(self._held) as inside:
            values, spec, leaves = self._values(inputs)
        graph = tuple(map(_has_graph, values))
        outputs = [x for x, g in zip(values, graph) if g]
        at = [*(x for x, w in zip(inputs, self._wanted) if w), *self._held]
        grads: Sequence[Tensor | None] = [None] * len(at)
        if outputs and at:
            given = [*cotangents] if count else None
            grads = torch.autograd.grad(outputs, at, given, allow_unused=True)
        self._require_ends(grads[len(at) - len(self._held) :])
        present = [g for g in grads if g is not None]
        form = Form(spec, leaves, graph, tuple(g is not None for g in grads), inside.found, None)
        return [*(x.detach() for x in values), *present], form

    def _require_ends(self, grads: Sequence[Tensor | None]) -> None:
        for x, g in zip(self._held, grads):
            if g is not None and x.grad_fn is not None:
                raise NotTraceableError(
                    f"{WORDS.where}: expected parameters and other leaves among what the function "
                    f"holds, got {self._names[id(x)]}, which was computed from others; pass it as "
                    "an argument, or compute it inside."
                )


class _Inside(TorchFunctionMode):
    """A mode that records whether a derivative is taken with respect to one of some tensors."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self._held, self.found = set(map(id, held)), False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad:
            inputs = args[1] if len(args) > 1 else (kwargs or {}).get("inputs")
            self.found |= any(id(x) in self._held for x in tree_leaves(inputs))
        return func(*args, **(kwargs or {}))


def _has_graph(x: Tensor) -> bool:
    return is_smooth(x) and x.requires_grad
