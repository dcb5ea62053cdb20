# SPDX-License-Identifier: Apache-2.0
"""Schedules: step sizes as functions of the number of previous updates, counted from 0."""

from __future__ import annotations

from torchopt.schedule.cosine import cosine_decay, cosine_restarts
from torchopt.schedule.exponential_decay import exponential_decay
from torchopt.schedule.inverse_sqrt import inverse_sqrt
from torchopt.schedule.join import (
    constant_schedule,
    join_schedules,
    one_cycle,
    piecewise_constant,
    warmup,
)
from torchopt.schedule.plateau import ReduceOnPlateau
from torchopt.schedule.polynomial import linear_schedule, polynomial_schedule

__all__ = [
    "ReduceOnPlateau",
    "constant_schedule",
    "cosine_decay",
    "cosine_restarts",
    "exponential_decay",
    "inverse_sqrt",
    "join_schedules",
    "linear_schedule",
    "one_cycle",
    "piecewise_constant",
    "polynomial_schedule",
    "warmup",
]
