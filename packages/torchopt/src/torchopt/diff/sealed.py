# SPDX-License-Identifier: Apache-2.0
"""Functions that provably depend only on their arguments.

Most functions do, and then nothing has to be recorded or compared. If in doubt, the answer is no.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
import types
from collections import deque
from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.diff.closure import ATOMS, LIBRARIES, captured, code_names, global_names, root_of
from torchopt.diff.recurrence import ELEMENTARY
from torchopt.tree import PyTreeSpec, tree_leaves
from torchopt.tree_function import PLAIN

__all__ = [
    "EXCHANGED",
    "RECURRENT",
    "are_plain",
    "draws_nothing",
    "draws_outside_torch",
    "is_pure",
    "is_sealed_without",
    "is_simple",
    "is_transparent",
    "may_exchange",
]

MOST = 2000  # number of objects up to which the search is known to be complete
# Packages without random numbers of Python or numpy.
KNOWN = {"torch", "torchopt", "optree", "builtins", "math", "functools", "itertools"}
KNOWN |= {"operator", "collections", "dataclasses", "typing", "types", "abc"}
SEEN_THROUGH = (
    Tensor,
    nn.Module,
    types.MethodType,
    types.BuiltinFunctionType,
    functools.partial,
    PyTreeSpec,
)
# Objects that run only what the search finds in them; a class may run more, by its descriptors.
PASSIVE = (
    *(Tensor, types.ModuleType, types.MethodType, functools.partial, PyTreeSpec),
    *(list, tuple, set, frozenset, deque, dict),
)
# Objects whose functions are all searched.
SEARCHED = (*PASSIVE, nn.Module, types.FunctionType, types.BuiltinFunctionType)
# Modules whose functions depend only on their arguments, like those of `torch` itself.
PURE = (
    "torch._functorch",
    "torch.func",
    "torch.nn.functional",
    "torchopt.solvers",
    "torchopt.diff",
)
# Operations that `twice_differentiable` replaces, and those that it examines.
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
EXCHANGED = frozenset(
    {
        *ELEMENTARY,
        *("scaled_dot_product_attention", "multi_head_attention_forward", "_weight_norm"),
        *("linear_cross_entropy", "mse_loss", "scatter_reduce", "scatter_reduce_"),
        *("register_hook", "register_prehook"),
    }
)
LOOKED_AT = EXCHANGED | {"apply", "autograd", "no_grad", "set_grad_enabled", "inference_mode"}
LOOKED_AT |= {"checkpoint"}
# Names that can reach, change or create something besides the arguments.
DOUBTFUL = {"nn", "Parameter", "autograd", "backward", "out", "inplace", "data", "ops", "utils"}
DRAWS = {"multinomial", "bernoulli"}  # methods; the others are functions or in place
REFLECTION = {"eval", "exec", "globals", "locals", "vars", "compile", "__import__"}
WRITES = ("STORE_SUBSCR", "STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "DELETE_", "INPLACE_")


def is_simple(found: Any) -> bool:
    """Return whether this object is a pure function without a closure, so no search is needed."""
    if type(found) is not types.FunctionType:
        return False
    if found.__closure__ or found.__defaults__ or found.__kwdefaults__ or found.__dict__:
        return False
    known, code = found.__globals__, found.__code__
    for name in code_names(code):
        if name in known and known[name] is not torch and known[name] is not math:
            return False
    return not _reflects(code) and not _writes(code) and not _reads_additions(found)


def _reads_additions(function: types.FunctionType) -> bool:
    """Return whether a function reads a name added to `builtins`, or a tensor of `torch`."""
    code, known = function.__code__, function.__globals__
    added = (getattr(builtins, name, None) for name in global_names(code) if name not in known)
    if any(x is not None and root_of(x) != "builtins" for x in added):
        return True
    return any(isinstance(vars(torch).get(name), Tensor) for name in code_names(code))


def is_sealed_without(function: Any, names: Set[str]) -> bool:
    """Return whether a function provably depends only on its arguments and avoids these names."""
    if is_simple(function):
        return names.isdisjoint(_words(function.__code__))
    for count, (_, found) in enumerate(captured(function, object)):
        if count > MOST or not (is_transparent(found) and is_pure(found)):
            return False
        if isinstance(found, types.FunctionType) and not names.isdisjoint(_words(found.__code__)):
            return False
    return True


def may_exchange(found: Any) -> bool:
    """Return whether this object may run an operation that `twice_differentiable` examines."""
    if isinstance(found, types.FunctionType):
        return not LOOKED_AT.isdisjoint(_words(found.__code__))
    if isinstance(found, types.BuiltinFunctionType):
        return found.__name__ in LOOKED_AT
    return not (isinstance(found, PASSIVE) and is_transparent(found))


def are_plain(*trees: Any) -> bool:
    """Return whether trees hold only tensors and numbers; other objects may hide tensors."""
    return all(isinstance(x, (Tensor, *ATOMS)) for x in tree_leaves(trees))


def draws_nothing(found: Any) -> bool:
    """Return whether a pure function draws no random numbers, by functions of torch or methods."""
    if not is_simple(found):
        return False
    names = code_names(found.__code__)
    return DRAWS.isdisjoint(names) and not any(found.__globals__.get(n) is torch for n in names)


def draws_outside_torch(reached: Iterable[tuple[str, Any]]) -> bool:
    """Return whether a function may draw random numbers of Python or numpy.

    Args:
        reached: What `captured(function, object)` yields.
    """
    for count, (_, found) in enumerate(reached):
        if isinstance(found, (torch.dtype, torch.device)):
            continue
        # Classes and other objects may have compiled methods, and so may operations of the user.
        seen = isinstance(found, SEARCHED) and is_transparent(found)
        if count > MOST or not seen or (isinstance(found, Tensor) and type(found) not in PLAIN):
            return True
        if isinstance(found, types.FunctionType) and "ops" in _words(found.__code__):
            return True
    return False


def is_transparent(found: Any) -> bool:
    """Return whether a search of the closure sees everything that this object reaches.

    Then it also draws no random numbers of Python or numpy that the search does not find.
    """
    if isinstance(found, types.FunctionType):
        package = root_of(found.__globals__.get("__name__"))
        return package in KNOWN if package in LIBRARIES else not _reflects(found.__code__)
    if isinstance(found, types.ModuleType):
        return root_of(found) in KNOWN
    if isinstance(found, type):
        return root_of(found) in KNOWN or root_of(found) not in LIBRARIES
    if isinstance(found, SEEN_THROUGH):
        return True
    if isinstance(found, (list, tuple, set, frozenset, deque, dict)):
        return len(found) <= 256  # the number of entries that the search covers
    package = root_of(type(found))
    return package not in LIBRARIES and package != "builtins"


def is_pure(found: Any) -> bool:
    """Return whether this object is a plain container, or a function without side effects."""
    if isinstance(found, types.FunctionType):
        module = str(found.__globals__.get("__name__"))
        if root_of(module) in LIBRARIES:
            return module.startswith(PURE)
        return not _writes(found.__code__) and not _reads_additions(found)
    if isinstance(found, types.ModuleType):
        return root_of(found) in ("torch", "math")
    return isinstance(found, (list, tuple, dict, types.MethodType, functools.partial, PyTreeSpec))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [code, *(y for x in code.co_consts if isinstance(x, types.CodeType) for y in _inner(x))]


@functools.lru_cache(4096)
def _reflects(code: types.CodeType) -> bool:
    names = set(code_names(code))
    imports = any(x.opname == "IMPORT_NAME" for c in _inner(code) for x in dis.get_instructions(c))
    return imports or not names.isdisjoint(REFLECTION)


@functools.lru_cache(4096)
def _words(code: types.CodeType) -> frozenset[str]:
    """Return the names and strings in code."""
    words = set(code_names(code))
    for inner in _inner(code):
        for constant in inner.co_consts:
            parts = constant if isinstance(constant, tuple) else (constant,)
            words.update(x for x in parts if isinstance(x, str))
    return frozenset(words)


@functools.lru_cache(4096)
def _writes(code: types.CodeType) -> bool:
    for inner in _inner(code):
        for step in dis.get_instructions(inner):
            augmented = step.opname == "BINARY_OP" and step.argrepr.endswith("=")
            if augmented or step.opname.startswith(WRITES):
                return True
    return any(w in DOUBTFUL or w.endswith("_") or "grad" in w for w in _words(code))
