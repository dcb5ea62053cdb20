#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare this torchopt with the published one: names, signatures, and small programs run in both.

Three stages, each in two worker processes, one for each package:

1. Interface: every module and its public names (those in ``__all__``, and those it defines without
   a leading underscore), with signatures (names, kinds, positional orders, defaults), fields of
   named tuples, methods, base classes, and the ``__module__`` of each class or function.
2. Programs: those of the table below; their results, or the type and text of their exceptions, are
   compared.
3. Pickles: states written by the published package are loaded by this one.

The result is a table of all public names with "same", "same, and more" (keyword arguments or
members were added) or the reason for a difference.  ``REASONS`` and ``PROGRAM_REASONS`` list the
intended differences.  Any other difference makes the exit status 1.

The published package is used as a black box, through ``inspect.signature`` and calls.  It runs on
the published optree, so it needs packages of its own::

    pip install --target rival --no-deps torchopt==0.7.3 optree==0.20.0 graphviz typing-extensions
    python tools/compare_published_torchopt.py --published-path rival --table table.md

Standard library only.
"""

# ruff: noqa: E501, D102, D103 -- one row per line reads best; the functions are internal.

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The workers --------------------------------------------------------------------------------------

INTERFACE = r"""
import importlib, inspect, json, pkgutil, sys, types, warnings
warnings.simplefilter('ignore')
import torchopt

def text(value):
    if isinstance(value, types.FunctionType):
        return f'<function {value.__name__}>'
    shown = repr(value)
    return '<object>' if ' at 0x' in shown else shown

def signature(function):
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None
    return [[p.name, p.kind.name, None if p.default is p.empty else text(p.default)] for p in parameters]

def describe(x):
    if inspect.ismodule(x):
        return {'kind': 'module'}
    if inspect.isclass(x):
        members = {}
        for name in dir(x):
            owner = next((k for k in x.__mro__ if name in vars(k)), None)
            if (name.startswith('_') and name != '__call__') or owner is None or not owner.__module__.startswith('torchopt'):
                continue
            member = inspect.getattr_static(x, name)
            if isinstance(member, (staticmethod, classmethod)):
                members[name] = [type(member).__name__, signature(getattr(x, name))]
            else:
                members[name] = ['method' if callable(member) else 'value', signature(member) if callable(member) else None]
        return {'kind': 'class', 'module': x.__module__, 'name': x.__qualname__, 'signature': signature(x),
                'fields': list(getattr(x, '_fields', ())) if issubclass(x, tuple) else [],
                'bases': [b.__name__ for b in x.__mro__[1:] if b.__module__.startswith('torchopt')], 'members': members}
    if hasattr(x, '__code__') or inspect.isbuiltin(x):
        return {'kind': 'function', 'module': x.__module__, 'name': x.__qualname__, 'signature': signature(x),
                'members': {n: ['method', signature(v)] for n, v in vars(x).items() if callable(v) and not n.startswith('_')} if hasattr(x, '__dict__') else {}}
    return {'kind': 'value', 'type': type(x).__name__}

modules = {}
names = ['torchopt', *(m.name for m in pkgutil.walk_packages(torchopt.__path__, 'torchopt.') if not any(p.startswith('_') for p in m.name.split('.')))]
for name in names:
    module = importlib.import_module(name)
    listed = set(getattr(module, '__all__', ()))
    defined = {n for n, v in vars(module).items() if not n.startswith('_') and not inspect.ismodule(v)
               and getattr(v, '__module__', None) == name and hasattr(v, '__qualname__')}
    modules[name] = {n: {**describe(getattr(module, n)), 'listed': n in listed} for n in sorted(listed | defined)}
json.dump({'version': torchopt.__version__, 'file': torchopt.__file__, 'modules': modules}, sys.stdout)
"""

PRELUDE = r"""
import warnings
warnings.simplefilter('ignore')
import copy, math, pickle
from collections import OrderedDict, namedtuple
import torch
from torch import nn
import torchopt
from torchopt import *
from torchopt import alias, base, clip, combine, hook, pytree, schedule, transform, typing, update, utils
from torchopt.alias.utils import _set_use_chain_flat, _get_use_chain_flat
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

def t(*values, grad=False): return torch.tensor(values if len(values) != 1 else values[0], requires_grad=grad)
def show(x):
    if isinstance(x, torch.Tensor):
        values = [float(f'{v:.9g}') + 0.0 for v in x.detach().double().reshape(-1).tolist()]
        return f'{type(x).__name__}({values}, {tuple(x.shape)}, {x.dtype}, grad={x.requires_grad}, leaf={x.is_leaf})'
    if isinstance(x, dict): return type(x).__name__ + '{' + ', '.join(f'{k!r}: {show(v)}' for k, v in x.items()) + '}'
    if isinstance(x, (list, tuple)):
        fields = getattr(x, '_fields', None)
        if fields is not None and not callable(x) and not hasattr(x, 'init'):
            return type(x).__name__ + '(' + ', '.join(f'{f}={show(v)}' for f, v in zip(fields, x)) + ')'
        if hasattr(x, 'init'): return type(x).__name__
        return type(x).__name__ + '[' + ', '.join(map(show, x)) + ']'
    if isinstance(x, float): return f'{x:.9g}'
    if callable(x): return f'<{type(x).__name__}>'
    return repr(x)
