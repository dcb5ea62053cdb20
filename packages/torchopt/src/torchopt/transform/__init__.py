# SPDX-License-Identifier: Apache-2.0
"""Gradients to updates, one rule a file."""

from __future__ import annotations

from torchopt.transform.add_decayed_weights import add_decayed_weights
from torchopt.transform.masked import MaskedNode, MaskedState, masked
from torchopt.transform.nan_to_num import nan_to_num
from torchopt.transform.scale import scale
from torchopt.transform.scale_by_adadelta import ScaleByAdadeltaState, scale_by_adadelta
from torchopt.transform.scale_by_adam import (
    ScaleByAdamState,
    scale_by_accelerated_adam,
    scale_by_adam,
)
from torchopt.transform.scale_by_adamax import ScaleByAdamaxState, scale_by_adamax
from torchopt.transform.scale_by_radam import ScaleByRAdamState, scale_by_radam
from torchopt.transform.scale_by_rms import ScaleByRmsState, scale_by_rms
from torchopt.transform.scale_by_rss import ScaleByRssState, scale_by_rss
from torchopt.transform.scale_by_schedule import ScaleByScheduleState, scale_by_schedule
from torchopt.transform.scale_by_stddev import ScaleByRStdDevState, scale_by_stddev
from torchopt.transform.trace import DampenedTraceState, TraceState, trace

__all__ = [
    "add_decayed_weights",
    "masked",
    "nan_to_num",
    "scale",
    "scale_by_accelerated_adam",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_stddev",
    "trace",
]
