# SPDX-License-Identifier: Apache-2.0
"""Names, positional orders, kinds and defaults are those of torchopt 0.7."""

from __future__ import annotations

import functools
import inspect
import typing

import pytest

import torchopt
from torchopt import transform
from torchopt.base import GradientTransformation
from torchopt.index import OPTIMIZERS

SIGNATURES = {
    "AdaDelta": "(params, lr=1.0, rho=0.9, eps=1e-06, weight_decay=0.0)",
    "AdaGrad": (
        "(params, lr=0.01, lr_decay=0.0, weight_decay=0.0, "
        "initial_accumulator_value=0.0, eps=1e-10, *, maximize=False)"
    ),
    "AdaMax": "(params, lr=0.002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)",
    "Adadelta": "(params, lr=1.0, rho=0.9, eps=1e-06, weight_decay=0.0)",
    "Adagrad": (
        "(params, lr=0.01, lr_decay=0.0, weight_decay=0.0, "
        "initial_accumulator_value=0.0, eps=1e-10, *, maximize=False)"
    ),
    "Adam": (
        "(params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, *, "
        "eps_root=0.0, maximize=False, use_accelerated_op=False)"
    ),
    "AdamW": (
        "(params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, *, "
        "eps_root=0.0, mask=None, maximize=False, use_accelerated_op=False)"
    ),
    "Adamax": "(params, lr=0.002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)",
    "FuncOptimizer": "(impl, *, inplace=False)",
    "FuncOptimizer.load_state_dict": "(self, state_dict)",
    "FuncOptimizer.state_dict": "(self)",
    "FuncOptimizer.step": "(self, loss, params, inplace=None)",
    "MetaAdaDelta": (
        "(module, lr=1.0, rho=0.9, eps=1e-06, weight_decay=0.0, *, moment_requires_grad=True)"
    ),
    "MetaAdaGrad": (
        "(module, lr=0.01, lr_decay=0.0, weight_decay=0.0, "
        "initial_accumulator_value=0.0, eps=1e-10, *, maximize=False)"
    ),
    "MetaAdaMax": (
        "(module, lr=0.002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, *, "
        "moment_requires_grad=True)"
    ),
    "MetaAdadelta": (
        "(module, lr=1.0, rho=0.9, eps=1e-06, weight_decay=0.0, *, moment_requires_grad=True)"
    ),
    "MetaAdagrad": (
        "(module, lr=0.01, lr_decay=0.0, weight_decay=0.0, "
        "initial_accumulator_value=0.0, eps=1e-10, *, maximize=False)"
    ),
    "MetaAdam": (
        "(module, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, *, "
        "eps_root=0.0, moment_requires_grad=True, maximize=False, "
        "use_accelerated_op=False)"
    ),
    "MetaAdamW": (
        "(module, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, *, "
        "eps_root=0.0, mask=None, moment_requires_grad=False, maximize=False, "
        "use_accelerated_op=False)"
    ),
    "MetaAdamax": (
        "(module, lr=0.002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, *, "
        "moment_requires_grad=True)"
    ),
    "MetaOptimizer": "(module, impl)",
    "MetaOptimizer.add_param_group": "(self, module)",
    "MetaOptimizer.load_state_dict": "(self, state_dict)",
    "MetaOptimizer.state_dict": "(self)",
    "MetaOptimizer.step": "(self, loss)",
    "MetaRAdam": (
        "(module, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, *, "
        "moment_requires_grad=True)"
    ),
    "MetaRMSProp": (
        "(module, lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0, "
        "centered=False, *, initial_scale=0.0, nesterov=False, maximize=False)"
    ),
    "MetaRMSprop": (
        "(module, lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0, "
        "centered=False, *, initial_scale=0.0, nesterov=False, maximize=False)"
    ),
    "MetaSGD": (
        "(module, lr, momentum=0.0, weight_decay=0.0, dampening=0.0, nesterov=False, "
        "moment_requires_grad=True, maximize=False)"
    ),
    "Optimizer": "(params, impl)",
    "Optimizer.add_param_group": "(self, params)",
    "Optimizer.load_state_dict": "(self, state_dict)",
    "Optimizer.state_dict": "(self)",
    "Optimizer.step": "(self, closure=None)",
    "Optimizer.zero_grad": "(self, set_to_none=False)",
    "RAdam": "(params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)",
    "RMSProp": (
        "(params, lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0, "
        "centered=False, *, initial_scale=0.0, nesterov=False, maximize=False)"
    ),
    "RMSprop": (
        "(params, lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0, "
        "centered=False, *, initial_scale=0.0, nesterov=False, maximize=False)"
    ),
    "SGD": (
        "(params, lr, momentum=0.0, weight_decay=0.0, dampening=0.0, nesterov=False, "
        "maximize=False)"
    ),
    "accelerated_op_available": "(devices=None)",
    "adadelta": "(lr=0.001, rho=0.9, eps=1e-06, weight_decay=0.0, *, moment_requires_grad=False)",
    "adagrad": (
        "(lr=0.01, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, "
        "eps=1e-10, *, maximize=False)"
    ),
    "adam": (
        "(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, *, eps_root=0.0, "
        "moment_requires_grad=False, maximize=False, use_accelerated_op=False)"
    ),
    "adamax": (
        "(lr=0.001, betas=(0.9, 0.999), eps=1e-06, weight_decay=0.0, *, moment_requires_grad=False)"
    ),
    "adamw": (
        "(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, *, eps_root=0.0, "
        "mask=None, moment_requires_grad=False, maximize=False, use_accelerated_op=False)"
    ),
    "alias.utils.flip_sign_and_add_weight_decay": "(weight_decay=0.0, maximize=False)",
    "alias.utils.scale_by_neg_lr": "(lr)",
    "apply_updates": "(params, updates, *, inplace=True)",
    "base.ChainedGradientTransformation": "(*transformations)",
    "base.GradientTransformation": "(init, update)",
    "base.identity": "()",
    "chain": "(*transformations)",
    "clip_grad_norm": "(max_norm, norm_type=2.0, error_if_nonfinite=False)",
    "combine.chain": "(*transformations)",
    "combine.chain_flat": "(*transformations)",
    "extract_state_dict": (
        "(target, *, by='reference', device=None, with_buffers=True, "
        "detach_buffers=False, enable_visual=False, visual_prefix='')"
    ),
    "hook.nan_to_num_hook": "(nan=0.0, posinf=None, neginf=None)",
    "hook.register_hook": "(hook)",
    "hook.zero_nan_hook": "(g)",
    "module_clone": "(target, *, by='reference', detach_buffers=False, device=None)",
    "module_detach_": "(target)",
    "nan_to_num": "(nan=0.0, posinf=None, neginf=None)",
    "radam": (
        "(lr=0.001, betas=(0.9, 0.999), eps=1e-06, weight_decay=0.0, *, moment_requires_grad=False)"
    ),
    "recover_state_dict": "(target, state)",
    "register_hook": "(hook)",
    "rmsprop": (
        "(lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0, "
        "centered=False, *, initial_scale=0.0, nesterov=False, maximize=False)"
    ),
    "schedule.exponential_decay": (
        "(init_value, decay_rate, transition_begin=0, transition_steps=1, "
        "staircase=False, end_value=None)"
    ),
    "schedule.linear_schedule": "(init_value, end_value, transition_steps, transition_begin=0)",
    "schedule.polynomial_schedule": (
        "(init_value, end_value, power, transition_steps, transition_begin=0)"
    ),
    "sgd": (
        "(lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, *, "
        "moment_requires_grad=False, maximize=False)"
    ),
    "stop_gradient": "(target)",
    "transform.add_decayed_weights": "(weight_decay=0.0, mask=None)",
    "transform.masked": "(inner, mask=None)",
    "transform.nan_to_num": "(nan=0.0, posinf=None, neginf=None)",
    "transform.scale": "(step_size)",
    "transform.scale_by_accelerated_adam": (
        "(b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, moment_requires_grad=False)"
    ),
    "transform.scale_by_adadelta": "(rho=0.9, eps=1e-06, moment_requires_grad=False)",
    "transform.scale_by_adam": (
        "(b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, moment_requires_grad=False)"
    ),
    "transform.scale_by_adamax": "(b1=0.9, b2=0.999, eps=1e-06, moment_requires_grad=False)",
    "transform.scale_by_radam": "(b1=0.9, b2=0.999, eps=1e-06, moment_requires_grad=False)",
    "transform.scale_by_rms": "(alpha=0.9, eps=1e-08, initial_scale=0.0)",
    "transform.scale_by_rss": "(initial_accumulator_value=0.0, eps=1e-10)",
    "transform.scale_by_schedule": "(step_size_fn)",
    "transform.scale_by_stddev": "(alpha=0.9, eps=1e-08, initial_scale=0.0)",
    "transform.trace": "(momentum=0.9, dampening=0.0, nesterov=False, moment_requires_grad=False)",
    "transform.utils.inc_count": "(updates, count)",
    "transform.utils.tree_map_flat": "(func, flat_arg, *flat_args, none_is_leaf=False)",
    "transform.utils.tree_map_flat_": "(func, flat_arg, *flat_args, none_is_leaf=False)",
    "transform.utils.update_moment": "(updates, moments, decay, *, order, inplace=True)",
    "utils.ModuleState": "(params, buffers, visual_contents=None, detach_buffers=False)",
}

