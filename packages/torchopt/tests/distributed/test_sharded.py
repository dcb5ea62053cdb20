# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters train, and are differentiated, like those of one process."""

from __future__ import annotations

import copy

import distributed_programs
import pytest
import sharded_programs as programs
import torch
from ahead import ahead, in_world
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import torchopt

SIZES = (1, 2, 3, 4)


@pytest.mark.parametrize("n", SIZES)
@ahead(lambda folder, n: in_world(programs.grid, n, seconds=3 * distributed_programs.PATIENCE))
def test_sharded_parameters_are_trained_like_those_of_one_process(made, n):
    total = sum(p.numel() for p in programs.small_net().parameters())
    for found in made:
        errors = {k: v for k, v in found.items() if not k.startswith(("share ", "states "))}
        assert len(errors) > 40
        assert max(errors.values()) < 1e-12, max(errors.items(), key=lambda item: item[1])
        for name in programs.CLASSES:  # every rank holds its part of parameters and states
            rest = 8 / total  # rows that n does not divide
            assert found[f"share {name}"] <= 1 / n + rest
            assert found[f"states {name}"] <= 2 * (1 / n + rest)
        assert found["states Adam"] > 0


@pytest.mark.parametrize("name", programs.CLASSES)
def test_get_state_dict_and_set_state_dict_work_with_our_optimizers(name):
    def steps(net, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            (net(programs.batch()) ** 2).mean().backward()
            optimizer.step()

    net, again = programs.small_net(), programs.small_net()
    first, second = (getattr(torchopt, name)(m.parameters(), lr=0.1) for m in (net, again))
    steps(net, first, 3)
    model, state = copy.deepcopy(get_state_dict(net, first))
    assert state["param_groups"][0]["params"] == [k for k, _ in net.named_parameters()]
    set_state_dict(again, second, model_state_dict=model, optim_state_dict=state)
    for module, optimizer in ((net, first), (again, second)):
        steps(module, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


@pytest.mark.parametrize("form", ["one", "dict", "lists"])
def test_get_state_dict_names_the_parameters_of_any_tree(form):
    """Each state is that of its parameter, whatever the keys of the tree."""
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)) for _ in range(2)]

    def parameters(net):
        if form == "one":
            return [net[0].weight]
        if form == "dict":
            return dict(net.named_parameters())
        return [list(net[0].parameters()), list(net[1].parameters())]

    first, second = (torchopt.Adam(parameters(net), lr=0.1) for net in nets)
    nets[0](torch.ones(4, 3)).square().mean().backward()
    first.step()
    model, state = copy.deepcopy(get_state_dict(nets[0], first))
    if form != "one":
        assert state["state"].keys() == dict(nets[0].named_parameters()).keys()
    for name, p in nets[0].named_parameters():
        for value in state["state"].get(name, {}).values():
            assert not value.ndim or value.shape == p.shape
    set_state_dict(nets[1], second, model_state_dict=model, optim_state_dict=state)
    want, got = (o.named_state_dict()["groups"][0]["state"] for o in (first, second))
    assert want.keys() == got.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_mesh_of_tasks_and_shards(standing, deterministic):
    net = distributed_programs.make_net()
    tasks = distributed_programs.make_tasks(5)
    losses = [distributed_programs.explicit_loss(net, t) for t in tasks]
    want = torch.autograd.grad(sum(losses) / 5, list(net.parameters()))
    for rank, (grads, got, owners, refused) in enumerate(
        standing(programs.tasks_and_shards, 4, deterministic)
    ):
        torch.testing.assert_close(got, torch.stack(losses).detach(), rtol=1e-12, atol=0)
        assert set(owners) == {rank % 2, rank % 2 + 2}
        assert "static" in refused
        for g, w in zip(grads, want):
            assert w.abs().max() > 1e-4
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["Shard", "Replicate"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_tasks_whose_batches_are_split_over_the_shards(standing, deterministic, kind):
    net = programs.small_net()
    losses = torch.stack([(net(programs.batch(k)) ** 2).mean() for k in range(5)])
    want = torch.autograd.grad(losses.mean(), list(net.parameters()))
    for grads, got in standing(programs.tasks_of_split_batches, 4, deterministic, kind):
        torch.testing.assert_close(got, losses.detach(), rtol=1e-12, atol=0)
        for g, w in zip(grads, want, strict=True):
            assert w.abs().max() > 1e-4
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-15)
