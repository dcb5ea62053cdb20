# SPDX-License-Identifier: Apache-2.0
"""Clip gradients: by value, by their joint norm, by the norm of each, or relative to parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.errors import NotDifferentiableError
from torchopt.params.sharded import largest_absolute
from torchopt.transform.base import LeafRule, as_transformation, transformation_of
from torchopt.transform.norm import power_of_two, scaled
from torchopt.transform.validate import Hyper, at_least_zero, number
from torchopt.tree_function import is_traced, is_tracked, is_transforming

__all__ = ["adaptive_clip", "clip_by_value", "clip_each_norm", "clip_grad_norm"]


@dataclass(frozen=True)
class ClipGradNorm(LeafRule):
    """u = g * min(1, max_norm / (norm of all g + 1e-6))."""

    max_norm: Hyper = at_least_zero("max_norm value")
    norm_type: Hyper = number()
    error_if_nonfinite: bool = number()
    differentiable: bool = number()
    complex_numbers: ClassVar[str] = "whole"

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the gradients, scaled together."""
        if not any(g.numel() for g in grads):
            return grads, state
        order = _order(self.norm_type)
        # It stays on the device, and is a constant for differentiation unless `differentiable`.
        seen = [g if self.differentiable else g.detach() for g in grads if g.numel()]
        size, total = _total_norm(seen, order)
        if self.error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(
                f"The total norm of order {order} for gradients from `parameters` is "
                "non-finite, so it "
                "cannot be clipped. To disable this error and scale the gradients by the "
                "non-finite norm anyway, "
                "set `error_if_nonfinite=False`"
            )
        coefficient = (_on(self.max_norm, total) / size / (total + 1e-6 / size)).clamp(max=1.0)
        return [g * coefficient.to(device=g.device, dtype=g.dtype) for g in grads], state


def _total_norm(grads: list[Tensor], order: float) -> tuple[Tensor | float, Tensor]:
    """Return two factors of the joint norm; the first is a constant for differentiation.

    The first factor is 1 if the norm can be computed directly, and otherwise the size of the
    largest number, without which powers would leave the range of the dtype. Only on a CPU is the
    direct norm tried: elsewhere the test would wait for the device.
    """
    device = grads[0].device

    def norm(tensors: list[Tensor]) -> Tensor:
        norms = [_norm(g, order).to(device) for g in tensors]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
        return total

    if order == 0:  # a count, which does not grow with the gradients
        return 1.0, norm(grads)
    if device.type == "cpu" and not is_transforming() and not is_traced():
        total = norm(grads)
        if SMALL < float(total.detach()) < math.inf:
            return 1.0, total
    tops = [largest_absolute(g).to(device) for g in grads]
    size = power_of_two(torch.stack(tops).amax())
    return size, norm([g / size.to(device=g.device) for g in grads])


def _norm(g: Tensor, order: float) -> Tensor:
    if order == math.inf and hasattr(g, "to_local") and not g.requires_grad:
        return largest_absolute(g)  # torch's function raises on ranks that hold nothing
    norm: Tensor = torch.linalg.vector_norm(g, order)
    return norm


SMALL = 1e-15
"""Norms above this lose no accuracy to underflow in float32, whose smallest square is 1e-38."""


def _order(norm_type: float | Tensor) -> float:
    if isinstance(norm_type, torch.Tensor) and is_tracked(norm_type):
        raise NotDifferentiableError(
            "clip_grad_norm: expected norm_type without a gradient, got a tensor that has one; "
            "the norm is not differentiable in its order, so give a number or norm_type.detach()"
        )
    return float(norm_type)


