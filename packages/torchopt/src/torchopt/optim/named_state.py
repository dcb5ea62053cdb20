# SPDX-License-Identifier: Apache-2.0
"""States of optimizers as plain dictionaries with a name for each tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from torchopt.base import GradientTransformation, UninitializedState
from torchopt.optim.states import Caster, StepLock, fitted_state, require_states
from torchopt.transform.in_8_bits import Quantized, is_coded
from torchopt.transform.masked import MaskedNode
from torchopt.tree import tree_flatten, tree_structure, tree_unflatten

__all__ = [
    "FORMAT",
    "VERSION",
    "StateGroups",
    "filled",
    "leaf_names",
    "load_named_state",
    "named_state",
    "owners",
]

FORMAT = "torchopt.optimizer_state"
VERSION = 1

# A transformation, its state, the names of the parameters, and the parameters.
Group = tuple[GradientTransformation, Any, Sequence[str], Any]


def leaf_names(tree: Any) -> list[str]:
    """Return the dotted path of each leaf, or its keys in brackets if dots would make two equal.

    Example:
        >>> leaf_names({"a": [1, 2], "b": 3})
        ['a.0', 'a.1', 'b']
        >>> leaf_names({"a.b": 1, "a": {"b": 2}, "c": 3})
        ["['a']['b']", "['a.b']", 'c']
    """
    spec = tree_structure(tree, none_is_leaf=True)
    names = [".".join(map(str, path)) for path in spec.paths()]
    times = Counter(names)
    if len(times) < len(names):
        codes = [accessor.codify("") for accessor in spec.accessors()]
        names = [code if times[name] > 1 else name for name, code in zip(names, codes)]
    return list(_distinct(names))


def _distinct(names: Iterable[str]) -> Iterator[str]:
    """Yield each name, with a number appended if it has occurred before."""
    seen: set[str] = set()
    for name in names:
        number, distinct = 1, name
        while distinct in seen:
            number += 1
            distinct = f"{name}#{number}"
        seen.add(distinct)
        yield distinct


def _is_state(node: Any) -> bool:
    """Return whether `node` is a state; empty nodes of masks and quantized tensors are leaves."""
    return (
        isinstance(node, tuple)
        and hasattr(node, "_fields")
        and type(node) not in (MaskedNode, Quantized)
    )


def _parts(where: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """Yield a leaf, or the tensors of a quantized one."""
    if is_coded(leaf):
        yield from ((f"{where}.{field}", value) for field, value in zip(leaf._fields, leaf))
    else:
        yield where, leaf


def _holds_states(node: Any) -> bool:
    if _is_state(node):
        return True
    children = node.values() if isinstance(node, dict) else node
    return isinstance(node, (tuple, list, dict)) and any(_holds_states(c) for c in children)


def walk(state: Any, names: Sequence[str]) -> list[tuple[str, Any]]:
    """Return pairs of name and value for all leaves of a state, in their order.

    A tree outside of the states of transformations of torchopt has the name "state".
    """
    entries = list(_entries(state, names))
    return list(zip(_distinct(name for name, _, _ in entries), (value for _, _, value in entries)))


def owners(state: Any, names: Sequence[str]) -> dict[str, str]:
    """Return the parameter of each name of `walk` that consists of a field, a dot and one."""
    entries = list(_entries(state, names))
    known = set(names)
    pairs = zip(_distinct(name for name, _, _ in entries), entries)
    return {name: owner for name, (plain, owner, _) in pairs if name == plain and owner in known}


def _entries(state: Any, names: Sequence[str]) -> Iterator[tuple[str, str | None, Any]]:
    """Yield the name, the parameter that it ends with, if any, and the value of each leaf."""
    seen: dict[str, int] = {}

    def inside(node: Any, prefix: str) -> Iterator[tuple[str, str | None, Any]]:
        if _is_state(node):
            kind = type(node).__name__
            for field in node._fields:
                value = getattr(node, field)
                where = f"{prefix}{kind}.{field}"
                number = seen[where] = seen.get(where, 0) + 1
                where = where if number == 1 else f"{where}#{number}"
                yield from field_of(value, where)
        elif not _holds_states(node):
            yield from field_of(node, prefix.removesuffix(".") or "state")
        elif isinstance(node, dict):
            # In the order of the leaves, which is not the insertion order.
            for key in tree_structure(node, is_leaf=lambda x: x is not node).entries():
                yield from inside(node[key], f"{prefix}{key}.")
        else:
            for child in node:
                yield from inside(child, prefix)

    def field_of(value: Any, where: str) -> Iterator[tuple[str, str | None, Any]]:
        if _holds_states(value):
            yield from inside(value, f"{where}.")
            return
        leaves, spec = tree_flatten(value, is_leaf=is_coded, none_is_leaf=True)
        if spec.num_nodes == 1 and len(leaves) == 1:
            # One value for all parameters, or the only parameter.
            yield from ((name, None, part) for name, part in _parts(where, value))
            return
        labels = names
        if len(leaves) != len(names):
            labels = leaf_names(tree_unflatten(spec, list(range(len(leaves)))))
        for label, leaf in zip(labels, leaves):
            owner = None if is_coded(leaf) else label
            yield from ((name, owner, part) for name, part in _parts(f"{where}.{label}", leaf))

    yield from inside(state, "")


def named_state(groups: Sequence[Group]) -> dict[str, Any]:
    """Return the states of groups as dictionaries, lists, strings, numbers and tensors alone."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "groups": [
            {
                "params": list(names),
                "initialized": not isinstance(state, UninitializedState),
                "state": dict(walk(state, names)),
            }
            for _, state, names, _ in groups
        ],
    }


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def load_named_state(saved: dict[str, Any], groups: Sequence[Group]) -> list[Any]:
    """Return the state of each group from a result of `named_state`.

    Raises:
        ValueError: Another format or version, another number of groups, other names of parameters,
            or entries that are missing or left over.
    """
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(
            f"load_named_state_dict: expected what named_state_dict() returns (format {FORMAT!r}), "
            f"got {type(saved).__name__}"
            + (f" with format {saved.get('format')!r}" if isinstance(saved, dict) else "")
            + "; states in tuples are for load_state_dict()."
        )
    if saved["version"] != VERSION:
        raise ValueError(
            f"load_named_state_dict: expected version {VERSION}, got {saved['version']}; it was "
            "saved by another release of torchopt."
        )
    if len(saved["groups"]) != len(groups):
        raise ValueError(
            f"load_named_state_dict: expected {len(groups)} groups of parameters, got "
            f"{len(saved['groups'])}."
        )
    return [
        _load_group(i, entry, group)
        for i, (entry, group) in enumerate(zip(saved["groups"], groups))
    ]


