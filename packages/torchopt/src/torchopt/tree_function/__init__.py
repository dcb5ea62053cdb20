# SPDX-License-Identifier: Apache-2.0
"""Differentiable operations on lists of tensors. Only this package subclasses autograd.Function."""

from __future__ import annotations

from torchopt.torch_internals import (
    any_watched,
    below_transforms,
    is_batched,
    is_differentiated,
    is_traced,
    is_tracked,
    is_transforming,
    is_watched,
    plain_entry,
)
from torchopt.tree_function.across_vmap import call_across_vmap
from torchopt.tree_function.lists import (
    PLAIN,
    add_lists,
    are_plain,
    are_unfollowed,
    max_over_batch,
    placed_like,
    require_entries_of_vmaps,
)
from torchopt.tree_function.modes import (
    derivatives_wanted,
    forward_modes,
    linearize,
    linearize_parts,
    uncompiled,
)
from torchopt.tree_function.operation import Operation, apply_operation
from torchopt.tree_function.rule import (
    Rule,
    Sweep,
    apply_releasable_rule,
    apply_rule,
    apply_sweep,
)

__all__ = [
    "PLAIN",
    "Operation",
    "Rule",
    "Sweep",
    "add_lists",
    "any_watched",
    "apply_operation",
    "apply_releasable_rule",
    "apply_rule",
    "apply_sweep",
    "are_plain",
    "are_unfollowed",
    "below_transforms",
    "call_across_vmap",
    "derivatives_wanted",
    "forward_modes",
    "is_batched",
    "is_differentiated",
    "is_traced",
    "is_tracked",
    "is_transforming",
    "is_watched",
    "linearize",
    "linearize_parts",
    "max_over_batch",
    "placed_like",
    "plain_entry",
    "require_entries_of_vmaps",
    "uncompiled",
]
