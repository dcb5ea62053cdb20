# SPDX-License-Identifier: Apache-2.0
"""The arguments of a call, and whether those of another call differ only in the values of tensors.

Each call is compared with earlier ones. The forms of all tensors are compared by one call of C++.
Only if that finds a difference are they read and compared one by one: it also compares types and
modes, and takes no tensor twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.closure import ATOMS
from torchopt.diff.explicit.call import DICTS
from torchopt.diff.explicit.fingerprint import form_of, settings
from torchopt.diff.explicit.stepper import key_of
from torchopt.torch_internals import in_forward_mode, is_traced, same_forms
from torchopt.tree import tree_flatten
from torchopt.tree_function import PLAIN, is_transforming

__all__ = ["Given", "Pattern"]

CONTAINERS = (*DICTS, list, tuple)


@dataclass(frozen=True)
class Given:
    """The arguments of a call.

    Attributes:
        tensors: The tensors among them, without those of the optimizer.
        hypers: The arguments for the constructor of the optimizer.
        key: Everything else that decides what the call does, besides `forms`, and what loss and
            optimizer reach.
    """

    tensors: list[Tensor]
    hypers: dict[str, Any]
    key: tuple[Any, ...]

    @staticmethod
    def of(trees: tuple[Any, ...], hypers: dict[str, Any]) -> Given | None:
        """Return the arguments of a call; None if it cannot be repeated."""
        if is_transforming() or in_forward_mode() or is_traced():
            return None
        orders, of_hypers = _order(trees), key_of(hypers)
        if orders is None or of_hypers is None:
            return None
        leaves, spec = tree_flatten(trees, none_is_leaf=True)
        tensors = [x for x in leaves if type(x) in PLAIN]
        others: list[Any] = []
        if len(tensors) < len(leaves):
            others = [None if type(x) in PLAIN else (type(x), repr(x)) for x in leaves]
        graded = torch.is_grad_enabled()
        return Given(tensors, hypers, (graded, spec, orders, others, of_hypers, settings()))

    @functools.cached_property
    def forms(self) -> list[Any] | None:
        """What a program depends on besides the values of tensors; None: it is not known."""
        if any(x.layout is not torch.strided or x.is_neg() or x.is_conj() for x in self.tensors):
            return None
        return list(map(form_of, self.tensors))


def _order(tree: Any) -> Any:
    """Return the orders of the dicts in a tree; None if it may hold others, or other leaves."""
    kind = type(tree)
    if kind in PLAIN or kind in ATOMS:
        return ()
    if kind not in CONTAINERS:
        return None
    inner = [_order(x) for x in (tree.values() if kind in DICTS else tree) if type(x) not in PLAIN]
    if None in inner:
        return None
    return tuple(tree) if kind in DICTS else (), inner


class Pattern:
    """The arguments of an earlier call, without the values of its tensors.

    Args:
        given: The arguments, whose `forms` are known.
    """

    def __init__(self, given: Given) -> None:
        self._key, self._forms = given.key, given.forms
        self._hypers = given.hypers  # kept alive: the key has the identities of tensors in them
        self._are_alike = same_forms(given.tensors)

    def matches(self, given: Given) -> bool:
        """Return whether arguments differ from these only in the values of tensors."""
        if self._key != given.key:
            return False
        return self._are_alike(given.tensors) or self._forms == given.forms
