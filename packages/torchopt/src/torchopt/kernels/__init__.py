# SPDX-License-Identifier: Apache-2.0
"""Bodies of the rules in `transform`: plain torch in `reference`, one fused call for all tensors in
`fused_adam`.
"""
