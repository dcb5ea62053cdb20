# SPDX-License-Identifier: Apache-2.0
"""Apply a separate transformation to each labelled part of the tree."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torchopt.base import Driver, GradientTransformation, require_transformation
from torchopt.shown import shown
from torchopt.transform.masked import part_of
from torchopt.tree import flatten_up_to, prefix_leaves, tree_flatten, tree_leaves, tree_unflatten

__all__ = ["PartitionState", "partition"]


class PartitionState(NamedTuple):
    """`inner_states`: the state of each transformation, by label."""

    inner_states: Any


@dataclass(frozen=True)
class Partition(Driver):
    """Applies `transformations[label]` to the leaves with that label."""

    transformations: Mapping[Hashable, GradientTransformation]
    labels: Any
    needs_tree: ClassVar[bool] = True

    def _leaf_labels(self, tree: Any) -> list[Any]:
        labels = self.labels(tree) if callable(self.labels) else self.labels
        found = prefix_leaves(labels, tree, "partition(transformations, labels)")
        for label, leaf in zip(found, tree_leaves(tree, none_is_leaf=True)):
            # A missing leaf needs no label.
            known = isinstance(label, Hashable) and label in self.transformations
            if not known and not (leaf is None and label is None):
                raise ValueError(
                    "partition(transformations, labels): expected one of the labels "
                    f"{str(list(self.transformations))[:160]}, got {shown(label)}"
                )
        return found

    def init(self, params: Any) -> PartitionState:
        leaves, spec = tree_flatten(params, none_is_leaf=True)
        labels = self._leaf_labels(params)
        return PartitionState(
            inner_states={
                label: inner.init(
                    tree_unflatten(spec, part_of(leaves, labels, label)) if label in labels else ()
                )
                for label, inner in self.transformations.items()
            }
        )

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Transform each part and merge the results."""
        leaves, spec = tree_flatten(updates if params is None else params, none_is_leaf=True)
        labels = self._leaf_labels(tree_unflatten(spec, leaves))
        values = flatten_up_to(spec, updates, "updates")
        merged = list(values)
        states = {}
        # If a later part raises, no state may have been written.
        inplace = inplace and len(self.transformations) == 1
        for label, inner in self.transformations.items():
            if label not in labels:
                states[label] = state.inner_states[label]
                continue
            part = tree_unflatten(spec, part_of(values, labels, label))
            own = None if params is None else tree_unflatten(spec, part_of(leaves, labels, label))
            part, states[label] = inner.update(
                part, state.inner_states[label], params=own, inplace=inplace
            )
            for i, value in enumerate(flatten_up_to(spec, part, "updates")):
                if labels[i] == label:
                    merged[i] = value
        return tree_unflatten(spec, merged), PartitionState(inner_states=states)


def partition(
    transformations: Mapping[Hashable, GradientTransformation],
    labels: Any | Callable[[Any], Any],
) -> GradientTransformation:
    """Return the transformation that applies a separate transformation to each labelled part.

    Args:
        transformations: A transformation for each label.
        labels: A tree of labels that is a prefix of the tree of parameters (one label applies to
            all leaves below it), or a function that returns such a tree for the parameters (for the
            updates if `update` is called without `params`).

    Raises:
        TypeError: A value of `transformations` is not a gradient transformation.
        ValueError: From `init` and `update`: an unknown label, or labels that are not a prefix
            of the parameters.

    Example:
        >>> import torch, torchopt
        >>> optimizer = partition(
        ...     {"slow": torchopt.sgd(0.1), "fast": torchopt.sgd(1.0)},
        ...     {"body": "slow", "head": "fast"},
        ... )
        >>> params = {"body": [torch.ones(1), torch.ones(1)], "head": torch.ones(1)}
        >>> optimizer.update(params, optimizer.init(params))[0]
        {'body': [tensor([-0.1000]), tensor([-0.1000])], 'head': tensor([-1.])}
    """
    for label, inner in transformations.items():
        require_transformation(inner, f"partition(transformations, labels): at {label!r}")
    return Partition(dict(transformations), labels).pair()
