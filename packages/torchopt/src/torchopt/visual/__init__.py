# SPDX-License-Identifier: Apache-2.0
"""Pictures of autograd graphs, as graphviz objects, DOT text or mermaid text."""

from __future__ import annotations

from torchopt.visual.dot import make_dot, resize_graph
from torchopt.visual.graph import Graph, make_graph

__all__ = ["Graph", "make_dot", "make_graph", "resize_graph"]