def attempt(f, *args, **kwargs):
    try: return f(*args, **kwargs)
    except Exception as e: return f'{type(e).__name__}: {e}'
P = {'w': t(1.0, -2.0), 'b': t(0.5)}
G = {'w': t(0.3, -0.7), 'b': t(1.5)}
def run(o, steps=3, params=P, grads=G, inplace=False, given=True):
    'Parameters and state after some steps.'
    params = pytree.tree_map(lambda p: p.clone(), params)
    state = o.init(params)
    for _ in range(steps):
        g = pytree.tree_map(lambda x: x.clone(), grads)
        updates, state = o.update(g, state, params=params if given else None, inplace=inplace)
        params = apply_updates(params, updates, inplace=inplace)
    return params, state
def missing(o):
    'Updates and parameters where the second of three gradients is missing.'
    params = pytree.tree_map(lambda p: p.clone(), P)
    state = o.init(params)
    out = []
    for g in (G, {'w': G['w'], 'b': None}, G):
        updates, state = o.update(dict(g), state, params=params, inplace=False)
        params = apply_updates(params, updates, inplace=False)
        out.append(updates['b'])
    return out, params['b']
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(t(1.0))
    def forward(self, x): return self.a * x ** 2
def net(make, steps=1):
    n = Net(); o = make(n)
    for _ in range(steps): o.step(n(t(2.0)))
    return n, o
def golden():
    x = t(2.0, grad=True); n = Net(); o = MetaSGD(n, lr=1.0)
    start = n.a
    saved, kept = extract_state_dict(n, by='reference'), extract_state_dict(o, by='reference')
    o.step(n(x)); n(x).backward()
    first = x.grad.clone()
    recover_state_dict(n, saved); recover_state_dict(o, kept)
    o.step(n.a * x); n(x).backward()
    return first, x.grad, n.a is not start
def clipped():
    x = t(2.0, grad=True); n = Net()
    o = MetaOptimizer(n, chain(clip_grad_norm(max_norm=2.0), sgd(lr=1.0, moment_requires_grad=True)))
    o.step(n(x)); n(x).backward()
    return x.grad
def classic(make, steps=3):
    params = [nn.Parameter(t(1.0, -2.0)), nn.Parameter(t(0.5))]
    o = make(params)
    for _ in range(steps):
        o.zero_grad(); (params[0] ** 2).sum().add(params[1] ** 3).backward(); o.step()
    return [p.detach() for p in params], o.state_dict()
def func(inplace=False):
    params = (t(1.0, -2.0, grad=True), t(0.5, grad=True))
    o = FuncOptimizer(adam(0.1), inplace=inplace)
    for _ in range(2): params = o.step((params[0] ** 2).sum() + params[1] ** 3, params)
    return params, o.state_dict()
"""

PROGRAMS_WORKER = r"""
import json, os, sys
channel = os.fdopen(os.dup(1), 'w', encoding='utf-8')
os.dup2(2, 1)
names = {'__name__': '__main__'}
task = json.load(sys.stdin)
exec(compile(task['prelude'], '<prelude>', 'exec'), names)
import __main__
vars(__main__).update(names)
answers = []
for code in task['programs']:
    try:
        answers.append(names['show'](eval(compile(code, '<program>', 'eval'), dict(names))))
    except Exception as error:
        answers.append(f'{type(error).__name__}: {error}')
