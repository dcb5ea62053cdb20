# SPDX-License-Identifier: Apache-2.0
"""Save a tree as a flat table of names and values, and report missing names when it is loaded.

The names of the leaves are their key strings, the structure is stored as JSON, and loading runs no
code. Loading a checkpoint of another model raises an error with the names that differ.

Prints::

    ['layers'][0]['bias'] = 0.0
    ['layers'][0]['weight'] = 1.5
    ['name'] = 'small'
    restored: {'layers': [{'weight': 1.5, 'bias': 0.0}], 'name': 'small'}
    missing: ["['layers'][1]['weight']"], unknown: ["['layers'][0]['bias']"]
"""

from __future__ import annotations

import json
from typing import Any

import optree


def save(tree: Any) -> str:
    """Return a tree of JSON values as text."""
    leaves, spec = optree.tree_flatten(tree)
    names = [optree.keystr(accessor) for accessor in spec.accessors()]
    return json.dumps({"spec": optree.treespec_dumps(spec), "leaves": dict(zip(names, leaves))})


def load(text: str) -> Any:
    """Return the tree that was saved."""
    document = json.loads(text)
    spec = optree.treespec_loads(document["spec"])
    names = [optree.keystr(accessor) for accessor in spec.accessors()]
    return spec.unflatten(document["leaves"][name] for name in names)


def load_into(model: Any, text: str) -> Any:
    """Return a tree like ``model`` with the saved leaves.

    Raises:
        ValueError: If the checkpoint has other leaves than ``model``.
    """
    saved = json.loads(text)["leaves"]
    spec = optree.tree_structure(model)
    names = [optree.keystr(accessor) for accessor in spec.accessors()]
    missing = [name for name in names if name not in saved]
    unknown = [name for name in saved if name not in names]
    if missing or unknown:
        raise ValueError(f"missing: {missing}, unknown: {unknown}")
    return spec.unflatten(saved[name] for name in names)


def main() -> None:
    """Save a model, restore it, and try to load it into another model."""
    model = {"layers": [{"weight": 1.5, "bias": 0.0}], "name": "small"}
    text = save(model)
    for name, value in json.loads(text)["leaves"].items():
        print(f"{name} = {value!r}")
    print("restored:", load(text))
    try:
        load_into({"layers": [{"weight": 0.0}, {"weight": 0.0}], "name": ""}, text)
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main()
