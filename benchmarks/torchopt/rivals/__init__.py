# SPDX-License-Identifier: Apache-2.0
"""The competitors: one module each with the same names.

Every module has `in_place(params, name)`, which returns a function that steps parameters in place
from their `grad`; `functional(params, grads)`, which returns a function that makes new parameters
without a graph; `differentiable(params, grads)`, the same with a graph and its backward pass; and
`meta(model, steps)`, which returns a function that returns meta-gradients; and
`task(operation, network)`, the same for a whole task of `tasks`, the optimizer and the snapshot
included. What a library does not have is left out, or raises `UnsupportedError`.
"""

from __future__ import annotations

from benchmarks.harness.rival import Rival

OURS = "torchopt"
PUBLISHED = "torchopt-0.7.3"
_HERE = "benchmarks.torchopt.rivals"


def rivals() -> list[Rival]:
    """Return the table of competitors, ours first."""
    published = ("torchopt==0.7.3", "optree==0.20.0", "graphviz", "typing-extensions")
    return [
        Rival(OURS, "torchopt", f"{_HERE}.torchopt_api"),
        Rival(
            PUBLISHED,
            "torchopt 0.7.3",
            f"{_HERE}.torchopt_api",
            published,
            ("torch==2.13.0",),
            dependencies=False,
        ),
        Rival("torch-foreach", "torch foreach", f"{_HERE}.torch_foreach"),
        Rival("torch-fused", "torch fused", f"{_HERE}.torch_fused"),
        Rival("torch-for-loop", "torch for-loop", f"{_HERE}.torch_for_loop"),
        Rival("hand-written", "hand-written", f"{_HERE}.hand_written"),
        Rival(
            "higher",
            "higher 0.2.1",
            f"{_HERE}.higher_loop",
            # Torch looks for optree, and would find half of the one of this repository.
            ("higher==0.2.1", "optree==0.20.0", "typing-extensions"),
            ("torch==2.13.0",),
            dependencies=False,
        ),
        Rival("learn2learn", "learn2learn's loop", f"{_HERE}.learn2learn_loop"),
    ]