def _differences(expected: Iterable[str], got: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names that are missing, and those that are left over."""
    wanted, found = dict.fromkeys(expected), dict.fromkeys(got)
    return [name for name in wanted if name not in found], [n for n in found if n not in wanted]


def _load_group(index: int, entry: dict[str, Any], group: Group) -> Any:
    impl, _, names, params = group
    if not entry["initialized"]:
        return UninitializedState()
    missing, extra = _differences(names, entry["params"])
    if missing or extra:
        raise ValueError(
            f"load_named_state_dict: group {index} is for other parameters: missing "
            f"[{_shown(missing)}], left over [{_shown(extra)}]."
        )
    with torch.no_grad():
        template = impl.init(params)
    expected = [name for name, _ in walk(template, names)]
    values = entry["state"]
    missing, extra = _differences(expected, values)
    if missing or extra:
        raise ValueError(
            f"load_named_state_dict: the state of group {index} is that of another optimizer: "
            f"missing [{_shown(missing)}], left over [{_shown(extra)}]. Build the optimizer with "
            "the transformations it was saved with."
        )
    return filled(template, names, values, params, f"load_named_state_dict: group {index}")


def filled(
    template: Any, names: Sequence[str], values: dict[str, Any], params: Any, what: str
) -> Any:
    """Return a new state with the values that have the names of `walk`, cast to its form."""
    caster = Caster(what, params)
    leaves = [
        caster.cast(values[name], new, name) if name in values else new
        for name, new in walk(template, names)
    ]
    return tree_unflatten(tree_structure(template, none_is_leaf=True), leaves)


class StateGroups:
    """An optimizer with a state for each group, which it saves and loads.

    Attributes:
        impls: The gradient transformation of each group.
        state_groups: The state of each group; `UninitializedState()` before its first step.
    """

    impls: list[GradientTransformation]
    state_groups: list[Any]
    _lock: StepLock
    # Whether the caller holds the tensors of the states, which must then not be overwritten.
    _lent = False

    def _names_and_params(self, index: int) -> tuple[list[str], Any]:
        """Return the names of the parameters of a group, and their tree."""
        raise NotImplementedError

    def _groups(self) -> list[Group]:
        return [
            (impl, state, *self._names_and_params(i))
            for i, (impl, state) in enumerate(zip(self.impls, self.state_groups))
        ]

    def _take_over(self, states: Sequence[Any]) -> None:
        self.state_groups[:] = states
        self._lent = True

    def state_dict(self) -> tuple[Any, ...]:
        """Return the state of each group. Later steps do not change what was returned.

        After `torch.save`, `torch.load` reads it, with `weights_only=True` too in a process that
        has used an optimizer of torchopt.
        """
        with self._lock:
            self._lent = True
            return tuple(self.state_groups)

    def load_state_dict(self, state_dict: Sequence[Any]) -> None:
        """Load the state of each group, cast to the dtypes and devices of the parameters.

        Tensors that need no cast are kept. Later steps do not change `state_dict`.

        Raises:
            TypeError: `state_dict` is not a tuple or a list.
            ValueError: The number of groups differs, or a state is that of another optimizer or of
                other parameters; nothing is loaded then.
        """
        with self._lock:
            require_states(state_dict, len(self.state_groups))
            pairs = zip(state_dict, self._groups())
            self._take_over(
                [
                    fitted_state(saved, impl, params, f"state[{i}]")
                    for i, (saved, (impl, _, _, params)) in enumerate(pairs)
                ]
            )

    def named_state_dict(self) -> dict[str, Any]:
        """Return the states with a name for each tensor, as plain containers.

        After `torch.save`, it can be read by `torch.load(..., weights_only=True)`. The tensors are
        shared with the optimizer. Later steps do not change what was returned.
        """
        with self._lock:
            self._lent = True
            return named_state(self._groups())

    def load_named_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of `named_state_dict`.

        Tensors are matched by the names of the parameters and of the transformations that they
        belong to. Transformations without a state, such as weight decay, may be added or removed.

        Raises:
            ValueError: Another format, names that are missing or left over, or other shapes; the
                message lists them, and nothing is loaded.
        """
        with self._lock:
            self._take_over(load_named_state(state_dict, self._groups()))
