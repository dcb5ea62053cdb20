# SPDX-License-Identifier: Apache-2.0
"""A traced function, ready to be called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchopt.diff.explicit.packing import Packing
from torchopt.precision import without_autocast
from torchopt.torch_internals import any_autocast

__all__ = ["Program", "as_traced"]


def as_traced(
    code: Callable[..., Sequence[Any]], *, spread: bool = False
) -> Callable[[list[Tensor]], Sequence[Any]]:
    """Return code that runs without autocast, whose casts are among its operations.

    Args:
        code: The code.
        spread: Whether it takes its arguments one by one instead of in a list.
    """

    def run(arguments: list[Tensor]) -> Sequence[Any]:
        if any_autocast():
            with without_autocast():
                return code(*arguments) if spread else code(arguments)
        return code(*arguments) if spread else code(arguments)

    return run


@dataclass(frozen=True)
class Program:
    """A traced function of a list of tensors.

    Attributes:
        function: The code; it takes a list of its arguments, which it may empty.
        held: Which of the tensors that the traced function reaches are additional arguments.
        strides: The strides that the code expects; empty if it accepts any.
        draws: Whether it draws random numbers.
        form: The information with which its caller interprets the returned list.
        writes: Whether it writes to buffers of modules, as a BatchNorm does.
        begin: The position of the first argument that `taken` packs.
        taken: The packing of some arguments; None: they are not packed.
        given: The packing of the first results.
    """

    function: Callable[[list[Tensor]], Sequence[Any]]
    held: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    draws: bool
    form: Any
    writes: bool = False
    begin: int = 0
    taken: Packing | None = None
    given: Packing | None = None

    def __call__(self, tensors: Sequence[Tensor], held: Sequence[Tensor]) -> Sequence[Any]:
        """Return the results for these arguments, given all tensors that the function reaches."""
        if self.taken is not None:
            end = self.begin + self.taken.size
            packed = self.taken.packed(tensors[self.begin : end])
            tensors = [*tensors[: self.begin], *packed, *tensors[end:]]
        found = self.function(self.fitted([*tensors, *(held[i] for i in self.held)]))
        if self.given is None:
            return found
        count = self.given.count
        return [*self.given.unpacked(found[:count]), *found[count:]]

    def fitted(self, arguments: list[Tensor]) -> list[Tensor]:
        """Return the arguments as the code reads them, or the same list.

        Compiled code reads memory in the strides that it expects, without the negative bit and the
        conjugate bit of a view.
        """
        pairs = zip(arguments, self.strides)
        wrong = [
            i
            for i, (x, stride) in enumerate(pairs)
            if x.stride() != stride or x.is_neg() or x.is_conj()
        ]
        if not wrong:
            return arguments
        fitted = list(arguments)
        for i in wrong:
            fitted[i] = _with_stride(arguments[i], self.strides[i])
        return fitted


def _with_stride(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    return x.new_empty_strided(x.shape, stride).copy_(x)
