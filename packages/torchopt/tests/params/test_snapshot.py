# SPDX-License-Identifier: Apache-2.0
"""Snapshots: which tensors are shared, copied or detached."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import torchopt


def stepped_net() -> tuple[nn.Module, torchopt.MetaOptimizer, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    x = torch.randn(5, 2)
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    optimizer.step(net(x).pow(3).sum())
    return net, optimizer, x


@pytest.mark.parametrize("by", ["reference", "ref", "copy", "clone", "deepcopy", "deepclone"])
def test_extract_shares_or_copies(by: str) -> None:
    net, _, _ = stepped_net()
    state = torchopt.extract_state_dict(net, by=by)
    taken, live = state.params[0]["weight"], net[0].weight
    assert torch.equal(taken, live)
    if by in ("reference", "ref"):
        assert taken is live
    elif by in ("copy", "clone"):
        assert taken is not live
        assert torch.equal(torch.autograd.grad(taken.sum(), live)[0], torch.ones_like(live))
    else:
        assert taken.grad_fn is None
        assert taken.requires_grad


def test_deepcopy_keeps_parameters_parameters() -> None:
    net = nn.Linear(2, 2)
    state = torchopt.extract_state_dict(net, by="deepcopy")
    assert isinstance(state.params[0]["weight"], nn.Parameter)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(AssertionError, match="`by` must be one of"):
        torchopt.extract_state_dict(nn.Linear(1, 1), by="value")


def test_recover_restores_module_and_optimizer() -> None:
    net, optimizer, x = stepped_net()
    state = torchopt.extract_state_dict(net, by="reference")
    optimizer_state = torchopt.extract_state_dict(optimizer, by="reference")
    weight, count = net[0].weight, optimizer.state_dict()[0][0].count[0]
    optimizer.step(net(x).pow(3).sum())
    assert net[0].weight is not weight
    torchopt.recover_state_dict(net, state)
    torchopt.recover_state_dict(optimizer, optimizer_state)
    assert net[0].weight is weight
    assert optimizer.state_dict()[0][0].count[0] is count


def test_detached_buffers_survive_later_updates() -> None:
    net, _, x = stepped_net()
    state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    mean = net[1].running_mean.clone()
    net(x + 5)
    assert not torch.equal(net[1].running_mean, mean)
    for _ in range(2):
        torchopt.recover_state_dict(net, state)
        assert torch.equal(net[1].running_mean, mean)
        net(x + 5)


def test_without_buffers() -> None:
    net, _, _ = stepped_net()
    assert torchopt.extract_state_dict(net, with_buffers=False).buffers == ()


class Named(nn.Module):
    """Layers under the names that the caller gives."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(
            lambda: Named(a=nn.Linear(2, 2, bias=False), b=nn.BatchNorm1d(2)),
            "expected parameters without 'bias' in the sub-module 'a', got those with 'bias'",
            id="a parameter less",
        ),
        pytest.param(
            lambda: Named(a=nn.Linear(2, 2), b=nn.BatchNorm1d(2), c=nn.Linear(2, 2)),
            "expected parameters of 3 sub-modules, got those of 2",
            id="a layer more",
        ),
        pytest.param(
            lambda: Named(a=nn.Linear(3, 2), b=nn.BatchNorm1d(2)),
            r"'weight' of shape \(2, 3\) in the sub-module 'a', got \(2, 2\)",
            id="another shape",
        ),
        pytest.param(
            lambda: Named(a=nn.Linear(2, 2), c=nn.BatchNorm1d(2)),
            "expected parameters of the sub-module 'c', got those of 'b'",
            id="another name",
        ),
        pytest.param(
            lambda: Named(b=nn.Linear(2, 2), a=nn.BatchNorm1d(2)),
            "expected parameters of the sub-module 'b', got those of 'a'",
            id="names exchanged",
        ),
        pytest.param(
            lambda: Named(a=nn.Linear(2, 2), b=Named(a=nn.BatchNorm1d(2))),
            "expected parameters of the sub-module 'b.a', got those of 'b'",
            id="a level deeper",
        ),
        pytest.param(
            lambda: Named(a=nn.Linear(2, 2), b=nn.LayerNorm(2)),
            "expected buffers of 0 sub-modules, got those of 1",
            id="no buffers",
        ),
    ],
)
def test_recover_refuses_another_module_and_restores_nothing(
    other: Callable[[], nn.Module], message: str
) -> None:
    taken = Named(a=nn.Linear(2, 2), b=nn.BatchNorm1d(2))
    for state in (
        torchopt.extract_state_dict(taken),
        copy.deepcopy(torchopt.extract_state_dict(taken)),
        pickle.loads(pickle.dumps(torchopt.extract_state_dict(taken, by="deepcopy"))),
    ):
        target = other()
        before = dict(target.named_parameters())
        with pytest.raises(ValueError, match=message):
            torchopt.recover_state_dict(target, state)
        assert all(x is before[name] for name, x in target.named_parameters())


