# SPDX-License-Identifier: Apache-2.0
"""All ways to compute a meta-gradient, on a problem whose exact meta-gradient is known."""