NAMES = [
    "SGD",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FuncOptimizer",
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaSGD",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RMSprop",
    "accelerated_op_available",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "apply_updates",
    "chain",
    "clip_grad_norm",
    "extract_state_dict",
    "module_clone",
    "module_detach_",
    "nan_to_num",
    "radam",
    "recover_state_dict",
    "register_hook",
    "rmsprop",
    "sgd",
    "stop_gradient",
]

# Arguments that this package adds; each is keyword-only and has a default.
ADDED = {
    "first_order", "detach_every", "impl", "differentiable", "amsgrad", "backend", "compensated",
    "in_8_bits",
}  # fmt: skip


def rendered(parameters: list[inspect.Parameter]) -> str:
    parts = []
    starred = False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        prefix = "*" if p.kind is p.VAR_POSITIONAL else ""
        parts.append(f"{prefix}{p.name}" + ("" if p.default is p.empty else f"={p.default!r}"))
    return f"({', '.join(parts)})"


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signature(name: str) -> None:
    target = functools.reduce(getattr, name.split("."), torchopt)
    parameters = list(inspect.signature(target).parameters.values())
    expected = SIGNATURES[name]
    added = [p for p in parameters if p.name in ADDED and p.name not in expected]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)
    assert rendered([p for p in parameters if p not in added]) == expected


