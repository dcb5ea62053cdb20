# SPDX-License-Identifier: Apache-2.0
"""Programs with sharded parameters: `fully_shard`, DTensors, meshes for tasks and shards."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
from distributed_programs import F64, explicit_loss, make_net, make_tasks
from torch import Tensor, nn

import torchopt
import torchopt.distributed as todist
from torchopt.params.sharded import largest_absolute

FUNCTIONAL = ("sgd", "adam", "adamw", "rmsprop", "adagrad", "radam", "adamax", "lamb")
CLASSES = ("SGD", "Adam", "AdamW", "RMSProp", "AdaGrad", "AdaDelta", "AdaMax", "RAdam")
# With norms of whole tensors, products of matrices, or sums over all tensors.
OTHERS = ("Adafactor", "LAMB", "LARS", "Lion", "Muon", "Prodigy", "ScheduleFreeAdamW")
META = ("MetaSGD", "MetaAdam", "MetaAdamW", "MetaRMSProp")
HOWS = ("fully_shard", "nested", "DTensor", "own batches")


def small_net() -> nn.Module:
    """Return a network; its tensors have 8 rows, or 2, of which some ranks get none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8, bias=False), nn.Tanh(), nn.Linear(8, 2)).double()


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def error(got: Any, want: Any) -> float:
    """Return the largest difference here, relative to the largest entry; ranks compare shards."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.detach(), b.detach()
        scale = b.abs().max() + 1e-300 if b.numel() else 1.0
        if (shard := getattr(a, "placements", None)) is not None:
            (placement,) = shard
            mesh = a.device_mesh
            if placement.is_shard():
                parts = b.chunk(mesh.size(), placement.dim)
                k = mesh.get_local_rank()
                b = parts[k] if k < len(parts) else b.narrow(placement.dim, 0, 0)
            elif not placement.is_replicate():
                a = a.full_tensor()
            a = a.to_local() if hasattr(a, "to_local") else a
        assert a.shape == b.shape
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / scale))
    return worst


def batch(rank: int = 0) -> Tensor:
    return torch.randn(8, 3, dtype=F64, generator=torch.Generator().manual_seed(rank))


def distributed(net: nn.Module, mesh: Any, placement: Any = None) -> nn.Module:
    """Return the module with DTensors in place of its parameters, split by rows if not told."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for part in net.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                p = nn.Parameter(distribute_tensor(p.detach(), mesh, [placement or Shard(0)]))
                part._parameters[name] = p
    return net


def under_fully_shard(kind: str) -> nn.Module:
    """Return the module under `fully_shard`, as a whole or with its layers ("nested")."""
    from torch.distributed.fsdp import fully_shard

    net: Any = small_net()
    if kind == "nested":
        fully_shard(net[0])
        fully_shard(net[2])
    fully_shard(net)
    whole: nn.Module = net
    return whole


