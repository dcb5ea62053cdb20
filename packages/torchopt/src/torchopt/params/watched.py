# SPDX-License-Identifier: Apache-2.0
"""Dictionaries of a module's tensors whose content depends on the computation that reads them.

`torch.utils.checkpoint` runs a part of a module again in the backward pass. By then the module may
hold other tensors: those of a later step, or its own after a functional call. The dictionaries of a
module that torchopt has ever run with other tensors are therefore replaced by `WatchedDict`:

1. If a dictionary is read inside a checkpoint, its content at the checkpoint's start is recorded.
2. The recomputation reads the recorded content. Only the recomputation sees what it writes.
3. A functional call puts a layer over the dictionaries, which only its own thread sees.

Only the dictionaries of those modules are replaced. Torch itself is not patched.
"""

from __future__ import annotations

import collections
import copy
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchopt.errors import NotDifferentiableError
from torchopt.params.lineage import MARK as LINEAGE
from torchopt.params.lineage import Lineage, check_unwritten, graph_nodes
from torchopt.torch_internals import (
    checkpoint_of,
    forward_mode_enabled,
    pack_hooks,
    reentrant_checkpoint,
    top_saved_tensor_hooks,
)
from torchopt.tree import optree

__all__ = [
    "Layer",
    "WatchedDict",
    "reads_plainly",
    "refuse_reentrant",
    "watch_one",
]

CONTAINERS = ("_parameters", "_buffers", "_meta_parameters")

# Looked up once, because every layer reads its tables in every forward pass.
_get = dict.__getitem__
is_grad_enabled = torch.is_grad_enabled

# The attribute that marks torch's objects.
MARK = "_torchopt_place"

REENTRANT = (
    "{who}: {owner} reads {key!r} below torch.utils.checkpoint with use_reentrant=True, which "
    "gives it no gradient in torch.autograd.grad and recomputes with other tensors; expected "
    "use_reentrant=False (in transformers: gradient_checkpointing_enable("
    "gradient_checkpointing_kwargs={{'use_reentrant': False}}))."
)


class Layer:
    """Tensors that hide those of the dictionaries, for one thread and one call.

    Attributes:
        tensors: The tensors, by the `token` of a dictionary and then by key.
        attributes: The names of exchanged tensors that are neither parameters nor buffers.
        graph: Whether gradients were enabled when the call began.
        inside: The recomputation in which the call runs, or None.
    """

    def __init__(self, tensors: dict[object, dict[str, Any]], attributes: Iterable[str]) -> None:
        self.tensors = tensors
        self.attributes = tuple(attributes)
        self.graph = True
        self.inside: Recomputation | None = None

    def __enter__(self) -> None:
        # Checkpoints that have already begun do not see this layer; later ones do.
        self.inside = None if top_saved_tensor_hooks(True) is None else _here()[0]
        self.graph = torch.is_grad_enabled()
        _local.layers.append(self)

    def __exit__(self, *error: object) -> None:
        _local.layers.remove(self)


class _Local(threading.local):
    def __init__(self) -> None:
        self.layers: list[Layer] = []


_local = _Local()


class Checkpoint:
    """The content of the watched dictionaries when a checkpoint began."""

    def __init__(self, inside: Recomputation | None) -> None:
        self.inside = inside
        self.layers = tuple(layer for layer in _local.layers if layer.inside is inside)
        self.seen: dict[object, dict[str, Any]] = {}
        self.versions: dict[object, dict[str, int]] = {}
        names = [name for layer in self.layers for name in layer.attributes]
        if names:
            raise NotDifferentiableError(
                f"functional_call: {names[:4]} are neither parameters nor buffers, and the module "
                "uses torch.utils.checkpoint, which would recompute with the module's own; "
                "register them as buffers."
            )

    def remember(self, table: WatchedDict) -> dict[str, Any]:
        """Return the content of `table` when the checkpoint began; call it before any write."""
        seen = self.seen.get(table.token)
        if seen is None:
            seen = self.seen[table.token] = {}
            for key in dict.keys(table):
                seen[key] = _holder(table, key, self.layers, self.inside)[key]
            if table.kind != "_buffers":
                self.versions[table.token] = {
                    key: x._version
                    for key, x in seen.items()
                    if isinstance(x, Tensor) and x.requires_grad and not x.is_inference()
                }
        return seen


