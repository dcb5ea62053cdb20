# SPDX-License-Identifier: Apache-2.0
"""Adam over all tensors in one native call, and its exact derivative."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from torchopt import _C
from torchopt.kernels.reference.adam import adam as reference_adam
from torchopt.kernels.registry import DTYPE_CODES, check_fused, placement
from torchopt.tree_function import Operation, apply_operation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


__all__ = ["AdamHyper", "fused_adam", "fused_adam_"]


@dataclass(frozen=True)
class AdamHyper:
    """The hyper-parameters of Adam's direction, as plain numbers."""

    b1: float
    b2: float
    eps: float
    eps_root: float

    def as_dict(self) -> dict[str, float]:
        """Return the keyword arguments of the kernels."""
        return {"b1": self.b1, "b2": self.b2, "eps": self.eps, "eps_root": self.eps_root}


def _groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of `tensors` that one call can serve together: same dtype, same device."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, x in enumerate(tensors):
        groups.setdefault((x.dtype, x.device), []).append(index)
    return list(groups.values())


def _launch(
    kernel: Callable[..., None],
    inputs: Sequence[Sequence[Tensor]],
    outputs: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor],
    hyper: AdamHyper,
) -> None:
    """Run `kernel` over contiguous tensors; `inputs` and `outputs` are lists of roles."""
    for group in _groups(inputs[0]):
        first = inputs[0][group[0]]
        device, stream = placement(first)
        kernel(
            [[role[i].data_ptr() for i in group] for role in inputs],
            [[role[i].data_ptr() for i in group] for role in outputs],
            [counts[i].data_ptr() for i in group],
            [inputs[0][i].numel() for i in group],
            DTYPE_CODES[first.dtype],
            **hyper.as_dict(),
            num_threads=torch.get_num_threads(),
            device=device,
            stream=stream,
        )


def _run(
    kernel: Callable[..., None], num_roles: int, hyper: AdamHyper, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Run `kernel` on `num_roles` roles and the counts; return three new roles, one after the
    other.
    """
    size = len(tensors) // (num_roles + 1)
    inputs = [
        [x.contiguous() for x in tensors[role * size : (role + 1) * size]]
        for role in range(num_roles)
    ]
    counts = tensors[num_roles * size :]
    outputs = [[torch.empty_like(x) for x in inputs[0]] for _ in range(3)]
    _launch(kernel, inputs, outputs, counts, hyper)
    return tuple(x for role in outputs for x in role)


def _reference(hyper: AdamHyper, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same function as `_run(_C.adam, 3, ...)` in differentiable torch operations."""
    size = len(tensors) // 4
    columns = zip(
        *(
            reference_adam(
                tensors[i],
                tensors[size + i],
                tensors[2 * size + i],
                tensors[3 * size + i],
                b1=hyper.b1,
                b2=hyper.b2,
                eps=hyper.eps,
                eps_root=hyper.eps_root,
            )
            for i in range(size)
        )
    )
    return tuple(x for column in columns for x in column)


def _check(
    grads: Sequence[Tensor], mu: Sequence[Tensor], nu: Sequence[Tensor], counts: Sequence[Tensor]
) -> None:
    check_fused(grads)
    for g, m, n, k in zip(grads, mu, nu, counts):
        if not (g.shape == m.shape == n.shape and g.dtype == m.dtype == n.dtype):
            raise ValueError(
                "fused Adam: expected moments of the shape and dtype of the gradient, "
                f"{tuple(g.shape)} {g.dtype}; got mu {tuple(m.shape)} {m.dtype} and "
                f"nu {tuple(n.shape)} {n.dtype}."
            )
        if not g.device == m.device == n.device == k.device:
            raise ValueError(
                "fused Adam: expected gradient, moments and count on one device, "
                f"got {g.device}, {m.device}, {n.device}, {k.device}."
            )


def fused_adam(
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    counts: Sequence[Tensor],
    hyper: AdamHyper,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return (updates, mu', nu') of one step of Adam over all tensors, in one native call.

    The same function as `reference.adam` on each tensor, with the same convention at zero,
    differentiable to any order with respect to `grads`, `mu` and `nu`. The first derivative is one
    native call too.

    Raises:
        KernelUnavailableError: No kernel for a dtype or device among `grads`.
        ValueError: Moments that do not match their gradient.
    """
    _check(grads, mu, nu, counts)
    if not grads:
        return [], [], []
    operation = Operation(
        functools.partial(_run, _C.adam, 3, hyper),
        functools.partial(_run, _C.adam_vjp, 6, hyper),
        functools.partial(_reference, hyper),
        3 * len(grads),
    )
    outputs = apply_operation(operation, *grads, *mu, *nu, *counts)
    n = len(grads)
    return list(outputs[:n]), list(outputs[n : 2 * n]), list(outputs[2 * n :])


def fused_adam_(
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    counts: Sequence[Tensor],
    hyper: AdamHyper,
) -> list[Tensor]:
    """Return the updates of one step of Adam and write the new moments into `mu` and `nu`.

    For plain contiguous tensors outside of any graph; the moments' versions are bumped.
    """
    _check(grads, mu, nu, counts)
    gradients = [g.detach().contiguous() for g in grads]
    updates = [torch.empty_like(g) for g in gradients]
    _launch(_C.adam, [gradients, mu, nu], [updates, mu, nu], counts, hyper)
    for moment in (*mu, *nu):
        torch.autograd.graph.increment_version(moment)
    return updates