def test_a_snapshot_without_names_fits_no_module_with_fewer_or_more_layers() -> None:
    layers = [nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2)]
    taken = torchopt.extract_state_dict(nn.Sequential(*layers[:3]))
    state = torchopt.pytree.tree_map(lambda x: x, taken)  # constructed as a user would
    for count in (1, 2, 4):
        with pytest.raises(ValueError, match=f"of {count} sub-modules, got those of 3"):
            torchopt.recover_state_dict(nn.Sequential(*layers[:count]), state)
    torchopt.recover_state_dict(nn.Sequential(*layers[:3]), state)


def test_a_snapshot_fits_the_module_inside_a_wrapper_and_outside() -> None:
    inner = Named(a=nn.Linear(2, 2), b=nn.BatchNorm1d(2))
    bare = torchopt.extract_state_dict(inner, by="deepcopy")
    wrapped = torchopt.extract_state_dict(nn.Sequential(inner), by="deepcopy")
    torchopt.recover_state_dict(nn.Sequential(inner), bare)
    assert inner.a.weight is bare.params[0]["weight"]
    torchopt.recover_state_dict(inner, wrapped)
    assert inner.b.running_mean is wrapped.buffers[0]["running_mean"]
    layer = nn.Linear(2, 2)  # its own parameters have no prefix
    torchopt.recover_state_dict(nn.Sequential(layer), torchopt.extract_state_dict(layer))
    torchopt.recover_state_dict(layer, torchopt.extract_state_dict(nn.Sequential(layer)))


def test_a_snapshot_is_a_tuple_of_four_that_tree_functions_map() -> None:
    net = Named(a=nn.Linear(2, 2), b=nn.BatchNorm1d(2))
    state = torchopt.extract_state_dict(net)
    params, buffers, names, detached = state
    assert (names, detached) == (None, False)
    assert repr(torchopt.utils.ModuleState((), ())).startswith("ModuleState(params=()")
    doubled = torchopt.pytree.tree_map(lambda x: 2 * x, state._replace(visual_contents={}))
    before = net.a.weight
    torchopt.recover_state_dict(net, doubled)
    assert torch.equal(net.a.weight, 2 * before)
    assert params[0]["weight"] is before
    assert buffers[0]["running_var"] is not net.b.running_var


def test_extract_and_recover_refuse_other_classes() -> None:
    with pytest.raises(TypeError, match="Unexpected class of"):
        torchopt.extract_state_dict({"a": 1})  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="Unexpected class of"):
        torchopt.recover_state_dict({"a": 1}, ())  # type: ignore[arg-type]


def test_stop_gradient_cuts_module_buffers_and_optimizer() -> None:
    net, optimizer, x = stepped_net()
    net[1].running_mean = net[1].running_mean * net[0].weight.sum()
    weight = net[0].weight
    torchopt.stop_gradient(net)
    torchopt.stop_gradient(optimizer)
    assert net[0].weight is weight
    assert weight.grad_fn is None
    assert weight.requires_grad
    assert net[1].running_mean.grad_fn is None
    mu = optimizer.state_dict()[0][0].mu
    assert all(m.grad_fn is None for m in mu)
    optimizer.step(net(x).pow(3).sum())
    assert torch.autograd.grad(net[0].weight.sum(), weight)[0].shape == weight.shape


def test_stop_gradient_on_snapshots_and_trees() -> None:
    net, _, _ = stepped_net()
    state = torchopt.extract_state_dict(net, by="copy")
    torchopt.stop_gradient(state)
    assert all(p.grad_fn is None for c in state.params for p in c.values())
    y = torch.ones(1, requires_grad=True) * 2
    assert torchopt.module_detach_({"y": y, "n": 3})["y"] is y
    assert y.grad_fn is None


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
def test_clone_of_a_stepped_module(by: str) -> None:
    net, _, x = stepped_net()
    clone = torchopt.module_clone(net, by=by)
    assert clone is not net
    assert clone[0] is not net[0]
    assert (clone[0].weight is net[0].weight) == (by == "reference")
    net.eval()
    clone.eval()
    assert torch.equal(clone(x), net(x))


def test_clone_of_a_meta_optimizer_steps_the_same_module() -> None:
    net, optimizer, x = stepped_net()
    clone = torchopt.module_clone(optimizer, by="reference")
    weight = net[0].weight
    clone.step(net(x).pow(3).sum())
    assert net[0].weight is not weight
    assert optimizer.state_dict()[0][0].count[0].item() == 1
    assert clone.state_dict()[0][0].count[0].item() == 2


