# SPDX-License-Identifier: Apache-2.0
"""Gradients to updates, one rule a file."""

from __future__ import annotations

from torchopt.transform import utils
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
from torchopt.transform.scale_by_adadelta import ScaleByAdadeltaState, scale_by_adadelta
from torchopt.transform.scale_by_adamax import ScaleByAdamaxState, scale_by_adamax
from torchopt.transform.scale_by_adan import ScaleByAdanState, scale_by_adan
from torchopt.transform.scale_by_adopt import ScaleByAdoptState, scale_by_adopt
from torchopt.transform.scale_by_amsgrad import ScaleByAmsgradState, scale_by_amsgrad
from torchopt.transform.scale_by_asgd import ScaleByAsgdState, scale_by_asgd
from torchopt.transform.scale_by_belief import ScaleByBeliefState, scale_by_belief
from torchopt.transform.scale_by_factored_rms import ScaleByFactoredRmsState, scale_by_factored_rms
from torchopt.transform.scale_by_nadam import ScaleByNadamState, scale_by_nadam
from torchopt.transform.scale_by_radam import ScaleByRAdamState, scale_by_radam
from torchopt.transform.scale_by_rms import ScaleByRmsState, scale_by_rms
from torchopt.transform.scale_by_rprop import ScaleByRpropState, scale_by_rprop
from torchopt.transform.scale_by_rss import ScaleByRssState, scale_by_rss
from torchopt.transform.scale_by_schedule import ScaleByScheduleState, scale_by_schedule
from torchopt.transform.scale_by_shampoo import ScaleByShampooState, scale_by_shampoo
from torchopt.transform.scale_by_sophia import (
    ScaleBySophiaState,
    observe_curvature,
    scale_by_sophia,
)
from torchopt.transform.scale_by_stddev import ScaleByRStdDevState, scale_by_stddev
from torchopt.transform.scale_by_trust_ratio import scale_by_trust_ratio
from torchopt.transform.scale_by_yogi import ScaleByYogiState, scale_by_yogi
from torchopt.transform.schedule_free import ScheduleFreeState, averaged_params, schedule_free
from torchopt.transform.trace import DampenedTraceState, TraceState, trace

# Rules of optimizers, which import what is above.
from torchopt.optimizers.adam import (  # isort: skip
    ScaleByAdamState,
    scale_by_accelerated_adam,
    scale_by_adam,
)
from torchopt.optimizers.lion import ScaleByLionState, scale_by_lion  # isort: skip

__all__ = [
    "accumulate",
    "add_decayed_weights",
    "add_noise",
    "apply_if_finite",
    "averaged_params",
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
    "observe_curvature",
    "orthogonalize",
    "partition",
    "sam",
    "scale",
    "scale_by_accelerated_adam",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_adopt",
    "scale_by_amsgrad",
    "scale_by_asgd",
    "scale_by_belief",
    "scale_by_factored_rms",
    "scale_by_lion",
    "scale_by_nadam",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rprop",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_shampoo",
    "scale_by_sophia",
    "scale_by_stddev",
    "scale_by_trust_ratio",
    "scale_by_yogi",
    "schedule_free",
    "trace",
]
