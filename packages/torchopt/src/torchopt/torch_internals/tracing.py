# SPDX-License-Identifier: Apache-2.0
"""Trace functions to graphs of operations; inspect and simplify the graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "HostReadError",
    "default_device",
    "draws_numbers",
    "hooks_of_all_modules",
    "is_host_read",
    "is_packed",
    "lifted_constants",
    "listed_weights",
    "packed_read",
    "repeats_removed",
    "traced_graph",
    "weights_that_follow",
    "writes",
]

aten = torch.ops.aten


class HostReadError(Exception):
    """While a function is traced, a value is read on the host or determines a shape.

    Args:
        what: What reads it.
        remedy: What to do instead.
    """

    def __init__(self, what: str, remedy: str = "Use torch.where") -> None:
        super().__init__(what)
        self.remedy = remedy


def packed_read() -> HostReadError:
    """Return the error for a packed sequence, whose lengths determine shapes."""
    return HostReadError("a packed sequence", "Use padded sequences and a mask for the padding")


class _HostReads(TorchDispatchMode):
    """A mode that calls `read` with each tensor whose value is read on the host."""

    def __init__(self, read: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            for x in args:
                if isinstance(x, Tensor):
                    self._read(x)
        if torch.Tag.dynamic_output_shape in func.tags and _shape_depends_on_values(func, args):
            raise HostReadError(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def _shape_depends_on_values(func: Any, args: Any) -> bool:
    if func is not torch.ops.aten.index.Tensor:
        return True
    masks = (torch.bool, torch.uint8)
    return any(isinstance(x, Tensor) and x.dtype in masks for x in args[1])


class _MemoryReads(TorchFunctionMode):
    """A mode that refuses methods that read a tensor's memory without a torch operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_OF_MEMORY:
            raise HostReadError(func.__name__)
        if is_packed(getattr(func, "__name__", ""), args, kwargs or {}):
            raise packed_read()
        return func(*args, **(kwargs or {}))


