# SPDX-License-Identifier: Apache-2.0
"""Replace matrices by nearly orthogonal ones with the same singular vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.kernels import native
from torchopt.kernels.stacks import in_stacks
from torchopt.transform.base import LeafRule, transformation_of
from torchopt.transform.norm import scaled
from torchopt.transform.validate import Hyper, are_numbers, at_least_zero, within

__all__ = ["orthogonalize"]


@dataclass(frozen=True)
class Orthogonalize(LeafRule):
    """u = scale * NewtonSchulz(g)."""

    steps: int = within("an integer >= 0", "ns_steps value", 5)
    coefficients: tuple[Hyper, Hyper, Hyper] = (3.4445, -4.7750, 2.0315)
    eps: Hyper = at_least_zero("epsilon value", 1e-7)
    match_rms: bool = False
    complex_numbers: ClassVar[str] = "whole"

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        for g in grads:
            if g.ndim != 2:
                raise ValueError(f"orthogonalize: expected matrices, got shape {tuple(g.shape)}")
        numbers = (*self.coefficients, self.eps)
        kernel = self._kernel if are_numbers(*numbers) else None
        return in_stacks(self._iterated, grads, *numbers, kernel=kernel), state

    def _kernel(self, grads: list[Tensor]) -> Sequence[Tensor | None] | None:
        """Return the values of `_iterated`; None for tensors that the kernel does not support."""
        shapes = [g.shape for g in grads]
        scale = {shape: self._scale(*shape) for shape in set(shapes)}
        scales = [scale[shape] for shape in shapes]
        numbers = map(float, (*self.coefficients, self.eps))
        found: Sequence[Tensor | None] | None
        found = native.call("newton_schulz", [grads], scales, self.steps, *numbers)
        return found

    def _iterated(self, g: Tensor, a: Any, b: Any, c: Any, eps: Any) -> Tensor:
        tall = g.shape[-2] > g.shape[-1]
        size, x, norm = scaled(g.mH if tall else g, dim=(-2, -1))
        x = x / torch.maximum(norm, eps / size)
        numbers = not any(isinstance(h, Tensor) for h in (a, b, c))
        for _ in range(self.steps):
            gram = x @ x.mH
            if numbers:
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            else:
                x = a * x + (b * gram + c * gram @ gram) @ x
        return (x.mH if tall else x) * self._scale(*g.shape[-2:])

    def _scale(self, rows: int, columns: int) -> float:
        if self.match_rms:
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / max(columns, 1)))


@transformation_of(Orthogonalize)
def orthogonalize() -> None:
    r"""Return the transformation that brings the singular values of matrices close to one.

    .. math::
        X_0 = g / \max(|g|, \epsilon), \quad
        X_{i+1} = a X_i + b (X_i X_i^T) X_i + c (X_i X_i^T)^2 X_i

    With g = U S V^T the result is U p(...p(S / |g|)) V^T, p(s) = a s + b s^3 + c s^5. It is
    multiplied by sqrt(max(1, rows / columns)), or with `match_rms` by 0.2 sqrt(max(rows, columns)),
    which gives it the size of Adam's steps. The dtype is that of the gradient. For complex matrices
    the transpose is the conjugate transpose.

    Args:
        steps: Number of iterations, >= 0.
        coefficients: a, b, c.
        eps: Lower bound of the divisor, >= 0.
        match_rms: Use the second factor.

    Raises:
        ValueError: Negative `steps` or `eps`; from `update`, for a tensor that is not a matrix.

    References:
        K. Jordan et al., Muon: An Optimizer for Hidden Layers in Neural Networks, 2024,
        https://kellerjordan.github.io/posts/muon

        J. Liu et al., Muon is Scalable for LLM Training, 2025, https://arxiv.org/abs/2502.16982,
        equation 4 (`match_rms`).

    Example:
        >>> import torch
        >>> iteration = orthogonalize(steps=12, coefficients=(1.5, -0.5, 0.0))  # the classic one
        >>> g = torch.diag(torch.tensor([3.0, 2.0]))
        >>> torch.allclose(iteration.update(g, iteration.init(g))[0], torch.eye(2), atol=1e-4)
        True
    """
