# SPDX-License-Identifier: Apache-2.0
"""Dictionaries of a module's tensors that know which computation reads them.

`torch.utils.checkpoint` runs a part of a module again in the backward pass, when the module may
hold other tensors: those of a later step, or its own after a functional call. The dictionaries of
a module that torchopt ever ran with other tensors are therefore replaced by `WatchedDict`:

1. What is read below a checkpoint is remembered, as it was when the checkpoint began.
2. The recomputation reads what was remembered. What it writes stays with it.
3. A functional call is a layer over the dictionaries, seen only by its own thread.

Only the dictionaries of those modules change. Nothing of torch is replaced.
"""

from __future__ import annotations

import collections
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

# Looked up once: tables are read in each layer of each forward pass.
_get = dict.__getitem__
is_grad_enabled = torch.is_grad_enabled

# What the objects of torch are marked with.
MARK = "_torchopt_place"

REENTRANT = (
    "{who}: {owner} reads {key!r} below torch.utils.checkpoint with use_reentrant=True, which "
    "gives it no gradient in torch.autograd.grad and recomputes with other tensors; expected "
    "use_reentrant=False (in transformers: gradient_checkpointing_enable("
    "gradient_checkpointing_kwargs={{'use_reentrant': False}}))."
)


class Layer:
    """Tensors that stand before those of the dictionaries, for one thread and one call.

    Attributes:
        tensors: By the `token` of a dictionary, then by key.
        attributes: Names of tensors that are not parameters or buffers and were exchanged as well.
        graph: Whether gradients were recorded when the call began.
        inside: The recomputation that the call is a part of.
    """

    def __init__(self, tensors: dict[object, dict[str, Any]], attributes: Iterable[str]) -> None:
        self.tensors = tensors
        self.attributes = tuple(attributes)
        self.graph = True
        self.inside: Recomputation | None = None

    def __enter__(self) -> None:
        # Checkpoints that have begun do not see this layer; those to come do.
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
    """What a checkpoint saw of the watched dictionaries when it began."""

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
        """Return what `table` held when the checkpoint began; called before anything is written."""
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
    """The second run of a checkpoint: what it reads, and what it wrote."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors: dict[object, dict[str, Any]] = {}
        self.untouched: dict[object, set[str]] = {}

    def of(self, table: WatchedDict, key: str) -> dict[str, Any]:
        """Return the dictionary that stands for `table`, ready for a use of `key`."""
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
            held[key] = x.clone()  # running statistics are not updated a second time
            return
        version = self.checkpoint.versions[table.token].get(key)
        if version is not None and version != x._version:
            raise NotDifferentiableError(
                f"activation checkpointing: {table.owner}'s {key!r} was written in place after the "
                "forward pass, so the pass cannot be recomputed; call backward() before the write, "
                "or replace the tensor."
            )


def _here() -> tuple[Recomputation | None, list[Checkpoint]]:
    """Return the innermost recomputation in this thread, and the checkpoints that it (or the
    thread) has entered since.
    """
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
                # One that is recomputed before it was ever seen sees the present content.
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
    """A watched dictionary as the dictionary that it is."""

    def __init__(self, table: WatchedDict) -> None:
        self.table = table

    def __getitem__(self, key: str) -> Any:
        return dict.__getitem__(self.table, key)

    def __setitem__(self, key: str, value: Any) -> None:
        dict.__setitem__(self.table, key, value)


def _enter(table: WatchedDict, key: str) -> Any:
    """Return the dictionary that holds `key` here and now; checkpoints remember the table first."""
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
    """Return whether watched dictionaries are what they hold: no layer or checkpoint stands
    before them in this thread.
    """
    return top_saved_tensor_hooks(True) is None and not _local.layers


class WatchedDict(dict[str, Any]):
    """The parameters or buffers of one module.

    A dictionary in every respect; only what it holds depends on who asks, see the module above.
    `dict.__getitem__(table, key)` and its like go past that.

    Attributes:
        kind: The attribute of the module that it is.
        owner: The class of the module, for messages.
        token: Stands for the dictionary where a key is needed.
        loads: Whether `load_state_dict` was told of fast weights.
        reentrant: A parameter that was read below a checkpoint with `use_reentrant=True`, and
            whether the graph shows it; None.
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
            # Written out: every layer comes by here for each of its tensors.
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
        if is_dynamo_compiling() or (top_saved_tensor_hooks(True) is None and not _local.layers):
            dict.__setitem__(self, key, value)
        else:
            _enter(self, key)[key] = value

    # Without it, `dict(table)` would copy what is below.
    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self)

    def get(self, key: str, default: Any = None) -> Any:
        """Return what `key` holds."""
        try:
            return self[key]
        except KeyError:
            return default

    def items(self) -> Any:
        """Return the pairs of keys and tensors."""
        if is_dynamo_compiling():
            return dict.items(self)
        if top_saved_tensor_hooks(True) is None and not _local.layers:
            return dict.items(self)
        return {key: self[key] for key in dict.keys(self)}.items()

    def values(self) -> Any:
        """Return the tensors."""
        if is_dynamo_compiling():
            return dict.values(self)
        if top_saved_tensor_hooks(True) is None and not _local.layers:
            return dict.values(self)
        return {key: self[key] for key in dict.keys(self)}.values()

    def copy(self) -> dict[str, Any]:
        """Return a plain dictionary of the same tensors."""
        return dict(self.items())

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Put tensors in."""
        if is_dynamo_compiling() or reads_plainly():
            dict.update(self, *args, **kwargs)
            return
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (self.copy(),)

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
    """Raise NotDifferentiableError where gradients of `loss` lack what a checkpoint hides.

    Args:
        tables: The dictionaries of the parameters, of which those that are watched count.
        loss: What is to be differentiated.
    """
    for table in tables:
        if not isinstance(table, WatchedDict) or table.reentrant is None:
            continue
        key, shown = table.reentrant
        if not shown or any(map(_is_reentrant, graph_nodes([loss]))):
            raise NotDifferentiableError(
                REENTRANT.format(who="step(loss)", owner=table.owner, key=key)
            )


def _is_reentrant(node: Any) -> bool:
    return str(node.name()).startswith("CheckpointFunction")


def watch_one(module: nn.Module) -> None:
    """Watch what a module itself holds from now on. May be called again."""
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
