# SPDX-License-Identifier: Apache-2.0
"""The version of torchopt."""

from __future__ import annotations

__version__ = "1.0.0"
__license__ = "Apache-2.0"
__author__ = "TorchOpt Contributors"
__release__ = True
