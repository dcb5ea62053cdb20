# SPDX-License-Identifier: Apache-2.0
"""Time competing libraries against each other: one process each, answers checked first."""
