# SPDX-License-Identifier: Apache-2.0
"""The explicit engine: inner loops that are differentiated through their steps."""

from __future__ import annotations

from torchopt.diff.explicit.loop import Explicit, InnerResult, inner_loop

__all__ = ["Explicit", "InnerResult", "inner_loop"]
