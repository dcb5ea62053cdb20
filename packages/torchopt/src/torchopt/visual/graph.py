# SPDX-License-Identifier: Apache-2.0
"""The autograd graph of tensors as data: nodes, edges and clusters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torchopt.torch_internals import AccumulateGrad
from torchopt.tree import tree_leaves
from torchopt.tree_function import Operation
from torchopt.visual.names import Names, collect_names

__all__ = ["Cluster", "Edge", "Graph", "Node", "make_graph"]


@dataclass(frozen=True)
class Node:
    """A tensor or a function.

    Attributes:
        kind: `"leaf"`, `"output"`, `"base"` (of a view), `"saved"`, `"function"`, `"named"` (a
            function with the named tensor it computed), or `"fused"` (one native call for many
            tensors).
        label: The text in the node; lines are separated by newlines.
    """

    kind: str
    label: str


@dataclass(frozen=True)
class Edge:
    """An edge from node number `tail` to node number `head`, in the direction of the values.

    Attributes:
        tail: The number of the node where it starts.
        head: The number of the node where it ends.
        style: `"solid"`, `"dotted"` (a view of its base) or `"undirected"` (a saved tensor).
    """

    tail: int
    head: int
    style: str = "solid"


@dataclass(frozen=True)
class Cluster:
    """A frame around nodes that belong together, and around further clusters.

    Attributes:
        label: The title.
        nodes: The numbers of the nodes, without those of inner clusters.
        clusters: The inner clusters.
    """

    label: str
    nodes: tuple[int, ...]
    clusters: tuple[Cluster, ...] = ()


@dataclass
class Graph:
    """An autograd graph.

    Attributes:
        nodes: The nodes, in the order in which they are found from the outputs. The number of a
            node is its position.
        edges: The edges.
        clusters: Inner steps, and fused steps in them or outside. A node is in at most one.
    """

    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    clusters: list[Cluster] = field(default_factory=list)

    def to_dot(self) -> str:
        """Return the graph in the language of graphviz, as text. The package is not needed."""
        from torchopt.visual.text import dot_source

        return dot_source(self)

    def to_mermaid(self) -> str:
        """Return the graph as a mermaid flowchart, which Markdown viewers draw."""
        from torchopt.visual.text import mermaid_source

        return mermaid_source(self)


def _shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def _titled(name: str, x: Tensor) -> str:
    return f"{name}\n{_shape(x)}" if name else _shape(x)


def _inputs(function: Any) -> list[Any]:
    return [source for source, _ in function.next_functions if source is not None]


def fused_rule(function: Any) -> str | None:
    """Return the name of the rule if `function` is a fused step of many tensors, else None."""
    operation = getattr(function, "operation", None)
    if not isinstance(operation, Operation):
        return None
    call = getattr(operation.kernel, "__self__", None)
    rule = getattr(call, "rule", None)
    return None if rule is None else f"fused {rule.name}, {getattr(call, 'size', '?')} tensors"


class _Builder:
    """Walks from the outputs to the leaves and numbers nodes."""

    def __init__(
        self,
        names: Names,
        outputs: list[Tensor],
        *,
        show_attrs: bool,
        show_saved: bool,
        max_attr_chars: int,
    ) -> None:
        self.names = names
        self.outputs = outputs
        self.output_ids = {id(x) for x in outputs}  # their names are in nodes of their own
        self.show_attrs = show_attrs
        self.show_saved = show_saved
        self.max_attr_chars = max_attr_chars
        self.graph = Graph()
        self.function_nodes: dict[Any, int] = {}
        self.owner: dict[int, Any] = {}  # the function of each node of a saved tensor
        self.tensor_nodes: dict[tuple[int, str], int] = {}
        self.kept: list[Tensor] = []

    def add_node(self, kind: str, label: str) -> int:
        self.graph.nodes.append(Node(kind, label))
        return len(self.graph.nodes) - 1

    def add_tensor(self, x: Tensor, kind: str, name: str) -> int:
        key = (id(x), kind)
        if key not in self.tensor_nodes:
            self.kept.append(x)
            self.tensor_nodes[key] = self.add_node(kind, _titled(name, x))
        return self.tensor_nodes[key]

    def function_label(self, function: Any) -> str:
        title = fused_rule(function) or function.name().rpartition("::")[2]
        if not self.show_attrs:
            return title
        rows = []
        for name in sorted(dir(function)):
            if not name.startswith("_saved_"):
                continue
            value = _saved_value(function, name)
            text = f"[saved tensor {_shape(value)}]" if isinstance(value, Tensor) else str(value)
            if len(text) > self.max_attr_chars:
                text = text[: self.max_attr_chars - 3] + "..."
            rows.append(f"{name.removeprefix('_saved_')}: {text}")
        return "\n".join([title, *rows])

    def named_results(self, function: Any) -> list[tuple[str, Tensor]]:
        """Return the named tensors that a function computed, except for outputs."""
        pairs = self.names.results.get(function, [])
        return sorted(
            ((name, x) for name, x in pairs if id(x) not in self.output_ids),
            key=lambda pair: pair[1].output_nr,
        )

    def add_function(self, function: Any) -> int:
        """Number a function; an accumulator of gradients is represented by its leaf."""
        if isinstance(function, AccumulateGrad):
            variable = function.variable
            number = self.add_tensor(variable, "leaf", self.names.leaves.get(id(variable), ""))
        elif named := self.named_results(function):
            title = function.name().rpartition("::")[2]
            rows = [_titled(name, x) for name, x in named]
            number = self.add_node("named", "\n".join([title, *rows]))
        else:
            kind = "function" if fused_rule(function) is None else "fused"
            number = self.add_node(kind, self.function_label(function))
        self.function_nodes[function] = number
        return number

    def add_saved(self, function: Any, number: int) -> None:
        found: list[tuple[str, Tensor]] = []
        if self.show_saved:
            for name in sorted(dir(function)):
                if name.startswith("_saved_"):
                    value = _saved_value(function, name)
                    rows = value if isinstance(value, (tuple, list)) else [value]
                    title = name.removeprefix("_saved_")
                    found += [(title, x) for x in rows if isinstance(x, Tensor)]
        # Functions written in Python always, as in the published package, except for our own.
        if self.show_saved or fused_rule(function) is None:
            rows = _saved_value(function, "saved_tensors")
            found += [("saved", x) for x in rows or () if isinstance(x, Tensor)]
        for title, x in found:
            saved = self.add_tensor(x, "saved", title)
            self.owner.setdefault(saved, function)
            self.graph.edges.append(Edge(saved, number, "undirected"))

    def walk(self, roots: Iterable[Any]) -> None:
        stack = [root for root in roots if root is not None]
        while stack:
            function = stack.pop()
            if function in self.function_nodes:
                continue
            number = self.add_function(function)
            self.add_saved(function, number)
            stack += reversed(_inputs(function))

    def add_edges(self) -> None:
        for function, head in list(self.function_nodes.items()):
            drawn = []
            for source in _inputs(function):
                tail = self.function_nodes[source]
                if tail not in drawn:  # a second edge between the same two nodes adds nothing
                    drawn.append(tail)
            self.graph.edges += [Edge(tail, head) for tail in drawn]

    def build(self) -> Graph:
        for x in self.outputs:
            self.add_output(x)
        self.add_edges()
        self.graph.clusters = _clusters(self)
        return self.graph

    def add_output(self, x: Tensor) -> None:
        self.walk([x.grad_fn])
        if x.grad_fn is None:
            self.add_tensor(x, "leaf", self.names.leaves.get(id(x), ""))
            return
        named = self.names.results.get(x.grad_fn, [])
        name = next((name for name, tensor in named if tensor is x), "")
        number = self.add_tensor(x, "output", name)
        self.graph.edges.append(Edge(self.function_nodes[x.grad_fn], number))
        if x._is_view() and x._base is not None:
            self.walk([x._base.grad_fn])
            base = self.add_tensor(x._base, "base", self.names.leaves.get(id(x._base), ""))
            if x._base.grad_fn is not None:
                self.graph.edges.append(Edge(self.function_nodes[x._base.grad_fn], base))
            self.graph.edges.append(Edge(base, number, "dotted"))


def _saved_value(function: Any, name: str) -> Any:
    try:
        return getattr(function, name)
    except AttributeError:
        return None
    except RuntimeError:  # after a backward pass
        return "freed"


def _reach(functions: Iterable[Any]) -> set[Any]:
    seen: set[Any] = set()
    stack = list(functions)
    while stack:
        function = stack.pop()
        if function not in seen:
            seen.add(function)
            stack += _inputs(function)
    return seen


def _step_members(names: Names, present: Mapping[Any, int]) -> list[tuple[str, set[Any]]]:
    """Return the functions of each inner step: those behind its results, but no earlier ones.

    Accumulators are left out, because a leaf belongs to no step.
    """
    taken: set[Any] = set()
    members = []
    for label, ends in names.steps:
        own = _reach(ends) - taken
        taken |= own
        own = {f for f in own if f in present and not isinstance(f, AccumulateGrad)}
        if own:
            members.append((label, own))
    return members


def _applies_updates(function: Any) -> bool:
    """Return whether a function adds updates to parameters, one by one or all at once."""
    name = function.name().rpartition("::")[2]
    return bool(
        name == "AddBackward0" or name.startswith(("ForeachAddBackward", "_AddListsBackward"))
    )


def _clusters(builder: _Builder) -> list[Cluster]:
    numbers = builder.function_nodes
    steps = _step_members(builder.names, numbers)
    home = {f: index for index, (_, members) in enumerate(steps) for f in members}
    consumers: dict[Any, list[Any]] = {}
    for function in numbers:
        for source in _inputs(function):
            consumers.setdefault(source, []).append(function)

    def cluster(label: str, members: Iterable[Any], inside: tuple[Cluster, ...] = ()) -> Cluster:
        own = set(members)
        saved = [number for number, owner in builder.owner.items() if owner in own]
        return Cluster(label, tuple(sorted([numbers[f] for f in own] + saved)), inside)

    # A fused step: the one call, and the additions that apply its updates.
    fused: dict[int | None, list[Cluster]] = {}
    claimed: set[Any] = set()
    for function in numbers:
        rule = fused_rule(function)
        if rule is None:
            continue
        place = home.get(function)
        group = {function} | {
            f
            for f in consumers.get(function, ())
            if home.get(f) == place and f not in claimed and _applies_updates(f)
        }
        claimed |= group
        label = f"{rule.partition(',')[0]} step"
        fused.setdefault(place, []).append(cluster(label, group))
    framed = [
        cluster(label, members - claimed, tuple(fused.get(index, ())))
        for index, (label, members) in enumerate(steps)
    ]
    return framed + fused.get(None, [])


def make_graph(
    var: Any,
    params: Any = None,
    *,
    steps: Mapping[str, Any] | Sequence[Any] | None = None,
    show_attrs: bool = False,
    show_saved: bool = False,
    max_attr_chars: int = 50,
) -> Graph:
    """Return the autograd graph behind tensors.

    Args:
        var: A tensor, or a tree of tensors.
        params: The names of tensors: a mapping from names to tensors, a `ModuleState` taken with
            `enable_visual=True`, pairs of name and tensor such as `module.named_parameters()`, or
            an iterable of these. Computed tensors can be named too. Each `ModuleState` of computed
            parameters marks the end of an inner step, which becomes a cluster.
        steps: The results of further inner steps in order, each a tree of tensors. A mapping from
            labels to trees gives the clusters these labels.
        show_attrs: Write the saved attributes of each function into its node.
        show_saved: Draw the tensors that each function saved.
        max_attr_chars: The length to which texts of `show_attrs` are cut; at least 4.

    Raises:
        TypeError: `var` has no tensor, or `params` is neither names nor tensors.
        ValueError: A `ModuleState` without names.

    Example:
        >>> import torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> print(make_graph((w * w).sum(), {"w": w}).to_mermaid())
        flowchart TD
          n0["SumBackward0"]
          n1["MulBackward0"]
          n2("w<br>(2)"):::leaf
          n3("()"):::output
          ...
    """
    tensors = [x for x in tree_leaves(var) if isinstance(x, Tensor)]
    if not tensors:
        raise TypeError(
            f"make_dot: expected a tensor or a tree of tensors, got {type(var).__name__}; pass a "
            "result, such as a loss, and dict(module.named_parameters()) as params="
        )
    builder = _Builder(
        collect_names(params, steps),
        tensors,
        show_attrs=show_attrs,
        show_saved=show_saved,
        max_attr_chars=max(4, max_attr_chars),
    )
    return builder.build()
