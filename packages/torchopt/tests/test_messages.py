# SPDX-License-Identifier: Apache-2.0
"""The message for each mistake says what was expected, what was given, where, and the remedy."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import ROWS
from torch import nn

import torchopt
from torchopt import linear_solve, solvers, transform
from torchopt.diff.implicit import custom_root
from torchopt.errors import LeafTypeError, NotDifferentiableError, SecondDerivativeWarning
from torchopt.visual import make_dot

PARAMS = {"w": torch.ones(2), "b": torch.ones(1)}
MANY = {f"layer{i}.weight": torch.ones(1) for i in range(2000)}
ADAM = torchopt.adam(0.1)


def net() -> nn.Module:
    return nn.Sequential(*[nn.Linear(3, 3) for _ in range(30)])


def updated(grads: Any, params: Any = PARAMS, state: Any = None, optimizer: Any = ADAM) -> Any:
    state = optimizer.init(params) if state is None else state
    return optimizer.update(grads, state, params=params)


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 1))), nn.Linear(1, 1))


def torch_scheduler() -> Any:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1.0)


def stepped(labels: Any) -> None:
    module = net()
    impl = transform.partition({"a": torchopt.sgd(0.1)}, labels)
    torchopt.MetaOptimizer(module, impl).step(module(torch.ones(1, 3)).sum())


def rooted(optimality: Any = lambda w, x: w - x, solve: Any = None) -> Any:
    x = torch.ones(2, requires_grad=True)
    solution = custom_root(optimality, argnums=1, solve=solve)(lambda w, x: x.detach())
    return solution(torch.zeros(2), x).sum().backward()


class Inner(torchopt.nn.ImplicitMetaGradientModule):
    """An inner problem whose solver ignores that it runs without a graph."""

    def __init__(self, meta: nn.Module) -> None:
        super().__init__()
        self.meta, self.w = meta, nn.Parameter(torch.ones(1, 2))

    def objective(self) -> torch.Tensor:
        meta: Any = self.meta
        return (self.w - meta.weight).square().sum()

    def solve(self) -> Any:
        self.objective().backward()
        return self


def fast() -> nn.Module:
    """Return a module after a step of a meta-optimizer."""
    module = net()
    torchopt.MetaSGD(module, lr=0.1).step(module(torch.ones(1, 3)).sum())
    return module


def after_backward(module: nn.Module) -> None:
    loss = module(torch.ones(1, 3)).square().sum()
    loss.backward()
    torchopt.MetaSGD(module, lr=0.1).step(loss)


def after_freezing(module: nn.Module) -> None:
    module.requires_grad_(False)
    torchopt.MetaSGD(module, lr=0.1).step(module(torch.ones(1, 3)).sum())


def used(generator: Any) -> Any:
    tuple(generator)
    return generator


LOOP = torchopt.inner_loop(lambda p, b: (p * b).sum(), torchopt.sgd(0.1), steps=1)


@custom_root(lambda x, a: x - a, argnums=1)
def SOLVER(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    found: torch.Tensor = torchopt.FuncOptimizer(ADAM).step(((x - a) ** 2).sum(), x)
    return found


# name: (the mistake, the error, words of the message)
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "a constructor in a chain": (
        lambda: torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam),
        TypeError,
        ("`adam`", "call it: adam("),
    ),
    "a constructor alone in a chain": (
        lambda: torchopt.chain.flat(torchopt.adam),
        TypeError,
        ("`adam`", "call it: adam("),
    ),
    "a number in a chain": (
        lambda: torchopt.chain(ADAM, 0.5),
        TypeError,
        ("float", "transform.scale(0.5)"),
    ),
    "a number after a transformation": (lambda: ADAM.chain(0.5), TypeError, ("scale(0.5)",)),
    "an optimizer of torch in a chain": (
        lambda: torchopt.chain(ADAM, torch.optim.Adam(net().parameters())),
        TypeError,
        ("Adam", "torchopt.adam(lr)"),
    ),
    "the class of an optimizer of torch": (
        lambda: torchopt.MetaOptimizer(net(), torch.optim.Adam),
        TypeError,
        ("is not a GradientTransformation", "torchopt.adam(lr)"),
    ),
    "a transformation for the function that makes it": (
        lambda: torchopt.optim.TorchOptimizer(net().parameters(), ADAM),
        TypeError,
        ("expected a function", "adam(lr=0.1", "torchopt.adam, lr=0.1"),
    ),
    "the class of an optimizer in an inner loop": (
        lambda: torchopt.inner_loop(lambda p, b: p.sum(), torchopt.Adam, steps=1),
        TypeError,
        ("inner_loop: optimizer", "adam(...), the function, instead of the class Adam"),
    ),
    "a data loader as batches": (
        lambda: LOOP(torch.ones(2), batches=torch.utils.data.DataLoader([torch.ones(2)])),
        TypeError,
        ("batches: expected a list", "DataLoader", "list(...)"),
    ),
    "a generator of parameters in an inner loop": (
        lambda: LOOP(net().parameters(), torch.ones(2)),
        TypeError,
        ("generator", "dict(module.named_parameters())"),
    ),
    "a step inside of a solver": (
        lambda: SOLVER(torch.ones(2), torch.ones(2)),
        NotDifferentiableError,
        ("torch.enable_grad()", "solver"),
    ),
    "the class for the function": (
        lambda: torchopt.chain(torchopt.Adam),
        TypeError,
        ("`Adam`", "call it: adam(...)", "the function"),
    ),
    "a list of transformations": (
        lambda: torchopt.chain([ADAM, ADAM]),
        TypeError,
        ("list", "unpack it"),
    ),
    "parameters by position": (
        lambda: ADAM.update(PARAMS, ADAM.init(PARAMS), PARAMS),
        TypeError,
        ("expected 2 positional arguments, got 3", "params=params"),
    ),
    "a module without parameters": (
        lambda: torchopt.MetaAdam(nn.ReLU(), lr=0.1),
        ValueError,
        ("MetaAdam(module)", "ReLU, which has none", "pass the module"),
    ),
    "one number for a pair": (
        lambda: torchopt.adam(0.1, betas=0.9),
        TypeError,
        ("expected 2 numbers", "0.9 (float)", "pass betas=(0.9, 0.999)"),
    ),
    "tensors for a pair": (
        lambda: torchopt.adam(0.1, betas=[torch.zeros(1)] * 3),
        ValueError,
        ("expected 2 numbers", "got 3: (Tensor, Tensor, Tensor)"),
    ),
    "a number for a loss": (
        lambda: torchopt.MetaAdam(net(), lr=0.1).step(1.0),
        TypeError,
        ("expected a 0-dim tensor, got float", "loss.item()"),
    ),
    "the snapshot of a transformation": (
        lambda: torchopt.extract_state_dict(ADAM),
        TypeError,
        ("GradientTransformation", "expected an nn.Module or a MetaOptimizer"),
    ),
    "an optimizer of torch for a snapshot": (
        lambda: torchopt.extract_state_dict(torch.optim.Adam(net().parameters())),
        TypeError,
        ("Unexpected class of Adam", "expected an nn.Module or a MetaOptimizer"),
    ),
    "a module for parameters": (
        lambda: torchopt.Adam(net(), lr=0.1),
        TypeError,
        ("got a module (Sequential)", "module.parameters()"),
    ),
    "parameters for a module": (
        lambda: torchopt.MetaAdam(list(net().parameters()), lr=0.1),
        RuntimeError,
        ("expected an nn.Module, got list", "pass the module"),
    ),
    "a generator that was used": (
        lambda: torchopt.Adam(used(net().parameters()), lr=0.1),
        ValueError,
        ("at least one tensor", "after its first use"),
    ),
    "a generator for init": (
        lambda: ADAM.init(net().parameters()),
        LeafTypeError,
        ("at $", "got generator", "tuple"),
    ),
    "a module for its parameters": (
        lambda: ADAM.init(net()),
        LeafTypeError,
        ("got Sequential", "dict(module.named_parameters())"),
    ),
    "a generator of gradients": (
        lambda: updated(net().parameters()),
        ValueError,
        ("updates", "generator"),
    ),
    "a number for a parameter": (
        lambda: ADAM.init({"a": 3.0}),
        LeafTypeError,
        ("at $['a']", "got float"),
    ),
    "the state of another optimizer": (
        lambda: updated(PARAMS, state=torchopt.sgd(0.1, momentum=0.9).init(PARAMS)),
        TypeError,
        ("mu, nu, count", "TraceState"),
    ),
    "no state": (lambda: ADAM.update(PARAMS, None), ValueError, ("2 states", "NoneType")),
    "a gradient without its key": (
        lambda: updated({"w": torch.ones(2)}),
        ValueError,
        ("expected a dict with 'b', got a dict without 'b'",),
    ),
    "a gradient with another key": (
        lambda: updated({**PARAMS, "c": torch.ones(1)}),
        ValueError,
        ("expected a dict without 'c', got a dict with 'c'",),
    ),
    "one key of many missing": (
        lambda: updated(dict(list(MANY.items())[1:]), MANY),
        ValueError,
        ("with 'layer0.weight', got", "without 'layer0.weight'"),
    ),
    "an update without its key": (
        lambda: torchopt.apply_updates(MANY, dict(list(MANY.items())[1:])),
        ValueError,
        ("with 'layer0.weight', got", "without 'layer0.weight'"),
    ),
    "a list for a dict": (
        lambda: updated(
            {"w": [torch.ones(2)], "b": torch.ones(1)},
            optimizer=torchopt.adam(0.1, weight_decay=0.1),
        ),
        ValueError,
        ("at $['w']", "list of 1"),
    ),
    "an update that is a number": (
        lambda: torchopt.apply_updates(PARAMS, {"w": 1.0, "b": None}),
        LeafTypeError,
        ("at $['w']", "an update", "got float"),
    ),
    "updates for no parameters": (
        lambda: torchopt.apply_updates(None, PARAMS),
        LeafTypeError,
        ("at $", "a parameter: expected a tensor, got None"),
    ),
    "a loss for a closure": (
        lambda: torchopt.Adam(net().parameters(), lr=0.1).step(torch.ones(())),
        TypeError,
        ("expected a function or None, got Tensor", "loss.backward()", "MetaOptimizer"),
    ),
    "parameters before the loss": (
        lambda: torchopt.FuncOptimizer(ADAM).step(PARAMS, torch.ones(())),
        TypeError,
        ("expected a 0-dim tensor, got dict", "pass the loss first"),
    ),
    "parameter groups of torch": (
        lambda: torchopt.Adam([{"params": net().parameters(), "lr": 0.1}], lr=0.1),
        TypeError,
        ("a leaf of type", "call add_param_group(params, impl="),
    ),
    "the state of torch's optimizer": (
        lambda: torchopt.Adam(net().parameters(), lr=0.1).load_state_dict(
            torch.optim.Adam(net().parameters()).state_dict()
        ),
        TypeError,
        ("expected what state_dict() of this class returned", "got dict", "torch.optim"),
    ),
    "no state to load": (
        lambda: torchopt.MetaAdam(net(), lr=0.1).load_state_dict(None),
        TypeError,
        ("a tuple, got NoneType",),
    ),
    "an array for a step size": (
        lambda: torchopt.adam(np.array([0.1, 0.2])),
        TypeError,
        ("Invalid learning rate", "a number or a tensor", "ndarray"),
    ),
    "a step of the function": (
        lambda: torchopt.adam(0.1).step(),  # type: ignore[attr-defined]
        AttributeError,
        ("no attribute 'step'", "update(grads, state, params=params)", "torchopt.Adam(params, lr)"),
    ),
    "gradients to zero for a step that takes the loss": (
        lambda: torchopt.MetaAdam(net(), lr=0.1).zero_grad(),  # type: ignore[attr-defined]
        AttributeError,
        ("'MetaAdam'", "'zero_grad'", "leave out zero_grad() and backward()"),
    ),
    "groups of a step that takes the loss": (
        lambda: torchopt.FuncOptimizer(ADAM).param_groups,  # type: ignore[attr-defined]
        AttributeError,
        ("'FuncOptimizer'", "'param_groups'", "a tensor or a schedule"),
    ),
    "a copy of another optimizer": (
        lambda: torchopt.module_clone(torchopt.Adam([torch.ones(2)])),  # type: ignore[type-var]
        TypeError,
        ("module_clone", "got Adam", "copy.deepcopy"),
    ),
    "the averages of another optimizer": (
        lambda: torchopt.transform.averaged_params(ADAM.init(PARAMS), PARAMS),
        ValueError,
        ("averaged_params", "got ScaleByAdamState", "pass what its init or update returned"),
    ),
    "a loss without a batch": (
        lambda: torchopt.inner_loop(lambda p: p.sum(), torchopt.sgd(0.1), steps=1)(torch.ones(1)),
        TypeError,
        ("2 arguments, (params, batch)", "got <lambda>(p)", "take the batch too"),
    ),
    "a module for the loss of an inner loop": (
        lambda: torchopt.inner_loop(net(), torchopt.sgd(0.1), steps=1)(PARAMS, torch.ones(1, 3)),
        TypeError,
        ("expected a function", "got Sequential(input)", "functional_call(module, params, inputs)"),
    ),
    "the class of a distribution": (
        lambda: torchopt.diff.zero_order(torch.distributions.Normal),
        TypeError,
        ("got the class Normal", "Normal(0.0, 1.0)"),
    ),
    "a snapshot and its module exchanged": (
        lambda: torchopt.recover_state_dict(  # type: ignore[arg-type]
            torchopt.extract_state_dict(net()), net()
        ),
        TypeError,
        ("first, got ModuleState first", "exchange the two"),
    ),
    "a generator whose gradients are stopped": (
        lambda: torchopt.stop_gradient(net().parameters()),  # type: ignore[arg-type]
        TypeError,
        ("expected a tree of tensors, got one with generator", "pass list(...)"),
    ),
    "a matrix for the options of a solver": (
        lambda: torchopt.linear_solve.CG(torch.eye(2)),  # type: ignore[arg-type]
        TypeError,
        ("CG(...)", "a tensor of shape (2, 2)", "linear_solve(A, b, CG())"),
    ),
    "the name of the solver of a system": (
        lambda: torchopt.linear_solve.linear_solve(
            torch.eye(2),
            torch.ones(2),
            "cg",  # type: ignore[arg-type]
        ),
        TypeError,
        ("expected a solver, such as CG()", "got 'cg'"),
    ),
    "the class of the solver of a system": (
        lambda: torchopt.linear_solve.linear_solve(
            torch.eye(2),
            torch.ones(2),
            torchopt.linear_solve.CG,  # type: ignore[arg-type]
        ),
        TypeError,
        ("got the class CG; call it",),
    ),
    "a module to step by a function": (
        lambda: torchopt.FuncOptimizer(torchopt.sgd(0.1)).step(
            torch.ones((), requires_grad=True),
            net(),  # type: ignore[arg-type]
        ),
        LeafTypeError,
        ("step(loss, params)", "got Sequential", "dict(module.named_parameters())"),
    ),
    "the pair that update returns for its updates": (
        lambda: torchopt.apply_updates(PARAMS, updated(PARAMS)),
        ValueError,
        ("got tuple of 2", "updates, state = update(...)"),
    ),
    "updates for a module": (
        lambda: torchopt.apply_updates(net(), torch.ones(2)),  # type: ignore[type-var]
        LeafTypeError,
        ("a parameter: expected a tensor, got Sequential", "dict(module.named_parameters())"),
    ),
    "a method for parameters": (
        lambda: ADAM.init(net().state_dict),
        LeafTypeError,
        ("init(params)", "got method; call it"),
    ),
    "a scheduler of torch for a step size": (
        lambda: torchopt.adam(torch_scheduler()),  # type: ignore[arg-type]
        TypeError,
        ("got LambdaLR of torch", "torchopt.schedule", "TorchOptimizer"),
    ),
    "a generator of parameters for a functional call": (
        lambda: torchopt.params.functional_call(
            net(),
            net().parameters(),
            torch.ones(1, 3),  # type: ignore[arg-type]
        ),
        TypeError,
        ("expected a mapping", "got generator", "dict(module.named_parameters())"),
    ),
    "a module among the names of a picture": (
        lambda: make_dot(torch.ones(1, requires_grad=True) * 2, params=net()),
        TypeError,
        ("got Linear", "dict(module.named_parameters())"),
    ),
    "tasks before their loss": (
        lambda: torchopt.distributed.TaskParallel(net()).backward(
            [torch.ones(1, 3)],
            lambda x: x.sum(),  # type: ignore[arg-type]
        ),
        TypeError,
        ("got function", "the loss comes first: backward(task_loss, tasks)"),
    ),
    "an optimizer for the parameters of tasks": (
        lambda: torchopt.distributed.TaskParallel(
            torchopt.Adam([torch.ones(2, requires_grad=True)])
        ),
        ValueError,
        ("found none in Adam", "pass a module"),
    ),
    "a world without brackets": (
        lambda: torchopt.distributed.auto_init_rpc(lambda: 3)(),  # type: ignore[call-arg]
        TypeError,
        ("expected a function to decorate", "@auto_init_rpc()"),
    ),
    "a call on all processes without brackets": (
        lambda: torchopt.distributed.parallelize(lambda x: x)(PARAMS),  # type: ignore[arg-type]
        TypeError,
        ("expected a function to decorate, got dict", "@parallelize()"),
    ),
    "a norm below zero": (
        lambda: torchopt.clip_grad_norm(-1.0),
        ValueError,
        ("Invalid max_norm value: -1.0", ">= 0"),
    ),
    "parameters to clip, as in torch": (
        lambda: torchopt.clip_grad_norm(net().parameters(), 1.0),
        TypeError,
        ("Invalid max_norm value", "generator"),
    ),
    "a transformation to inject into": (
        lambda: transform.inject_hyperparams(ADAM),
        TypeError,
        ("expected a function such as torchopt.adam", "inject_hyperparams(torchopt.adam)(lr=0.1)"),
    ),
    "the class of a linear solver": (
        lambda: rooted(solve=linear_solve.CG),
        TypeError,
        ("got the class CG; call it: CG()",),
    ),
    "the name of a linear solver": (
        lambda: rooted(solve="cg"),
        TypeError,
        ("got 'cg'", "such as CG()"),
    ),
    "a loss for its gradient": (
        lambda: rooted(lambda w, x: ((w - x) ** 2).sum()),
        ValueError,
        ("such as the gradient of a loss,", "expected shape (2,)", "got ()"),
    ),
    "a matrix for its product": (
        lambda: linear_solve.CG()(torch.eye(500), torch.ones(500)),
        TypeError,
        ("expected a function of a tree like b, got Tensor", "linear_solve(A, b, solver)"),
    ),
    "an array to solve for": (
        lambda: linear_solve.CG()(lambda v: v, np.ones(500)),
        TypeError,
        ("expected tensors, got ndarray",),
    ),
    "the product in place of options": (
        lambda: linear_solve.CG(lambda v: v),
        TypeError,
        ("expected options of the solver, got a function", "CG()(matvec, b)"),
    ),
    "the objective in place of options, as in jaxopt": (
        lambda: solvers.LBFGS(lambda w: w),
        TypeError,
        ("got a function; write LBFGS()(function, start, *args)",),
    ),
    "a module to draw": (
        lambda: make_dot(net()),
        TypeError,
        ("expected a tensor or a tree of tensors, got Sequential", "params="),
    ),
    "a scripted sequence": (
        lambda: torchopt.MetaSGD(scripted()[0], lr=0.1),
        RuntimeError,
        ("the module", "RecursiveScriptModule", "scripted from"),
    ),
    "a scripted module": (
        lambda: torchopt.MetaSGD(scripted(), lr=0.1),
        RuntimeError,
        ("the sub-module '0'", "RecursiveScriptModule", "scripted from"),
    ),
    "labels by name for a module": (
        lambda: stepped({name: "a" for name, _ in net().named_parameters()}),
        ValueError,
        ("tuple of 60", "dict of 60", "a function of that tuple"),
    ),
    "an unknown label": (lambda: stepped("b"), ValueError, ("'a'", "got 'b'")),
    "a constructor for a label": (
        lambda: transform.partition({"a": torchopt.adam}, "a"),
        TypeError,
        ("at 'a'", "call it: adam("),
    ),
    "modules in a tree whose gradients are stopped": (
        lambda: torchopt.stop_gradient([net(), torch.ones(1)]),
        TypeError,
        ("got one with Sequential as a leaf", "for each module"),
    ),
    "fast weights for torchopt.Adam": (
        lambda: torchopt.Adam(fast().parameters(), lr=0.1),
        ValueError,
        ("expected leaf tensors", "of shape (3, 3)", "before the first step"),
    ),
    "backward before the step": (
        lambda: after_backward(net()),
        NotDifferentiableError,
        ("freed by loss.backward()", "leave out backward()"),
    ),
    "a frozen module": (
        lambda: after_freezing(net()),
        NotDifferentiableError,
        ("none of the 60 parameters requires a gradient", "requires_grad_()"),
    ),
    "tensors that were never marked": (
        lambda: torchopt.FuncOptimizer(ADAM).step(torch.ones(2).sum(), torch.ones(2)),
        NotDifferentiableError,
        ("none of the 1 parameters requires a gradient",),
    ),
    "a loss under no_grad": (
        lambda: torchopt.MetaSGD(net(), lr=0.1).step(net()(torch.ones(1, 3)).sum().detach()),
        NotDifferentiableError,
        ("has no graph", "outside of torch.no_grad()"),
    ),
    "a state_dict for a snapshot": (
        lambda: torchopt.recover_state_dict(net(), net().state_dict()),
        TypeError,
        ("got OrderedDict", "what extract_state_dict(module) returned"),
    ),
    "the snapshot of the module for its optimizer": (
        lambda: torchopt.recover_state_dict(
            torchopt.MetaSGD(net(), lr=0.1), torchopt.extract_state_dict(net())
        ),
        TypeError,
        ("got that of a module", "extract_state_dict(optimizer)"),
    ),
    "the snapshot of a module with many parameters": (
        lambda: torchopt.recover_state_dict(
            nn.ParameterDict({f"p{i}": torch.ones(1) for i in range(500)}),
            torchopt.extract_state_dict(
                nn.ParameterDict({f"q{i}": torch.ones(1) for i in range(500)})
            ),
        ),
        ValueError,
        ("'p0'", "another module"),
    ),
    "parameters and a step size for the function": (
        lambda: torchopt.adam(net().parameters(), 0.1),
        TypeError,
        ("the step size is lr",),
    ),
    "parameters for the step size": (
        lambda: torchopt.sgd(net().parameters()),
        TypeError,
        ("Invalid learning rate", "got generator", "init(params)", "torchopt.Adam(params, lr)"),
    ),
    "backward inside of a solver": (
        lambda: custom_root(lambda w, x: w - x, argnums=1)(
            lambda w, x: torch.autograd.grad((x.clone() ** 2).sum(), x)[0]
        )(torch.ones(2), torch.ones(2, requires_grad=True)),
        NotDifferentiableError,
        ("solver_fn runs without a graph", "torch.enable_grad()"),
    ),
    "backward inside of a module's solve": (
        lambda: Inner(nn.Linear(2, 1)).solve(),
        NotDifferentiableError,
        ("runs without a graph", "torch.enable_grad()"),
    ),
    "a solver that returns a pair": (
        lambda: custom_root(lambda w, x: w - x, argnums=1)(lambda w, x: (x.detach(), 3))(
            torch.ones(2), torch.ones(2, requires_grad=True)
        ),
        RuntimeError,
        ("Got (tensor of shape (2,), 3)", "has_aux=True"),
    ),
    "an array for a differentiated argument": (
        lambda: custom_root(lambda w, x: w - x, argnums=1)(lambda w, x: w)(
            torch.ones(900), np.ones(900)
        ),
        RuntimeError,
        ("at position 1", "make it a tensor"),
    ),
    "a decorator without its arguments": (
        lambda: torchopt.diff.zero_order(lambda x: x.sum())(torch.ones(2)),
        TypeError,
        ("expected a function to decorate, got Tensor", "@zero_order(distribution, ...)"),
    ),
    "a number from a zero-order function": (
        lambda: torchopt.diff.zero_order(torch.randn)(lambda x: x.sum().item())(
            torch.ones(2, requires_grad=True)
        ),
        TypeError,
        ("Got float", "without .item()"),
    ),
    "a vector from a zero-order function": (
        lambda: torchopt.diff.zero_order(torch.randn)(lambda x: x)(
            torch.ones(2, requires_grad=True)
        ),
        RuntimeError,
        ("of shape (2,)", "vector_output=True"),
    ),
    "arrays in an inner loop": (
        lambda: LOOP({"w": np.ones(900)}, torch.ones(2)),
        TypeError,
        ("first leaf is ndarray", "named_parameters"),
    ),
    "integers in an inner loop": (
        lambda: LOOP(torch.ones(2, dtype=torch.int64), torch.ones(2)),
        TypeError,
        ("first leaf is a tensor of torch.int64",),
    ),
    "a transposed gradient": (
        lambda: updated({"w": torch.ones(1, 2), "b": torch.ones(1)}),
        ValueError,
        ("at $['w']", "(2,)", "gradients like the parameters"),
    ),
    "a tuple of gradients for a list of parameters": (
        lambda: updated((torch.ones(2),), [torch.ones(2)], optimizer=torchopt.adamw(0.1)),
        ValueError,
        ("expected list of 1, got tuple of 1", "convert it with list(...)"),
    ),
    "an update for no parameter": (
        lambda: torchopt.apply_updates(None, torch.ones(2)),
        LeafTypeError,
        ("a parameter: expected a tensor, got None",),
    ),
    "a tensor for a prox": (
        lambda: solvers.ProximalGradient(prox=torch.ones(3)),
        TypeError,
        ("prox: expected a function of (v, step, *args)", "tensor of shape (3,)"),
    ),
    "a tensor for a loss": (
        lambda: solvers.LevenbergMarquardt(loss=torch.ones(3)),
        ValueError,
        ("loss: expected one of 'linear'", "tensor of shape (3,)"),
    ),
    "an array for a matrix": (
        lambda: torchopt.linalg.cg(np.ones((9, 9)), torch.ones(9)),
        TypeError,
        ("must be a callable, a matrix", "leaf of type ndarray"),
    ),
    "tensors for betas": (
        lambda: torchopt.adam(betas={"b1": torch.ones(9)}),
        ValueError,
        ("Invalid betas: expected 2 numbers", "got 1"),
    ),
    "a list for a step size": (
        lambda: torchopt.transform.scale_by_adam(b1=(torch.ones(9),)),
        TypeError,
        ("expected a number or a tensor", "(tensor of shape (9,))"),
    ),
    "a module for FuncOptimizer": (
        lambda: torchopt.FuncOptimizer(ADAM).step(torch.ones(()), net()),
        LeafTypeError,
        ("step(loss, params): a parameter: expected a tensor, got Sequential", "named_parameters"),
    ),
    "an array for FuncOptimizer": (
        lambda: torchopt.FuncOptimizer(ADAM).step(torch.ones(()), {"w": np.ones(1)}),
        LeafTypeError,
        ("at $['w']", "expected a tensor, got ndarray", "torch.from_numpy"),
    ),
    "a module for TorchOptimizer": (
        lambda: torchopt.optim.TorchOptimizer(net(), torchopt.sgd, lr=0.1),
        TypeError,
        ("got a module (Sequential)", "module.parameters()"),
    ),
    "a class for TorchOptimizer": (
        lambda: torchopt.optim.TorchOptimizer([torch.ones(1)], torchopt.SGD, lr=0.1),
        TypeError,
        ("expected a function of hyper-parameters, got SGD", "torchopt.adam, lr=0.1"),
    ),
    "a static name that is none": (
        lambda: transform.inject_hyperparams(torchopt.adam, static=["lrr"])(lr=0.1),
        TypeError,
        ("expected arguments of make, lr, betas", "got 'lrr'"),
    ),
    "a list for a label": (
        lambda: transform.partition({"a": ADAM}, [["a"]]).init([torch.ones(1)]),
        ValueError,
        ("expected one of the labels ['a'], got ['a']",),
    ),
    "a bool of numpy in a mask": (
        lambda: transform.masked(ADAM, {"w": np.bool_(True)}).init({"w": torch.ones(1)}),
        TypeError,
        ("expected a tree of bools", "numpy.bool"),
    ),
    "nothing for a hook": (
        lambda: torchopt.register_hook(None),  # type: ignore[arg-type]
        TypeError,
        ("expected a function of a derivative, got NoneType",),
    ),
    **{
        f"a constructor in {make.__name__}": (
            lambda make=make, rest=rest: make(torchopt.adam, *rest),
            TypeError,
            ("`adam`", "call it: adam("),
        )
        for make, rest in (
            (transform.masked, (True,)),
            (transform.accumulate, (2,)),
            (transform.lookahead, (2,)),
            (transform.in_precision, (torch.float32,)),
            (transform.apply_if_finite, ()),
            (torchopt.FuncOptimizer, ()),
        )
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_a_clear_message(mistake: str) -> None:
    run, error, words = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        run()
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    assert len(text) < 400
    assert "tensor(" not in text


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("wrong", [3.0, np.ones(1), "x"], ids=["float", "numpy", "str"])
@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_gradient_that_is_not_a_tensor(name: str, wrong: Any, inplace: bool) -> None:
    optimizer = ROWS[name].functional(**ROWS[name].settings[-1])
    state = optimizer.init(PARAMS)
    with pytest.raises(LeafTypeError, match=r"at \$\['b'\]: .*expected a tensor, got") as caught:
        optimizer.update({**PARAMS, "b": wrong}, state, params=PARAMS, inplace=inplace)
    assert isinstance(caught.value, (TypeError, ValueError))


WRAPPERS: dict[str, Any] = {
    "accumulate": lambda inner: torchopt.transform.accumulate(inner, 2),
    "apply_if_finite": torchopt.transform.apply_if_finite,
    "cautious": torchopt.transform.cautious,
    "compensated": torchopt.transform.compensated,
    "galore": lambda inner: torchopt.transform.galore(inner, 1),
    "in_8_bits": torchopt.transform.in_8_bits,
    "in_precision": torchopt.transform.in_precision,
    "lookahead": torchopt.transform.lookahead,
    "sam": torchopt.transform.sam,
}


@pytest.mark.parametrize("wrong", [3.0, np.ones(1), "x"], ids=["float", "numpy", "str"])
@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_a_wrapper_around_sgd_takes_tensors_alone(name: str, wrong: Any) -> None:
    optimizer = WRAPPERS[name](torchopt.sgd(0.1))
    state = optimizer.init(PARAMS)
    with pytest.raises(LeafTypeError, match=r"at \$\['b'\]: .*a gradient: expected a tensor, got"):
        optimizer.update({**PARAMS, "b": wrong}, state, params=PARAMS)
    if name in ("compensated", "in_precision", "lookahead"):  # those that read the parameters
        with pytest.raises(LeafTypeError, match=r"at \$\['b'\]: init\(params\): a parameter: "):
            optimizer.init({**PARAMS, "b": wrong})


COUNTS: dict[str, Any] = {
    "every of accumulate": lambda n: torchopt.transform.accumulate(torchopt.sgd(0.1), n),
    "every of lookahead": lambda n: torchopt.transform.lookahead(torchopt.sgd(0.1), n),
    "rank": lambda n: torchopt.transform.galore(torchopt.sgd(0.1), n),
    "update_every of galore": lambda n: torchopt.transform.galore(torchopt.sgd(0.1), 1, n),
    "block_size": lambda n: torchopt.transform.in_8_bits(torchopt.sgd(0.1), n),
    "update_every of shampoo": lambda n: torchopt.shampoo(update_every=n),
    "root_steps": lambda n: torchopt.transform.scale_by_shampoo(root_steps=n),
    "update_every of soap": lambda n: torchopt.soap(update_every=n),
    "update_every of sophia": lambda n: torchopt.sophia(update_every=n),
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_counts_are_integers(name: str) -> None:
    hyper = name.partition(" ")[0]
    for wrong in (0, 2.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^Invalid {hyper} value: .*; expected an integer"):
            COUNTS[name](wrong)
    for allowed in (1, np.int64(2)):
        COUNTS[name](allowed)
    if "sophia" not in name:
        with pytest.raises(TypeError, match=rf"^Invalid {hyper} value: expected a number"):
            COUNTS[name](None)
    for make in (lambda n: torchopt.psgd(seed=n), lambda n: torchopt.muon(ns_steps=n)):
        with pytest.raises(ValueError, match=r"value: 0\.5; expected an integer >= 0"):
            make(0.5)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_parameters_by_position_are_named_in_the_answer(name: str) -> None:
    optimizer = ROWS[name].functional(**ROWS[name].settings[-1])
    state = optimizer.init(PARAMS)
    for run in (optimizer, torchopt.chain(optimizer, torchopt.sgd(0.1))):
        with pytest.raises(TypeError, match=r"got 3; pass the parameters by name"):
            run.update(PARAMS, state, PARAMS)


# A refused value of each hyper-parameter, by its name in the signatures.
OUT_OF_RANGE = {"lr": -1.0, "eps": -1.0, "weight_decay": -1.0, "momentum": -1.0, "rho": -1.0,
                "betas": (1.5, 0.9), "b1": 1.5, "b2": 1.5, "decay": 2.0, "alpha": -1.0,
                "d": -1.0, "d0": -1.0, "etas": (2.0, 1.2), "step_sizes": (2.0, 1.0),
                "update_every": 0, "beta2_decay": 1.0, "growth_rate": 0.5}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_refused_number_is_answered_with_its_range(name: str) -> None:
    make = ROWS[name].functional
    found = [n for n in inspect.signature(make).parameters if n in OUT_OF_RANGE]
    assert found
    for hyper in found:
        wrong: Any = OUT_OF_RANGE[hyper]
        usual = inspect.signature(make).parameters[hyper].default
        if isinstance(usual, tuple):
            wrong = (*(wrong if isinstance(wrong, tuple) else (wrong, wrong)), 0.9)[: len(usual)]
        settings = {**ROWS[name].settings[-1], "lr": 0.1, hyper: wrong}
        with pytest.raises(ValueError, match=r"^Invalid .*; expected .*[<>]") as caught:
            make(**settings)
        assert len(str(caught.value)) < 400


SEVERAL = [
    (name, hyper, parameter.default)
    for name in sorted(ROWS)
    for hyper, parameter in inspect.signature(ROWS[name].functional).parameters.items()
    if isinstance(parameter.default, tuple)
]


@pytest.mark.parametrize(("name", "hyper", "usual"), SEVERAL)
def test_one_number_for_several_is_completed_by_the_defaults(
    name: str, hyper: str, usual: tuple[Any, ...]
) -> None:
    settings = {**ROWS[name].settings[-1], hyper: 0.9}
    with pytest.raises(TypeError, match=f"Invalid {hyper}: expected {len(usual)} num") as caught:
        ROWS[name].functional(**settings)
    assert f"pass {hyper}={(0.9, *usual[1:])}" in str(caught.value)


class Attention(nn.Module):
    """Self-attention by torch's fast kernel, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.project(x)
        return nn.functional.scaled_dot_product_attention(h, h, h)


