# SPDX-License-Identifier: Apache-2.0
"""What the processes of the tests run: functions that other processes import by name."""

from __future__ import annotations
