# SPDX-License-Identifier: Apache-2.0
"""Another derivative of a run that was recorded."""

from __future__ import annotations

from torch import Tensor

from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.run import Run

__all__ = ["FOLLOWING", "FollowedRun"]

FOLLOWING = ("mixed", "first_order")  # these and differences need no graph of the run


class FollowedRun(Run):
    """The derivative of a recorded run by another call of the same problem.

    Args:
        call: The call, whose `trail` is recorded.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call, call.steps)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the recorded result."""
        del inputs
        call = self.call
        assert call.trail
        trail = call.trail[0]
        self._seen, found = trail.seen, trail.outputs
        for t in range(call.first, call.steps):
            self._moments.keep(t, trail.moments[t])
        self._seen.watch(found.losses.select(0 if call.tasks is None else 1, call.first))
        self.outputs = self._with(found, [x.new_empty(0) for x in self._flat(found)])
        return tuple(x.clone() for x in self._flat(found))