def pairs(rows: Sequence[str], columns: Sequence[str], n: int) -> list[tuple[str, str]]:
    """Return every pair for two ranks, else one for each row: other ones for 1, 3 and 4 ranks."""
    if n == 2 or "TORCHOPT_GRID" in os.environ:  # it asks for every pair at every size
        return list(itertools.product(rows, columns))
    start = n // 2
    return list(zip(rows, itertools.islice(itertools.cycle(columns), start, None)))


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def grid() -> dict[str, float]:
    """Return the error of each way to train sharded parameters, against one process."""
    import torch.distributed as dist
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,))
    x = batch()
    x_d = distribute_tensor(x, mesh, [Replicate()])
    found: dict[str, float] = {}

    def held(module: Any, optimizer: Any) -> tuple[float, float]:
        """Return this rank's share of parameters and states, in units of the parameters."""
        states = torch.utils._pytree.tree_leaves(optimizer.state_dict())
        sizes = [x.to_local().numel() for x in states if hasattr(x, "to_local")]
        total = sum(p.numel() for p in module.parameters())
        return sum(p.to_local().numel() for p in module.parameters()) / total, sum(sizes) / total

    def trained(name: str, again: bool, **options: Any) -> None:
        """Train for two steps. Then load the state after the first one, and take the second again.

        Args:
            name: The class of the optimizer.
            again: Whether to load.
            options: Of the optimizer.
        """
        key = " ".join([name, *options])
        ends, states = [], []
        for module in (small_net(), under_fully_shard("whole")):
            optimizer = getattr(torchopt, name)(module.parameters(), lr=0.1, **options)

            def step(module: Any = module, optimizer: Any = optimizer) -> list[Tensor]:
                optimizer.zero_grad()
                (module(x) ** 2).mean().backward()
                optimizer.step()
                parts = [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]
                return [p.detach().clone() for p in parts]

            step()
            if again:
                whole = dcp.StateDictOptions(full_state_dict=True)
                model, state = copy.deepcopy(dcp.get_state_dict(module, optimizer, options=whole))
                leaves = torch.utils._pytree.tree_leaves((model, state))
                states.append([y for y in leaves if isinstance(y, Tensor)])
            want = step()
            ends.append([p.detach().clone() for p in module.parameters()])
            if again:
                dcp.set_state_dict(
                    module,
                    optimizer,
                    model_state_dict=model,
                    optim_state_dict=state,
                    options=whole,
                )
                found[f"{key} again {len(ends)}"] = error(step(), want)
        found[f"share {key}"], found[f"states {key}"] = held(module, optimizer)
        found[key] = error(ends[1], ends[0])
        if again:
            found[f"state dict {key}"] = error(states[1], states[0])

    for name in CLASSES:  # torch takes no empty state
        trained(name, True, **({"momentum": 0.9} if name == "SGD" else {}))
    for name in ("SGD", *(OTHERS if n == 3 else ())):
        trained(name, False)

    def clipped(make: Any) -> float:
        """Return the error with clipping by the norm of all gradients, under `fully_shard`."""
        ends = []
        for module in (small_net(), under_fully_shard("nested")):
            leaves = list(module.parameters())
            chain = torchopt.chain(torchopt.clip.clip_grad_norm(0.01), torchopt.adam(0.1))
            ends.append(make(module, leaves, chain))
        return error(ends[1], ends[0])

    def clipped_steps(module: Any, leaves: list[Any], chain: Any) -> Any:
        optimizer = torchopt.Optimizer(leaves, chain)
        for _ in range(2):
            optimizer.zero_grad()
            (module(x) ** 2).mean().backward()
            optimizer.step()
        return leaves

    def clipped_meta_steps(module: Any, leaves: list[Any], chain: Any) -> Any:
        optimizer = torchopt.MetaOptimizer(module, chain)
        for _ in range(2):
            optimizer.step((module(x) ** 2).mean())
        return torch.autograd.grad(((module(x) - 1) ** 2).mean(), leaves)

    found["clipped, fully_shard"] = clipped(clipped_steps)
    found["clipped, meta-optimizer"] = clipped(clipped_meta_steps)

    def functional(name: str, inplace: bool, differentiate: bool, clip: bool) -> float:
        results = []
        for module, data in ((small_net(), x), (distributed(small_net(), mesh), x_d)):
            params = dict(module.named_parameters())
            leaves = list(params.values())
            steps = [torchopt.clip.clip_grad_norm(0.01)] if clip else []
            optimizer = torchopt.chain(*steps, getattr(torchopt, name)(0.1))
            state = optimizer.init(params)
            for _ in range(2):
                loss = (torch.func.functional_call(module, params, (data,)) ** 2).mean()
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=differentiate)
                updates, state = optimizer.update(
                    dict(zip(params, grads)), state, params=params, inplace=inplace
                )
                params = torchopt.apply_updates(params, updates, inplace=inplace)
                if not differentiate:
                    params = {k: v.detach().requires_grad_() for k, v in params.items()}
            if differentiate:
                loss = ((torch.func.functional_call(module, params, (data,)) - 1) ** 2).mean()
                results.append(torch.autograd.grad(loss, leaves))
            else:
                results.append(tuple(params.values()))
        return error(results[1], results[0])

    ways = {
        "in place": (True, False),
        "not in place": (False, False),
        "differentiated": (False, True),
    }
    for name, how in pairs(FUNCTIONAL, tuple(ways), n):
        found[f"{name} {how}"] = functional(name, *ways[how], clip=False)
    zeros = {k: torch.zeros_like(p) for k, p in distributed(small_net(), mesh).named_parameters()}
    for norm_type in (2.0, float("inf")):  # of nothing, where some ranks hold no entry
        clip = torchopt.clip.clip_grad_norm(1.0, norm_type)
        clipped, _ = clip.update(zeros, clip.init(zeros))
        found[f"zeros {norm_type}"] = max(float(full(x).abs().max()) for x in clipped.values())
    cube = torch.randn(5, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    for shard, dim, keep in itertools.product((0, 1, 2), (None, 0, (-3, 1)), (False, True)):
        part = distribute_tensor(cube, mesh, [Shard(shard)])
        pair = [largest_absolute(y, dim, keep) for y in (part, cube)]
        found[f"largest of {shard} over {dim} {keep}"] = error(pair[:1], pair[1:])
    found["clipped"] = functional("sgd", False, False, True)
    found["clipped, differentiated"] = functional("adam", False, True, True)

    def inner(kind: str, name: str = "adam", **options: Any) -> float:
        results = []
        shard = distributed(small_net(), mesh) if kind == "DTensor" else under_fully_shard(kind)
        for module, data in ((shard, x_d if kind == "DTensor" else x), (small_net(), x)):
            params = dict(module.named_parameters())

            def loss(p: Any, goal: float = 0.0, module: Any = module, data: Any = data) -> Tensor:
                value = torch.func.functional_call(module, p, (data,)) - goal
                return (value**2).mean()

            step = getattr(torchopt, name)(0.1)
            steps = 3 if "keep" in options else 2
            run = torchopt.inner_loop(lambda p, batch: loss(p), step, steps=steps, **options)
            results.append(torch.autograd.grad(loss(run(params).params, 1.0), params.values()))
        return error(results[0], results[1])

    for kind in ("DTensor", "whole", "nested"):
        for name in (
            ("sgd", "adam", "adamw", "rmsprop", "adagrad") if kind == "whole" else ("adam",)
        ):
            found[f"inner loop, {kind}, {name}"] = inner(kind, name)
        found[f"inner loop, {kind}, first order"] = inner(kind, derivative="first_order")
        found[f"inner loop, {kind}, snapshots"] = inner(kind, keep=2)
    refused = []
    for name in ("shampoo", "soap", "psgd"):
        try:
            getattr(torchopt, name)(0.1).init(zeros)
        except TypeError as e:
            refused.append("DTensor" in str(e))
    try:
        torchopt.transform.in_8_bits(torchopt.adam(0.1), min_size=1).init(zeros)
    except TypeError as e:
        refused.append("DTensor" in str(e))
    for options in (
        {"derivative": "mixed"},
        {"derivative": "forward"},
        {"derivative": "differences"},
        {"execute": "trace"},
    ):
        try:
            inner("whole", **options)
        except TypeError as e:
            refused.append("DTensor" in str(e))
    found["refused"] = float(refused != [True] * 8)

    for name, how in pairs(META, HOWS, n):
        plain = small_net()
        net = distributed(small_net(), mesh) if how == "DTensor" else under_fully_shard(how)
        own = batch(dist.get_rank()) if how == "own batches" else x_d if how == "DTensor" else x
        everyone = [batch(r) for r in range(n)] if how == "own batches" else [x]
        results = []
        for module, batches in ((plain, everyone), (net, [own])):
            leaves = list(module.parameters())
            inner = getattr(torchopt, name)(module, lr=0.1)
            for _ in range(2):
                inner.step(sum((module(b) ** 2).mean() for b in batches) / len(batches))
            loss = sum(((module(b) - 1) ** 2).mean() for b in batches) / len(batches)
            results.append(torch.autograd.grad(loss, leaves))
        found[f"{name} {how}"] = error(results[1], results[0])
    if alone:
        dist.destroy_process_group()
    return found


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def tasks_and_shards(deterministic: bool) -> Any:
    """Return the meta-gradient on a mesh of tasks and shards, and the losses."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tasks", "shards"))
    net = make_net()
    fully_shard(net, mesh=mesh["shards"])
    engine = todist.TaskParallel(net, group=mesh.get_group("tasks"), deterministic=deterministic)
    leaves = list(net.parameters())
    step = engine.backward(lambda t: explicit_loss(net, t), make_tasks(5))
    refused = ""
    try:
        todist.TaskParallel(net, group=mesh.get_group("tasks"), schedule="dynamic")
    except ValueError as e:
        refused = str(e)
    return [full(p.grad) for p in leaves], step.losses, step.owners, refused


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def tasks_of_split_batches(deterministic: bool, kind: str) -> Any:
    """Return the meta-gradient and losses of tasks whose batches are split over the shards.

    Args:
        deterministic: As in `TaskParallel`.
        kind: `"Shard"` or `"Replicate"`: how the parameters are placed. The gradients of replicated
            ones are sums that are pending.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tasks", "shards"))
    shards, group = mesh["shards"], mesh.get_group("tasks")
    net = distributed(small_net(), shards, Replicate() if kind == "Replicate" else Shard(0))
    engine = todist.TaskParallel(net, group=group, deterministic=deterministic)

    def loss(k: int) -> Tensor:
        return (net(distribute_tensor(batch(k), shards, [Shard(0)])) ** 2).mean()

    step = engine.backward(loss, range(5))
    return [full(p.grad) for p in net.parameters()], step.losses
