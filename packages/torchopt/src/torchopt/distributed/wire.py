# SPDX-License-Identifier: Apache-2.0
"""The content of remote calls: parameters once for each version, the rest with every call.

A tensor of a module, or of a value of `share`, is sent as the digest of its content. The content
itself is sent ahead in a separate message to workers that do not have it yet, once for each version
however many calls use it. For gradients, a carrier is sent with the digest: a tensor of the same
shape that is -0.0 everywhere and takes the space of one number. The worker adds the carrier to the
content (x + (-0.0) is x, bit for bit), so the gradient that torch's distributed autograd returns
for the carrier is the gradient of the tensor.
"""

from __future__ import annotations

import io
import pickle
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.distributed import memory, stats
from torchopt.distributed.outbox import Outbox
from torchopt.distributed.share import Shared, digest, tensors_of
from torchopt.distributed.stats import WireStats, wire_stats
from torchopt.tree import tree_leaves
from torchopt.tree_function import apply_rule

__all__ = ["Message", "Packer", "WireStats", "unpack", "wire_stats"]

_SMALLEST = 64  # bytes; a digest saves nothing on smaller tensors
_ARRIVAL = 60.0  # seconds to wait for a content that arrives after its call


class Sent:
    """The derivative rule of the map from a tensor to what is sent in its place.

    Attributes:
        is_used: Whether the called function used the tensor; the answer says so. For an unused
            tensor torch sends a gradient of zeros, and ours is None.
    """

    needs_its_closure = False
    num_differentiable_inputs = num_differentiable_outputs = 1
    num_kept_inputs = 0

    def __init__(self, *, as_carrier: bool) -> None:
        self.as_carrier = as_carrier
        self.is_used = True

    def evaluate(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        return (x.new_full((), -0.0).expand(x.shape) if self.as_carrier else x.clone(),)

    def pull_back(
        self,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        cotangents: tuple[Tensor, ...],
    ) -> Any:
        del inputs, outputs
        if not self.is_used:
            return (None,)
        if self.as_carrier:
            size = sum(stats.nbytes(g) for g in cotangents)
            stats.count(gradient_bytes=size)
            memory.count_freed(size)
        return cotangents

    def push_forward(
        self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        del inputs, outputs
        return tangents


def unused(results: Any, natives: list[Any]) -> list[int]:
    """Return the positions of the tensors of a call that no result depends on."""
    wanted = {k: (x.grad_fn, x.output_nr) for k, x in enumerate(natives) if _has_graph(x)}
    if not wanted:
        return []
    missing = set(wanted.values())
    stack = [(x.grad_fn, x.output_nr) for x in tree_leaves(results) if _has_graph(x)]
    seen = set()
    while stack and missing:
        edge = stack.pop()
        missing.discard(edge)
        if edge[0] is None or edge[0] in seen:
            continue
        seen.add(edge[0])
        stack += edge[0].next_functions
    return [k for k, edge in wanted.items() if edge in missing]


def _has_graph(x: Any) -> bool:
    return isinstance(x, Tensor) and x.grad_fn is not None


@dataclass
class Message:
    """One call, ready to be sent.

    Attributes:
        payload: The pickled function and arguments, with numbers in place of tensors.
        natives: Objects that torch's own RPC has to send: tensors, remote references, script
            modules.
        contents: The tensors that the payload refers to by digest, with their digests.
        sent: The rules of the natives that gradients come back through, by position.
    """

    payload: bytes
    natives: list[Any]
    sent: dict[int, Sent]
    contents: dict[bytes, Tensor]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, packer: Packer) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._packer = packer
        self._numbers: dict[int, Any] = {}
        self.natives: list[Any] = []
        self.sent: dict[int, Sent] = {}
        self.contents: dict[bytes, Tensor] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, (Tensor, torch.jit.ScriptModule)):
            rref = getattr(sys.modules.get("torch.distributed.rpc"), "PyRRef", None)
            if rref is None or not isinstance(obj, rref):
                return None
        key = id(obj)  # one object stays one object on the worker, for tied parameters
        if key not in self._numbers:
            self._numbers[key] = (len(self._numbers), *self._place(obj))
        return self._numbers[key]

    def _place(self, obj: Any) -> tuple[Any, ...]:
        if not isinstance(obj, Tensor):
            return ("native", self._native(obj))
        shared = self._packer.shared.get(id(obj))
        connected = obj.requires_grad and (shared == "shared" or not isinstance(obj, nn.Parameter))
        parameter = isinstance(obj, nn.Parameter) and not connected
        if (
            shared is None
            or obj.device.type != "cpu"
            or obj.layout != torch.strided
            or obj.numel() * obj.element_size() < _SMALLEST
        ):
            # Copies: the caller may change the tensor before it is sent.
            if parameter:  # a leaf on the worker too, as in the published package
                return "parameter", self._native(obj.detach().clone()), obj.requires_grad
            if connected:
                return "native", self._connected(obj, as_carrier=False)
            return "native", self._native(obj.detach().clone().requires_grad_(obj.requires_grad))
        name = self._packer.name(obj)
        self.contents[name] = obj
        if connected:
            return "content", name, self._connected(obj, as_carrier=True)
        return "copy", name, parameter, obj.requires_grad

    def _connected(self, obj: Tensor, *, as_carrier: bool) -> int:
        rule = Sent(as_carrier=as_carrier)
        number = self._native(apply_rule(rule, obj)[0])
        self.sent[number] = rule
        return number

    def _native(self, obj: Any) -> int:
        self.natives.append(obj)
        return len(self.natives) - 1


