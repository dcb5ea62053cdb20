# SPDX-License-Identifier: Apache-2.0
"""The DTensors of a checkpoint: each rank writes its shards with `torch.distributed.checkpoint`.

torch makes the plans, but `Group` exchanges them, so that the error names a process that fails in
the meantime.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchopt.distributed.group import Group
from torchopt.torch_internals import strided_shard
from torchopt.tree import tree_flatten, tree_map, tree_paths, tree_unflatten

__all__ = ["Writing", "clean", "fresh", "problem", "restored", "split"]

_SHARDED = "torchopt.sharded"


def _is_dtensor(x: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there are no DTensors
    return module is not None and isinstance(x, module.DTensor)


def _dcp() -> Any:
    return importlib.import_module("torch.distributed.checkpoint")  # slow to import


def split(state: Any) -> tuple[Any, dict[str, Any]]:
    """Return a state with descriptions in place of DTensors, and the DTensors by number.

    Raises:
        TypeError: The ranks hold the terms of a sum, of which only one would be saved.
    """
    leaves, spec = tree_flatten(state, none_is_leaf=True)
    found: dict[str, Any] = {}
    for k, x in enumerate(leaves):
        if _is_dtensor(x):
            if any(p.is_partial() for p in x.placements):
                path = tree_paths(state, none_is_leaf=True)[k]
                raise TypeError(
                    "Checkpoint.save: expected DTensors whose sums are complete, got placements "
                    f"{list(x.placements)} at ${''.join(f'[{key!r}]' for key in path)}; "
                    "redistribute it first, to Replicate() or Shard()"
                )
            number = str(len(found))
            found[number] = x.detach()
            mesh = x.device_mesh
            leaves[k] = {
                _SHARDED: number,
                "shape": list(x.shape),
                "dtype": x.dtype,
                "placements": [(type(p).__name__, getattr(p, "dim", 0)) for p in x.placements],
                "mesh": list(mesh.shape),
                "names": list(mesh.mesh_dim_names or ()),
                "device": mesh.device_type,
            }
    return (tree_unflatten(spec, leaves), found) if found else (state, found)


class Writing:
    """The shards of one state while they are written; all ranks take part.

    Args:
        find: Returns the folder of the shards, on the first rank, before another rank makes it.
        sharded: The DTensors, by number.
        group: The ranks.
        copy: Copy the tensors, because they may change before they are written.
    """

    def __init__(
        self, find: Callable[[], Path], sharded: dict[str, Any], group: Group, *, copy: bool
    ) -> None:
        dcp = _dcp()
        self.folder = folder = group.by_first(find, "the old folder of a Checkpoint")
        self.group = group
        self._state = {k: x.clone() for k, x in sharded.items()} if copy else sharded
        self._planner: Any = dcp.DefaultSavePlanner()
        self._planner.set_up_planner(self._state, None, group.rank == 0)
        self._writer: Any = dcp.FileSystemWriter(folder, sync_files=True)
        plan = self._writer.prepare_local_plan(self._planner.create_local_plan())
        plans = group.gather_objects(plan, "the plan of a Checkpoint")
        set_up = partial(self._writer.set_up_storage_writer, True)
        group.by_first(set_up, "the folder of a Checkpoint")
        # The global plan is the same on every rank, so the shares need not be sent.
        plans, self._metadata = self._planner.create_global_plan(plans)
        plans = self._writer.prepare_global_plan(plans)
        self._plan = self._planner.finish_plan(plans[group.rank])
        self._results: Any = []

    def write(self) -> None:
        """Write the shards of this rank."""
        self._results = self._writer.write_data(self._plan, self._planner).wait()

    def finish(self, error: BaseException | None) -> dict[str, Any]:
        """Return the checksums of all files, after every rank has written.

        Raises:
            WorkerError: A rank could not write.
        """
        from torchopt.distributed.raised import Raised

        own: Any = self._results
        if error is not None:
            own = Raised(error, self.group.world_rank, "the save of a Checkpoint")
        results = self.group.gather_objects(own, "the shards of a Checkpoint")
        for result in results:
            if isinstance(result, Raised):
                raise result.as_error()
        finish = partial(self._writer.finish, self._metadata, results)
        self.group.by_first(finish, "the shards of a Checkpoint")
        sums = _checksums(self.folder, self.group)
        return {"folder": self.folder.name, "files": sums}


def _checksums(folder: Path, group: Group) -> dict[str, str]:
    """Return the checksums of all files in a folder; each rank computes some of them."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    own = {}
    for path in files[group.rank :: group.size]:
        with path.open("rb") as file:
            sum_ = hashlib.blake2b(digest_size=32)
            while block := file.read(2**20):
                sum_.update(block)
        own[path.name] = sum_.hexdigest()
    everyone: dict[str, str] = {}
    for part in group.gather_objects(own, "the checksums of a Checkpoint"):
        everyone.update(part)
    return everyone


