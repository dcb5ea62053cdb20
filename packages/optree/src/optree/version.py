# SPDX-License-Identifier: Apache-2.0
"""Version and authorship of the package."""

from __future__ import annotations

__version__: str = "1.0.0"
__license__: str = "Apache-2.0"
__author__: str = "The OpTree Contributors"
__release__: bool = True
