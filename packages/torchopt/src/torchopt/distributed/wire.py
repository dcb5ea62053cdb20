# SPDX-License-Identifier: Apache-2.0
"""What travels with a remote call: parameters once per version, everything else once per call.

A tensor of a module, or of a value of `share`, travels as the digest of its content. The content
itself is sent ahead, in a message of its own, to a worker that has not got it yet: once for each
version, however many calls use it. Gradients still find their way back: with the digest goes a
carrier, a tensor of the same shape that is -0.0 everywhere and takes one number on the wire. The
worker adds it to the content (x + (-0.0) is x, bit for bit), and what torch's distributed autograd
returns for the carrier is the gradient of the tensor.
"""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
import torch.distributed.rpc as rpc
from torch import Tensor, nn

from torchopt.tree import tree_leaves, tree_map, tree_structure
from torchopt.tree_function import apply_rule

__all__ = ["Message", "Packer", "Shared", "WireStats", "share", "unpack", "wire_stats"]

T = TypeVar("T")

_SMALLEST = 64  # bytes; a digest saves nothing on smaller tensors
_KEPT = 256 * 2**20  # bytes a worker keeps for each sender before the oldest versions go
_ARRIVAL = 60.0  # seconds that a content sent ahead of a call may come after it


@dataclass
class WireStats:
    """What this process has put on the wire with remote calls, and what it has got back.

    Attributes:
        calls: Remote calls.
        call_bytes: Of functions, arguments and carriers: sent with every call.
        parameter_bytes: Contents of shared tensors: sent once per version and worker.
        parameter_bytes_saved: What sending them with every call would have added.
        result_bytes: Tensors in the results.
        gradient_bytes: Gradients of shared tensors, which come back once a call.
    """

    calls: int = 0
    call_bytes: int = 0
    parameter_bytes: int = 0
    parameter_bytes_saved: int = 0
    result_bytes: int = 0
    gradient_bytes: int = 0


_stats = WireStats()
_stats_lock = threading.Lock()


def _count(**amounts: int) -> None:
    with _stats_lock:
        for name, amount in amounts.items():
            setattr(_stats, name, getattr(_stats, name) + amount)


def wire_stats(*, reset: bool = False) -> WireStats:
    """Return what went over the wire since the start, or since the last reset.

    Args:
        reset: Count from zero again.

    Example:
        >>> wire_stats(reset=True).calls
        0
    """
    global _stats
    with _stats_lock:
        result = replace(_stats)
        if reset:
            _stats = WireStats()
    return result


def count_results(results: Any) -> None:
    """Count the tensors of results that came back."""
    _count(result_bytes=sum(_nbytes(x) for x in tree_leaves(results) if isinstance(x, Tensor)))


def _nbytes(x: Tensor) -> int:
    if x.layout != torch.strided:
        return x.numel() * x.element_size()
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class Shared(Generic[T]):
    """A value that remote calls refer to instead of sending it each time; see `share`.

    Attributes:
        value: The module or tree of tensors.
    """

    def __init__(self, value: T) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _unwrapped, (self.value,)

    def __repr__(self) -> str:
        return f"share({self.value!r})"


def _unwrapped(value: T) -> T:
    return value


def share(value: T) -> Shared[T]:
    """Return a reference to a module or a tree of tensors, to be passed to remote calls.

    The called function receives the value itself. Partitioners repeat it instead of splitting its
    tensors; its contents travel once per version, and gradients flow back to its tensors, to the
    parameters of a module as well. A module that is passed without `share` also travels once per
    version, but its parameters arrive as parameters of their own, cut from those of the caller.

    The tensors may change between calls, in place or not: a call sees the contents of its moment.

    Args:
        value: A module, or a tree of tensors.

    Example:
        >>> import torchopt.distributed as todist
        >>> double = todist.parallelize(todist.batch_partitioner, todist.sum_reducer)(
        ...     lambda w, x: (w * x).sum())
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> double(todist.share(w), torch.arange(4.0))
        tensor(12., grad_fn=...)
    """
    return Shared(value)


