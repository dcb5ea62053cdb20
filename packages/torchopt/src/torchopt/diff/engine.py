# SPDX-License-Identifier: Apache-2.0
"""The base class of engines: objects that differentiate any inner problem."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torchopt.shown import Described

if TYPE_CHECKING:
    from torchopt.diff.verify import Verify, VerifyReport

__all__ = ["Engine"]

Self = TypeVar("Self", bound="Engine")


class Engine(Described, ABC):
    """A way to differentiate an inner loop: a frozen dataclass with these fields and its own.

    `torchopt.diff.Explicit`, `torchopt.diff.Implicit` and `torchopt.diff.ZeroOrder` are engines.
    Each takes the same problem and returns a function with the same arguments and results; only
    the derivatives differ.

    Attributes:
        loss: As in `torchopt.inner_loop`; None for an engine without a problem, see `over`.
        optimizer: As there.
        steps: As there.
        tasks: As there.
        verify: As there.
        report: What `verify` has found.
    """

    loss: Callable[..., Any] | None
    optimizer: Any
    steps: int
    tasks: Sequence[Any] | None
    verify: Verify | None
    report: VerifyReport

    def over(
        self: Self,
        loss: Callable[..., Any],
        optimizer: Any,
        *,
        steps: int,
        tasks: Sequence[Any] | None = None,
        verify: Verify | None = None,
    ) -> Self:
        """Return this engine for an inner problem: a copy with these fields set.

        Args:
            loss: `loss(params, batch, *meta)`; see `torchopt.inner_loop`.
            optimizer: A constructor or a transformation.
            steps: The number of steps, >= 1.
            tasks: The dimension that counts tasks, for params, batch and each further argument;
                None: those of this engine.
            verify: A `torchopt.diff.Verify`; None: that of this engine.

        Returns:
            A function of `(params, batch, *meta, batches=None, state=None, **hypers)` that returns
            an `InnerResult`.

        Raises:
            ValueError: The engine already has a loss.

        Example:
            >>> import torch, torchopt
            >>> from torchopt.diff import Explicit, Implicit
            >>> x = torch.tensor([3.0], requires_grad=True)
            >>> def loss(w, x):
            ...     return ((w - x) ** 2).sum()
            >>> for engine in (Explicit(), Implicit()):
            ...     inner = engine.over(loss, torchopt.sgd(0.5), steps=1)
            ...     print(torch.autograd.grad(inner(torch.zeros(1), x).params.sum(), x)[0])
            tensor([1.])
            tensor([1.])
        """
        if self.loss is not None:
            raise ValueError(
                f"{type(self).__name__}.over: expected an engine without a loss of its own, got "
                "one over an inner problem; call it, or make the engine without loss, optimizer "
                "and steps."
            )
        made: Any = self
        found: Self = dataclasses.replace(
            made,
            loss=loss,
            optimizer=optimizer,
            steps=steps,
            tasks=self.tasks if tasks is None else tasks,
            verify=self.verify if verify is None else verify,
        )
        return found

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop: `(params, batch, *meta, batches=None, state=None, **hypers)`."""

    @property
    def follows(self) -> bool:
        """Whether the engine differentiates a run that another one over its problem recorded."""
        return False

    def record_in(self, trail: list[Any]) -> None:
        """Add a record of the next run to a list, or use the record of the same run in it."""

    @abstractmethod
    def run_inner(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop without a check by `verify`."""
