# SPDX-License-Identifier: Apache-2.0
"""A program for remote calls, as users write it; it prints what the test checks."""

from __future__ import annotations

import json
import os
import sys

import torch

import torchopt
import torchopt.distributed as todist

ready = False


def worker_init_fn():
    global ready
    torch.manual_seed(1000 + todist.get_rank())
    ready = True


@todist.parallelize(partitioner=todist.batch_partitioner, reducer=todist.mean_reducer)
def compute_loss(model, batch, target):
    inner_optim = torchopt.MetaSGD(model, lr=0.1)
    inner_optim.step(torch.nn.functional.mse_loss(model(batch), target))
    return torch.nn.functional.mse_loss(model(batch), target)


@todist.rank_zero_only
def train():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1).double()
    optimizer = torchopt.SGD(model.parameters(), lr=0.2)
    batch = torch.randn(8, 4, dtype=torch.float64)
    target = batch.sum(dim=1, keepdim=True)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with todist.autograd.context() as context_id:
            copy = torchopt.module_clone(model, by="copy")
            loss = compute_loss(copy, batch, target)
            todist.autograd.backward(context_id, loss)
        losses.append(loss.item())
        last = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    # The last gradient again, computed in this process.
    with torch.no_grad():
        for p, g in zip(model.parameters(), last):
            p += 0.2 * g
    total = 0.0
    for x, y in zip(batch.chunk(todist.get_world_size()), target.chunk(todist.get_world_size())):
        start = torchopt.extract_state_dict(model, by="reference")
        inner_optim = torchopt.MetaSGD(model, lr=0.1)
        inner_optim.step(torch.nn.functional.mse_loss(model(x), y))
        total = total + torch.nn.functional.mse_loss(model(x), y) / todist.get_world_size()
        torchopt.recover_state_dict(model, start)
    want = torch.autograd.grad(total, list(model.parameters()))
    error = max((g - w).abs().max().item() for g, w in zip(last, want))
    facts = {
        "world_size": todist.get_world_size(),
        "ready": ready,
        "first": losses[0],
        "last": losses[-1],
        "error": error,
    }
    sys.stdout.write(json.dumps(facts) + "\n")
    return facts


@todist.auto_init_rpc(worker_init_fn)
def main():
    return train()


def process(rank, world_size, port, told):
    """Set the variables of torchrun and run the program."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    facts = main()
    if facts is not None:
        told.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
