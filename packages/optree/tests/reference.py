# SPDX-License-Identifier: Apache-2.0
"""A slow and simple implementation of flattening: the oracle of the laws in ``test_laws.py``.

It shares no code with the package except the registry entries of custom types. It derives kinds,
orders, paths, counts and representations from the documented rules.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import optree


def sorted_keys(keys: list[Any]) -> list[Any]:
    """Return ``keys`` sorted, or sorted by class name and key, or unchanged if neither works."""
    try:
        return sorted(keys)
    except TypeError:
        pass

    def class_then_key(key: Any) -> tuple[str, Any]:
        cls = type(key)
        return f"{cls.__module__}.{cls.__qualname__}", key

    try:
        return sorted(keys, key=class_then_key)
    except TypeError:
        return list(keys)


def is_namedtuple_type(cls: type) -> bool:
    fields = getattr(cls, "_fields", None)
    return (
        issubclass(cls, tuple)
        and type(fields) is tuple
        and all(type(field) is str for field in fields)
        and callable(getattr(cls, "_make", None))
        and callable(getattr(cls, "_asdict", None))
    )


def is_structseq_type(cls: type) -> bool:
    return (
        cls.__bases__ == (tuple,)
        and all(
            type(getattr(cls, name, None)) is int
            for name in ("n_fields", "n_sequence_fields", "n_unnamed_fields")
        )
        and not cls.__flags__ & (1 << 10)
    )


@dataclasses.dataclass
class Outcome:
    """The result of flattening one tree."""

    leaves: list[Any] = dataclasses.field(default_factory=list)
    paths: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    num_nodes: int = 0
    has_custom: bool = False
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Rules:
    """The arguments of a flatten call."""

    is_leaf: Callable[[Any], bool] | None = None
    none_is_leaf: bool = False
    namespace: str = ""
    insertion_ordered: bool = False


def _dict_node(tree: Any, rules: Rules) -> tuple[list[Any], list[Any]]:
    keys = list(tree)
    if type(tree) is not OrderedDict and not rules.insertion_ordered:
        keys = sorted_keys(keys)
    return keys, [tree[key] for key in keys]


def _structseq_labels(cls: type) -> list[str]:
    fields = optree.structseq_fields(cls)
    return [
        f"<unnamed@{i}>" if field == "unnamed field" else field for i, field in enumerate(fields)
    ]


def _one_level(
    tree: Any, rules: Rules
) -> tuple[list[Any], list[Any], Callable[[list[str]], str], bool] | None:
    """Return ``(entries, children, render, is_custom)`` or None for a leaf."""
    cls = type(tree)
    if tree is None:
        return None if rules.none_is_leaf else ([], [], lambda texts: "None", False)
    if cls is tuple:
        return (
            list(range(len(tree))),
            list(tree),
            lambda texts: f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})",
            False,
        )
    if cls is list:
        return list(range(len(tree))), tree, lambda texts: f"[{', '.join(texts)}]", False
    if cls in (dict, OrderedDict, defaultdict, getattr(builtins, "frozendict", dict)):
        keys, values = _dict_node(tree, rules)

        def render_dict(texts: list[str]) -> str:
            body = ", ".join(f"{key!r}: {text}" for key, text in zip(keys, texts))
            if cls is dict:
                return f"{{{body}}}"
            if cls is OrderedDict:
                return f"OrderedDict({{{body}}})" if body else "OrderedDict()"
            if cls is defaultdict:
                return f"defaultdict({tree.default_factory!r}, {{{body}}})"
            return f"frozendict({{{body}}})" if body else "frozendict()"

        return keys, values, render_dict, False
    if cls is deque:

        def render_deque(texts: list[str]) -> str:
            parts = [f"[{', '.join(texts)}]"] if texts else []
            if tree.maxlen is not None:
                parts.append(f"maxlen={tree.maxlen}")
            return f"deque({', '.join(parts)})"

        return list(range(len(tree))), list(tree), render_deque, False
    entry = optree.register_pytree_node.get(cls, namespace=rules.namespace)
    if entry is not None and entry.kind == optree.PyTreeKind.CUSTOM:
        children, metadata, *rest = tuple(entry.flatten_func(tree))
        children = list(children)
        entries = list(rest[0]) if rest and rest[0] is not None else list(range(len(children)))
        return (
            entries,
            children,
            lambda texts: f"CustomTreeNode({cls.__name__}[{metadata!r}], [{', '.join(texts)}])",
            True,
        )
    if is_structseq_type(cls):
        labels = _structseq_labels(cls)
        name = f"{cls.__module__}.{cls.__qualname__}"
        return (
            list(range(len(tree))),
            list(tree),
            lambda texts: f"{name}({', '.join(f'{a}={b}' for a, b in zip(labels, texts))})",
            False,
        )
    if is_namedtuple_type(cls):
        return (
            list(range(len(tree))),
            list(tree),
            lambda texts: (
                f"{cls.__name__}({', '.join(f'{a}={b}' for a, b in zip(cls._fields, texts))})"
            ),
            False,
        )
    return None


def _visit(tree: Any, rules: Rules, path: tuple[Any, ...], outcome: Outcome) -> str:
    outcome.num_nodes += 1
    level = None
    if rules.is_leaf is None or not rules.is_leaf(tree):
        level = _one_level(tree, rules)
    if level is None:
        outcome.leaves.append(tree)
        outcome.paths.append(path)
        return "*"
    entries, children, render, is_custom = level
    outcome.has_custom |= is_custom
    texts = [
        _visit(child, rules, (*path, entry), outcome) for entry, child in zip(entries, children)
    ]
    return render(texts)


def flatten(tree: Any, **rules: Any) -> Outcome:
    """Flatten ``tree`` by the documented rules; keyword arguments are the fields of `Rules`."""
    settings = Rules(**rules)
    outcome = Outcome()
    body = _visit(tree, settings, (), outcome)
    suffix = ", NoneIsLeaf" if settings.none_is_leaf else ""
    kept = settings.namespace if outcome.has_custom else ""
    suffix += f", namespace={kept!r}" if kept else ""
    outcome.text = f"PyTreeSpec({body}{suffix})"
    return outcome


def follow(tree: Any, steps: optree.PyTreeAccessor) -> Any:
    """Apply the entries of an accessor one after the other."""
    return functools.reduce(lambda node, entry: entry(node), steps, tree)