def test_a_clone_of_a_meta_optimizer_has_groups_of_its_own() -> None:
    net, optimizer, x = stepped_net()
    clone = torchopt.module_clone(optimizer, by="reference")
    assert isinstance(clone, torchopt.MetaOptimizer)
    added = {clone: nn.Linear(3, 1), optimizer: nn.Linear(5, 2)}
    for stepped, more in added.items():
        stepped.add_param_group(more)
    for _ in range(2):  # each has its own second group
        for stepped, more in added.items():
            before = more.weight.detach().clone()
            stepped.step(net(x).pow(2).sum() + more.weight.pow(2).sum())
            assert not torch.equal(more.weight, before)


class TiedNet(nn.Module):
    """One weight and one buffer under two names each, in two sub-modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        shift = torch.ones(3)
        self.a.register_buffer("shift", shift)
        self.b.register_buffer("shift", shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + self.a.shift + self.b.shift


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
@pytest.mark.parametrize("detach_buffers", [False, True])
def test_tied_tensors_stay_tied_in_the_snapshot_and_after_recovery(
    by: str, detach_buffers: bool
) -> None:
    torch.manual_seed(0)
    net = TiedNet()
    x = torch.randn(4, 3)
    before = net(x).detach()
    state = torchopt.extract_state_dict(
        net, by=by, with_buffers=True, detach_buffers=detach_buffers
    )
    assert state.params[0]["weight"] is state.params[1]["weight"]
    assert state.buffers[0]["shift"] is state.buffers[1]["shift"]
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    optimizer.step(net(x).pow(2).sum())
    torchopt.recover_state_dict(net, state)
    assert net.a.weight is net.b.weight
    assert torch.equal(net(x), before)
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    optimizer.step(net(x).pow(2).sum())
    assert net.a.weight is net.b.weight


def test_tensors_that_are_deep_copied_together_with_a_snapshot_stay_shared() -> None:
    state = torchopt.extract_state_dict(nn.Linear(2, 1), by="deepcopy", enable_visual=True)
    weight = state.params[0]["weight"]
    twin, first, second = copy.deepcopy((state, weight, {"w": weight}))
    assert twin.params[0]["weight"] is first is second["w"]
    assert first is not weight
    assert torch.equal(first, weight)


@pytest.mark.parametrize("by", ["copy", "clone", "deepcopy"])
def test_a_copy_without_grad_mode_still_requires_a_gradient(by: str) -> None:
    """As after a step under no_grad: leaves, from which training and adaptation go on."""
    net, optimizer, x = stepped_net()
    with torch.no_grad():
        state = torchopt.extract_state_dict(net, by=by)
        optimizer_state = torchopt.extract_state_dict(optimizer, by=by)
        cloned = torchopt.module_clone(net, by=by)
    torchopt.recover_state_dict(net, state)
    torchopt.recover_state_dict(optimizer, optimizer_state)
    for module in (net, cloned):
        assert isinstance(module, nn.Module)
        assert all(p.is_leaf and p.requires_grad for p in module.parameters())
    weight = net[0].weight
    optimizer.step(net(x).pow(3).sum())
    assert torch.autograd.grad(net(x).pow(3).sum(), weight)[0].abs().sum() > 0


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_moved_copy_without_grad_mode_requires_a_gradient_as_its_original(
    by: str, device: str
) -> None:
    net, _, _ = stepped_net()
    net.add_module("frozen", nn.Linear(1, 1).requires_grad_(False))
    with torch.no_grad():
        state = torchopt.extract_state_dict(net, by=by, device=torch.device(device))
        cloned = torchopt.module_clone(net, by=by, device=torch.device(device))
    assert isinstance(cloned, nn.Module)
    torchopt.recover_state_dict(net, state)
    for module in (net, cloned):
        for name, p in module.named_parameters():
            assert p.device.type == device
            assert p.requires_grad == (not name.startswith("frozen"))


def test_a_recovery_whose_copies_fail_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer, x = stepped_net()
    state = torchopt.extract_state_dict(net, detach_buffers=True)
    optimizer.step(net(x).pow(3).sum())
    before = {**dict(net.named_parameters()), **dict(net.named_buffers())}

    def no_memory(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("torchopt.params.snapshot.copy_tensor", no_memory)
    with pytest.raises(MemoryError):
        torchopt.recover_state_dict(net, state)
    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
def test_buffers_that_are_one_tensor_stay_one_when_they_are_copied_at_recovery(by: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 1)
            for module in (self, self.inner):
                module.register_buffer("seen", torch.zeros(1) if module is self else self.seen)

    net = Shared()
    state = torchopt.extract_state_dict(net, by=by, detach_buffers=True)
    for _ in range(2):
        torchopt.recover_state_dict(net, state)
        assert net.inner.seen is net.seen
        assert net.seen is not state.buffers[0]["seen"]
        net.seen.add_(1.0)
        assert float(state.buffers[0]["seen"]) == 0.0
