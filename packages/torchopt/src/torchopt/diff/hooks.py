# SPDX-License-Identifier: Apache-2.0
"""Hooks in a loss that replace the gradient that torch computed.

The result is then the gradient of no function. Its derivative is not symmetric, which forward over
reverse mode assumes; and in reverse mode torch calls the hook again when it computes the
derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import hooks_of_node

__all__ = ["unchanging", "watch_hooks"]


def unchanging(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that raises if `hook` returns another gradient than it was given.

    Args:
        hook: A hook of a tensor, or of a node of a graph.
    """

    @functools.wraps(hook)
    def checked(given: Any, *others: Any) -> Any:
        found = hook(given, *others)
        if found is not None and not _is_same(found, given):
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise NotDifferentiableError(
                f"hook {name} in a loss: expected one that returns None, because its gradient is "
                "differentiated again, got one that returns another gradient; change the gradient "
                'in the optimizer, as in torchopt.chain, or use derivative="first_order"'
            )
        return found

    return checked


def _is_same(found: Any, given: Any) -> bool:
    if isinstance(given, tuple):
        found = found if isinstance(found, tuple) else (found,)
        return len(found) == len(given) and all(a is b for a, b in zip(found, given))
    return found is given


def watch_hooks(node: Any) -> None:
    """Wrap every hook of a node of a graph in `unchanging`."""
    for hooks in hooks_of_node(node):
        for key, hook in hooks.items():
            hooks[key] = unchanging(hook)
