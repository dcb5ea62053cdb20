# SPDX-License-Identifier: Apache-2.0
"""Choose the kind of run for a call of an inner loop."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace

import torch

from torchopt.diff.closure import captured
from torchopt.diff.explicit.budget import require_within, snapshots_within
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.checks import require_no_differences
from torchopt.diff.explicit.forward import ForwardRun
from torchopt.diff.explicit.options import TRACED
from torchopt.diff.explicit.reversible import ReversibleRun
from torchopt.diff.explicit.run import ROOM, Run, graph_size
from torchopt.diff.explicit.traced import TracedRun
from torchopt.diff.explicit.traced_forward import TracedForwardRun
from torchopt.diff.explicit.trail import FollowedRun
from torchopt.diff.explicit.unrolled import Outputs, run_attached
from torchopt.diff.places import recorded_iterators
from torchopt.errors import NotTraceableError
from torchopt.params.sharded import gather_in_graph, require_whole
from torchopt.torch_internals import in_forward_mode_of_this_thread, top_saved_tensor_hooks
from torchopt.tree_function import apply_sweep, is_transforming

__all__ = ["run_call"]

MANY = 32  # number of snapshots from which several steps are reversed at once


def run_call(call: Call, keep: int | str, execute: str, unroll: int) -> Outputs:
    """Return the outputs of a call, from the run that its settings and surroundings need."""
    _gather_shards_in_graph(call)
    _require_whole_if_needed(call, keep, execute)
    repeated = _is_repeated(call, keep, execute)
    with recorded_iterators(call.loss) if repeated else contextlib.nullcontext():
        return _run(call, keep, execute, unroll)


def _is_repeated(call: Call, keep: int | str, execute: str) -> bool:
    """Return whether the loss may run again for a step and then find other surroundings."""
    if call.plain or (execute not in TRACED and not (call.wanted and torch.is_grad_enabled())):
        return False
    return execute in TRACED or keep != "all" or call.derivative not in ("reverse", "first_order")


def _run(call: Call, keep: int | str, execute: str, unroll: int) -> Outputs:
    budget = _is_budget(keep)
    if execute in TRACED:
        return _run_traced(call, keep, execute, unroll)
    if is_transforming() or in_forward_mode_of_this_thread():
        require_no_differences(call, "a call outside of torch.func transforms and forward mode")
        if budget:
            raise ValueError(
                f"inner_loop: keep: expected a call outside of transforms for the budget {keep!r}, "
                'in which everything is kept; use keep="all" there, or tasks= instead of vmap.'
            )
        return run_attached(call, call.inputs)
    reversible = keep == "reversible"
    if not call.wanted or not torch.is_grad_enabled():
        if not torch.is_grad_enabled():
            call = replace(call, plain=True)  # no derivative is left out, as none is wanted
        run = ReversibleRun(call) if reversible else Run(call, 1)
        with torch.no_grad():
            return run.outputs_with(run.evaluate(*call.inputs))
    if call.trail:
        run = FollowedRun(call)
    elif call.derivative == "forward":
        run = ForwardRun(call)
        if budget:
            require_within(run, str(keep))
    elif reversible:
        run = ReversibleRun(call)
    elif (keep == "all" and call.derivative in ("reverse", "first_order")) or (
        keep == "steps" and _is_small(call)
    ):
        return run_attached(call, call.inputs, call.trail)
    elif isinstance(keep, str):
        run = Run(call, snapshots_within(call, keep)) if budget else Run(call, call.steps, ROOM)
    else:
        run = Run(call, keep, ROOM if keep >= MANY else 0)
    return _swept(run, call)


def _is_budget(keep: int | str) -> bool:
    return isinstance(keep, str) and keep not in ("all", "steps", "reversible")


def _is_small(call: Call) -> bool:
    """Return whether the graph of all steps takes no more than that of the last ones may."""
    size = graph_size(call)
    if size is None or call.derivative != "reverse" or call.host:
        return False
    return top_saved_tensor_hooks(True) is None and (call.steps - call.first) * size <= ROOM


def _swept(run: Run, call: Call) -> Outputs:
    tensors = apply_sweep(run, *call.inputs)
    run.require_repeatable()
    return run.outputs_with(tensors)


def _require_whole_if_needed(call: Call, keep: int | str, execute: str) -> None:
    if call.derivative not in ("reverse", "first_order"):
        what = f"derivative={call.derivative!r}"
    elif execute in TRACED:
        what = f"execute={execute!r}"
    elif keep == "reversible":
        what = f"keep={keep!r}"
    else:
        return
    require_whole(
        call.inputs,
        f"inner_loop: {what}",
        "use derivative='reverse' or 'first_order', execute='eager' and another `keep`, which "
        "support DTensors",
    )


def _gather_shards_in_graph(call: Call) -> None:
    """Replace the hooks of the modules under `fully_shard` that the loss uses."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: there are no such modules
    if fsdp is not None and any(hasattr(x, "to_local") for x in call.inputs):
        reached = captured((call.loss, call.batches, call.meta), fsdp.FSDPModule)
        for _, module in list(reached):
            gather_in_graph(module)


def _snapshots(call: Call, keep: int | str) -> int:
    if isinstance(keep, int):
        return keep
    return call.steps if keep in ("all", "steps") else snapshots_within(call, keep, beside=4)


def _is_whole(call: Call) -> bool:
    return call.derivative == "reverse" and call.first == 0


def _run_traced(call: Call, keep: int | str, execute: str, unroll: int) -> Outputs:
    if is_transforming() or in_forward_mode_of_this_thread():
        raise NotTraceableError(
            "inner_loop: execute: expected a call outside of torch.func transforms and forward "
            f"mode for {execute!r}, got one inside; use tasks= instead of vmap, or "
            'execute="eager".'
        )
    differentiated = call.wanted and torch.is_grad_enabled()
    compiled = execute == "compile"
    run: TracedRun
    if differentiated and call.derivative == "forward":
        run = TracedForwardRun(call, compiled=compiled, keep_gradients=False)
        if _is_budget(keep):
            require_within(run, str(keep))
    else:
        run = TracedRun(
            call,
            _snapshots(call, keep) if differentiated else 1,
            compiled=compiled,
            keep_gradients=keep == "all" or call.derivative != "reverse",
            keep_all=bool(differentiated and keep == "all" and _is_whole(call)),
            unroll=unroll,
            differentiated=bool(differentiated),
        )
    if differentiated:
        return _swept(run, call)
    with torch.no_grad():
        return run.outputs_with(run.evaluate(*call.inputs))
