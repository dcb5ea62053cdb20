# SPDX-License-Identifier: Apache-2.0
"""What the calls of one form share, found by one key.

A call needs a start, the program of its steps and the list of inputs that they take. Each has a
key of its own, and computing these keys takes longer than a step of a small problem. A plan is
looked up by one key, which contains everything that the others depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.fingerprint import Key, form_of
from torchopt.diff.explicit.forms import fixed
from torchopt.diff.explicit.taken import inputs_of
from torchopt.diff.explicit.trace import Kept, Words
from torchopt.diff.explicit.traced_start import TracedStart, traced_start
from torchopt.diff.explicit.variables import Input
from torchopt.diff.surroundings import Surroundings

__all__ = ["Plan", "planned"]


@dataclass
class Plan:
    """What the calls of one form share.

    Attributes:
        start: The start of their runs; None if it is not traced.
        key: The key of the program of their first steps, from the first call on.
        inputs: The inputs that their steps take, from the first call on.
    """

    start: TracedStart | None
    key: Key | None = None
    inputs: list[Input] | None = None


_kept: Kept[Plan] = Kept()


def planned(
    call: Call, common: Key, unroll: int, surroundings: Callable[[], Surroundings], words: Words
) -> Plan:
    """Return the plan of a call; a new one if it has a state, or its steps get different tensors.

    Args:
        call: The call.
        common: The key of all programs of the call.
        unroll: How many steps a program takes.
        surroundings: Returns the surroundings of the optimizer.
        words: Words for messages.
    """

    def make() -> Plan:
        return Plan(traced_start(call, common, surroundings, words))

    if call.state is not None or not call.alike:
        return make()
    batch = call.batches[0]
    key: Hashable = (
        common,
        unroll,
        tuple(map(form_of, call.inputs)),
        (call.dims, call.wanted, call.hypers),
        fixed(call.params.leaves),
        (batch.spec, batch.orders, fixed(batch.leaves)),
    )
    plan, _ = _kept.get(key, make)
    plan.inputs = call.taken[None] = plan.inputs or inputs_of(call, range(call.steps))
    return plan
