# SPDX-License-Identifier: Apache-2.0
"""The names of tensors in a picture, and the results of inner steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torchopt.params.snapshot import ModuleState
from torchopt.tree import tree_leaves

__all__ = ["Names", "collect_names"]


@dataclass
class Names:
    """The names of tensors, and the ends of inner steps.

    Attributes:
        leaves: The name of each leaf tensor, by identity.
        results: The names and tensors that each function computed, which may be several.
        steps: For each inner step in order, its label and the functions that computed its result.
        kept: The tensors, kept alive so that their identities stay valid.
    """

    leaves: dict[int, str] = field(default_factory=dict)
    results: dict[Any, list[tuple[str, Tensor]]] = field(default_factory=dict)
    steps: list[tuple[str, list[Any]]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def add(self, name: str, x: Tensor) -> None:
        """Name one tensor."""
        self.kept.append(x)
        if x.grad_fn is None:
            self.leaves[id(x)] = name
        else:
            known = self.results.setdefault(x.grad_fn, [])
            known[:] = [pair for pair in known if pair[1] is not x]  # the last name wins
            known.append((name, x))

    def add_step(self, label: str | None, tensors: Iterable[Tensor]) -> None:
        """Mark these tensors as the results of an inner step; leaves are ignored."""
        functions = list(dict.fromkeys(x.grad_fn for x in tensors if x.grad_fn is not None))
        if functions:
            self.steps.append((label or f"inner step {len(self.steps) + 1}", functions))


def _is_pair(item: Any) -> bool:
    return (
        isinstance(item, tuple)
        and not isinstance(item, ModuleState)
        and len(item) == 2
        and isinstance(item[0], str)
    )


def _add_params(names: Names, params: Any) -> None:
    if isinstance(params, ModuleState):
        contents = params.visual_contents
        if contents is None:
            raise ValueError(
                "make_dot: expected a ModuleState with names, got one without; take it with "
                "extract_state_dict(module, enable_visual=True)"
            )
        for key, value in contents.items():
            name, x = (value, key) if isinstance(key, Tensor) else value
            names.add(name, x)
        names.add_step(None, [x for c in params.params for x in c.values()])
    elif isinstance(params, Mapping):
        for name, x in params.items():
            _add_pair(names, name, x)
    elif _is_pair(params):
        _add_pair(names, *params)
    elif isinstance(params, Iterable) and not isinstance(params, (str, Tensor)):
        for item in params:
            _add_params(names, item)
    else:
        raise TypeError(
            "make_dot: expected params to be a mapping from names to tensors, a ModuleState, pairs "
            f"of name and tensor, or an iterable of these; got {type(params).__name__}; of a "
            "module pass dict(module.named_parameters())"
        )


def _add_pair(names: Names, name: Any, x: Any) -> None:
    if not isinstance(name, str) or not (x is None or isinstance(x, Tensor)):
        hint = "; swap the two" if isinstance(name, Tensor) and isinstance(x, str) else ""
        raise TypeError(
            f"make_dot: expected a name and its tensor in params, got {type(name).__name__} and "
            f"{type(x).__name__}{hint}"
        )
    if x is not None:
        names.add(name, x)


def collect_names(params: Any, steps: Any) -> Names:
    """Return the names and steps from the arguments of `make_graph`.

    Args:
        params: See `make_graph`.
        steps: See `make_graph`.

    Raises:
        TypeError: An argument is neither names nor tensors.
        ValueError: A snapshot that was taken without names.
    """
    names = Names()
    if params is not None:
        _add_params(names, params)
    if isinstance(steps, Mapping):
        labelled: Iterable[tuple[str | None, Any]] = steps.items()
    else:
        labelled = ((None, tree) for tree in steps or ())
    for label, tree in labelled:
        tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
        if not tensors:
            raise TypeError(
                f"make_dot: expected a tree of tensors for step {label!r}, got a "
                f"{type(tree).__name__} without any"
            )
        names.add_step(label, tensors)
    return names