class Recomputation:
    """The second run of a checkpoint: the tensors that it reads and has written."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors: dict[object, dict[str, Any]] = {}
        self.untouched: dict[object, set[str]] = {}

    def of(self, table: WatchedDict, key: str) -> dict[str, Any]:
        """Return the dictionary that replaces `table`, prepared for a use of `key`."""
        held = self.tensors.get(table.token)
        if held is None:
            seen = self.checkpoint.remember(table)
            held = self.tensors[table.token] = dict(seen)
            self.untouched[table.token] = set(seen)
        if key in self.untouched[table.token]:
            self.untouched[table.token].remove(key)
            self._first_use(table, key, held)
        return held

    def _first_use(self, table: WatchedDict, key: str, held: dict[str, Any]) -> None:
        x = held[key]
        if not isinstance(x, Tensor):
            return
        if table.kind == "_buffers":
            held[key] = x.clone()  # so that running statistics are not updated twice
            return
        version = self.checkpoint.versions[table.token].get(key)
        if version is not None and version != x._version:
            raise NotDifferentiableError(
                f"activation checkpointing: {table.owner}'s {key!r} was written in place after the "
                "forward pass, so the pass cannot be recomputed; call backward() before the write, "
                "or replace the tensor."
            )


def _here() -> tuple[Recomputation | None, list[Checkpoint]]:
    """Return the innermost recomputation of this thread or None, and the checkpoints inside it."""
    recomputation: Recomputation | None = None
    checkpoints: list[Checkpoint] = []
    for pack in pack_hooks():
        place = getattr(pack, MARK, None)
        if place is None:
            found = checkpoint_of(pack)
            if found is None:
                continue
            frame, recomputed = found
            checkpoint = getattr(frame, MARK, None)
            if checkpoint is None:
                # A checkpoint that was not seen before its recomputation gets the current content.
                checkpoint = Checkpoint(recomputation)
                setattr(frame, MARK, checkpoint)
            place = Recomputation(checkpoint) if recomputed else checkpoint
            setattr(pack, MARK, place)
        if isinstance(place, Recomputation):
            recomputation, checkpoints = place, []
        else:
            checkpoints.append(place)
    return recomputation, checkpoints


def _holder(
    table: WatchedDict, key: str, layers: Iterable[Layer], recomputation: Recomputation | None
) -> Any:
    """Return the dictionary that holds `key` of `table`."""
    for layer in reversed(tuple(layers)):
        if layer.inside is recomputation:
            held = layer.tensors.get(table.token)
            if held is not None and key in held:
                return held
    if recomputation is not None:
        return recomputation.of(table, key)
    return _Plain(table)


class _Plain:
    """Direct access to the content of a watched dictionary."""

    def __init__(self, table: WatchedDict) -> None:
        self.table = table

    def __getitem__(self, key: str) -> Any:
        return dict.__getitem__(self.table, key)

    def __setitem__(self, key: str, value: Any) -> None:
        dict.__setitem__(self.table, key, value)


def _enter(table: WatchedDict, key: str) -> Any:
    """Return the dictionary that holds `key` now, after active checkpoints recorded the table."""
    pair = top_saved_tensor_hooks(True)
    if pair is None:
        return _holder(table, key, _local.layers, None)
    place = getattr(pair[0], MARK, None)
    if isinstance(place, Recomputation):
        recomputation: Recomputation | None = place
    elif isinstance(place, Checkpoint) and table.token in place.seen:
        recomputation = place.inside
    else:
        recomputation, checkpoints = _here()
        for checkpoint in checkpoints:
            checkpoint.remember(table)
    return _holder(table, key, _local.layers, recomputation)


def reads_plainly() -> bool:
    """Return whether this thread is inside no layer or checkpoint, so that it reads own content."""
    return top_saved_tensor_hooks(True) is None and not _local.layers


class WatchedDict(dict[str, Any]):
    """The parameters or buffers of one module.

    It behaves like any dictionary, except that its content depends on the computation that reads
    it; see the docstring of this file. `dict.__getitem__(table, key)` and other methods of `dict`
    access its own content.

    Attributes:
        kind: The name of the module's attribute, such as "_parameters".
        owner: The class name of the module, for messages.
        token: A hashable object that identifies the dictionary.
        loads: Whether `load_state_dict` has the hook for fast weights.
        reentrant: The key of a parameter that was read inside a checkpoint with
            `use_reentrant=True`, and whether the graph shows that checkpoint; else None.
    """

    __slots__ = ("__weakref__", "kind", "loads", "owner", "reentrant", "token")

    def __init__(self, tensors: dict[str, Any], kind: str, owner: str) -> None:
        super().__init__(tensors)
        self.kind = kind
        self.owner = owner
        self.loads = False
        self.token = object()
        self.reentrant: tuple[str, bool] | None = None

    def __getitem__(self, key: str) -> Any:
        if is_dynamo_compiling():  # the compiler recomputes by itself
            return dict.__getitem__(self, key)
        if top_saved_tensor_hooks(True) is None and not _local.layers:
            value = _get(self, key)
        else:
            value = _enter(self, key)[key]
        if is_grad_enabled():
            # Inlined, because every layer runs this for each of its tensors.
            lineage = getattr(value, LINEAGE, None)
            if (
                lineage is not None
                and isinstance(lineage, Lineage)
                and lineage.grad_fn is not None
                and (
                    lineage.pointer is None
                    or value._version != lineage.version
                    or value.data_ptr() != lineage.pointer
                )
            ):
                check_unwritten(value, lineage, self.owner, key)
        elif not forward_mode_enabled() and value is not None and value.requires_grad:
            self._refuse_reentrant(key, value)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        if is_dynamo_compiling() or reads_plainly():
            dict.__setitem__(self, key, value)
        else:
            _enter(self, key)[key] = value

    # Without this method, `dict(table)` would copy the dictionary's own content.
    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the tensor of `key`, or `default`."""
        try:
            return self[key]
        except KeyError:
            return default

    def items(self) -> Any:
        """Return the pairs of keys and tensors."""
        return dict.items(self._content())

    def values(self) -> Any:
        """Return the tensors."""
        return dict.values(self._content())

    def _content(self) -> dict[str, Any]:
        if is_dynamo_compiling() or reads_plainly():
            return self
        return {key: self[key] for key in dict.keys(self)}

    def copy(self) -> dict[str, Any]:
        """Return a plain dictionary of the same tensors."""
        return dict(self.items())

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several keys, like `dict.update`."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (self.copy(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        for key, x in self.items():
            if isinstance(x, Tensor) and x.grad_fn is not None and id(x) not in memo:
                raise NotDifferentiableError(
                    f"copy.deepcopy(module): expected tensors without a graph, got the fast weight "
                    f"{key!r} of {self.owner}, whose copy would have no gradient; use torchopt."
                    'module_clone(module, by="copy"), by="deepcopy" to detach it, or restore the '
                    "module with torchopt.recover_state_dict first"
                )
        return {key: copy.deepcopy(x, memo) for key, x in self.items()}

    def _refuse_reentrant(self, key: str, value: Tensor) -> None:
        ctx = reentrant_checkpoint()
        if ctx is None:
            return
        for layer in _local.layers:
            if layer.graph and key in layer.tensors.get(self.token, ()):
                raise NotDifferentiableError(
                    REENTRANT.format(who="functional_call", owner=self.owner, key=key)
                )
        shown = any(ctx.needs_input_grad)
        if shown and not value.is_leaf:
            raise NotDifferentiableError(
                REENTRANT.format(who="fast weights", owner=self.owner, key=key)
            )
        if self.reentrant is None or self.reentrant[1]:
            self.reentrant = (key, shown)