def received(tree: Any, *, connected: bool) -> Any:
    """Return arguments as a function gets them that runs in this process instead of another one.

    Modules are copies, so that what the function does to them stays with it. Their tensors are
    those of the caller where gradients flow back, and copies elsewhere.

    Args:
        tree: The arguments.
        connected: Whether gradients reach the parameters of modules that are not shared. With
            remote calls they do not.
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Shared):
            return received_value(leaf.value, connected=True)
        return received_value(leaf, connected=connected)

    return tree_map(one, tree, none_is_leaf=True)


def received_value(value: Any, *, connected: bool) -> Any:
    """Return a module, or a tree of tensors and modules, as `received` says."""
    if not isinstance(value, nn.Module):
        if tree_structure(value, none_is_leaf=True).is_leaf():
            return value
        return tree_map(lambda x: received_value(x, connected=connected), value, none_is_leaf=True)
    memo: dict[int, Any] = {}
    for x in tensors_of(value):
        if isinstance(x, nn.Parameter) and not connected:
            memo[id(x)] = nn.Parameter(x.detach().clone(), x.requires_grad)
        elif isinstance(x, nn.Parameter) or x.requires_grad:
            memo[id(x)] = x
        else:
            memo[id(x)] = x.detach().clone()
    return copy.deepcopy(value, memo)


# --- sending --------------------------------------------------------------------------------------


class _Carriers:
    """From tensors to their carriers, as a rule for derivatives."""

    needs_its_closure = False

    def __init__(self, count: int) -> None:
        self.num_differentiable_inputs = self.num_kept_inputs = count
        self.num_differentiable_outputs = count

    def evaluate(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_full((), -0.0).expand(x.shape) for x in tensors)

    def pull_back(
        self,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        cotangents: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        del inputs, outputs
        _count(gradient_bytes=sum(_nbytes(g) for g in cotangents))
        return cotangents

    def push_forward(
        self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        del inputs, outputs
        return tangents


def digest(x: Tensor) -> bytes:
    """Return 16 bytes that name dtype, shape and content of a tensor on the CPU."""
    h = hashlib.blake2b(f"{x.dtype}{tuple(x.shape)}".encode(), digest_size=16)
    content: Any = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    h.update(content)
    return h.digest()


@dataclass
class Message:
    """One call, ready to be sent.

    Attributes:
        payload: Function and arguments, pickled; tensors are numbers in there.
        natives: What torch's own RPC has to send: tensors, remote references, script modules.
        contents: Digest and tensor of everything that the payload refers to by digest.
    """

    payload: bytes
    natives: list[Any]
    contents: dict[bytes, Tensor]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, packer: Packer) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._packer = packer
        self._numbers: dict[int, Any] = {}
        self.natives: list[Any] = []
        self.contents: dict[bytes, Tensor] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, (Tensor, _RRef, torch.jit.ScriptModule)):
            return None
        key = id(obj)  # the same object on this side is the same on the other: tied parameters
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
            if parameter:  # a leaf on the other side too, as published
                return "parameter", self._native(obj.detach()), obj.requires_grad
            # Of a Parameter torch would send the value alone; of a view of it, the graph too.
            return "native", self._native(obj.view_as(obj) if connected else obj)
        name = self._packer.name(obj)
        self.contents[name] = obj
        if connected:
            return "content", name, self._native(apply_rule(_Carriers(1), obj)[0])
        return "copy", name, parameter, obj.requires_grad

    def _native(self, obj: Any) -> int:
        self.natives.append(obj)
        return len(self.natives) - 1


_RRef: Any = getattr(rpc, "PyRRef", None) or type("NoRRef", (), {})


class Packer:
    """Packs the calls of one batch: each tensor is hashed once for all of them.

    Args:
        trees: All arguments of the batch.
    """

    def __init__(self, trees: Iterable[Any]) -> None:
        self.shared: dict[int, str] = {}  # id of a tensor -> "shared" or "module"
        self._names: dict[int, bytes] = {}
        self._alive: list[Any] = []  # ids must stay those of these objects
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
        message = Message(file.getvalue(), pickler.natives, pickler.contents)
        tensors = sum(_nbytes(x) for x in message.natives if isinstance(x, Tensor))
        _count(calls=1, call_bytes=len(message.payload) + tensors)
        return message


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tree, and those of the modules in it."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, nn.Module):
            for module in leaf.modules():
                for container in (module._parameters, module._buffers):
                    yield from (x for x in container.values() if x is not None)
        elif isinstance(leaf, Tensor):
            yield leaf


class Outbox:
    """Knows which contents each worker has got from this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has: dict[int, OrderedDict[bytes, int]] = {}
        self._in_use: Counter[tuple[int, bytes]] = Counter()

    def missing(self, rank: int, message: Message) -> tuple[dict[bytes, Tensor], list[bytes]]:
        """Return what to send ahead of a message, and which old contents the worker can drop.

        The contents count as in use until `done` is called.
        """
        with self._lock:
            has = self._has.setdefault(rank, OrderedDict())
            new = {}
            for name, x in message.contents.items():
                size = x.numel() * x.element_size()
                self._in_use[rank, name] += 1
                if name in has:
                    _count(parameter_bytes_saved=size)
                    has.move_to_end(name)
                else:
                    # A copy: the caller may change the tensor before it is on its way.
                    new[name] = x.detach().clone()
                    has[name] = size
                    _count(parameter_bytes=size)
            drop = []
            total = sum(has.values())
            for name in list(has):
                if total <= _KEPT:
                    break
                if not self._in_use[rank, name]:
                    drop.append(name)
                    total -= has.pop(name)
            return new, drop

    def done(self, rank: int, message: Message) -> None:
        """Note that the worker has answered a message."""
        with self._lock:
            for name in message.contents:
                self._in_use[rank, name] -= 1
                if not self._in_use[rank, name]:
                    del self._in_use[rank, name]

    def forget(self, rank: int | None = None) -> None:
        """Note that a worker, or every one, has nothing."""
        with self._lock:
            if rank is None:
                self._has.clear()
                self._in_use.clear()
            else:
                self._has.pop(rank, None)


outbox = Outbox()


# --- receiving ------------------------------------------------------------------------------------


class Inbox:
    """The contents that this process has got, by sender."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._contents: dict[tuple[int, bytes], Tensor] = {}

    def put(self, sender: int, new: dict[bytes, Tensor], drop: Iterable[bytes]) -> None:
        """Keep new contents and drop old ones."""
        with self._arrived:
            for name in drop:
                self._contents.pop((sender, name), None)
            for name, x in new.items():
                self._contents[sender, name] = x
            self._arrived.notify_all()

    def get(self, sender: int, name: bytes) -> Tensor:
        """Return a content; waits for one that is on its way."""
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
    """Called by a sender ahead of the call that needs the contents."""
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
        if kind == "content":
            return inbox.get(self._sender, rest[0]) + self._natives[rest[1]]
        name, parameter, requires_grad = rest
        copy = inbox.get(self._sender, name).clone()  # the function may write into it
        if parameter:
            return nn.Parameter(copy, requires_grad)
        return copy.requires_grad_(requires_grad)


def unpack(payload: bytes, natives: list[Any], sender: int) -> Any:
    """Return the call in a message."""
    return _Unpickler(payload, natives, sender).load()
