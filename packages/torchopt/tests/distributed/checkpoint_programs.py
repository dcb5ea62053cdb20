# SPDX-License-Identifier: Apache-2.0
"""Programs that save and load sharded states."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from distributed_programs import introduce, make_net, make_tasks, outcome
from torch import nn

import torchopt
import torchopt.distributed as todist


def _mesh(dims: tuple[int, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", dims, mesh_dim_names=("tasks", "shards")[-len(dims) :])


def _sharded(mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    net = make_net()
    fully_shard(net, mesh=mesh)
    return net


def _train(net: nn.Module, optimizer: Any, steps: int) -> None:
    for x, y, _, _ in make_tasks(steps):
        optimizer.zero_grad()
        ((net(x) - y) ** 2).mean().backward()
        optimizer.step()


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def save_sharded(path: str, dims: tuple[int, ...], asynchronous: bool) -> Any:
    """Save after one and after two steps; return the parameters after these."""
    mesh = _mesh(dims)
    net = _sharded(mesh["shards"] if len(dims) > 1 else mesh)
    optimizer = torchopt.Adam(net.parameters(), lr=0.1)
    checkpoint = todist.Checkpoint(path, asynchronous=asynchronous)
    found = []
    for step in (1, 2):
        _train(net, optimizer, 1)
        checkpoint.save(step, {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
        found.append([p.full_tensor().detach().clone() for p in net.parameters()])
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()  # an asynchronous save has its copy
    checkpoint.wait()
    todist.barrier()
    return found


# With states of different kinds: factors, averages of parameters, sums over all tensors.
OTHERS = ("Adafactor", "Prodigy", "ScheduleFreeAdamW")


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def other_optimizers(path: str, loads: bool) -> dict[str, list[torch.Tensor]]:
    """Return the parameters after three steps with each optimizer; save after two, or load."""
    size = todist.get_world_size()
    mesh = _mesh((size,)) if size > 1 else None
    nets = {name: make_net() if mesh is None else _sharded(mesh) for name in OTHERS}
    optimizers = {name: getattr(torchopt, name)(nets[name].parameters(), lr=0.1) for name in OTHERS}
    if loads:
        found = todist.Checkpoint(path).load()
        assert found is not None
        for name, (net, optimizer) in found[1].items():
            nets[name].load_state_dict(net)
            optimizers[name].load_state_dict(optimizer)
    else:
        for name, net in nets.items():
            _train(net, optimizers[name], 2)
        states = {k: (nets[k].state_dict(), optimizers[k].state_dict()) for k in OTHERS}
        todist.Checkpoint(path).save(2, states)
    for name, net in nets.items():
        _train(net, optimizers[name], 1)
    return {
        name: [(p if mesh is None else p.full_tensor()).detach() for p in net.parameters()]
        for name, net in nets.items()
    }


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def saves_that_fail(path: str) -> Any:
    """Return, by cause, a rank's error if rank 0 cannot save, and the step in the checkpoint."""
    writer = importlib.import_module("torch.distributed.checkpoint").FileSystemWriter
    net = _sharded(_mesh((todist.get_world_size(),)))
    checkpoint = todist.Checkpoint(path)
    checkpoint.save(1, {"net": net.state_dict()})
    found = {}
    for what, (where, name) in {
        "the folder": (writer, "set_up_storage_writer"),
        "the plan": (writer, "finish"),
        "the file": (os, "replace"),
        "the state": (None, ""),
    }.items():
        state = {"net": net.state_dict(), "more": None if where else print}
        with mock.patch.object(where, name, no_room) if where else contextlib.nullcontext():
            found[what] = outcome(functools.partial(checkpoint.save, 2, state))
        left = checkpoint.load()
        assert left is not None
        found[what] = *found[what][:4], left[0]
    checkpoint.save(3, {"net": net.state_dict()})
    return found, checkpoint.load()


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def saves_a_step_again(path: str) -> Any:
    """Return what is loaded after a second save of a step that fails, and one that does not."""
    writer = importlib.import_module("torch.distributed.checkpoint").FileSystemWriter
    net = _sharded(_mesh((todist.get_world_size(),)))
    checkpoint = todist.Checkpoint(path)
    found = [[p.full_tensor().detach().clone() for p in net.parameters()]]
    checkpoint.save(1, {"net": net.state_dict()})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    for _ in range(2):
        with mock.patch.object(writer, "finish", no_room):
            outcome(functools.partial(checkpoint.save, 1, {"net": net.state_dict()}))
    for again in (False, True):
        if again:
            checkpoint.save(1, {"net": net.state_dict()})
        loaded = todist.Checkpoint(path).load()
        assert loaded is not None
        found.append([x.full_tensor() for x in loaded[1]["net"].values()])
    return found, len(list(Path(f"{path}.shards").iterdir()))


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def shards_in_two_ways(path: str) -> Any:
    """Return what was saved under tensor parallelism and `fully_shard`, and is loaded on each mesh.

    Then also what module and optimizer are after they were trained on and loaded.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import parallel

    mesh = _mesh((2, 2))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    ways = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    parallel.parallelize_module(net, mesh["shards"], ways)
    fully_shard(net, mesh=mesh["tasks"])
    optimizer = torchopt.Adam(net.parameters(), lr=0.1)

    def state() -> dict[str, Any]:
        return {"net": net.state_dict(), "optimizer": optimizer.state_dict()}

    def whole(tree: Any) -> list[torch.Tensor]:
        leaves = torch.utils._pytree.tree_leaves(tree)
        return [x.full_tensor().detach().clone() for x in leaves if hasattr(x, "full_tensor")]

    def train() -> None:
        optimizer.zero_grad()
        (net(torch.ones(2, 4, dtype=torch.float64)) ** 2).mean().backward()
        optimizer.step()

    train()
    saved = whole(state())
    todist.Checkpoint(path).save(1, state())
    found = todist.Checkpoint(path).load()
    assert found is not None
    train()
    later = whole(state())
    net.load_state_dict(found[1]["net"])
    optimizer.load_state_dict(found[1]["optimizer"])
    train()
    kinds = {type(p).__name__ for x in net.parameters() for p in x.placements}
    elsewhere = [todist.Checkpoint(path).load(mesh=_mesh(dims)) for dims in ((4, 1), (1, 4))]
    loaded = [whole(each and each[1]) for each in (found, *elsewhere)]
    return saved, loaded, later, whole(state()), kinds


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def saves_a_sum_that_is_pending(path: str) -> Any:
    """Return what is told about a DTensor whose ranks hold the terms of a sum."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = _mesh((todist.get_world_size(),))
    terms = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    checkpoint = todist.Checkpoint(path)
    try:
        checkpoint.save(1, {"net": [terms]})
    except TypeError as error:
        return str(error), checkpoint.load()
    return None


