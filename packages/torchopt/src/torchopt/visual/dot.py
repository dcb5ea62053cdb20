# SPDX-License-Identifier: Apache-2.0
"""Graphs as objects of the graphviz package, which is imported when it is first needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchopt.visual.graph import make_graph
from torchopt.visual.text import DOT_GRAPH, DOT_NODE, dot_body

if TYPE_CHECKING:
    import graphviz

__all__ = ["make_dot", "resize_graph"]


def make_dot(
    var: Any,
    params: Any = None,
    show_attrs: bool = False,
    show_saved: bool = False,
    max_attr_chars: int = 50,
    *,
    steps: Mapping[str, Any] | Sequence[Any] | None = None,
) -> graphviz.Digraph:
    """Return a picture of the autograd graph behind tensors.

    Leaves that require a gradient, and named fast weights, are light blue. Outputs are green; the
    base of a view is darker green, with a dotted edge. Saved tensors are orange. A fused optimizer
    step, one call for all tensors, is gold. Inner steps and fused steps are framed.

    It needs the `graphviz` package, and the program `dot` for rendering. `make_graph(...).to_dot()`
    and `.to_mermaid()` return the same picture as text without either.

    Args:
        var: A tensor, or a tree of tensors.
        params: Names; see `make_graph`.
        show_attrs: Write the saved attributes of each function into its node.
        show_saved: Draw the tensors that each function saved; those of functions written in Python
            are always drawn.
        max_attr_chars: The length to which texts of `show_attrs` are cut.
        steps: Results of inner steps; see `make_graph`.

    Raises:
        ImportError: The `graphviz` package is not installed.
        TypeError: `var` has no tensor, or `params` is neither names nor tensors.
        ValueError: A `ModuleState` without names.

    Example:
        >>> import pytest; _ = pytest.importorskip("graphviz")
        >>> import torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> dot = make_dot((w * w).sum(), {"w": w})
        >>> "MulBackward0" in dot.source
        True
    """
    try:
        import graphviz
    except ImportError as error:
        raise ImportError(
            "make_dot: expected the package graphviz (`pip install graphviz`), found none; "
            "torchopt.visual.make_graph(...).to_dot() or .to_mermaid() gives text without it"
        ) from error
    graph = make_graph(
        var,
        params,
        steps=steps,
        show_attrs=show_attrs,
        show_saved=show_saved,
        max_attr_chars=max_attr_chars,
    )
    dot = graphviz.Digraph(graph_attr=dict(DOT_GRAPH), node_attr=dict(DOT_NODE))
    dot.body.extend(dot_body(graph))
    resize_graph(dot)
    return dot


def resize_graph(
    dot: graphviz.Digraph, size_per_element: float = 0.5, min_size: float = 12.0
) -> None:
    """Set the size of the picture from the number of statements in it, in place.

    Args:
        dot: The result of `make_dot`.
        size_per_element: Width and height for each node, edge and frame, in inches.
        min_size: The smallest width and height, in inches.
    """
    size = max(min_size, len(dot.body) * size_per_element)
    dot.graph_attr.update(size=f"{size},{size}")
