# SPDX-License-Identifier: Apache-2.0
"""Evolution strategies by several processes that exchange nothing but losses.

A network learns from its error rate, which has no derivative. Every process knows the seeds of the
directions in which the parameters are perturbed. Each process evaluates the error rate along its
share of them, the processes exchange the values, 8 bytes per evaluation, and all of them compute
the same gradient. The size of a gradient is printed for comparison.

References:
    T. Salimans, J. Ho, X. Chen, S. Sidor, I. Sutskever, Evolution Strategies as a Scalable
    Alternative to Reinforcement Learning, 2017, https://arxiv.org/abs/1703.03864

Run `torchrun --standalone --nproc-per-node 2 distributed_es.py` (below a minute), or without
torchrun `python distributed_es.py --nproc 2`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import torchopt
import torchopt.distributed as todist
from torchopt.diff.zero_order import Gaussian, ZeroOrder, estimators

# The processes import this file and the files beside it by name.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from evolution_strategies import Config, error_rate, fresh_params, load
from example_tools import flat_table, progress

# The settings of `evolution_strategies.py`; `num_pairs` counts the pairs of all processes.
PRESETS = {"full": Config(), "smoke": Config(steps=30, num_pairs=30)}


@todist.auto_init_rpc(backend="collective")
def train(config: Config) -> dict[str, Any]:
    """Train in every process; all have the same parameters after every step."""
    images, labels, test_images, test_labels = load()
    generator = torch.Generator().manual_seed(config.seed)
    params = {name: p.requires_grad_() for name, p in fresh_params(config.width, generator).items()}
    engine = ZeroOrder(
        Gaussian(),
        estimators.shaped(estimators.antithetic),
        num_samples=config.num_pairs,
        sigma=config.sigma,
        generator=generator,
        vectorized=True,
    )
    sharded = todist.zero_order(engine)
    estimated = sharded(error_rate)
    optimizer = torchopt.Adam(params.values(), lr=config.lr)
    started = time.perf_counter()
    label = f"ES, {todist.get_world_size()} processes"
    with progress(config.steps, label, shown=todist.get_rank() == 0) as bar:
        for _ in range(config.steps):
            batch = torch.randint(len(labels), (config.batch,), generator=generator)
            optimizer.zero_grad()
            estimated(params, images[batch], labels[batch]).backward()
            optimizer.step()
            bar.update()
    return {
        "world_size": todist.get_world_size(),
        "seconds": time.perf_counter() - started,
        "bytes_per_step": sharded.group.bytes_sent / config.steps,  # type: ignore[attr-defined]
        "gradient_bytes": sum(p.numel() * p.element_size() for p in params.values()),
        "test_error": error_rate(params, test_images, test_labels).item(),
        "checksum": sum(p.detach().double().sum().item() for p in params.values()),
    }


def report(results: dict[str, Any], limit: float) -> bool:
    """Print the results and return whether the network learned."""
    table = [["processes", "test error", "seconds", "bytes sent a step", "of a gradient"]]
    for row in (results, *([results["alone"]] if "alone" in results else [])):
        table.append(
            [
                str(row["world_size"]),
                f"{100 * row['test_error']:.1f} %",
                f"{row['seconds']:.1f}",
                f"{row['bytes_per_step']:.0f}",
                str(row["gradient_bytes"]),
            ]
        )
    print(flat_table(table))
    return bool(results["test_error"] < limit)


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when it did not learn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nproc", type=int, default=2, help="processes, without torchrun (2)")
    parser.add_argument("--smoke", action="store_true", help="seconds; judged leniently")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where to write (out)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = Config(
        **{**asdict(PRESETS["smoke" if options.smoke else "full"]), "seed": options.seed}
    )
    torch.set_num_threads(1)
    # Processes are forked from one that has done all imports, including the lazy ones.
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "torchopt.distributed"])
    if "RANK" in os.environ:  # torchrun has started the processes
        results = train(config)
    else:
        results = todist.spawn(train, options.nproc, (config,), start_method="forkserver")[0]
        results["alone"] = todist.spawn(train, 1, (config,), start_method="forkserver")[0]
    if todist.get_rank() != 0:
        return 0
    learned = report(results, 0.7 if options.smoke else 0.35)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "distributed_es.json"
    path.write_text(json.dumps({"config": asdict(config), **results}, indent=2) + "\n")
    print(f"wrote {path}")
    print("reached" if learned else "NOT REACHED: the network did not learn")
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
