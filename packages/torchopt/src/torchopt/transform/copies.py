# SPDX-License-Identifier: Apache-2.0
"""Find the copies of parameters in a state, such as the iterates of schedule-free optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.params.lineage import graph_nodes
from torchopt.tree import tree_leaves, tree_map

__all__ = ["origins", "watched_start"]


def watched_start(inner: GradientTransformation, params: Any) -> tuple[Any, dict[int, Any]]:
    """Return `inner.init(params)` with a graph, and the parameters by the ids of its leaves.

    The graph shows what is computed from the parameters; detach what is kept.
    """
    watched = tree_map(_watched, params)
    known = dict(zip(map(id, tree_leaves(watched)), zip(tree_leaves(watched), tree_leaves(params))))
    with torch.inference_mode(False), torch.enable_grad():
        return inner.init(watched), known


def origins(x: Tensor, known: dict[int, Any]) -> list[Any]:
    """Return the parameters that a tensor of a state is, or is computed from."""
    leaves = [x, *(getattr(node, "variable", None) for node in graph_nodes([x]))]
    return [known[id(leaf)][1] for leaf in leaves if id(leaf) in known]


def _watched(p: Any) -> Any:
    if not (isinstance(p, Tensor) and (p.is_floating_point() or p.is_complex())):
        return p
    return (p.clone() if p.is_inference() else p.detach()).requires_grad_()
