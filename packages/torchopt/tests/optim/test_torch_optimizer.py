# SPDX-License-Identifier: Apache-2.0
"""The adapter is a torch.optim.Optimizer to schedulers, group entries and hooks, and on resume."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import ROWS
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import torchopt
from torchopt.optim import TorchOptimizer

STEPS = 8

# What torch.optim has under the same hyper-parameters, with the settings that are tried.
TWINS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {}),
    "adamax": (torch.optim.Adamax, {"eps": 1e-8}),
    "radam": (torch.optim.RAdam, {"eps": 1e-8}),
    "nadam": (torch.optim.NAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adadelta": (torch.optim.Adadelta, {"rho": 0.9}),
    "rprop": (torch.optim.Rprop, {}),
    "asgd": (torch.optim.ASGD, {"t0": 3}),
}

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


def adapter(name: str, params: Any, **settings: Any) -> TorchOptimizer:
    return TorchOptimizer(params, ROWS[name].functional, **settings)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 2), (2,), ())]


def trained(make: Callable[[Any], Any], during: Callable[[Any, int], None]) -> list[Tensor]:
    """Return the parameters after `STEPS` steps; `during(optimizer, step)` follows each."""
    params = parameters()
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.03}])
    target = torch.randn(3, 2, dtype=torch.float64)
    for step in range(STEPS):
        optimizer.zero_grad()
        ((params[0] - target).pow(2).sum() + (params[0] @ params[1]).cos().sum()).backward()
        (params[2] ** 4).backward()
        optimizer.step()
        during(optimizer, step)
    return [p.detach() for p in params]


def in_double(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Run with float64 scalars, which torch's optimizers make with the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        return run()
    finally:
        torch.set_default_dtype(torch.float32)


def assert_equal_torch(name: str, during: Callable[[], Callable[[Any, int], None]]) -> None:
    twin, settings = TWINS[name]
    ours = trained(lambda p: adapter(name, p, lr=0.05, **settings), during())
    theirs = in_double(lambda: trained(lambda p: twin(p, lr=0.05, **settings), during()))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def scheduled(make: Callable[[Any], Any]) -> Callable[[Any, int], None]:
    made: list[Any] = []

    def during(optimizer: Any, step: int) -> None:
        if step == 0:
            made.append(make(optimizer))
        plateau = isinstance(made[0], lr_scheduler.ReduceLROnPlateau)
        made[0].step(*([1.0] if plateau else []))

    return during


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_every_scheduler_acts_as_on_the_optimizer_of_torch(name: str, scheduler: str) -> None:
    assert_equal_torch(name, lambda: scheduled(SCHEDULERS[scheduler]))


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.parametrize("name", sorted(TWINS))
def test_every_optimizer_of_torch_has_its_twin(name: str) -> None:
    cycles = "betas" in TWINS[name][0]([torch.zeros(1)]).defaults or name in ("sgd", "rmsprop")
    make = SCHEDULERS["OneCycleLR" if cycles else "CosineAnnealingLR"]
    if name == "asgd":  # torch's takes a step with the step size of the step before
        assert_equal_torch(name, lambda: lambda optimizer, step: None)
    else:
        assert_equal_torch(name, lambda: scheduled(make))


def changed(name: str, values: dict[int, Any]) -> Callable[[Any, int], None]:
    def during(optimizer: Any, step: int) -> None:
        if step in values:
            optimizer.param_groups[0][name] = values[step]

    return during


@pytest.mark.parametrize(
    ("name", "hyper", "values"),
    [
        ("sgd", "momentum", {0: 0.0, 2: 0.9}),
        ("sgd", "momentum", {1: 0.0, 3: 0.9, 4: 0.0, 6: 0.5}),
        ("sgd", "weight_decay", {1: 0.0, 3: 0.3}),
        ("sgd", "dampening", {1: 0.5, 4: 0.0, 6: 0.2}),
        ("sgd", "nesterov", {2: True, 5: False}),
        ("sgd", "maximize", {2: True, 5: False}),
        ("rmsprop", "momentum", {1: 0.0, 4: 0.9}),
        ("adam", "weight_decay", {1: 0.0, 3: 0.3}),
        ("adam", "betas", {2: (0.5, 0.9)}),
        ("adamw", "weight_decay", {1: 0.0, 3: 0.3}),
    ],
)
def test_stages_that_come_and_go_keep_their_state(
    name: str, hyper: str, values: dict[int, Any]
) -> None:
    assert_equal_torch(name, lambda: changed(hyper, values))


def test_a_momentum_that_is_switched_on_later_begins_then() -> None:
    for dampening in (0.0, 0.5):
        results = []
        for make in (torch.optim.SGD, lambda p, **kw: TorchOptimizer(p, torchopt.sgd, **kw)):
            p = nn.Parameter(torch.ones(2, dtype=torch.float64))
            optimizer = make([p], lr=0.1, momentum=0.0)
            for step in range(4):
                p.grad = torch.full_like(p, float(step + 1))
                optimizer.step()
                optimizer.param_groups[0].update(momentum=0.9, dampening=dampening)
            results.append(p.detach())
        assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.parametrize("scheduler", ["ExponentialLR", "OneCycleLR", "ReduceLROnPlateau"])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_tensor_as_step_size_follows_its_scheduler(name: str, scheduler: str) -> None:
    results = []
    for lr in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = adapter(name, [p], lr=lr)
        schedule = scheduled(SCHEDULERS[scheduler])
        for step in range(STEPS):
            p.grad = torch.ones_like(p)
            optimizer.step()
            schedule(optimizer, step)
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=0.0)


def test_a_tensor_that_is_written_to_counts_from_the_next_step_on() -> None:
    p, lr = nn.Parameter(torch.zeros(1)), torch.tensor(1.0)
    optimizer = TorchOptimizer([p], torchopt.sgd, lr=lr)
    for factor in (0.1, 0.1):
        p.grad = torch.ones(1)
        optimizer.step()
        lr.data.mul_(factor)  # leaves no trace in the version of the tensor
    assert p.item() == pytest.approx(-1.1)


def test_a_list_that_is_written_to_counts_from_the_next_step_on() -> None:
    results = []
    for kind in (list, tuple):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer: Any = TorchOptimizer([p], torchopt.adam, lr=0.1, betas=kind((0.9, 0.99)))
        (group,) = optimizer.param_groups
        for step in range(4):
            p.grad = p.detach() + step
            if step == 2 and kind is list:
                group["betas"][0] = 0.5
            elif step == 2:
                group["betas"] = (0.5, 0.99)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_notes_in_groups_are_kept_and_have_no_effect(name: str) -> None:
    results = []
    for notes in ({}, {"name": "head", "lr_scale": 0.5, "initial_lr": 3.0, "foreach": None}):
        (p, *_), settings = parameters(), ROWS[name].settings[0]
        optimizer = adapter(name, [{"params": [p], **notes}], **settings)
        for _ in range(2):
            p.grad = p.detach().clone()
            optimizer.step()
        assert notes.items() <= optimizer.param_groups[0].items()
        assert notes.items() <= optimizer.state_dict()["param_groups"][0].items()
        results.append(p.detach())
    assert torch.equal(*results)


def test_defaults_are_those_of_the_signature() -> None:
    optimizer = TorchOptimizer(parameters(), torchopt.adam, lr=0.1)
    assert optimizer.defaults["betas"] == optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert optimizer.defaults["lr"] == 0.1
    groups = [{"params": parameters(), "lr": 0.1}]
    assert TorchOptimizer(groups, torchopt.sgd).param_groups[0]["momentum"] == 0.0
    with pytest.raises(ValueError, match="required optimization parameter lr"):
        TorchOptimizer(parameters(), torchopt.sgd)


def test_makers_that_take_any_keyword_get_hyper_parameters_and_no_notes() -> None:
    seen: list[dict[str, Any]] = []

    def make(**hyper: Any) -> Any:
        seen.append(hyper)
        return torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(**hyper))

    groups = [{"params": parameters(), "betas": (0.5, 0.9), "name": "body", "fused": True}]
    TorchOptimizer(groups, make, lr=0.1)
    assert seen[-1] == {"lr": 0.1, "betas": (0.5, 0.9)}


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_resumed_optimizer_goes_on_and_takes_another_group(name: str, how: str) -> None:
    settings = ROWS[name].settings[-1]

    def stepped(optimizer: TorchOptimizer, params: list[nn.Parameter], count: int) -> None:
        for _ in range(count):
            for p in params:
                p.grad = p.detach().cos()
            optimizer.step()

    params = parameters()
    optimizer = adapter(name, params[:1], **settings)
    stepped(optimizer, params[:1], 2)
    twin_params = copy.deepcopy(params)
    if how == "state_dict":
        twin = adapter(name, twin_params[:1], **{**settings, "lr": 7.0})
        twin.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    else:
        copied = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else None
        twin = copied or copy.deepcopy(optimizer)
        twin_params[0] = twin.param_groups[0]["params"][0]
    for stepper, own in ((optimizer, params), (twin, twin_params)):
        stepper.add_param_group({"params": own[1:], "lr": 0.01})
        stepped(stepper, own, 2)
    for p, q in zip(params, twin_params):
        assert torch.equal(p, q)


def test_hooks_see_the_state_that_is_saved_and_loaded() -> None:
    p = parameters()[0]
    optimizer = TorchOptimizer([p], torchopt.adam, lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    called: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: called.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "run": 7} if sd["state"] else None)
    saved = optimizer.state_dict()
    assert saved["run"] == 7
    twin = TorchOptimizer([parameters()[0]], torchopt.adam, lr=0.5)
    twin.register_load_state_dict_pre_hook(lambda o, sd: saved)
    twin.register_load_state_dict_post_hook(lambda o: called.append("load"))
    twin.load_state_dict({"param_groups": [], "state": {}})
    assert called == ["save", "load"]
    assert twin.state_dict()["state"]["groups"][0]["initialized"]
    assert twin.param_groups[0]["lr"] == 0.1


def test_groups_of_torch_load_with_their_switches() -> None:
    p = parameters()[0]
    theirs = torch.optim.Adam([p], lr=0.3, foreach=False, fused=False)
    optimizer = TorchOptimizer([p], torchopt.adam, lr=0.1)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    optimizer.add_param_group({"params": parameters()[1:]})
    p.grad = torch.ones_like(p)
    optimizer.step()
    theirs.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="as torch.optim saves it"):
        TorchOptimizer([p], torchopt.adam).load_state_dict(theirs.state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_names_of_parameters_are_kept() -> None:
    net = nn.Linear(2, 1)
    optimizer = TorchOptimizer(net.named_parameters(), torchopt.adam, lr=0.1)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(saved)
    optimizer.step()


def test_a_group_that_is_refused_is_not_there() -> None:
    optimizer = TorchOptimizer(parameters(), torchopt.adam, lr=0.1)
    twice = {"params": optimizer.param_groups[0]["params"]}
    for group, error, message in (
        ({"params": [nn.Parameter(torch.ones(1))], "lr": -1.0}, ValueError, "learning rate: -1.0"),
        ({"params": [nn.Parameter(torch.ones(1))], "momentum": 0.9}, TypeError, "'momentum'"),
        (twice, ValueError, "in more than one parameter group"),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
