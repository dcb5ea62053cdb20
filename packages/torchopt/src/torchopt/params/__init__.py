# SPDX-License-Identifier: Apache-2.0
"""The parameters of modules: where they live, snapshots of them."""
