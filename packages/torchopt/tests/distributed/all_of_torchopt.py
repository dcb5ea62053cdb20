# SPDX-License-Identifier: Apache-2.0
"""Import what torchopt imports at first use."""

from __future__ import annotations

import torchopt

found = [getattr(torchopt, name) for name in torchopt.__all__]