def test_attention_without_a_second_derivative_is_pointed_out_once() -> None:
    module, x = Attention(), torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    start = tuple(module.parameters())
    optimizer = torchopt.MetaSGD(module, lr=0.1)
    with pytest.warns(SecondDerivativeWarning, match=r"SDPBackend\.MATH"):
        optimizer.step(module(x).square().sum())
    optimizer.step(module(x).square().sum())
    meta_loss = module(x).square().sum()
    with pytest.raises(NotDifferentiableError, match=r"SDPBackend\.MATH") as caught:
        torchopt.FuncOptimizer(torchopt.sgd(0.1)).step(meta_loss, start)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("quiet", ["first order", "no graph", "the remedy"])
def test_no_warning_where_no_second_derivative_is_missing(quiet: str) -> None:
    module, x = Attention(), torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torchopt.MetaSGD(module, lr=0.1)
    optimizer.first_order = quiet == "first order"
    math = [torch.nn.attention.SDPBackend.MATH]
    fast = [torch.nn.attention.SDPBackend.FLASH_ATTENTION]
    kernels = torch.nn.attention.sdpa_kernel(math if quiet == "the remedy" else fast)
    with kernels:
        loss = module(x).square().sum()
        with torch.set_grad_enabled(quiet != "no graph"):
            optimizer.step(loss)


