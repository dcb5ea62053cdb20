# SPDX-License-Identifier: Apache-2.0
"""The one table of trees that every tree benchmark runs on.

Trees are built without any library. A leaf is the result of a function that makes leaves, by
default a small object of a class that no library has registered: to a pytree library it is like a
tensor, but cheap.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, NamedTuple

Tree = Any
MakeLeaf = Callable[[], Any]

RESNETS = ("resnet18", "resnet50", "resnet101", "resnet152")


class Leaf:
    """A leaf with a number, so that answers in the wrong order are detected."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"Leaf({self.number})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Leaf) and self.number == other.number

    def __hash__(self) -> int:
        return hash(self.number)


class Tensors(NamedTuple):
    """A module's own tensors."""

    parameters: tuple[Any, ...]
    buffers: list[Any]


class Containers(NamedTuple):
    """A module's own tensors by name, empty entries included."""

    parameters: dict[str, Any]
    buffers: dict[str, Any]


class Slots(NamedTuple):
    """The state of an optimizer for one parameter."""

    step: Any
    mu: Any
    nu: Any
    master: Any
    average: Any


class Pair:
    """A user's container, registered as a custom node by the rivals that can."""

    __slots__ = ("left", "right")

    def __init__(self, left: Any, right: Any) -> None:
        self.left = left
        self.right = right

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pair) and (self.left, self.right) == (other.left, other.right)

    __hash__ = None  # type: ignore[assignment]  # mutable and compared by value


def flatten_pair(pair: Pair) -> tuple[tuple[Any, Any], None]:
    """Return the children and the metadata of a pair."""
    return (pair.left, pair.right), None


def unflatten_pair(_: None, children: Any) -> Pair:
    """Return the pair with these children."""
    return Pair(*children)


@dataclasses.dataclass
class Record:
    """A user's dataclass, registered as a custom node by the rivals that can."""

    left: Any
    right: Any


def numbered_leaf() -> MakeLeaf:
    """Return a function that makes leaves numbered 0, 1, 2, ..."""
    numbers = itertools.count()
    return lambda: Leaf(next(numbers))


def number_leaf() -> MakeLeaf:
    """Return a function that makes the integers 1, 2, 3, ..., for sums and comparisons."""
    numbers = itertools.count(1)
    return lambda: next(numbers)


# ---------------------------------------------------------------------- module trees


@functools.cache
def _descriptions() -> dict[str, Any]:
    record = Path(__file__).with_name("resnet_modules.json")
    descriptions: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return descriptions


def _named_tensors(text: str, leaf: MakeLeaf, mapping: type[dict[str, Any]]) -> dict[str, Any]:
    """Return the tensors of `weight,bias=None` by name."""
    tensors = mapping()
    for entry in filter(None, text.split(",")):
        name, _, empty = entry.partition("=")
        tensors[sys.intern(name)] = None if empty else leaf()
    return tensors


def module_tree(description: Any, leaf: MakeLeaf, mapping: type[dict[str, Any]]) -> Tree:
    """Return a module as the TorchOpt paper's Table 2 has it.

    A mapping of the children, `tensors` and `containers`; a list for Sequential and
    ModuleList. A tensor appears twice, as in a module that is listed both ways.
    """
    if isinstance(description, list):
        return [module_tree(child, leaf, mapping) for child in description]
    tree = mapping()
    if isinstance(description, dict):
        for name, child in description.items():
            tree[name] = module_tree(child, leaf, mapping)
        parameters, buffers = mapping(), mapping()
    else:
        parameters, buffers = (
            _named_tensors(text, leaf, mapping) for text in description.split("|")
        )
    tree["tensors"] = Tensors(
        tuple(tensor for tensor in parameters.values() if tensor is not None),
        [tensor for tensor in buffers.values() if tensor is not None],
    )
    tree["containers"] = Containers(parameters, buffers)
    return tree


# ------------------------------------------------------------------------ state dicts


Rename = Callable[[str], str]


def same(key: str) -> str:
    """Return the key itself, the object that earlier trees used."""
    return key


def equal(key: str) -> str:
    """Return a new string equal to the key, as unpickling or formatting makes one."""
    return (key + ".")[:-1]


@functools.cache
def _transformer_keys() -> tuple[str, ...]:
    """Return the 1000 names of the tensors of a transformer with 62 layers."""
    of_layer = [
        f"{part}.{tensor}"
        for part in (
            *("ln_1", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"),
            *("ln_2", "mlp.fc_in", "mlp.fc_out"),
        )
        for tensor in ("weight", "bias")
    ]
    keys = ["embed.tokens.weight", "embed.positions.weight"]
    keys += ["embed.norm.weight", "embed.norm.bias"]
    keys += [f"layers.{layer}.{name}" for layer in range(62) for name in of_layer]
    return (*keys, "ln_f.weight", "ln_f.bias", "head.weight", "head.bias")


@functools.cache
def _transformer_paths() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(sys.intern(part) for part in key.split(".")) for key in _transformer_keys())


@functools.cache
def _wide_keys() -> tuple[str, ...]:
    keys = [f"parameter_{index}" for index in range(10_000)]
    random.Random(0).shuffle(keys)
    return tuple(keys)


def flat_state(leaf: MakeLeaf, rename: Rename = same) -> Tree:
    """Return a transformer's state as one dict."""
    return {rename(key): leaf() for key in _transformer_keys()}


def nested_state(leaf: MakeLeaf, rename: Rename = same) -> Tree:
    """Return a transformer's state with a dict for every dot."""
    tree: dict[str, Any] = {}
    for *folders, name in _transformer_paths():
        node = tree
        for folder in folders:
            node = node.setdefault(rename(folder), {})
        node[rename(name)] = leaf()
    return tree