def problem(folder: Path, manifest: Any, group: Group) -> str | None:
    """Return what is wrong with the shards of a state, or None; the same on every rank."""
    if manifest is None:
        return None
    found = _checksums(folder / manifest["folder"], group)
    for name, expected in manifest["files"].items():
        if found.get(name) != expected:
            how = "is missing" if name not in found else "was changed (the checksum differs)"
            return f"its shard {folder / manifest['folder'] / name} {how}"
    return None


def restored(folder: Path, state: Any, manifest: Any, mesh: Any) -> Any:
    """Return a state with its DTensors loaded."""
    if manifest is None:
        return state
    dcp = _dcp()

    tensors: dict[str, Any] = {}
    meshes: dict[Any, Any] = {}

    def made(x: Any) -> Any:
        return tensors.setdefault(x[_SHARDED], _empty(x, mesh, meshes)) if _is_record(x) else x

    result = tree_map(made, state, is_leaf=_is_record, none_is_leaf=True)
    reader = dcp.FileSystemReader(folder / manifest["folder"])
    with warnings.catch_warnings():  # `no_dist` is meant: each rank reads its own shards
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return result


def _is_record(x: Any) -> bool:
    return isinstance(x, dict) and _SHARDED in x


def _empty(record: dict[str, Any], mesh: Any, meshes: dict[Any, Any]) -> Any:
    """Return an empty DTensor; without a process group, an empty plain tensor."""
    shape, dtype = record["shape"], record["dtype"]
    if mesh is None and not dist.is_initialized():
        return torch.empty(shape, dtype=dtype)
    dtensor: Any = importlib.import_module("torch.distributed.tensor")
    from torch.distributed.device_mesh import init_device_mesh

    if mesh is None:
        size, dims = dist.get_world_size(), tuple(record["mesh"])
        if len(dims) == 1:
            dims = (size,)
        elif torch.Size(dims).numel() != size:
            raise ValueError(
                f"Checkpoint.load: expected {torch.Size(dims).numel()} ranks, as the state was "
                f"saved on a mesh {list(dims)}, got {size}; pass `mesh`"
            )
        key = (record["device"], dims, tuple(record["names"]))
        if key not in meshes:
            meshes[key] = init_device_mesh(key[0], dims, mesh_dim_names=key[2] or None)
        mesh = meshes[key]
    placements: list[Any] = []
    for k, (kind, dim) in enumerate(record["placements"]):
        # `fully_shard` splits what tensor parallelism has split into parts of each of its shards.
        later = [j for j, x in enumerate(record["placements"]) if j > k and x == ("Shard", dim)]
        factor = math.prod(mesh.size(j) for j in later) if kind == "_StridedShard" else 1
        if kind == "Replicate":
            placements.append(dtensor.Replicate())
        else:
            placements.append(strided_shard(dim, factor) if factor > 1 else dtensor.Shard(dim))
    return dtensor.empty(*shape, dtype=dtype, device_mesh=mesh, placements=placements)


def clean(folder: Path, files: Iterable[Path]) -> None:
    """Remove the shards that no file refers to."""
    if not folder.is_dir():
        return
    used = _used(files)
    for found in folder.iterdir():
        if found.name not in used:
            shutil.rmtree(found, ignore_errors=True)


def fresh(folder: Path, step: int, files: Iterable[Path]) -> Path:
    """Return a path for the shards of a step that does not exist and that no file refers to.

    If a step is saved a second time, the first shards remain until the new ones are complete.
    """
    for name in itertools.chain([str(step)], (f"{step}.{k}" for k in itertools.count(2))):
        found = folder / name
        if not found.exists():
            break
        if name not in _used(files):
            shutil.rmtree(found, ignore_errors=True)
            break
    return found


def _used(files: Iterable[Path]) -> set[str]:
    """Return the names of the folders that the files refer to."""
    from torchopt.distributed.checkpoint import _read
    from torchopt.distributed.plain import decode

    used = set()
    for path in files:
        with contextlib.suppress(OSError):
            data, _ = _read(path)
            manifest = None if data is None else decode(data)[2]
            if manifest is not None:
                used.add(manifest["folder"])
    return used
