# SPDX-License-Identifier: Apache-2.0
"""Tensors that a function depends on without taking them as arguments.

The dependence is read from the graph of the value, so exactly the tensors that are used are found.
The names come from a search of the closure and only make the message more helpful.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.errors import NotDifferentiableError
from torchopt.lazy import lazy
from torchopt.params.second_order import explain_no_derivative
from torchopt.torch_internals import AccumulateGrad, is_wrapped, weights_that_follow
from torchopt.tree import tree_leaves
from torchopt.tree_function import below_transforms, is_differentiated

__all__ = [
    "ATOMS",
    "LIBRARIES",
    "captured",
    "code_names",
    "explained",
    "global_names",
    "graph_of",
    "hidden_inputs",
    "own_classes",
    "parts",
    "require_arguments",
    "root_of",
    "slot_names",
    "unseen",
]

MADE_INSIDE = " (made inside for torch.autograd.grad? use torch.func.grad)"
# torch's message about a tensor outside its transform.
ESCAPED = ("escaped", "batched == nullptr", "wrapper == nullptr")
NAMED, SEARCHED, ENTRIES = 3, 5000, 256
ATOMS = (int, float, complex, str, bytes, bool, type(None), range)
# Functions and globals of these libraries hold no objects of the user, except in closure cells.
LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | {
    "numpy",
    "optree",
    "torch",
    "torchopt",
}
OURS = "_leaf_of_a_run"
LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
TABLES = ("_parameters", "_buffers", "_modules", "_meta_parameters", "_meta_modules")


def require_arguments(
    value: Any,
    args: Any,
    function: Any,
    where: str,
    remedy: str = "Pass it as an argument that is differentiated, or detach it.",
) -> None:
    """Raise if a derivative of a function would leave out tensors that are not arguments.

    Args:
        value: The result of the function in grad mode, a tree.
        args: Its arguments, a tree; the tensors that they were computed from are not searched.
        function: The function, for the names of tensors.
        where: The beginning of the message.
        remedy: The end of the message.

    Raises:
        NotDifferentiableError: `value` depends on other tensors that are differentiated, at any
            level.
    """
    names = hidden_inputs(value, args, function)
    if not names:
        return
    shown = ", ".join(names[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    raise NotDifferentiableError(
        f"{where}: the function depends on {shown}{more}: not among the arguments, but a gradient "
        f"is required there; it would silently be zero. {remedy}"
    )


@contextlib.contextmanager
def explained(function: Any, where: str, remedy: str) -> Iterator[None]:
    """Replace two of torch's errors by ones that explain the cause.

    Raises:
        NotDifferentiableError: The function reaches a tensor of an enclosing transform that should
            be an argument, or one of its operations has no second derivative.
    """
    try:
        yield
    except RuntimeError as error:
        missing = explain_no_derivative(where, error, 'Implicit(derivative="differences")')
        if missing is not None:
            raise missing from error
        if not any(sign in str(error) for sign in ESCAPED):
            raise
        names = [name for name, x in captured(function, Tensor) if is_wrapped(x)]
        if not names:
            raise NotDifferentiableError(
                f"{where}: torch.func lost a tensor of an enclosing transform, as it does where "
                "the function has a solver, or another derivative, inside. Take the derivative by "
                "torch.autograd.grad or backward(), which follow it. If there is no solver inside, "
                f"a search of the function does not find the tensor. {remedy}"
            ) from error
        shown = ", ".join(names[:NAMED])
        raise NotDifferentiableError(
            f"{where}: the function depends on {shown} of an enclosing torch.func transform, which "
            f"is not among the arguments. {remedy}"
        ) from error


def hidden_inputs(value: Any, args: Any, function: Any) -> list[str]:
    """Return the names of the differentiated tensors that a value depends on; see
    `require_arguments`.
    """
    tracked = [x for x in tree_leaves(value) if isinstance(x, Tensor) and is_differentiated(x)]
    if not tracked:
        return []
    arguments = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    ends = {x.grad_fn for x in arguments if x.grad_fn is not None}
    nodes, leaves = graph_of([x for x in map(below_transforms, tracked) if x.requires_grad], ends)
    for x in arguments:
        leaves.pop(id(x), None)
    # Transforms and forward mode keep no graph that could be searched.
    unseen = any(is_wrapped(x) or not x.requires_grad for x in tracked)
    if not leaves and not unseen:
        return []
    names = []
    for name, x in captured(function, Tensor):
        if is_wrapped(x) or not x.requires_grad:
            used = is_differentiated(x)
        else:
            used = id(x) in leaves or (x.grad_fn is not None and x.grad_fn in nodes)
        if used:
            names.append(name)
            for leaf in graph_of([x])[1] if x.requires_grad else ():
                leaves.pop(leaf, None)
    names += [f"a tensor of shape {tuple(x.shape)}{MADE_INSIDE}" for x in leaves.values()]
    return names or ["a tensor of an enclosing transform"]


def unseen(x: Tensor) -> Tensor:
    """Mark a leaf that a run made for its own gradient, so that searches skip it; return it.

    Without the mark, a loss that contains a run would count as a closure over the leaf.
    """
    setattr(x, OURS, True)
    return x


def graph_of(
    tensors: Sequence[Tensor], ends: Set[Any] = frozenset()
) -> tuple[set[Any], dict[int, Tensor]]:
    """Return the nodes of a graph, and its leaves by id, without following the nodes `ends`."""
    leaves = {id(x): x for x in tensors if x.grad_fn is None and x.requires_grad}
    nodes: set[Any] = {x.grad_fn for x in tensors if x.grad_fn is not None} - ends
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if isinstance(node, AccumulateGrad) and not hasattr(node.variable, OURS):
            leaves[id(node.variable)] = node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in nodes and following not in ends:
                nodes.add(following)
                stack.append(following)
    return nodes, leaves


def captured(function: Any, kind: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, object) for the objects that a function reaches besides its arguments.

    Closures, defaults, globals, bound objects, partials, attributes, modules and containers are
    followed, each object once.

    Args:
        function: A function, or any callable object.
        kind: The class of objects to yield, or several.
    """
    seen: set[int] = set()
    queue: deque[tuple[str, Any]] = deque([("", function)])
    while queue and len(seen) < SEARCHED:
        name, found = queue.popleft()
        if isinstance(found, ATOMS) or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, kind):
            yield name or "itself", found
        if not isinstance(found, Tensor) and not hasattr(type(found), "not_searched"):
            queue.extend(parts(name, found))


