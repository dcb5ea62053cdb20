# SPDX-License-Identifier: Apache-2.0
"""Step sizes as functions of the step count."""

from __future__ import annotations

from torchopt.schedule.exponential import exponential_decay
from torchopt.schedule.polynomial import linear_schedule, polynomial_schedule

__all__ = ["exponential_decay", "linear_schedule", "polynomial_schedule"]
