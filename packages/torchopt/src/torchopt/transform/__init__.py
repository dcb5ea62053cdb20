# SPDX-License-Identifier: Apache-2.0
"""Gradients to updates, one rule a file."""

from __future__ import annotations

from torchopt.index import OPTIMIZERS, exported

# The modules of the published package, before the functions that have their names.
from torchopt.transform import (
    scale_by_adadelta,
    scale_by_adam,
    scale_by_adamax,
    scale_by_radam,
    scale_by_rms,
    scale_by_rss,
    scale_by_stddev,
    trace,
    utils,
)
from torchopt.transform.accumulate import AccumulateState, accumulate
from torchopt.transform.add_decayed_weights import add_decayed_weights
from torchopt.transform.add_noise import AddNoiseState, add_noise
from torchopt.transform.apply_if_finite import ApplyIfFiniteState, apply_if_finite
from torchopt.transform.cautious import cautious
from torchopt.transform.centralize import centralize
from torchopt.transform.compensated import CompensatedState, compensated
from torchopt.transform.ema import EmaState, ema
from torchopt.transform.freeze import freeze
from torchopt.transform.galore import GaloreState, galore
from torchopt.transform.in_8_bits import in_8_bits
from torchopt.transform.in_precision import in_precision
from torchopt.transform.inject_hyperparams import InjectHyperparamsState, inject_hyperparams
from torchopt.transform.lookahead import LookaheadState, lookahead
from torchopt.transform.masked import MaskedNode, MaskedState, masked
from torchopt.transform.nan_to_num import nan_to_num
from torchopt.transform.orthogonalize import orthogonalize
from torchopt.transform.partition import PartitionState, partition
from torchopt.transform.sam import SamState, sam
from torchopt.transform.scale import scale
from torchopt.transform.scale_by_schedule import ScaleByScheduleState, scale_by_schedule
from torchopt.transform.scale_by_trust_ratio import scale_by_trust_ratio

# The rules of optimizers, which use the modules above.
globals().update({k: v for k, v in exported().items() if k not in OPTIMIZERS})

__all__ = [
    "accumulate",
    "add_decayed_weights",
    "add_noise",
    "apply_if_finite",
    "cautious",
    "centralize",
    "compensated",
    "ema",
    "freeze",
    "galore",
    "in_8_bits",
    "in_precision",
    "inject_hyperparams",
    "lookahead",
    "masked",
    "nan_to_num",
    "orthogonalize",
    "partition",
    "sam",
    "scale",
    "scale_by_schedule",
    "scale_by_trust_ratio",
]
__all__ += [name for name in exported() if name not in OPTIMIZERS and name[0].islower()]
