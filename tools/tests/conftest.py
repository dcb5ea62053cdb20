# SPDX-License-Identifier: Apache-2.0
"""Put the tools on the import path, as dev.py does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
