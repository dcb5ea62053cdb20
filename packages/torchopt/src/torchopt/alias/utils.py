# SPDX-License-Identifier: Apache-2.0
"""The stages that all optimizers share; see `torchopt.optimizers.stages`."""

from torchopt.optimizers.stages import _get_use_chain_flat as _get_use_chain_flat
from torchopt.optimizers.stages import _set_use_chain_flat as _set_use_chain_flat
from torchopt.optimizers.stages import flip_sign_and_add_weight_decay, scale_by_neg_lr

__all__ = ["flip_sign_and_add_weight_decay", "scale_by_neg_lr"]
