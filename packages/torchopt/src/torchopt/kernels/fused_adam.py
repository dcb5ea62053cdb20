# SPDX-License-Identifier: Apache-2.0
"""Adam's direction over all tensors in one native call; see `fused_update`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchopt.kernels.fused_update import fused_update, fused_update_

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


__all__ = ["AdamHyper", "fused_adam", "fused_adam_"]


@dataclass(frozen=True)
class AdamHyper:
    """The hyper-parameters of Adam's direction, numbers or 0-dim tensors."""

    b1: Any
    b2: Any
    eps: Any
    eps_root: Any

    def as_dict(self) -> dict[str, Any]:
        """Return the hyper-parameters by name."""
        return {"b1": self.b1, "b2": self.b2, "eps": self.eps, "eps_root": self.eps_root}

    def as_chain(self) -> dict[str, Any]:
        """Return those of an optimizer whose update is the direction."""
        return {
            "lr": -1.0,
            "weight_decay": 0.0,
            "decoupled_weight_decay": 0.0,
            **self.as_dict(),
        }


def fused_adam(
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    counts: Sequence[Tensor],
    hyper: AdamHyper,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return (directions, mu', nu') of one step of Adam over all tensors, in one native call.

    Raises:
        KernelUnavailableError: No kernel for a dtype or device among `grads`.
        ValueError: Moments that do not match their gradient.
    """
    updates, (new_mu, new_nu) = fused_update(
        "adam", grads, [mu, nu], None, counts, hyper.as_chain()
    )
    return updates, new_mu, new_nu


def fused_adam_(
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    counts: Sequence[Tensor],
    hyper: AdamHyper,
) -> list[Tensor]:
    """Return the directions of one step of Adam and write the new moments into `mu` and `nu`.

    For plain contiguous tensors outside of any graph; the moments' versions are bumped.
    """
    return fused_update_("adam", grads, [mu, nu], None, counts, hyper.as_chain())
