# SPDX-License-Identifier: Apache-2.0
"""A library that defines its own node type: interval arithmetic on trees.

The library registers its class in its own namespace and re-exports the tree functions with that
namespace as the default. For other libraries an interval is still a leaf.

Prints::

    bounds: [('width.low', 1.0), ('width.high', 2.0), ('sides[0].low', 3.0), ('sides[0].high', 4.0)]
    centers: {'width': 1.5, 'sides': [3.5]}
    scaled: {'width': Interval(10.0, 20.0), 'sides': [Interval(30.0, 40.0)]}
    leaves elsewhere: [Interval(3.0, 4.0), Interval(1.0, 2.0)]
"""

from __future__ import annotations

from typing import Any

import optree

pytree: Any = optree.pytree.reexport(namespace="intervals", module="intervals_example.pytree")


@pytree.register_node_class(path_entry_type=optree.GetAttrEntry, namespace="intervals")
class Interval:
    """The numbers from ``low`` to ``high``."""

    def __init__(self, low: Any, high: Any) -> None:
        self.low, self.high = low, high

    def __repr__(self) -> str:
        return f"Interval({self.low}, {self.high})"

    def __tree_flatten__(self) -> tuple[tuple[Any, Any], None, tuple[str, str]]:
        """Return the bounds, no metadata, and the names of the bounds."""
        return (self.low, self.high), None, ("low", "high")

    @classmethod
    def __tree_unflatten__(cls, metadata: None, children: tuple[Any, Any]) -> Interval:
        """Return an interval with new bounds, which may be any objects."""
        return cls(*children)


def name_of(accessor: optree.PyTreeAccessor) -> str:
    """Return the code of an accessor, with the key of the outermost dictionary as the variable."""
    return accessor[1:].codify(accessor[0].entry)


def main() -> None:
    """Read and change trees of intervals."""
    tree = {"width": Interval(1.0, 2.0), "sides": [Interval(3.0, 4.0)]}
    with optree.dict_insertion_ordered(True, namespace="intervals"):
        accessors, leaves, _ = pytree.flatten_with_accessor(tree)
        print("bounds:", [(name_of(a), leaf) for a, leaf in zip(accessors, leaves)])
    centers = pytree.map(
        lambda interval: (interval.low + interval.high) / 2,
        tree,
        is_leaf=lambda x: isinstance(x, Interval),
    )
    print("centers:", centers)
    print("scaled:", pytree.map(lambda bound: 10 * bound, tree))
    print("leaves elsewhere:", optree.tree_leaves(tree))


if __name__ == "__main__":
    main()