def refuse_reentrant(tables: Iterable[dict[str, Any]], loss: Tensor) -> None:
    """Raise NotDifferentiableError if a reentrant checkpoint hides parameters from `loss`.

    Args:
        tables: The dictionaries of the parameters; only watched ones are checked.
        loss: The loss to be differentiated.
    """
    for table in tables:
        if not isinstance(table, WatchedDict) or table.reentrant is None:
            continue
        key, shown = table.reentrant
        names = (str(node.name()) for node in graph_nodes([loss]))
        if not shown or any(name.startswith("CheckpointFunction") for name in names):
            raise NotDifferentiableError(
                REENTRANT.format(who="step(loss)", owner=table.owner, key=key)
            )


def watch_one(module: nn.Module) -> None:
    """Replace a module's own dictionaries by watched ones. Calling it again has no effect."""
    own = module.__dict__
    for kind in CONTAINERS:
        held: Any = own.get(kind)
        if type(held) is not WatchedDict and type(held) in (dict, collections.OrderedDict):
            own[kind] = WatchedDict(held, kind, type(module).__name__)


def _flatten(table: Any) -> tuple[list[Any], tuple[str, ...], tuple[str, ...]]:
    keys = tuple(sorted(table))
    return [table[key] for key in keys], keys, keys


optree.register_pytree_node(
    WatchedDict,
    _flatten,
    lambda keys, children: dict(zip(keys, children)),
    path_entry_type=optree.MappingEntry,
    namespace=optree.registry.GLOBAL_NAMESPACE,
)