def parts(name: str, found: Any) -> Iterator[tuple[str, Any]]:
    """Yield the objects that an object holds, with their names."""
    if isinstance(found, types.FunctionType):
        yield from _of_function(found)
    elif isinstance(found, types.BuiltinFunctionType):
        yield "self", found.__self__
    elif isinstance(found, types.MethodType):
        yield "self", found.__self__
        yield "", found.__func__
    elif isinstance(found, functools.partial):
        yield "", found.func
        yield from ((f"argument {i} of a partial", x) for i, x in enumerate(found.args))
        yield from found.keywords.items()
    elif isinstance(found, Mapping):
        entries = itertools.islice(found.items(), ENTRIES)
        yield from ((f"{name}[{key!r}]", x) for key, x in entries)
    elif isinstance(found, (list, tuple, set, frozenset, deque)):
        yield from _of_sequence(name, found)
    elif isinstance(found, types.ModuleType):
        pass  # `_of_function` yields those contents of a module that the function uses
    elif isinstance(found, type):
        for base in own_classes(found):
            yield from ((f"{name}.{key}", x) for key, x in list(vars(base).items()))
            yield from (("", x) for x in _methods(base))
    else:
        yield from _of_object(name, found)


def _of_sequence(name: str, found: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    names = getattr(found, "_fields", None)
    for i, x in enumerate(itertools.islice(found, ENTRIES)):
        yield (f"{name}.{names[i]}" if names else f"{name}[{i}]"), x


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for key, cell in zip(code.co_freevars, function.__closure__ or ()):
        try:
            yield key, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    positional = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(positional[len(positional) - len(defaults) :], defaults)
    yield from (function.__kwdefaults__ or {}).items()
    yield from (("", x) for x in list(vars(function).values()))
    if root_of(str(function.__globals__.get("__name__"))) in LIBRARIES:
        return
    names = code_names(code)
    for key in global_names(code):
        if key in function.__globals__:
            value = function.__globals__[key]
            yield key, value
            if isinstance(value, types.ModuleType) and root_of(value) not in LIBRARIES:
                content = vars(value)
                yield from (
                    (f"{key}.{inner}", content[inner]) for inner in names if inner in content
                )


@functools.lru_cache(4096)
def code_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes in code, including inner functions.

    Names that are not identifiers are left out: tools such as pytest insert them.
    """
    inner = (x for x in code.co_consts if isinstance(x, types.CodeType))
    names = filter(str.isidentifier, code.co_names)
    return (*names, *itertools.chain.from_iterable(map(code_names, inner)))


@functools.lru_cache(4096)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals in code, including inner functions."""
    inner = (x for x in code.co_consts if isinstance(x, types.CodeType))
    found = {x.argval for x in dis.get_instructions(code) if x.opname in LOADS}
    names = (name for name in code.co_names if name in found and name.isidentifier())
    return (*names, *itertools.chain.from_iterable(map(global_names, inner)))


def _of_object(name: str, found: Any) -> Iterator[tuple[str, Any]]:
    prefix = f"{name}." if name else ""
    if isinstance(found, torch.jit.ScriptModule):
        yield from ((prefix + k, x) for k, x in (*found.named_parameters(), *found.named_buffers()))
        yield from ((prefix + k, m.training) for k, m in found.named_modules())
        return
    attributes: dict[str, Any] = dict(getattr(found, "__dict__", None) or {})
    if isinstance(found, nn.Module):
        yield "", type(found).forward  # a user may have replaced it in a class of torch
        for table in TABLES:
            yield from ((prefix + key, x) for key, x in (attributes.pop(table, None) or {}).items())
        attributes = {k: x for k, x in attributes.items() if not k.endswith("_hooks") or x}
        if isinstance(found, nn.RNNBase):
            follow = weights_that_follow(found)
            attributes = {k: x for k, x in attributes.items() if k not in follow}
    # A cached property follows from the other attributes and exists only after its first use.
    derived = (key for key in attributes if isinstance(getattr(type(found), key, None), lazy))
    for key in list(derived):
        del attributes[key]
    yield from ((prefix + key, x) for key, x in attributes.items())
    for key in slot_names(type(found)):
        if hasattr(found, key):
            yield prefix + key, getattr(found, key)
    for base in own_classes(type(found)):
        yield from (("", x) for x in _methods(base))


def own_classes(found: type) -> list[type]:
    """Return a class and its bases, without those of libraries."""
    return [base for base in found.__mro__ if root_of(base) not in LIBRARIES]


def _methods(found: type) -> Iterator[types.FunctionType]:
    for x in list(vars(found).values()):
        inner = (x.fget, x.fset) if isinstance(x, property) else (getattr(x, "__func__", x),)
        yield from (f for f in inner if isinstance(f, types.FunctionType))


def slot_names(found: type) -> list[str]:
    """Return the names of the slots of a class and its bases."""
    return [
        key
        for base in found.__mro__
        if "__slots__" in vars(base)
        for key, x in list(vars(base).items())
        if isinstance(x, types.MemberDescriptorType)
    ]


def root_of(found: Any) -> str:
    """Return the top-level package of a module, class, function or dotted name."""
    if isinstance(found, types.ModuleType):
        found = found.__name__
    elif not isinstance(found, str):
        found = getattr(found, "__module__", None)
    return str(found).partition(".")[0]