class Packer:
    """Packs the calls of one batch; each tensor is hashed once for all of them.

    Args:
        trees: All arguments of the batch.
    """

    def __init__(self, trees: Iterable[Any]) -> None:
        self.shared: dict[int, str] = {}  # id of a tensor -> "shared" or "module"
        self._names: dict[int, bytes] = {}
        self._alive: list[Any] = []  # keeps the tensors alive, so that their ids stay theirs
        for leaf in tree_leaves(list(trees)):
            value, how = (leaf.value, "shared") if isinstance(leaf, Shared) else (leaf, "module")
            if how == "module" and not isinstance(leaf, nn.Module):
                continue
            for x in tensors_of(value):
                self._alive.append(x)
                if self.shared.get(id(x)) != "shared":
                    self.shared[id(x)] = how

    def name(self, x: Tensor) -> bytes:
        """Return the digest of a tensor."""
        if id(x) not in self._names:
            self._names[id(x)] = digest(x)
        return self._names[id(x)]

    def pack(self, call: Any) -> Message:
        """Return a call as a message."""
        file = io.BytesIO()
        pickler = _Pickler(file, self)
        pickler.dump(call)
        message = Message(file.getvalue(), pickler.natives, pickler.sent, pickler.contents)
        tensors = sum(stats.nbytes(x) for x in message.natives if isinstance(x, Tensor))
        stats.count(calls=1, call_bytes=len(message.payload) + tensors)
        return message


outbox = Outbox()


# --- receiving ------------------------------------------------------------------------------------


class Inbox:
    """The contents that this process has received, by sender."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._contents: dict[tuple[int, bytes], Tensor] = {}

    def put(self, sender: int, new: dict[bytes, Tensor], drop: Iterable[bytes]) -> None:
        """Keep new contents and drop old ones."""
        with self._arrived:
            gone = [self._contents.pop((sender, name), None) for name in drop]
            size = sum(stats.nbytes(x) for x in gone if x is not None)
            gone.clear()
            for name, x in new.items():
                self._contents[sender, name] = x
            self._arrived.notify_all()
        memory.count_freed(size)

    def get(self, sender: int, name: bytes) -> Tensor:
        """Return a content; wait for it if it is in flight."""
        key = (sender, name)
        deadline = time.monotonic() + _ARRIVAL
        with self._arrived:
            while key not in self._contents:
                if not self._arrived.wait(deadline - time.monotonic()):
                    raise RuntimeError(
                        f"expected the content {name.hex()} of a shared tensor from rank {sender} "
                        f"within {_ARRIVAL:g} s, got none; the connection is too slow or lost"
                    )
            return self._contents[key]

    def clear(self) -> None:
        """Forget everything."""
        with self._arrived:
            self._contents.clear()


inbox = Inbox()


def receive(sender: int, names: list[bytes], tensors: list[Tensor], drop: list[bytes]) -> None:
    """Store contents; a sender calls this ahead of the call that needs them."""
    inbox.put(sender, dict(zip(names, tensors)), drop)


class _Unpickler(pickle.Unpickler):
    def __init__(self, payload: bytes, natives: list[Any], sender: int) -> None:
        super().__init__(io.BytesIO(payload))
        self._natives = natives
        self._sender = sender
        self._made: dict[int, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        number, kind, *rest = pid
        if number not in self._made:
            self._made[number] = self._make(kind, *rest)
        return self._made[number]

    def _make(self, kind: str, *rest: Any) -> Any:
        if kind == "native":
            return self._natives[rest[0]]
        if kind == "parameter":
            return nn.Parameter(self._natives[rest[0]], requires_grad=rest[1])
        name = rest[0]
        content = inbox.get(self._sender, name)
        memory.count_freed(stats.nbytes(content))  # of its copy, and maybe of its gradient
        if kind == "content":
            return content + self._natives[rest[1]]
        name, parameter, requires_grad = rest
        copy = content.clone()  # the function may write to it
        if parameter:
            return nn.Parameter(copy, requires_grad)
        return copy.requires_grad_(requires_grad)


def unpack(payload: bytes, natives: list[Any], sender: int) -> Any:
    """Return the call in a message."""
    return _Unpickler(payload, natives, sender).load()
