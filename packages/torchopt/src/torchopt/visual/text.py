# SPDX-License-Identifier: Apache-2.0
"""Write a graph as text: DOT for graphviz, mermaid for Markdown viewers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchopt.visual.graph import Cluster, Graph

__all__ = ["DOT_GRAPH", "DOT_NODE", "dot_body", "dot_source", "mermaid_source"]

DOT_GRAPH = {"size": "12,12"}
DOT_NODE = {
    "style": "filled",
    "shape": "box",
    "align": "left",
    "fontsize": "10",
    "ranksep": "0.1",
    "height": "0.2",
    "fontname": "monospace",
}
CLUSTER_STYLE = "style=rounded color=gray40 fontname=monospace fontsize=10 labeljust=l"
FILL = {
    "leaf": "lightblue",
    "named": "lightblue",
    "output": "darkolivegreen1",
    "base": "darkolivegreen3",
    "saved": "orange",
    "function": "lightgrey",
    "fused": "gold",
}


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _dot_cluster(cluster: Cluster, name: str, indent: str) -> Iterator[str]:
    yield f"{indent}subgraph cluster_{name} {{\n"
    yield f"{indent}\tlabel={_quoted(cluster.label)} {CLUSTER_STYLE}\n"
    for index, inner in enumerate(cluster.clusters):
        yield from _dot_cluster(inner, f"{name}_{index}", indent + "\t")
    for number in cluster.nodes:
        yield f"{indent}\tn{number}\n"
    yield f"{indent}}}\n"


def dot_body(graph: Graph) -> list[str]:
    """Return the statements between the braces, each with its newline."""
    lines = []
    for number, node in enumerate(graph.nodes):
        shape = " shape=box3d" if node.kind == "fused" else ""
        lines.append(
            f"\tn{number} [label={_quoted(node.label)} fillcolor={FILL[node.kind]}{shape}]\n"
        )
    for edge in graph.edges:
        style = {"solid": "", "dotted": " [style=dotted]", "undirected": " [dir=none]"}
        lines.append(f"\tn{edge.tail} -> n{edge.head}{style[edge.style]}\n")
    for index, cluster in enumerate(graph.clusters):
        lines += _dot_cluster(cluster, str(index), "\t")
    return lines


def _attributes(values: dict[str, str]) -> str:
    return " ".join(f"{name}={_quoted(value)}" for name, value in values.items())


def dot_source(graph: Graph) -> str:
    """Return the graph in the language of graphviz."""
    head = f"digraph {{\n\tgraph [{_attributes(DOT_GRAPH)}]\n\tnode [{_attributes(DOT_NODE)}]\n"
    return head + "".join(dot_body(graph)) + "}\n"


def _mermaid_cluster(cluster: Cluster, name: str, indent: str) -> Iterator[str]:
    yield f"{indent}subgraph {name}[{_html(cluster.label)}]"
    for index, inner in enumerate(cluster.clusters):
        yield from _mermaid_cluster(inner, f"{name}_{index}", indent + "  ")
    for number in cluster.nodes:
        yield f"{indent}  n{number}"
    yield f"{indent}end"


def _html(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace('"', "&quot;")
    escaped = escaped.replace("<", "&lt;").replace(">", "&gt;").replace("\n", "<br>")
    return f'"{escaped}"'


def mermaid_source(graph: Graph) -> str:
    """Return the graph as a mermaid flowchart."""
    lines = ["flowchart TD"]
    for number, node in enumerate(graph.nodes):
        left, right = ("[", "]") if node.kind in ("function", "fused") else ("(", ")")
        suffix = "" if node.kind == "function" else f":::{node.kind}"
        lines.append(f"  n{number}{left}{_html(node.label)}{right}{suffix}")
    arrows = {"solid": "-->", "dotted": "-.->", "undirected": "---"}
    lines += [f"  n{e.tail} {arrows[e.style]} n{e.head}" for e in graph.edges]
    for index, cluster in enumerate(graph.clusters):
        lines += _mermaid_cluster(cluster, f"c{index}", "  ")
    colours = {"leaf": "#add8e6", "named": "#add8e6", "output": "#caff70", "base": "#a2cd5a"}
    colours |= {"saved": "#ffa500", "fused": "#ffd700"}
    lines += [f"  classDef {kind} fill:{colour},color:#000" for kind, colour in colours.items()]
    return "\n".join(lines) + "\n"
