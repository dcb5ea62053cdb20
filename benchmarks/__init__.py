# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of both packages; run them from the root of the repository."""