def test_exported_names() -> None:
    """Those of torchopt 0.7, and every optimizer in its three forms."""
    new = {form for f, c in OPTIMIZERS.items() for form in (f, c, f"Meta{c}")}
    assert set(torchopt.__all__) == {*NAMES, *new}
    assert len(torchopt.__all__) == len(set(torchopt.__all__))
    assert all(hasattr(torchopt, name) for name in torchopt.__all__)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(NAMES)))
def test_new_classes_take_what_their_functions_take(name: str) -> None:
    function = list(inspect.signature(getattr(torchopt, name)).parameters.values())
    first = function[0].replace(default=inspect.Parameter.empty)
    for cls, leading in (
        (getattr(torchopt, OPTIMIZERS[name]), "params"),
        (getattr(torchopt, f"Meta{OPTIMIZERS[name]}"), "module"),
    ):
        parameters = list(inspect.signature(cls).parameters.values())
        kept = [p for p in parameters if p.name not in ADDED]
        assert rendered(kept) == rendered([first.replace(name=leading), *function]), cls


@pytest.mark.parametrize("name", sorted(transform.__all__))
def test_transformations_are_said_to_be_returned(name: str) -> None:
    make = getattr(transform, name)
    hints = typing.get_type_hints(make)
    if hasattr(make, "rule"):  # made from a rule
        assert hints["return"] is GradientTransformation
        assert inspect.signature(make).return_annotation is GradientTransformation
        assert inspect.signature(make.impl).return_annotation is GradientTransformation
