# SPDX-License-Identifier: Apache-2.0
"""Leave out all objects that exist now when garbage is searched.

Imported last by the process that others are forked from: a search in one of them would touch, and
so copy, the memory of every module.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