def _on(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Return a hyper-parameter in the dtype and on the device of `like`."""
    return value.to(like) if isinstance(value, torch.Tensor) else float(value)


def clip_grad_norm(
    max_norm: float | Tensor,
    norm_type: float | str | Tensor = 2.0,
    error_if_nonfinite: bool = False,
    *,
    differentiable: bool = False,
) -> GradientTransformation:
    """Return the transformation that scales all gradients so that their joint norm is at most
    `max_norm`.

    The update is u = g min(1, max_norm / (norm + 1e-6)), as in `torch.nn.utils.clip_grad_norm_`,
    with the norm over all elements of all gradients. The coefficient is a constant for
    differentiation, unless `differentiable`.

    Args:
        max_norm: The largest norm, >= 0; a number, or a 0-dim tensor, which is differentiated.
        norm_type: Order of the norm; `"inf"` or `math.inf` for the largest absolute value.
        error_if_nonfinite: Raise when the norm is NaN or infinite; this waits for the device.
        differentiable: Differentiate the coefficient too, so that meta-gradients are exact.

    Raises:
        ValueError: A negative `max_norm`, which would reverse the gradients.
        RuntimeError: From `update`, with `error_if_nonfinite`, when the norm is not finite.
        NotDifferentiableError: From `update`, when `norm_type` is a tensor that requires a
            gradient.

    Example:
        >>> clip = clip_grad_norm(1.0)
        >>> grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> clip.update(grads, clip.init(grads))[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    order = norm_type if isinstance(norm_type, torch.Tensor) else float(norm_type)
    rule = ClipGradNorm(max_norm, order, error_if_nonfinite, differentiable)
    return as_transformation(rule, already_flattened=False)


@dataclass(frozen=True)
class ClipByValue(LeafRule):
    """u = g between -limit and limit."""

    limit: Hyper = at_least_zero("limit value")

    def moved(self, g: Tensor, p: Any) -> Tensor:
        """Return the clipped gradient."""
        limit: Any = _on(self.limit, g)
        return g.clamp(-limit, limit)


@transformation_of(ClipByValue)
def clip_by_value() -> None:
    """Return the transformation that clamps each element between -limit and limit.

    Args:
        limit: >= 0; a number, or a 0-dim tensor, which is differentiated.

    Example:
        >>> clip_by_value(1.0).update(torch.tensor([-3.0, 0.5]), ())[0]
        tensor([-1.0000,  0.5000])
    """


def _shortened(g: Tensor, largest: Tensor | float, dim: Any = None) -> Tensor:
    """Return g * min(1, largest / |g|), or g if its norm is zero; all derivatives are finite."""
    size, unit, norm = scaled(g, dim)
    limit = largest / size
    safe = torch.where(norm > 0, norm, 1.0)
    return torch.where(norm > limit, unit * (largest / safe), g)


@dataclass(frozen=True)
class ClipEachNorm(LeafRule):
    """u = g * min(1, max_norm / |g|), tensor by tensor."""

    max_norm: Hyper = at_least_zero("max_norm value")

    def moved(self, g: Tensor, p: Any) -> Tensor:
        """Return the gradient, scaled by itself."""
        return _shortened(g, _on(self.max_norm, g))


@transformation_of(ClipEachNorm)
def clip_each_norm() -> None:
    """Return the transformation that scales each tensor so that its norm is at most `max_norm`.

    The update is u = g min(1, max_norm / |g|). The coefficient is differentiated.

    Args:
        max_norm: The largest Euclidean norm, >= 0; a number, or a 0-dim tensor, which is
            differentiated.

    Example:
        >>> clip_each_norm(1.0).update([torch.tensor([3.0, 4.0]), torch.tensor([0.5])], ())[0]
        [tensor([0.6000, 0.8000]), tensor([0.5000])]
    """


@dataclass(frozen=True)
class AdaptiveClip(LeafRule):
    """u = g * min(1, clipping * max(|p|, eps) / |g|), unit by unit."""

    clipping: Hyper = at_least_zero("clipping value", 0.01)
    eps: Hyper = at_least_zero("epsilon value", 1e-3)
    reads_params: ClassVar[bool] = True
    complex_numbers: ClassVar[str] = "whole"

    def moved(self, g: Tensor, p: Any) -> Tensor:
        """Return the gradient, scaled unit by unit."""
        dim = tuple(range(1, g.ndim)) if g.ndim > 1 else None
        of_p = scaled(p, dim)
        size = (of_p.size * of_p.norm).clamp(min=_on(self.eps, of_p.norm))
        return _shortened(g, _on(self.clipping, size) * size, dim)


@transformation_of(AdaptiveClip)
def adaptive_clip() -> None:
    """Return the transformation that clips gradients relative to the norm of their parameters.

    The update is u = g min(1, clipping max(|p|, eps) / |g|). Norms are taken for each unit: over
    all dimensions but the first, or over the whole tensor if it has one dimension or none.

    Args:
        clipping: Largest ratio of the two norms, >= 0; a number, or a 0-dim tensor, which is
            differentiated.
        eps: Lower bound of the norm of a parameter, >= 0; a number or a tensor as `clipping`.

    References:
        A. Brock, S. De, S. L. Smith, K. Simonyan, High-Performance Large-Scale Image Recognition
        Without Normalization, 2021, https://arxiv.org/abs/2102.06171, equation 3.

    Example:
        >>> import torch
        >>> clip = adaptive_clip(0.1)
        >>> p, g = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
        >>> clip.update(g, clip.init(p), params=p)[0]  # |p| = 5, so |u| = 0.5
        tensor([0.0000, 0.5000])
    """