def test_clipping_by_the_largest_value_with_an_empty_tensor() -> None:
    grads = (torch.tensor([3.0, -4.0]), torch.zeros(0))
    for order in ("inf", 2.0, 1.0):
        clip = torchopt.clip_grad_norm(1.0, order)
        clipped, empty = clip.update(grads, clip.init(grads))[0]
        norm = torch.linalg.vector_norm(grads[0], float(order))
        torch.testing.assert_close(clipped, grads[0] / (norm + 1e-6))
        assert empty.shape == (0,)
        assert clip.update(grads[1:], ())[0][0].shape == (0,)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64),
                                    (torch.float32, torch.bfloat16)], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", sorted(ROWS))
def test_gradients_of_another_dtype_than_their_parameters(name: str, dtypes: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    optimizer = ROWS[name].functional(**ROWS[name].settings[-1])
    found = []
    for of_p, of_g in (dtypes, (torch.float64, torch.float64)):
        param, grad = p.to(dtypes[0]).to(of_p), g.to(dtypes[1]).to(of_g)
        updates, _ = optimizer.update(grad, optimizer.init(param), params=param, inplace=False)
        found.append(updates.double())
    scale = found[1].abs().max()
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    assert (found[0] - found[1]).abs().max() <= 8 * coarsest * scale
