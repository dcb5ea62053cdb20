# SPDX-License-Identifier: Apache-2.0
"""The record of which parameter a tensor replaced, whose hooks it inherits."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from torchopt.errors import NotDifferentiableError

__all__ = [
    "begin_step",
    "check_unwritten",
    "descend",
    "inherit_hooks",
    "lineage_of",
]

MARK = "_torchopt_lineage"

Hooks = Mapping[int, Callable[[Tensor], Any]]
Place = tuple["weakref.ref[dict[str, Any]]", str]


class Lineage(NamedTuple):
    """The origin of a tensor, and its state when the record was made.

    Attributes:
        leaf: The parameter that it replaced; None if the tensor is itself a parameter.
        places: The dictionaries of modules and the keys where it was put.
        hooks: The hooks of the tensors that it replaced, except those of `leaf`.
        grad_fn: Its graph node.
        kind: Its dtype and device.
        version: Its version counter; None in inference mode, where tensors have none.
        pointer: The address of its memory; None inside a transform, where tensors have none.
    """

    leaf: Tensor | None
    places: Sequence[Place]
    hooks: tuple[Hooks, ...]
    grad_fn: Any = None
    kind: Any = None
    version: int | None = None
    pointer: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy is an independent parameter with the same hooks.
        own = self.leaf._backward_hooks if self.leaf is not None else None
        return Lineage(None, (), (own, *self.hooks) if own else self.hooks)

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()  # a pickle keeps only values


_make: Any = tuple.__new__  # skips the constructor with field names: a step makes many records


def lineage_of(x: Tensor) -> Lineage | None:
    """Return the lineage of a tensor, or None if it has replaced no other tensor."""
    found = getattr(x, MARK, None)
    return found if isinstance(found, Lineage) else None


def descend(old: Tensor, new: Tensor, places: Sequence[Place] = ()) -> None:
    """Record that `new` replaces `old`."""
    if is_dynamo_compiling():
        return
    before = getattr(old, MARK, None)
    leaf, hooks = (before.leaf, before.hooks) if isinstance(before, Lineage) else (None, ())
    if leaf is None:
        leaf = old
    else:
        own: Any = old._backward_hooks
        if own and leaf is not old:
            hooks = (*hooks, own)
    version = pointer = None
    try:
        version = new._version
        pointer = new.data_ptr()
    except RuntimeError:  # no version in inference mode, no address inside a transform
        pass
    fields = (leaf, places, hooks, new.grad_fn, (new.dtype, new.device), version, pointer)
    setattr(new, MARK, _make(Lineage, fields))


def inherit_hooks(old: Tensor, new: Tensor) -> None:
    """Record that `new`, a copy of `old`, inherits its hooks."""
    hooks = tuple(_hooks_before(old))
    own: Any = old._backward_hooks
    if own:
        hooks = (*hooks, own)
    if hooks:
        setattr(new, MARK, Lineage(None, (), hooks))


def _hooks_before(x: Tensor) -> Iterator[Hooks]:
    lineage = lineage_of(x)
    if lineage is None:
        return
    own = x._backward_hooks
    if lineage.leaf is not None and lineage.leaf is not x and lineage.leaf._backward_hooks:
        yield lineage.leaf._backward_hooks
    for hooks in lineage.hooks:
        if hooks and hooks is not own:
            yield hooks


def _run(inherited: Sequence[Hooks]) -> Callable[[Tensor], Tensor | None]:
    def hook(grad: Tensor) -> Tensor | None:
        changed = None
        for hooks in inherited:
            for each in list(hooks.values()):
                result = each(grad if changed is None else changed)
                changed = changed if result is None else result
        return changed

    return hook


def begin_step(params: Sequence[Tensor], names: Sequence[str]) -> list[Any]:
    """Check parameters, and run their inherited hooks on their gradients during a step.

    Hooks act only within a step. A cotangent that later flows back through a fast weight to earlier
    weights is not a gradient of the parameter.

    Args:
        params: The parameters of the step.
        names: Their dotted names, for messages.

    Returns:
        The handles to `remove()` after the step.

    Raises:
        NotDifferentiableError: A fast weight was written to without autograd.
    """
    handles = []
    for index, p in enumerate(params):
        lineage = getattr(p, MARK, None)
        if not isinstance(lineage, Lineage):
            if p.is_leaf:
                warn_of_idle_hooks(p, names[index])
            continue
        if lineage.grad_fn is not None and (
            lineage.pointer is None
            or p._version != lineage.version
            or p.data_ptr() != lineage.pointer
        ):
            check_unwritten(p, lineage, names[index])
        leaf = lineage.leaf
        if not lineage.hooks and (leaf is None or not leaf._backward_hooks):
            continue
        inherited = list(_hooks_before(p))
        if inherited:
            handle = p.register_hook(_run(inherited))
            handles.append(handle)
            _put_first(p._backward_hooks, handle.id)
    return handles


def _put_first(own: Any, key: int) -> None:
    """Make a hook run before the tensor's own hooks, since it was registered earlier.

    The engine reads the OrderedDict as a plain dict, whose order `move_to_end` does not change.
    """
    if len(own) > 1:
        items = {key: own[key], **own}
        own.clear()
        own.update(items)


# Keyed by identity, because comparing tensors is elementwise.
_warned: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def warn_of_idle_hooks(x: Tensor, name: str) -> None:
    """Warn, once for each parameter, about hooks that no step will run."""
    hooks: Mapping[int, Any] | None = getattr(x, "_post_accumulate_grad_hooks", None)
    if not hooks:
        return
    if _warned.get(id(x)) is not x and not all(map(_is_for_sums, hooks.values())):
        _warned[id(x)] = x
        warnings.warn(
            f"step(loss): {name} has hooks of register_post_accumulate_grad_hook, which do not "
            "act in steps that are differentiated: no gradient is accumulated in them. Use "
            "register_hook for what should act in each step.",
            stacklevel=4,
        )


def _is_for_sums(hook: Any) -> bool:
    """Return whether a hook reduces gradients over processes, which only meta-gradients need."""
    module = str(getattr(getattr(hook, "func", hook), "__module__", ""))
    return module.startswith(("torchopt.distributed.", "torch.distributed."))


def check_unwritten(x: Tensor, lineage: Lineage, *name: str) -> None:
    """Raise NotDifferentiableError if a value was written that the graph does not record."""
    if lineage.grad_fn is None:
        return
    if x._version == lineage.version:
        if lineage.pointer is None or x.data_ptr() == lineage.pointer:
            return
        if (x.dtype, x.device) != lineage.kind:
            return  # module.to(...): the same value
    if x.grad_fn is not lineage.grad_fn:
        return  # autograd has recorded the change
    raise NotDifferentiableError(
        f"{'.'.join(name)} holds a fast weight whose value was written in place after the step "
        "(under no_grad, or through .data), while its graph is that of the value before; expected "
        "recover_state_dict(module, snapshot) or module.load_state_dict(...) to start again, or an "
        "assignment that autograd records."
    )


def graph_nodes(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """Yield every node of the graph of `tensors`, each once."""
    pending: list[Any] = [x.grad_fn for x in tensors]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)
