# SPDX-License-Identifier: Apache-2.0
"""Modules of `fully_shard`, differentiable to any order.

torch gathers the shards of such a module in hooks around its forward pass, and its graph ends at
the gathered parameters. Here these hooks are removed and gathering is part of the graph. The module
is then an ordinary function of its shards, which fast weights can replace.

Let rank r compute a loss L_r from the gathered parameters p, and let all ranks differentiate
T = mean_r L_r, as with torch's hooks. The cotangent of the gathered p on rank r is the derivative
of L_r; the cotangent of a shard is the derivative of T. So the transpose of gathering is the mean
over the ranks, scattered, and the transpose of that is gathering.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.params.swap import Swap
from torchopt.torch_internals import remove_fsdp_hooks
from torchopt.tree_function import apply_rule

__all__ = ["completed", "gather_in_graph", "largest_absolute", "require_whole"]

_done: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def gather_in_graph(module: nn.Module) -> None:
    """Make a module and its sub-modules gather their shards as part of the graph, permanently.

    Modules without `fully_shard` are not changed.

    Args:
        module: A module.
    """
    # Importing it takes long; if nobody has, no module is sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule") or not isinstance(module, nn.Module):
        return
    for part in module.modules():
        if isinstance(part, fsdp.FSDPModule) and part not in _done:
            part.reshard()
            remove_fsdp_hooks(part)
            around = _Around()
            part.register_forward_pre_hook(around.before, prepend=True)
            part.register_forward_hook(around.after, always_call=True)
            _done.add(part)


class _Around:
    """The forward hooks that run a module with gathered parameters."""

    def __init__(self) -> None:
        self._swaps: list[Swap | None] = []

    def before(self, module: nn.Module, args: Any) -> None:
        del args
        shards = {k: x for k, x in module.named_parameters() if hasattr(x, "full_tensor")}
        swap = None
        if shards:
            swap = Swap(module, {k: gathered(x) for k, x in shards.items()}, tie_weights=True)
            swap.__enter__()
        self._swaps.append(swap)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        swap = self._swaps.pop()
        if swap is not None:
            swap.__exit__(None, None, None)


def gathered(x: Any) -> Tensor:
    """Return a DTensor as one tensor on every rank of its mesh, differentiable in the shards."""
    (whole,) = apply_rule(_Gather(x.device_mesh, x.placements), x)
    return whole


def completed(x: Tensor) -> Tensor:
    """Return a DTensor whose pending sums are complete on every rank; any other tensor as it is."""
    sharded: Any = x
    if not any(p.is_partial() for p in getattr(x, "placements", ())):
        return x
    from torch.distributed.tensor import Replicate

    kept = [Replicate() if p.is_partial() else p for p in sharded.placements]
    result: Tensor = sharded.redistribute(placements=kept)
    return result


def largest_absolute(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """Return the largest absolute value, as a constant for differentiation.

    Some ranks may hold no elements of a DTensor; they count as 0.

    Args:
        x: A tensor that is not empty.
        dim: The dimensions to reduce; None for all.
        keepdim: Whether the reduced dimensions are kept with size 1.
    """
    x = x.detach()
    over = tuple(range(x.ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    if not hasattr(x, "to_local"):
        return x.abs().amax(dim=over, keepdim=keepdim)
    from torch.distributed.tensor import DTensor, Partial

    reduced = {d % x.ndim for d in over}
    sharded: Any = completed(x)
    local = sharded.to_local().abs()
    if local.numel():
        top = local.amax(dim=over, keepdim=True)
    else:
        top = local.new_zeros([1 if d in reduced else n for d, n in enumerate(local.shape)])
    placements = [
        Partial("max") if p.is_shard() and p.dim in reduced else p for p in sharded.placements
    ]
    shape = torch.Size(1 if d in reduced else n for d, n in enumerate(x.shape))
    whole = DTensor.from_local(
        top,
        sharded.device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    result = completed(whole)
    left = [n for d, n in enumerate(x.shape) if d not in reduced]
    return result if keepdim else result.reshape(left)


def require_whole(tensors: Iterable[Any], what: str, instead: str) -> None:
    """Raise `TypeError` if one of the tensors is sharded.

    Args:
        tensors: The tensors.
        what: The name of the function or option that does not support DTensors, for the message.
        instead: What to do instead, for the message.
    """
    for k, x in enumerate(tensors):
        if hasattr(x, "to_local"):
            raise TypeError(
                f"{what}: expected tensors that are whole on every rank, got a DTensor of shape "
                f"{list(x.shape)} in leaf {k}; {instead}"
            )


class _Rule:
    needs_its_closure = False
    num_differentiable_inputs = num_differentiable_outputs = 1
    num_kept_inputs = 0

    def __init__(self, mesh: Any, placements: Any) -> None:
        self.mesh = mesh
        self.placements = placements


class _Gather(_Rule):
    """The operation that gathers shards into the whole tensor."""

    def evaluate(self, *inputs: Any) -> tuple[Tensor, ...]:
        return (inputs[0].full_tensor(),)

    def pull_back(self, inputs: Any, outputs: Any, cotangents: Any) -> Any:
        del inputs, outputs
        return apply_rule(_Mean(self.mesh, self.placements), *cotangents)

    def push_forward(self, inputs: Any, outputs: Any, tangents: Any) -> Any:
        del inputs, outputs
        return apply_rule(self, *tangents)


class _Mean(_Rule):
    """The operation that averages the tensors of all ranks and scatters the mean as shards."""

    def evaluate(self, *inputs: Any) -> tuple[Tensor, ...]:
        from torch.distributed.tensor import DTensor, Partial

        part = inputs[0].contiguous() / self.mesh.size()
        whole = DTensor.from_local(part, self.mesh, [Partial()] * self.mesh.ndim, run_check=False)
        return (whole.redistribute(placements=self.placements),)

    def pull_back(self, inputs: Any, outputs: Any, cotangents: Any) -> Any:
        del inputs, outputs
        (cotangent,) = cotangents
        cotangent = cotangent.redistribute(placements=self.placements)
        return apply_rule(_Gather(self.mesh, self.placements), cotangent)

    def push_forward(self, inputs: Any, outputs: Any, tangents: Any) -> Any:
        del inputs, outputs
        return apply_rule(self, *tangents)