def wide_dict(leaf: MakeLeaf, rename: Rename = same) -> Tree:
    """Return a dict of 10,000 leaves under keys in random order."""
    return {rename(key): leaf() for key in _wide_keys()}


def small_dict(leaf: MakeLeaf, rename: Rename = same) -> Tree:
    """Return a dict of 3 leaves whose insertion order is not the sorted one."""
    return {rename(key): leaf() for key in ("weight", "bias", "scale")}


def deep(leaf: MakeLeaf, depth: int = 500) -> Tree:
    """Return dicts in tuples in dicts, with one leaf beside every level."""
    tree: Tree = leaf()
    for level in range(depth):
        tree = {"next": tree, "here": leaf()} if level % 2 else (leaf(), tree)
    return tree


def million(leaf: MakeLeaf) -> Tree:
    """Return a list of 1000 flat transformer states, 1,000,000 leaves under shared keys."""
    return [flat_state(leaf) for _ in range(1000)]


def _resnet(name: str, mapping: type[dict[str, Any]]) -> Callable[[MakeLeaf], Tree]:
    return lambda leaf: module_tree(_descriptions()[name], leaf, mapping)


# ------------------------------------------------------------------------- the tables

# name in results: (name in tables, maker)
TREES: dict[str, tuple[str, Callable[[MakeLeaf], Tree]]] = {
    "resnet18": ("ResNet18 modules", _resnet("resnet18", OrderedDict)),
    "resnet50": ("ResNet50 modules", _resnet("resnet50", OrderedDict)),
    "resnet101": ("ResNet101 modules", _resnet("resnet101", OrderedDict)),
    "resnet152": ("ResNet152 modules", _resnet("resnet152", OrderedDict)),
    "resnet50_dicts": ("ResNet50 as nested dicts", _resnet("resnet50", dict)),
    "dict3": ("dict of 3", small_dict),
    "tuple3": ("tuple of 3", lambda leaf: (leaf(), leaf(), leaf())),
    "state_flat": ("transformer state, flat", flat_state),
    "state_nested": ("transformer state, nested", nested_state),
    "dict10k": ("dict of 10,000", wide_dict),
    "list10k": ("list of 10,000", lambda leaf: [leaf() for _ in range(10_000)]),
    "million": ("1,000,000 leaves", million),
    "namedtuples": (
        "1000 namedtuples",
        lambda leaf: [Slots(leaf(), leaf(), leaf(), leaf(), leaf()) for _ in range(1000)],
    ),
    "deep500": ("depth 500", deep),
}

# Trees for single operations only, not part of the matrix.
SPECIAL_TREES: dict[str, tuple[str, Callable[[MakeLeaf], Tree]]] = {
    "leaf": ("a bare leaf", lambda leaf: leaf()),
    "custom1000": ("1000 custom nodes", lambda leaf: [Pair(leaf(), leaf()) for _ in range(1000)]),
    "dataclass1000": (
        "1000 dataclasses",
        lambda leaf: [Record(leaf(), leaf()) for _ in range(1000)],
    ),
}


class ColdTree(NamedTuple):
    """A tree that is visited once: every sample of a benchmark gets new ones."""

    label: str
    make: Callable[[MakeLeaf, Rename], Tree]
    keys: str  # "new": never seen before; "same": the known objects; "equal": new objects
    batch: int  # trees visited one after the other in one sample


def _without_keys(make: Callable[[MakeLeaf], Tree]) -> Callable[[MakeLeaf, Rename], Tree]:
    return lambda leaf, _: make(leaf)


def _cold_trees() -> dict[str, ColdTree]:
    keyed: list[tuple[str, Callable[[MakeLeaf, Rename], Tree], int]] = [
        ("dict3", small_dict, 5000),
        ("state_flat", flat_state, 20),
        ("state_nested", nested_state, 20),
        ("dict10k", wide_dict, 3),
    ]
    labels = {"new": "new keys", "equal": "first visit, equal keys", "same": "first visit"}
    table = {
        f"{name}_{keys}": ColdTree(f"{TREES[name][0]}, {label}", make, keys, batch)
        for keys, label in labels.items()
        for name, make, batch in keyed
    }
    for name, batch in (("resnet50", 40), ("resnet50_dicts", 60), ("namedtuples", 10)):
        label, make_hot = TREES[name]
        table[f"{name}_same"] = ColdTree(
            f"{label}, first visit", _without_keys(make_hot), "same", batch
        )
    return table


COLD_TREES = _cold_trees()


def cold_batch(name: str, salt: str) -> list[Tree]:
    """Return new trees to be visited once; `salt` must differ from call to call."""
    cold = COLD_TREES[name]
    fixed = {"same": same, "equal": equal}
    trees = []
    for index in range(cold.batch):
        suffix = f"_{salt}_{index}"
        rename = fixed.get(cold.keys, lambda key, suffix=suffix: key + suffix)
        trees.append(cold.make(numbered_leaf(), rename))
    return trees


def make_tree(name: str, leaf: MakeLeaf) -> Tree:
    """Return a new tree of the table.

    Raises:
        KeyError: there is no tree of that name.
    """
    table = {**TREES, **SPECIAL_TREES}
    if name not in table:
        raise KeyError(f"expected one of {', '.join(table)}, got {name!r}")
    return table[name][1](leaf)


def tree_label(name: str) -> str:
    """Return the name of a tree in tables."""
    if name in COLD_TREES:
        return COLD_TREES[name].label
    return {**TREES, **SPECIAL_TREES}[name][0]
