# SPDX-License-Identifier: Apache-2.0
"""How fast optree is: against its peers (`run`), for a demo, and in instructions."""