def no_room(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def load_sharded(path: str) -> Any:
    """Return step, own shards and whole tensors, in any number of processes."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = todist.Checkpoint(path).load()
    told_of = [str(w.message) for w in told if "refuses" in str(w.message)]
    assert found is not None
    step, state = found
    values = list(state["net"].values())
    kinds = {type(x).__name__ for x in values}
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in values]
    local = sum(x.to_local().numel() if hasattr(x, "to_local") else x.numel() for x in values)
    moments = [x for x in torch.utils._pytree.tree_leaves(state["optimizer"]) if x.ndim]
    return step, kinds, whole, local, len(moments), told_of


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def continue_sharded(path: str, load: bool) -> Any:
    """Return the parameters after three steps; two of the steps may come from a checkpoint."""
    net = _sharded(_mesh((todist.get_world_size(),)))
    optimizer = torchopt.Adam(net.parameters(), lr=0.1)
    if load:
        _train(net, optimizer, 1)  # so that there are states to be loaded over
        found = todist.Checkpoint(path).load()
        assert found is not None
        net.load_state_dict(found[1]["net"])
        optimizer.load_state_dict(found[1]["optimizer"])
    else:
        _train(net, optimizer, 1)
        _train(net, optimizer, 1)
    _train(net, optimizer, 1)
    return [p.full_tensor().detach() for p in net.parameters()]


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def checkpointed_shards(folder: str, steps: int) -> Any:
    """Train sharded parameters from the checkpoint on, with a new checkpoint after each step."""
    progress = introduce()
    net = _sharded(_mesh((todist.get_world_size(),)))
    optimizer = torchopt.Adam(net.parameters(), lr=0.1)
    checkpoint = todist.Checkpoint(Path(folder) / "state.pt")
    found = checkpoint.load()
    done = 0 if found is None else found[0]
    if found is not None:
        _train(net, optimizer, 1)  # so that there are states to be loaded over
        net.load_state_dict(found[1]["net"])
        optimizer.load_state_dict(found[1]["optimizer"])
    for step in range(done + 1, steps + 1):
        _train(net, optimizer, 1)
        checkpoint.save(step, {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
        progress()
    return [p.full_tensor().detach() for p in net.parameters()]


def kill_while_saving(path: str) -> None:
    """Save ever larger numbers until this process is killed."""
    checkpoint = todist.Checkpoint(path)
    step = 0
    while True:
        step += 1
        checkpoint.save(step, {"w": torch.full((300_000,), float(step))})
        Path(path + ".told").write_text(str(step))