json.dump(answers, channel)
channel.close()
"""

# The programs -------------------------------------------------------------------------------------

BAD = {
    "lr": "-1.0", "eps": "-1.0", "weight_decay": "-1.0", "eps_root": "-1.0", "rho": "1.5", "alpha": "-0.5", "lr_decay": "-1.0",
    "momentum": "-1.0", "betas": "(1.0, 0.9)", "initial_accumulator_value": "-1.0", "nesterov": "True",
}  # fmt: skip
TAKES = {
    "adadelta": ("lr", "rho", "eps", "weight_decay"),
    "adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
    "adam": ("lr", "betas", "eps", "weight_decay", "eps_root"),
    "adamax": ("lr", "betas", "eps", "weight_decay"),
    "adamw": ("lr", "betas", "eps", "weight_decay", "eps_root"),
    "radam": ("lr", "betas", "eps", "weight_decay"),
    "rmsprop": ("lr", "alpha", "eps", "weight_decay", "momentum"),
    "sgd": ("lr", "momentum", "weight_decay", "nesterov"),
}
SETTINGS = {
    "adadelta": ("", "rho=0.5, weight_decay=0.1"),
    "adagrad": (
        "",
        "lr_decay=0.1, initial_accumulator_value=0.5",
        "maximize=True, weight_decay=0.1",
    ),
    "adam": (
        "",
        "weight_decay=0.1",
        "maximize=True",
        "eps_root=1e-3, betas=(0.5, 0.7)",
        "lr=schedule.linear_schedule(0.1, 0.0, 10)",
    ),
    "adamax": ("", "weight_decay=0.1, betas=(0.5, 0.7)"),
    "adamw": ("", "weight_decay=0.0", "maximize=True", "eps_root=1e-3"),
    "radam": ("", "weight_decay=0.1, betas=(0.5, 0.7)"),
    "rmsprop": (
        "",
        "centered=True",
        "momentum=0.9",
        "momentum=0.9, nesterov=True, centered=True",
        "initial_scale=1.0, maximize=True",
    ),
    "sgd": (
        "lr=0.1",
        "lr=0.1, momentum=0.9",
        "lr=0.1, momentum=0.9, nesterov=True",
        "lr=0.1, momentum=0.9, dampening=0.5, maximize=True",
        "lr=0.1, weight_decay=0.1",
        "lr=lambda c: 0.1 / (c + 1)",
    ),
}
CLASSES = {
    "adadelta": "AdaDelta",
    "adagrad": "AdaGrad",
    "adam": "Adam",
    "adamax": "AdaMax",
    "adamw": "AdamW",
    "radam": "RAdam",
    "rmsprop": "RMSProp",
    "sgd": "SGD",
}


def optimizer_programs() -> list[str]:
    programs = []
    for name, settings in SETTINGS.items():
        lr = "lr=0.1, " if name == "sgd" else ""
        cls = CLASSES[name]
        for setting in settings:
            programs += [
                f"{name}({setting}).init(P)",
                f"run({name}({setting}))[0]",
                f"run({name}({setting}))[1]",
                f"run({name}({setting}), inplace=True)",
                f"run({name}({setting}), given=False)",
                f"missing({name}({setting}))",
            ]
        programs += [
            f"{name}({lr}moment_requires_grad=True).init(P)",
            f"type({name}({lr})).__name__",
            f"classic(lambda p: {cls}(p, {lr}))",
            f"net(lambda n: Meta{cls}(n, {lr}), 2)[0].a",
            f"net(lambda n: Meta{cls}(n, {lr}), 2)[1].state_dict()",
            f"Meta{cls}(Net(), {lr}).state_dict()",
            f"attempt({name}, {lr}betas=3)",
            f"attempt({cls}, [P['w']], {lr}nonsense=3)",
        ]
        for key in TAKES[name]:
            first = "" if key == "lr" else lr
            programs += [
                f"attempt({name}, {first}{key}={BAD[key]})",
                f"attempt({cls}, [P['w']], {first}{key}={BAD[key]})",
                f"attempt(Meta{cls}, Net(), {first}{key}={BAD[key]})",
            ]
    return programs


TRANSFORMS = (
    "scale(0.5)", "scale_by_schedule(lambda c: 0.5 / (c + 1))", "trace()", "trace(0.0)", "trace(0.5, 0.5)", "trace(0.5, nesterov=True)",
    "scale_by_adam()", "scale_by_accelerated_adam()", "scale_by_adadelta()", "scale_by_adamax()", "scale_by_radam()", "scale_by_rms()",
    "scale_by_rms(initial_scale=0.3)", "scale_by_rss()", "scale_by_rss(0.5)", "scale_by_stddev()", "add_decayed_weights(0.1)",
    "add_decayed_weights(0.0)", "add_decayed_weights(0.1, {'w': True, 'b': False})", "masked(transform.scale(3.0), {'w': True, 'b': False})",
    "masked(transform.scale(3.0), lambda p: {'w': False, 'b': True})", "nan_to_num(1.0)",
)  # fmt: skip
BAD_TRANSFORMS = (
    "scale_by_adam(b1=1.0)", "scale_by_adam(b2=-0.1)", "scale_by_adam(eps=-1.0)", "scale_by_adam(eps_root=-1.0)", "scale_by_adamax(b1=1.0)",
    "scale_by_adamax(b2=1.0)", "scale_by_adamax(eps=-1.0)", "scale_by_radam(b1=1.0)", "scale_by_radam(b2=1.0)", "scale_by_radam(eps=-1.0)",
    "scale_by_rms(alpha=-1.0)", "scale_by_rms(eps=-1.0)", "scale_by_rms(alpha=2.0)", "scale_by_stddev(alpha=2.0)", "scale_by_stddev(alpha=-1.0)", "scale_by_stddev(eps=-1.0)",
    "scale_by_rss(-1.0)", "scale_by_rss(eps=-1.0)", "scale_by_adadelta(rho=2.0)", "scale_by_adadelta(eps=-1.0)", "trace(-1.0)",
    "trace(0.9, 0.5, True)", "trace(0.0, 0.0, True)", "add_decayed_weights(-0.1)", "nan_to_num('a')", "scale_by_schedule(3)",
)  # fmt: skip
OTHER = (
    # base, combine, update
    "base.EmptyState(), base.UninitializedState()", "base.identity() == base.identity()", "chain() == base.identity()",
    "(lambda a: chain(a) is a)(sgd(0.1))", "show(chain(sgd(0.1), adam()))", "len(chain(sgd(0.1), adam()).transformations)",
    "len(chain(chain(sgd(0.1), adam()), base.identity(), radam()).transformations)", "type(combine.chain_flat(sgd(0.1), adam())).__name__",
    "combine.chain_flat() == base.identity()", "(lambda a: chain(a, base.identity()) == a)(sgd(0.1))",
    "(lambda a: len({chain(a), chain(a), a}))(sgd(0.1))", "sgd(0.1).chain(adam()).init(P)", "chain.flat is combine.chain_flat",
    "attempt(chain(sgd(0.1), adam()).update, G, (1,))", "base.GradientTransformation(1, 2)._fields",
    "base.identity().init(P), base.identity().update(G, base.EmptyState())", "base.ChainedGradientTransformation().transformations == (base.identity(),)",
    "run(chain(clip_grad_norm(1.0), sgd(0.1)))", "run(chain(nan_to_num(0.0), clip_grad_norm(0.1), adam()))", "run(combine.chain_flat(transform.trace.flat(0.9), transform.scale.flat(-0.1)))",
    "apply_updates(P, G, inplace=False)", "(lambda p: apply_updates(p, G) is p)({k: v.clone() for k, v in P.items()})",
    "apply_updates({'w': t(1.0), 'b': t(2.0)}, {'w': None, 'b': t(1.0)}, inplace=False)",
    "attempt(apply_updates, [t(1.0)], (t(1.0),), inplace=False)", "attempt(apply_updates, {'a': t(1.0)}, {'b': t(1.0)}, inplace=False)",
    "_get_use_chain_flat()", "(_set_use_chain_flat(False), adam().init(P), run(adamw(mask={'w': True, 'b': False})), _set_use_chain_flat(True))[1:3]",
    "run(adamw(mask=[True, True]), params=[P['w'], P['b']], grads=[G['w'], G['b']])",
    # trees
    "run(adam(), params=[P['w'], (P['b'],)], grads=[G['w'], (G['b'],)])", "run(adam(), params=P['w'], grads=G['w'])",
    "run(adam(), params=OrderedDict(P), grads=OrderedDict(G))", "run(adam(), params={'x': {'y': P['w'], 'z': [P['b']]}}, grads={'x': {'y': G['w'], 'z': [G['b']]}})",
    "attempt(run, adam(), params=P, grads={'w': G['w']})",
    # clip
    "run(clip_grad_norm(0.5), 1)", "run(clip_grad_norm(0.5, 1.0), 1)", "run(clip_grad_norm(0.5, math.inf), 1)", "run(clip_grad_norm(100.0), 1)",
    "attempt(run, clip_grad_norm(0.5, error_if_nonfinite=True), grads={'w': t(math.inf, 1.0), 'b': t(0.0)})", "run(clip_grad_norm(0.5), 1, params={}, grads={})",
    "attempt(run, clip_grad_norm(0.5, 'inf'), 1)", "clip_grad_norm(1.0).init(P)",
    "clip_grad_norm(0.5).update({'w': None, 'b': t(2.0)}, base.EmptyState(), inplace=False)",
    # hooks
    "hook.zero_nan_hook(t(math.nan, 1.0, math.inf))", "hook.nan_to_num_hook(1.0, 2.0, 3.0)(t(math.nan, math.inf, -math.inf))",
    "(lambda g: (register_hook(hook.zero_nan_hook).update({'g': g}, base.EmptyState()), list(g._backward_hooks.values())[0] is hook.zero_nan_hook)[1])(t(1.0, grad=True))",
    "attempt(lambda: register_hook(hook.zero_nan_hook).update(G, base.EmptyState()))", "register_hook(hook.zero_nan_hook).init(P)",
    # classic optimizers
    "attempt(Optimizer, [t(1.0, grad=True)], 3)", "attempt(Optimizer, [t(1.0, grad=True)], lambda x: x)", "attempt(MetaOptimizer, Net(), 3)", "attempt(FuncOptimizer, 3)",
    "attempt(Adam, [])", "attempt(Adam, [3])", "attempt(Adam, 3)", "Adam([t(1.0, grad=True)]).state_dict()", "type(Adam([t(1.0, grad=True)]).param_groups[0])",
    "Adam([t(1.0, grad=True)]).step()", "Adam([t(1.0, grad=True)]).step(lambda: t(3.0))", "type(Adam([t(1.0, grad=True)]).impl).__name__",
    "(lambda o: (o.add_param_group(t(2.0, grad=True)), len(o.param_groups), o.state_dict())[1:])(SGD([t(1.0, grad=True)], 0.1))",
    "(lambda p, o: (setattr(p, 'grad', t(1.0)), o.zero_grad(), p.grad, o.zero_grad(set_to_none=True), p.grad)[2::2])(*(lambda p: (p, SGD([p], 0.1)))(t(1.0, grad=True)))",
    "issubclass(Adam, Optimizer), issubclass(MetaAdam, MetaOptimizer), Adadelta is AdaDelta, MetaRMSprop is MetaRMSProp, RMSprop is RMSProp, Adamax is AdaMax, Adagrad is AdaGrad",
    "(lambda o: (o.load_state_dict(o.state_dict()), o.state_dict())[1])(Adam([t(1.0, grad=True)]))",
    "sorted(k for k in vars(Adam([t(1.0, grad=True)])) if k in ('impl', 'param_groups', 'param_treespecs', 'state_groups'))",
    "sorted(k for k in vars(MetaAdam(Net())) if k in ('impl', 'param_containers_groups', 'state_groups'))",
    "func()", "func(True)", "FuncOptimizer(adam()).state_dict(), FuncOptimizer(adam()).optim_state, FuncOptimizer(adam()).inplace",
    "attempt(FuncOptimizer(adam()).step, 3.0, (t(1.0, grad=True),))",
    # meta optimizers and state utilities
    "golden()", "clipped()", "net(lambda n: MetaAdam(n, lr=1.0), 2)[0].a", "net(lambda n: MetaSGD(n, lr=1.0))[1].state_dict()",
    "type(net(lambda n: MetaSGD(n, lr=1.0))[0].a).__name__", "type(list(net(lambda n: MetaSGD(n, lr=1.0))[0].parameters())[0]).__name__",
    "extract_state_dict(Net())", "extract_state_dict(Net(), by='copy')", "extract_state_dict(Net(), by='deepcopy')", "extract_state_dict(Net(), by='deepclone').params[0]['a'].is_leaf",
    "extract_state_dict(Net(), by='clone', detach_buffers=True)", "extract_state_dict(nn.BatchNorm1d(2), by='reference')", "extract_state_dict(nn.BatchNorm1d(2), with_buffers=False)",
    "extract_state_dict(nn.Linear(1, 1, bias=False), enable_visual=True, visual_prefix='x.').visual_contents.__len__()",
    "attempt(extract_state_dict, Net(), by='nonsense')", "attempt(extract_state_dict, 3)", "attempt(extract_state_dict, adam())", "attempt(recover_state_dict, 3, ())",
    "extract_state_dict(net(lambda n: MetaAdam(n))[1])", "extract_state_dict(net(lambda n: MetaAdam(n))[1], by='deepcopy')", "utils.ModuleState((), ())",
    "(lambda n: (stop_gradient(n), n.a)[1])(net(lambda n: MetaSGD(n, lr=1.0))[0])", "(lambda o: (stop_gradient(o), o.state_dict())[1])(net(lambda n: MetaAdam(n))[1])",
    "(lambda x: (stop_gradient({'x': x}), x)[1])(t(1.0, grad=True) * 2)", "(lambda x: (stop_gradient((x, 3, None)), x)[1])(t(1.0, grad=True) * 2)",
    "(lambda n: module_detach_(n) is n)(Net())", "type(module_clone(Net())).__name__", "(lambda n: module_clone(n).a is n.a)(Net())",
    "module_clone(Net(), by='copy').a", "module_clone(Net(), by='deepcopy').a", "attempt(module_clone, Net(), by='nonsense')", "module_clone({'x': t(1.0, grad=True)}, by='copy')",
    "[len(x) for x in utils.extract_module_containers(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))]", "attempt(utils.extract_module_containers, 3)",
    # schedules
    *(f"schedule.exponential_decay(1.0, 0.5, {a})(c)".replace("(c)", f"({c})") for a in ("2, 2, True, 0.2", "0, 1", "1, 3, False", "0, 0", "-1, 2", "0, 2, False, 5.0") for c in (0, 1, 2, 3, 5, 8)),
    *(f"schedule.polynomial_schedule(1.0, 0.1, 2, 4, {b})({c})" for b in (0, 1, -1) for c in (0, 1, 2, 3, 5, 6)),
    *(f"schedule.linear_schedule(1.0, 0.1, {s})({c})" for s in (4, 0, -1) for c in (0, 2, 6)),
    "schedule.linear_schedule(1.0, 0.0, 4)(torch.tensor(1))", "schedule.exponential_decay(1.0, 0.5)(torch.tensor(3))",
    "schedule.exponential_decay(1.0, 0.0)(3)", "schedule.exponential_decay(1.0, 1.5, end_value=2.0)(9)",
    # transform.utils, pytree, accelerated_op
    "transform.utils.inc_count(G, {'w': torch.tensor(3), 'b': torch.tensor(2 ** 63 - 1)})", "transform.utils.inc_count({'w': None, 'b': t(1.0)}, {'w': torch.tensor(3), 'b': torch.tensor(4)})",
    "transform.utils.update_moment(G, P, 0.9, order=1, inplace=False)", "transform.utils.update_moment(G, P, 0.9, order=2, inplace=False)", "attempt(transform.utils.update_moment, G, P, 0.9, order=3)",
    "transform.utils.tree_map_flat(lambda x, y: (x, y), [1, None], [2, 3])", "transform.utils.tree_map_flat(lambda x, y: (x, y), [1, None], [2, 3], none_is_leaf=True)",
    "transform.utils.tree_map_flat_(lambda x: 7, [1, None])",
    "pytree.tree_flatten_as_tuple({'b': 1, 'a': (2, None)})[0]", "pytree.tree_pos(P), pytree.tree_neg(P)", "pytree.tree_add(P, G)", "pytree.tree_add(P, G, P)", "pytree.tree_add_scalar_mul(P, G, 2.0)", "pytree.tree_add_scalar_mul(P, G)",
    "pytree.tree_sub(P, G)", "pytree.tree_sub_scalar_mul(P, G, 2.0)", "pytree.tree_mul(P, G)", "pytree.tree_matmul(torch.eye(2), torch.ones(2, 2))", "pytree.tree_scalar_mul(2.0, P)", "pytree.tree_truediv(P, G)",
    "pytree.tree_vdot_real(P, G)", "pytree.tree_vdot_real([torch.tensor([1j])], [torch.tensor([1j])])", "attempt(pytree.tree_add)",
    "accelerated_op_available('cpu')", "accelerated_op_available()", "accelerated_op_available(['cpu', 'cpu'])", "attempt(accelerated_op_available, 'nonsense')",
    "run(adam(use_accelerated_op=True))", "run(adamw(use_accelerated_op=True))",
    "torchopt.accelerated_op.AdamOp(inplace=False)(t(0.1), t(0.2), t(0.3), torch.tensor(2))",
    "isinstance(torch.distributions.Normal(0.0, 1.0), typing.Samplable), issubclass(torch.distributions.Distribution, typing.Samplable)", "typing.PyTree[torch.Tensor] is not None",
)  # fmt: skip


def all_programs() -> list[str]:
    programs = optimizer_programs()
    for make in TRANSFORMS:
        programs += [
            f"transform.{make}.init(P)",
            f"run(transform.{make})",
            f"run(transform.{make}, inplace=True)",
        ]
    programs += [f"attempt(lambda: transform.{make})" for make in BAD_TRANSFORMS]
    return [*programs, *OTHER]


PICKLES = (
    *(f"run({name}({setting}))[1]" for name, settings in SETTINGS.items() for setting in settings),
    "extract_state_dict(nn.BatchNorm1d(2), by='deepcopy')",
    "transform.masked(transform.scale(3.0), {'w': True, 'b': False}).init(P)",
    "base.UninitializedState()",
)

# Wanted differences -------------------------------------------------------------------------------

# (pattern of the qualified name, a space, the kind of difference; the reason)
REASONS: tuple[tuple[str, str], ...] = (
    (
        r"ScaleBy(Adamax|RAdam)State (fields|signature): ",
        "leaves that missed a gradient count their own steps, in an optional last field",
    ),
    (
        r"AdamOp member: no (Mu|Nu|Updates)Op",
        "parts of the published implementation; the three results are one operation here",
    ),
    (
        r"MaskedOptimalityFn missing|MetaInputsContainer missing|WrappedSamplable missing|visual\.get_fn_name missing",
        "a part of the published implementation, in none of its documents",
    ),
    (
        r"enable_zero_order_gradients signature: .*chunk_size=None",
        "arguments with defaults were added at the end",
    ),
    (
        r"linear_solve\.(\w+\.)?solve_(cg|normal_cg) signature: \(\*\*kwargs\)",
        "the keyword arguments that are understood are named, instead of **kwargs",
    ),
    (
        r"(solve_(cg|inv|normal_cg)|masked|MaskedNode|MaskedState|extract_module_containers|MetaGradientModule|repara\w+|swap_state|TensorDimensionPartitioner|dim_partitioner|mean_reducer|sum_reducer|make_dot|resize_graph) module: ",
        "defined in another module, importable from the same places",
    ),
    (
        r"^torchopt\.typing\.\w+ kind: ",
        "trees of tensors are Any to type checkers: Python's types cannot describe them more precisely",
    ),
    (
        r"distributed\.autograd\.(context|get_gradients) ",
        "a wrapper around the function of torch, with a name and a signature",
    ),
    (
        r"signature: \.update_fn\(.*\*positional",
        "parameters passed by position raise an error that shows the right call, instead of a count",
    ),
    (r"make_rmatvec signature: ", "the example is the positional argument x"),
)

# (pattern of the program; the reason)
PROGRAM_REASONS: tuple[tuple[str, str], ...] = (
    (
        r"register_hook\(hook\.zero_nan_hook\)\.update\(G,",
        "gradients without a graph get no hook: those of steps under no_grad and of first-order steps",
    ),
    (r"betas=3", "Python's own message for unpacking a number"),
    (r"eps_root=-1.0|scale_by_rss\((eps=)?-1.0", "a hyper-parameter out of range is refused"),
    (
        r"^missing\((adamax|radam|.*momentum=)",
        "a missing gradient leaves parameter and state as they are, and the update is None",
    ),
    (
        r"dampening=0.5|trace\(0.5, 0.5\)",
        "with dampening the state counts the steps: DampenedTraceState(trace, count)",
    ),
    (
        r"MetaAdamW\(n, \), 2\)\[1\]|^func\(True\)",
        "moments are in the graph exactly if the fused step was differentiated; the values are equal",
    ),
    (
        r"chain\(sgd\(0.1\), adam\(\)\).update, G, \(1,\)|attempt\(apply_updates|grads=\{'w': G\['w'\]\}\)|update_moment, G, P, 0.9, order=3|FuncOptimizer\(adam\(\)\).step, 3.0|nonsense|extract_module_containers, 3|Optimizer, .*3\)$",
        "the message says what was expected, what was given and where",
    ),
    (
        r"(extract|recover)_state_dict, (3|adam\(\))",
        "TypeError instead of RuntimeError for a wrong kind of argument",
    ),
    (r"clip_grad_norm\(0.5, 'inf'\)", "the documented norm_type='inf' works"),
    (
        r"attempt\(Adam, (\[3?\]|3)\)",
        "an empty list of parameters, or anything but tensors, is refused as in torch.optim",
    ),
    (r"lambda x: x\)$", "the address of a function in a message"),
)

# Comparison ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One torchopt: an interpreter, and a folder of packages if they are not installed in it."""

    name: str
    python: str
    path: str | None

    def run(self, code: str, task: Any = None) -> Any:
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        variables["PYTHONHASHSEED"] = "0"
        if self.path:
            variables["PYTHONPATH"] = self.path
        done = subprocess.run(
            [self.python, *(["-S"] if self.path else []), "-c", code],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            env=variables,
            check=False,
            cwd=tempfile.gettempdir(),
        )
        if done.returncode != 0:
            sys.exit(f"{self.name}: {self.python} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def programs(self, programs: list[str]) -> list[str]:
        answers: list[str] = self.run(PROGRAMS_WORKER, {"prelude": PRELUDE, "programs": programs})
        return answers


@dataclass(frozen=True)
class Row:
    """A public name, its verdict and the reason."""

    name: str
    verdict: str
    detail: str


def shown(signature: Any) -> str:
    if not signature:
        return "()"
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    parts: list[str] = []
    for name, kind, default in signature:
        if kind == "KEYWORD_ONLY" and "*" not in "".join(parts):
            parts.append("*")
        parts.append(stars.get(kind, "") + name + ("" if default is None else f"={default}"))
    return f"({', '.join(parts)})"


def nameless(signature: Any) -> Any:
    """Drop the names of ``*args`` and ``**kwargs``: no call can use them."""
    return [[k if k.startswith("VAR") else n, k, d] for n, k, d in signature] if signature else []


def added_arguments(theirs: Any, ours: Any) -> list[str] | None:
    """Return the keyword-only arguments added in ours, or None if the signatures differ otherwise."""
    theirs, ours = nameless(theirs), nameless(ours)
    known = {p[0] for p in theirs}
    kept = [p for p in ours if p[0] in known]
    more = [p for p in ours if p[0] not in known]
    if kept != theirs or any(k != "KEYWORD_ONLY" or d is None for _, k, d in more):
        return None
    return [p[0] for p in more]


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the differences and the additions, as short texts."""
    if theirs["kind"] != ours["kind"]:
        if "value" in (theirs["kind"], ours["kind"]) and theirs["kind"] != "module":
            return [
                f"kind: {theirs.get('type', theirs['kind'])} here {ours.get('type', ours['kind'])}"
            ], []
        return [f"kind: {theirs['kind']}, here {ours['kind']}"], []
    wrong: list[str] = []
    more: list[str] = []
    for key in ("module", "name", "fields"):
        if theirs.get(key) != ours.get(key):
            wrong.append(f"{key}: {theirs.get(key)}, here {ours.get(key)}")
    lost = [b for b in theirs.get("bases", ()) if b not in ours.get("bases", ())]
    if lost:
        wrong.append(f"bases: no {', '.join(lost)}")
    pairs = {"": (["", theirs.get("signature")], ["", ours.get("signature")])}
    for name, member in theirs.get("members", {}).items():
        if name not in ours["members"]:
            wrong.append(f"member: no {name}")
        else:
            pairs[f".{name}"] = (member, ours["members"][name])
    for name, (old, new) in pairs.items():
        if old[0] != new[0]:
            wrong.append(f"member: {name} is a {old[0]}, here a {new[0]}")
        elif old[1] != new[1]:
            added = added_arguments(old[1], new[1])
            if added is None:
                wrong.append(f"signature: {name}{shown(old[1])}, here {shown(new[1])}")
            elif added:
                more.append(f"{name}({', '.join(f'{a}=' for a in added)})".lstrip("."))
    new_members = sorted(set(ours.get("members", {})) - set(theirs.get("members", {})))
    more += [f".{name}" for name in new_members]
    return wrong, more


def without_counts(text: str) -> str:
    """Remove the field that the published states of AdaMax and RAdam do not have."""
    one = r"(?:'\w+': )?Tensor\(\[[\d.]+\], \(\), torch.int64, grad=False, leaf=True\)"
    return re.sub(
        rf"(t=\d+), count=(?:None|(?:\w+[\[{{])?(?:{one}(?:, )?)+[\]}}]?)\)", r"\1)", text
    )


def reason_of(text: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((reason for pattern, reason in table if re.search(pattern, text)), None)


def says_more(ours: str, theirs: str) -> bool:
    """Return whether both raise the same exception and our text begins with the published text."""
    raised = re.match(r"""['"]?\w*(Error|Exception): """, theirs)
    return raised is not None and ours.lstrip("'\"").startswith(theirs.strip("'\""))


def compare_names(theirs: dict[str, Any], ours: dict[str, Any]) -> list[Row]:
    rows = []
    for module, names in sorted(theirs["modules"].items()):
        here = ours["modules"].get(module)
        no_more: list[str] = []
        for name, old in [("", None), *names.items()]:
            if old is not None and old["kind"] == "module":
                continue  # listed in a row of its own
            qualified = f"{module}.{name}" if name else module
            if here is None or (name and name not in here):
                wrong, more = ["missing"], no_more
            elif old is None:
                wrong, more = [], no_more
            else:
                wrong, more = differences(old, here[name])
            unexplained = [w for w in wrong if reason_of(f"{qualified} {w}", REASONS) is None]
            reasons = {str(reason_of(f"{qualified} {w}", REASONS)) for w in wrong}
            if unexplained:
                rows.append(Row(qualified, "DIFFERENT", "; ".join(unexplained)))
            elif wrong:
                rows.append(Row(qualified, "different", "; ".join(sorted(reasons))))
            elif more:
                rows.append(Row(qualified, "same, and more", ", ".join(more)))
            else:
                rows.append(Row(qualified, "same", ""))
    return rows


def compare_programs(sides: tuple[Side, Side], limit: int) -> int:
    programs = all_programs()
    ours, theirs = (side.programs(programs) for side in sides)
    allowed: Counter[str] = Counter()
    wrong = 0
    for code, mine, other in zip(programs, ours, theirs):
        if mine == other:
            continue
        reason = reason_of(code, PROGRAM_REASONS)
        if reason is None and without_counts(mine) == other:
            reason = "AdaMax and RAdam count the steps of each leaf, after the published fields"
        if reason is None and says_more(mine, other):
            reason = "the published message, followed by what was expected or what to do"
        if reason is not None:
            allowed[reason] += 1
            continue
        wrong += 1
        if wrong <= limit:
            print(f"program:   {code}\n  ours:      {mine}\n  published: {other}\n")
    same = len(programs) - wrong - sum(allowed.values())
    raising = sum(bool(re.match(r"'?\w*(Error|Exception): ", other)) for other in theirs)
    print(f"{len(programs)} programs ({raising} raise in the published package): {same} same, "
          f"{sum(allowed.values())} different with a reason, {wrong} without")  # fmt: skip
    for reason, count in sorted(allowed.items()):
        print(f"  {count:4d} x {reason}")
    return wrong


def compare_pickles(sides: tuple[Side, Side]) -> int:
    """Load pickles of the published package in this one."""
    ours, theirs = sides
    written = theirs.programs([f"pickle.dumps({code}).hex()" for code in PICKLES])
    shown_there = theirs.programs(list(PICKLES))
    read = ours.programs([f"pickle.loads(bytes.fromhex({text}))" for text in written])
    read = [without_counts(text) for text in read]
    wrong = [row for row in zip(PICKLES, read, shown_there) if row[1] != row[2]]
    for code, got, expected in wrong[:5]:
        print(f"pickle of {code}\n  read:    {got}\n  written: {expected}\n")
    print(f"{len(PICKLES)} pickles of states written by the published package: {len(wrong)} differ")
    return len(wrong)


def markdown(rows: list[Row], published: str, ours: str) -> str:
    counts = Counter(row.verdict for row in rows)
    head = f"Public names of torchopt {published}, and their counterparts in torchopt {ours}: "
    head += ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) + "."
    lines = [
        head,
        "",
        "| name | verdict | additions, or reason for the difference |",
        "|---|---|---|",
    ]
    for row in rows:
        detail = row.detail.replace("|", "\\|")
        lines.append(f"| `{row.name}` | {row.verdict} | {detail} |")
    return "\n".join(lines) + "\n"


def torch_folder() -> str:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        sys.exit("expected torch in the running interpreter, found none")
    return str(Path(found.origin).resolve().parents[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--published",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter that runs the published package",
    )
    parser.add_argument(
        "--published-path",
        metavar="DIR",
        help="folder that holds the published package and its optree; torch is taken from the running interpreter",
    )
    parser.add_argument(
        "--ours",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter that runs the package under test",
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="where to write the table of names as Markdown"
    )
    parser.add_argument("--limit", type=int, default=40, help="differences to print")
    arguments = parser.parse_args()
    if arguments.published == arguments.ours and arguments.published_path is None:
        parser.error(
            "expected --published or --published-path: the two packages need environments of their own"
        )
    path = arguments.published_path
    if path is not None:
        path = os.pathsep.join((str(Path(path).resolve()), torch_folder()))
    sides = (Side("ours", arguments.ours, None), Side("published", arguments.published, path))
    ours, theirs = (side.run(INTERFACE) for side in sides)
    for side, interface in zip(sides, (ours, theirs)):
        print(f"{side.name}: torchopt {interface['version']} ({interface['file']})")

    rows = compare_names(theirs, ours)
    for verdict, count in sorted(Counter(row.verdict for row in rows).items()):
        print(f"{count:5d} names: {verdict}")
    wrong = [row for row in rows if row.verdict == "DIFFERENT"]
    for row in wrong[: arguments.limit]:
        print(f"  {row.name}: {row.detail}")
    if arguments.table is not None:
        arguments.table.write_text(
            markdown(rows, theirs["version"], ours["version"]), encoding="utf-8"
        )
    unexplained = len(wrong) + compare_programs(sides, arguments.limit) + compare_pickles(sides)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
