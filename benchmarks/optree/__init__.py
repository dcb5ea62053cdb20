# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of optree: against other libraries (`run`), as a demo, and in instructions."""
