# SPDX-License-Identifier: Apache-2.0
"""All ways to a meta-gradient on one problem whose exact one is known."""