def is_packed(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether an operation of torch takes or makes a packed sequence.

    Args:
        name: The name of the operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    if name not in _RECURRENT:
        return name in _PACKING
    # A recurrent layer takes (data, batch_sizes, hx, params, ...), or (input, hx, params, ...).
    return not isinstance(args[3], bool) if len(args) > 3 else "batch_first" not in kwargs


_TABLES_OF_HOOKS: list[dict[int, Any]] = [
    table
    for name, table in vars(torch.nn.modules.module).items()
    if name.startswith("_global") and name.endswith("_hooks")
]
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
_PACKING = frozenset(("_pack_padded_sequence", "_pad_packed_sequence"))
_READS_OF_MEMORY = frozenset((Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__))


def listed_weights(layer: torch.nn.RNNBase) -> list[Any]:
    """Return the list of weights that a recurrent layer passes to its kernel."""
    found: list[Any] = layer._flat_weights
    return found


def weights_that_follow(layer: torch.nn.RNNBase) -> tuple[str, ...]:
    """Return the attributes that a recurrent layer derives from its parameters.

    There are none if it calls its kernel with a list of other tensors, as it does where the list
    was exchanged and no parameter was.
    """
    names, weights = layer._flat_weights_names, layer._flat_weights
    # A parametrized weight is computed, and listed, in each call; to compare it would compute it.
    follow = (
        any(hasattr(type(layer), name) for name in names)
        or layer._weights_have_changed()
        or [id(getattr(layer, name, None)) for name in names] == [*map(id, weights)]
    )
    return ("_flat_weights", "_flat_weight_refs") if follow else ()


def traced_graph(
    function: Callable[..., Any], examples: Sequence[Tensor], read: Callable[[Tensor], None]
) -> torch.fx.GraphModule:
    """Return the torch operations of a function of tensors, as a graph.

    Derivatives that the function computes are operations in the graph. Tensors that are not
    arguments are constants of the graph.

    Args:
        function: A function of tensors that returns a list of tensors.
        examples: Arguments for it, all distinct tensors.
        read: A function that raises. It is called with each tensor that is not an argument and
            whose value is read on the host.

    Raises:
        HostReadError: A value is read without a torch operation, or a shape depends on a value.
        RuntimeError: A value that depends on the arguments is read on the host.
    """
    # This import takes 0.4 s, which only callers who trace should pay.
    from torch.fx.experimental.proxy_tensor import make_fx

    with _HostReads(read), _MemoryReads():
        graph: torch.fx.GraphModule = make_fx(function)(*examples)
    return graph


_CPU = torch.device("cpu")


def default_device() -> torch.device:
    """Return `torch.get_default_device()`, in a tenth of its time."""
    if torch._C._len_torch_function_stack() == 0 and torch._C._get_default_device() == "cpu":
        return _CPU  # no mode sets another one, and no default dtype of the old kind
    return torch.empty(0).device


def hooks_of_all_modules() -> list[Any]:
    """Return the hooks that are registered globally for all modules, forward and backward."""
    return [hook for table in _TABLES_OF_HOOKS for hook in table.values()]


def is_host_read(error: BaseException) -> bool:
    """Return whether tracing failed because a value was read on the host."""
    return isinstance(error, HostReadError) or "value out of a tracing tensor" in str(error)


def draws_numbers(graph: torch.fx.GraphModule) -> bool:
    """Return whether a graph draws random numbers."""
    return any(map(is_drawn, graph.graph.nodes))


def is_drawn(node: torch.fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags


def writes(nodes: Iterable[torch.fx.Node]) -> bool:
    """Return whether one of these operations writes to an argument."""
    schemas = [getattr(n.target, "_schema", None) for n in nodes if n.op == "call_function"]
    return any(schema is not None and schema.is_mutable for schema in schemas)


def repeats_removed(graph: torch.fx.GraphModule) -> bool:
    """Merge repeated operations of a graph; return whether that was possible.

    It is not possible if an operation writes to an argument, because equal operations may then have
    different results.
    """
    nodes = list(graph.graph.nodes)
    if writes(nodes):
        return False
    known: dict[Any, torch.fx.Node] = {}
    for node in nodes:
        if node.op != "call_function" or is_drawn(node):
            continue
        given = repr((node.args, node.kwargs))  # the names of nodes are unique
        first = known.setdefault((node.target, given), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
    graph.recompile()
    return True


def _is_same_view(node: torch.fx.Node) -> bool:
    if node.target is not aten.view.default:
        return False
    x, y = (n.meta.get("val") for n in (*node.all_input_nodes, node))
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    return (x.shape, x.stride()) == (y.shape, y.stride())


def lifted_constants(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into additional last arguments, and return them.

    Views that are the same as their tensors are removed. Tensors for number literals of the traced
    function remain in the graph.
    """
    for node in graph.graph.nodes:
        if node.target is aten.detach.default or _is_same_view(node):
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    nodes = list(graph.graph.nodes)
    last = next((n for n in reversed(nodes) if n.op == "placeholder"), None)
    by_identity: dict[int, tuple[Tensor, Any]] = {}
    for node in nodes:
        if node.op != "get_attr":
            continue
        x = getattr(graph, node.target)
        if not isinstance(x, Tensor) or all("lift_fresh" in str(u.target) for u in node.users):
            continue
        if id(x) not in by_identity:
            here = (
                graph.graph.inserting_after(last)
                if last
                else graph.graph.inserting_before(nodes[0])
            )
            with here:
                last = graph.graph.placeholder(f"held_{len(by_identity)}")
                last.meta.update(node.meta)
            by_identity[id(x)] = x, last
        node.replace_all_uses_with(by_identity[id(x)][1])
        graph.graph.erase_node(node)
    for name in {n.target for n in nodes if n.op == "get_attr"} - {
        n.target for n in graph.graph.nodes if n.op == "get_attr"
    }:
        delattr(graph, name)
    graph.recompile()
    return [x for x, _ in by_identity.values()]
