# SPDX-License-Identifier: Apache-2.0
"""Train part of a model: gradient descent on the parameters that are not frozen.

The model is a tree of numbers. Two maps split it by name into two trees of the same structure: the
parameters to train, and the frozen ones. The optimizer sees the first tree only, and
``tree_combine`` joins both for the forward pass.

Prints::

    trained: {'encoder': {'bias': None, 'scale': None}, 'head': {'bias': 1.0, 'scale': 3.0}}
    frozen:  {'encoder': {'bias': 0.0, 'scale': 2.0}, 'head': {'bias': None, 'scale': None}}
"""

from __future__ import annotations

from typing import Any

import optree

Tree = Any


def predict(params: Tree, x: float) -> float:
    """Return the composition of two affine functions at ``x``."""
    hidden = params["encoder"]["scale"] * x + params["encoder"]["bias"]
    return float(params["head"]["scale"] * hidden + params["head"]["bias"])


def loss(trained: Tree, frozen: Tree) -> float:
    """Return the mean square error for y = 6 x + 1."""
    params = optree.tree_combine(trained, frozen)
    points = [-1.0, 0.0, 1.0]
    return sum((predict(params, x) - (6 * x + 1)) ** 2 for x in points) / len(points)


def gradient(trained: Tree, frozen: Tree, step: float = 1e-6) -> Tree:
    """Return the gradient of the loss, by central differences."""
    leaves, spec = optree.tree_flatten(trained)

    def slope(position: int) -> float:
        values = []
        for sign in (1, -1):
            moved = list(leaves)
            moved[position] += sign * step
            values.append(loss(spec.unflatten(moved), frozen))
        return (values[0] - values[1]) / (2 * step)

    return spec.unflatten(slope(position) for position in range(len(leaves)))


def main() -> None:
    """Train the head of a model whose encoder is frozen."""
    params = {"encoder": {"bias": 0.0, "scale": 2.0}, "head": {"bias": 0.0, "scale": 1.0}}
    names = optree.tree_map_with_path(lambda path, _: path[0], params)
    frozen_names = optree.tree_map(lambda name: name == "encoder", names)
    # Each leaf is in one of the two trees, and None in the other.
    trained = optree.tree_map(lambda p, is_frozen: None if is_frozen else p, params, frozen_names)
    frozen = optree.tree_map(lambda p, is_frozen: p if is_frozen else None, params, frozen_names)

    for _ in range(100):
        slopes = gradient(trained, frozen)
        trained = optree.tree_map(lambda p, slope: p - 0.1 * slope, trained, slopes)

    print("trained:", optree.tree_map(lambda p: round(p, 4), trained))
    print("frozen: ", frozen)


if __name__ == "__main__":
    main()
