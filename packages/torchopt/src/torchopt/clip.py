# SPDX-License-Identifier: Apache-2.0
"""Clip gradients: by value, by the norm of all, of each, or relative to the parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.transform.base import LeafRule, as_transformation

__all__ = ["adaptive_clip", "clip_by_value", "clip_each_norm", "clip_grad_norm"]


@dataclass(frozen=True)
class ClipGradNorm(LeafRule):
    """u = g * min(1, max_norm / (norm of all g + 1e-6))."""

    max_norm: float
    norm_type: float
    error_if_nonfinite: bool
    differentiable: bool

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the gradients, scaled together."""
        if not any(g.numel() for g in grads):
            return grads, state
        # On the device all along, and a constant for differentiation unless asked otherwise.
        device = grads[0].device
        seen = grads if self.differentiable else [g.detach() for g in grads]
        norms = [torch.linalg.vector_norm(g, self.norm_type).to(device) for g in seen if g.numel()]
        total = torch.linalg.vector_norm(torch.stack(norms), self.norm_type)
        if self.error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(
                f"The total norm of order {self.norm_type} for gradients from `parameters` is "
                "non-finite, so it "
                "cannot be clipped. To disable this error and scale the gradients by the "
                "non-finite norm anyway, "
                "set `error_if_nonfinite=False`"
            )
        coefficient = (self.max_norm / (total + 1e-6)).clamp(max=1.0)
        return [g * coefficient.to(device=g.device, dtype=g.dtype) for g in grads], state


def clip_grad_norm(
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    *,
    differentiable: bool = False,
) -> GradientTransformation:
    """Return the transformation that scales all gradients so that their joint norm is at most
    `max_norm`.

    The coefficient min(1, max_norm / (norm + 1e-6)) is a constant for differentiation, unless
    `differentiable`.

    Args:
        max_norm: The largest norm.
        norm_type: Order of the norm; `"inf"` or `math.inf` for the largest absolute value.
        error_if_nonfinite: Raise when the norm is NaN or infinite; this waits for the device.
        differentiable: Differentiate the coefficient too: meta-gradients are then those of the
            function that is computed.

    Raises:
        RuntimeError: From `update`, with `error_if_nonfinite`, when the norm is not finite.

    Example:
        >>> clip = clip_grad_norm(1.0)
        >>> grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> clip.update(grads, clip.init(grads))[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    rule = ClipGradNorm(float(max_norm), float(norm_type), error_if_nonfinite, differentiable)
    return as_transformation(rule, already_flattened=False)


@dataclass(frozen=True)
class ClipByValue(LeafRule):
    """u = g between -limit and limit."""

    limit: float

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the clipped gradients."""
        return [g.clamp(-self.limit, self.limit) for g in grads], state


def clip_by_value(limit: float) -> GradientTransformation:
    """Return the transformation that keeps each number between -limit and limit.

    Args:
        limit: >= 0.

    Raises:
        ValueError: A negative `limit`.

    Example:
        >>> clip_by_value(1.0).update(torch.tensor([-3.0, 0.5]), ())[0]
        tensor([-1.0000,  0.5000])
    """
    if not limit >= 0:
        raise ValueError(f"clip_by_value: expected limit >= 0, got {limit}")
    return as_transformation(ClipByValue(float(limit)), already_flattened=False)


def _coefficient(norm: Tensor, largest: Tensor | float) -> Tensor:
    """Return min(1, largest / norm), and 1 for a norm of zero; finite in every derivative."""
    safe = torch.where(norm > 0, norm, 1.0)
    return torch.where(norm > largest, largest / safe, 1.0)


def _norm(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """Return the Euclidean norm; where it is zero, with derivative zero."""
    square = (x * x).sum(dim=dim, keepdim=keepdim)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


@dataclass(frozen=True)
class ClipEachNorm(LeafRule):
    """u = g * min(1, max_norm / |g|), tensor by tensor."""

    max_norm: float

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the gradients, each scaled by itself."""
        return [g * _coefficient(_norm(g), self.max_norm) for g in grads], state


def clip_each_norm(max_norm: float) -> GradientTransformation:
    """Return the transformation that scales each tensor so that its norm is at most `max_norm`.

    The coefficient is differentiated.

    Args:
        max_norm: The largest Euclidean norm, >= 0.

    Raises:
        ValueError: A negative `max_norm`.

    Example:
        >>> clip_each_norm(1.0).update([torch.tensor([3.0, 4.0]), torch.tensor([0.5])], ())[0]
        [tensor([0.6000, 0.8000]), tensor([0.5000])]
    """
    if not max_norm >= 0:
        raise ValueError(f"clip_each_norm: expected max_norm >= 0, got {max_norm}")
    return as_transformation(ClipEachNorm(float(max_norm)), already_flattened=False)


@dataclass(frozen=True)
class AdaptiveClip(LeafRule):
    """u = g * min(1, clipping * max(|p|, eps) / |g|), unit by unit."""

    clipping: float
    eps: float
    reads_params: ClassVar[bool] = True

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the gradients, scaled unit by unit."""
        updates = []
        for g, p in zip(grads, params):
            dim = tuple(range(1, g.ndim)) if g.ndim > 1 else None
            largest = self.clipping * _norm(p, dim, g.ndim > 1).clamp(min=self.eps)
            updates.append(g * _coefficient(_norm(g, dim, g.ndim > 1), largest))
        return updates, state


def adaptive_clip(clipping: float = 0.01, eps: float = 1e-3) -> GradientTransformation:
    """Return the transformation that clips gradients relative to the norm of their parameters.

    Norms are taken over all dimensions but the first, the outputs; over the whole tensor where it
    has one dimension or none.

    Args:
        clipping: Largest ratio of the two norms, >= 0.
        eps: Norm that a parameter counts for at least, >= 0.

    Raises:
        ValueError: A negative argument.
        AssertionError: From `update`, when it is called without `params`.

    References:
        A. Brock, S. De, S. L. Smith, K. Simonyan, High-Performance Large-Scale Image Recognition
        Without Normalization, 2021, https://arxiv.org/abs/2102.06171, equation 3.
    """
    if not (clipping >= 0 and eps >= 0):
        raise ValueError(
            f"adaptive_clip: expected clipping >= 0 and eps >= 0, got {clipping}, {eps}"
        )
    return as_transformation(AdaptiveClip(float(clipping), float(eps)), already_flattened=False)
