# SPDX-License-Identifier: Apache-2.0
"""The optimizer of an inner loop, and everything that it reaches.

Each call of the loop calls the constructor of the optimizer. Its result is searched for tensors and
for everything that a traced program depends on, which takes longer than a short run. A constructor
of torchopt gives the same result for the same arguments, so it is called and searched again only
for other arguments.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from torchopt.base import GradientTransformation, require_transformation
from torchopt.diff.closure import ATOMS, captured, root_of
from torchopt.diff.explicit.fingerprint import Fingerprint, join
from torchopt.diff.explicit.reached import Reached
from torchopt.diff.sealed import EXCHANGED, is_sealed_without

__all__ = ["Memory", "Stepper", "key_of"]

_UNNAMED = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_KEYWORD
MOST = 64  # forms of inputs whose sizes are remembered, and blocks


class Stepper:
    """An optimizer and the tensors that it holds.

    Args:
        optimizer: The transformation.
        arguments: The arguments of a constructor of torchopt, if the transformation depends on
            nothing else.
    """

    def __init__(
        self, optimizer: GradientTransformation, arguments: dict[str, Any] | None = None
    ) -> None:
        self.optimizer, self._arguments = optimizer, arguments
        self._reached = Reached(optimizer)
        self._joined: tuple[Fingerprint, Fingerprint, Fingerprint] | None = None

    @property
    def is_given(self) -> bool:
        """Whether the transformation depends only on the arguments of a constructor of torchopt."""
        return self._arguments is not None

    def now(self) -> Fingerprint:
        """Return the current fingerprint of the transformation."""
        return self._reached.now()

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the optimizer holds."""
        return self._found if self._arguments is not None else self._search()

    @functools.cached_property
    def _found(self) -> list[Tensor]:
        return self._search()

    def _search(self) -> list[Tensor]:
        return [x for _, x in captured(self.optimizer, Tensor)]

    def reach_with(self, loss: Fingerprint) -> Fingerprint:
        """Return the current fingerprint of a loss, given alone, and of the optimizer."""
        own, known = self._reached.now(), self._joined
        if known is None or known[0] is not loss or known[1] is not own:
            self._joined = known = loss, own, join(loss, own)
        return known[2]


class Recent(dict[Any, Any]):
    """A dict of at most `MOST` entries, which drops the oldest ones."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        for old in list(self)[:-MOST]:
            self.pop(old, None)  # another thread may have dropped it


class Memory:
    """A cache of an inner loop for its loss and its last optimizer. Copies start empty.

    Several threads may use it at the same time: its entries are replaced, never changed.
    """

    not_searched = True  # by `captured`: a loss that contains a loop does not depend on its cache

    def __init__(self) -> None:
        self.sizes: dict[Any, int] = Recent()  # see `Call`
        self.known_blocks: dict[int, Any] = Recent()
        self.trail: list[Any] | None = None  # see `Call`; only in copies that check a gradient
        self._loss: tuple[Any, Reached] | None = None
        self._sealed: tuple[Fingerprint, bool] | None = None
        self._last: tuple[Any, Hashable, Stepper] | None = None

    def __reduce__(self) -> Any:
        return Memory, ()

    def stepper(self, made: Any, hypers: dict[str, Any]) -> Stepper:
        """Return the optimizer for some hyper-parameters.

        Args:
            made: A transformation, or a constructor of one.
            hypers: Arguments of the constructor.
        """
        is_made = hasattr(made, "init") and hasattr(made, "update")
        if is_made and hypers:
            raise TypeError(
                "inner_loop: expected a constructor, such as torchopt.adam, to take "
                f"{', '.join(map(repr, hypers))} in the call, got a transformation; "
                "pass the constructor, or make the transformation with them."
            )
        key = () if is_made else key_of(hypers) if root_of(made) == "torchopt" else None
        last = self._last
        if key is not None and last is not None and last[0] is made and last[1] == key:
            return last[2]
        optimizer = made if is_made else _call(made, hypers)
        require_transformation(optimizer, "inner_loop: what the optimizer's constructor returns")
        found = Stepper(optimizer, None if is_made or key is None else hypers)
        if key is not None:
            self._last = made, key, found
        return found

    def kept(self, optimizer: GradientTransformation) -> Stepper | None:
        """Return the last optimizer, which other calls may get again, if it is this one."""
        last = self._last
        return None if last is None or last[2].optimizer is not optimizer else last[2]

    def reach(self, loss: Any, stepper: Stepper) -> Fingerprint:
        """Return the current fingerprint of the loss and an optimizer."""
        return stepper.reach_with(self.loss_now(loss))

    def loss_now(self, loss: Any) -> Fingerprint:
        """Return the current fingerprint of the loss."""
        return self._reached(loss).now()

    def is_sealed(self, loss: Any) -> bool:
        """Return `is_sealed_without(loss, EXCHANGED)`, looked up again only where that changed."""
        reached, known = self.loss_now(loss), self._sealed
        if known is None or known[0] is not reached:
            self._sealed = known = reached, is_sealed_without(loss, EXCHANGED)
        return known[1]

    def _reached(self, loss: Any) -> Reached:
        known = self._loss
        if known is None or known[0] is not loss:
            self._loss = known = loss, Reached(loss)
        return known[1]


def _call(constructor: Any, hypers: dict[str, Any]) -> Any:
    """Return the optimizer; explain it if the constructor does not take these arguments."""
    try:
        return constructor(**hypers)
    except TypeError as error:
        _explain_keywords(constructor, hypers, error)
        raise


def _explain_keywords(constructor: Any, hypers: dict[str, Any], error: TypeError) -> None:
    """Raise a clear error from `error` if the constructor does not take these arguments."""
    try:
        signature = inspect.signature(constructor)
    except ValueError:  # of a builtin
        return
    try:
        signature.bind(**hypers)
    except TypeError as reason:
        made = getattr(constructor, "func", constructor)  # of a partial
        name = getattr(made, "__name__", type(made).__name__)
        taken = [p.name for p in signature.parameters.values() if p.kind not in _UNNAMED]
        raise TypeError(
            f"inner_loop: optimizer: expected keywords that {name} takes ({', '.join(taken)}), "
            f"got {', '.join(hypers) or 'none'}: {reason}."
        ) from error


def key_of(hypers: dict[str, Any]) -> Hashable:
    """Return a key for arguments; None if they may change or have a graph."""
    parts: list[Hashable] = []
    for name, x in hypers.items():
        if isinstance(x, Tensor):
            if not x.is_leaf:
                return None
            parts.append((name, Tensor, id(x)))  # `_last` keeps the tensor alive
        elif isinstance(x, ATOMS):
            parts.append((name, type(x), repr(x)))
        else:
            return None
    return tuple(parts)
