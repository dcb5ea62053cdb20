#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare this optree with the published one: run the same programs in both, print differences.

The table below and a seeded random generator give a few thousand small programs (expressions over
trees).  Each program runs in two worker processes: one imports the optree under test, the other
the published optree 0.20.0.  The script compares canonical descriptions of the results (types,
orders, metadata, texts), or the types and messages of the exceptions; the death of a worker counts
as a result.  In a second stage, each side loads the pickles written by the other.

``DELIBERATE`` lists the intended differences with their reasons.  They are counted, not reported.
Any other difference makes the exit status 1.

Usage::

    python -m venv rival && rival/bin/pip install optree==0.20.0
    python tools/compare_published.py --published rival/bin/python
    python tools/compare_published.py --published rival/bin/python --ours rival/bin/python  # 0

Standard library only.
"""

# ruff: noqa: E501, D102, D103 -- one program per line reads best, and the functions of this
# script are internal.

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The worker ---------------------------------------------------------------------------------------

PRELUDE = r'''
import collections, copy, gc, inspect, operator, os, pickle, time, types, warnings, base64, itertools
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
import optree
from optree import *

warnings.simplefilter('error')
GLOBAL = getattr(optree.registry, '__GLOBAL_NAMESPACE')
P = namedtuple('P', 'x y'); P.__module__ = 'programs'
Q = namedtuple('Q', 'x y'); Q.__module__ = 'programs'
E = namedtuple('E', ''); E.__module__ = 'programs'
class P3(P):
    __slots__ = ()
class L(list): pass
class D(dict): pass
class U:
    """A key without order."""
    def __init__(self, n): self.n = n
    def __repr__(self): return f'U({self.n!r})'
    def __eq__(self, o): return isinstance(o, U) and self.n == o.n
    def __hash__(self): return hash(self.n)
class Node:
    def __init__(self, *items, meta=None): self.items, self.meta = items, meta
    def __repr__(self): return f'{type(self).__name__}{self.items!r}@{self.meta!r}'
    def __getitem__(self, i): return self.items[i]
class C(Node): 'global and in ns'
class N(Node): 'only in ns; entries'
class M(Node): 'global; metadata compared'
class X(Node): 'misbehaving'
def rebuild(cls): return lambda meta, children: cls(*children, meta=meta)
register_pytree_node(C, lambda n: (n.items, n.meta), rebuild(C), namespace=GLOBAL)
register_pytree_node(C, lambda n: (list(n.items), n.meta), rebuild(C), namespace='ns')
register_pytree_node(N, lambda n: (iter(n.items), n.meta, [f'e{i}' for i in range(len(n.items))]),
                     rebuild(N), path_entry_type=GetAttrEntry, namespace='ns')
register_pytree_node(M, lambda n: (n.items, (n.meta, 'm')), lambda m, c: M(*c, meta=m[0]),
                     path_entry_type=SequenceEntry, namespace=GLOBAL)
def flatten_x(n):
    if n.meta == 'raise': raise LookupError('flatten')
    if n.meta == 'one': return (n.items,)
    if n.meta == 'four': return n.items, 1, None, 2
    if n.meta == 'none': return None
    if n.meta == 'int': return 3, None
    if n.meta == 'entries': return n.items, None, ['only']
    return n.items, n.meta
def unflatten_x(m, c):
    if m == 'unflatten': raise LookupError('unflatten')
    return X(*c, meta=m)
register_pytree_node(X, flatten_x, unflatten_x, namespace=GLOBAL)
for cls in (P3, L, D, U, Node, C, N, M, X):
    cls.__module__ = 'programs'
module = types.ModuleType('programs')
for cls in (P, Q, E, P3, L, D, U, Node, C, N, M, X):
    setattr(module, cls.__name__, cls)
import sys as _sys
_sys.modules['programs'] = module

def structseq(cls, first): return cls(range(first, first + cls.n_sequence_fields))
def nest(depth, leaf=0):
    for _ in range(depth): leaf = [leaf]
    return leaf

def show(x, depth=0):
    """Describe any result canonically: types, orders, metadata."""
    t = type(x)
    if depth > 40: return '...'
    d = depth + 1
    if isinstance(x, PyTreeSpec):
        return f'<{x!r} {show(x.__getstate__(), d) if depth < 3 else ""}>'
    if isinstance(x, PyTreeAccessor): return repr(x)
    if isinstance(x, Node): return f'{t.__name__}({", ".join(show(i, d) for i in x.items)} @ {show(x.meta, d)})'
    if isinstance(x, (list, tuple, deque)):
        extra = f' maxlen={x.maxlen}' if isinstance(x, deque) else ''
        extra += ' original=' + show(x.original_keys, d) if hasattr(x, 'original_keys') else ''
        return f'{t.__name__}[{", ".join(show(i, d) for i in x)}]{extra}'
    if isinstance(x, dict):
        extra = f' factory={x.default_factory!r}' if isinstance(x, defaultdict) else ''
        return t.__name__ + '{' + ', '.join(f'{show(k, d)}: {show(v, d)}' for k, v in x.items()) + '}' + extra
    if isinstance(x, BaseException): return f'{t.__name__}: {x}'
    if isinstance(x, types.FunctionType): return f'<function {x.__qualname__}>'
    return repr(x)

def plain_signature(f):
    """Names, kinds and defaults of the parameters, without annotations."""
    return [(p.name, p.kind.name, repr(p.default)) for p in inspect.signature(f).parameters.values()]

def attempt(f, *args, **kwargs):
    """Result or exception of a call, as a value."""
    try: return show(f(*args, **kwargs))
    except Exception as e: return f'{type(e).__module__}.{type(e).__name__}: {e}'
'''

WORKER = r"""
import json, os, re, sys
channel = os.fdopen(os.dup(1), 'w', encoding='utf-8')
os.dup2(2, 1)
names = {'__name__': 'programs'}
exec(compile(sys.stdin.readline() and json.loads(PRELUDE), '<prelude>', 'exec'), names)
names['__name__'] = 'programs'
def run(code):
    scope = dict(names)
    try:
        return {'result': names['show'](eval(compile(code, '<program>', 'eval'), scope))}
    except BaseException as error:
        return {'error': f'{type(error).__module__}.{type(error).__name__}', 'message': str(error)}
print(json.dumps({'ready': names['optree'].__version__, 'file': names['optree'].__file__}),
      file=channel, flush=True)
for line in sys.stdin:
    task = json.loads(line)
    answer = run(task['code'])
    answer['id'] = task['id']
    print(json.dumps(answer), file=channel, flush=True)
"""


@dataclasses.dataclass
class Side:
    """One optree: an interpreter and the folders to put on its path."""

    name: str
    python: str
    path: str | None

    def start(self) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment["PYTHONHASHSEED"] = "0"
        if self.path:
            environment["PYTHONPATH"] = self.path
        code = WORKER.replace("PRELUDE", repr(json.dumps(PRELUDE)))
        process = subprocess.Popen(
            [self.python, '-X', 'faulthandler', '-c', code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, encoding='utf-8', env=environment,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return process

    def describe(self) -> str:
        process = self.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
        process.wait()
        if not line:
            sys.exit(f"{self.name}: {self.python} cannot import optree and run the prelude")
        ready = json.loads(line)
        return f"{self.name}: optree {ready['ready']} ({ready['file']})"

    def run(self, programs: list[str], timeout: float) -> list[str]:
        """Return the canonical outcome of each program, restarting the worker when it dies."""
        outcomes: list[str] = []
        while len(outcomes) < len(programs):
            process = self.start()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()
            first = len(outcomes)
            lines = "".join(
                json.dumps({"id": i, "code": code}) + "\n"
                for i, code in enumerate(programs[first:], first)
            )
            feeder = threading.Thread(target=self._feed, args=(process, lines), daemon=True)
            feeder.start()
            while len(outcomes) < len(programs):
                watchdog = threading.Timer(timeout, process.kill)
                watchdog.start()
                line = process.stdout.readline()
                watchdog.cancel()
                if not line:
                    outcomes.append(f"worker died: exit status {process.wait()}")
                    break
                answer = json.loads(line)
                assert answer["id"] == len(outcomes)
                outcomes.append(canonical(answer))
            process.kill()
            process.wait()
            feeder.join()
        return outcomes

    @staticmethod
    def _feed(process: subprocess.Popen[str], lines: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(lines)
            process.stdin.close()
        except (BrokenPipeError, ValueError):
            pass


ADDRESS = re.compile(r"0x[0-9a-fA-F]{4,}")


def canonical(answer: dict[str, Any]) -> str:
    text = answer["result"] if "result" in answer else f"{answer['error']}: {answer['message']}"
    return ADDRESS.sub("0x", text)


# Deliberate differences ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Deliberate:
    """An intended difference, recognised by the program and both outcomes."""

    reason: str
    matches: Callable[[str, str, str], bool]


def _argument_text(code: str, ours: str, theirs: str) -> bool:
    return re.search(
        "incompatible (function|constructor) arguments", theirs
    ) is not None and kind_of(ours).lstrip("'\"") == kind_of(theirs).lstrip("'\"")


def _longer_message(code: str, ours: str, theirs: str) -> bool:
    # Same error and text, followed by the place in the tree.
    return ours.startswith(theirs) and kind_of(theirs).endswith("Error")


def kind_of(outcome: str) -> str:
    return outcome.split(":", 1)[0]


MATCHED_PICKLE_TEXTS = (
    "the number of fields does not match the arity",
    "is a built-in type",
    "Unknown custom type",
)


def _is_rejection(outcome: str) -> bool:
    return kind_of(outcome) in {f"builtins.{name}Error" for name in ("Runtime", "Type", "Value")}


DELIBERATE: tuple[Deliberate, ...] = (
    Deliberate(
        "TypeErrors about arguments name the argument instead of a C++ overload table",
        _argument_text,
    ),
    Deliberate("errors about mismatches also name the place in the tree", _longer_message),
    Deliberate(
        "an OrderedDict is read in its own order, also after move_to_end",
        lambda code, ours, theirs: "move_to_end" in code or "moved(" in code,
    ),
    Deliberate(
        "the result of a predicate is tested for truth, and an exception from that test propagates",
        lambda code, ours, theirs: "Unable to cast Python instance" in theirs,
    ),
    Deliberate(
        "StopIteration raised by the mapped function propagates",
        lambda code, ours, theirs: "StopIteration" in ours and "StopIteration" not in theirs,
    ),
    Deliberate(
        "the reason given for a malformed pickle has another wording, except for the two texts that "
        "clients match",
        lambda code, ours, theirs: (
            "__setstate__(" in code
            and "RuntimeError: Malformed pickled PyTreeSpec: " in ours
            and _is_rejection(theirs)
            and not any(text in theirs and text not in ours for text in MATCHED_PICKLE_TEXTS)
        ),
    ),
    Deliberate(
        "a custom type that is not a class makes the pickle malformed instead of unknown",
        lambda code, ours, theirs: "custom node is not a class" in ours and "__setstate__" in code,
    ),
    Deliberate(
        "non-iterables raise the error of CPython",
        lambda code, ours, theirs: (
            "is not an instance of 'iterable'" in theirs and "object is not iterable" in ours
        ),
    ),
    Deliberate(
        "structures whose state was never set raise instead of crashing",
        lambda code, ours, theirs: "__new__(PyTreeSpec)" in code and "worker died" in theirs,
    ),
    Deliberate(
        "a structure loaded from an old pickle writes its current key order",
        lambda code, ours, theirs: (
            "__setstate__(" in code
            and re.sub(r"dict\{'a': None\}\]\], ", "None]], ", ours) == theirs
        ),
    ),
    Deliberate(
        "missing and extra keys that cannot be sorted are listed in their order, not in that of a set",
        lambda code, ours, theirs: (
            "U(" in code
            and "dictionary key mismatch" in ours
            and sorted(re.findall(r"[\w.]+", ours)) == sorted(re.findall(r"[\w.]+", theirs))
        ),
    ),
)


# Programs -----------------------------------------------------------------------------------------

PUBLIC_FUNCTIONS = [
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_flatten_with_accessor",
    "tree_unflatten",
    "tree_iter",
    "tree_leaves",
    "tree_structure",
    "tree_paths",
    "tree_accessors",
    "tree_is_leaf",
    "all_leaves",
    "tree_map",
    "tree_map_",
    "tree_map_with_path",
    "tree_map_with_path_",
    "tree_map_with_accessor",
    "tree_map_with_accessor_",
    "tree_replace_nones",
    "tree_partition",
    "tree_transpose",
    "tree_transpose_map",
    "tree_transpose_map_with_path",
    "tree_transpose_map_with_accessor",
    "tree_broadcast_prefix",
    "broadcast_prefix",
    "tree_broadcast_common",
    "broadcast_common",
    "tree_broadcast_map",
    "tree_broadcast_map_with_path",
    "tree_broadcast_map_with_accessor",
    "tree_reduce",
    "tree_sum",
    "tree_max",
    "tree_min",
    "tree_all",
    "tree_any",
    "tree_flatten_one_level",
    "prefix_errors",
    "treespec_paths",
    "treespec_accessors",
    "treespec_entries",
    "treespec_entry",
    "treespec_children",
    "treespec_child",
    "treespec_one_level",
    "treespec_transform",
    "treespec_is_leaf",
    "treespec_is_strict_leaf",
    "treespec_is_one_level",
    "treespec_is_prefix",
    "treespec_is_suffix",
    "treespec_leaf",
    "treespec_none",
    "treespec_tuple",
    "treespec_list",
    "treespec_dict",
    "treespec_namedtuple",
    "treespec_ordereddict",
    "treespec_defaultdict",
    "treespec_deque",
    "treespec_structseq",
    "treespec_frozendict",
    "treespec_from_collection",
    "register_pytree_node",
    "register_pytree_node_class",
    "unregister_pytree_node",
    "dict_insertion_ordered",
    "is_namedtuple",
    "is_namedtuple_class",
    "is_namedtuple_instance",
    "namedtuple_fields",
    "is_structseq",
    "is_structseq_class",
    "is_structseq_instance",
    "structseq_fields",
]

PRIVATE_NAMES = [
    "AutoEntry",
    "BUILDTIME_METADATA",
    "DataclassEntry",
    "FlattenedEntry",
    "GLIBCXX_USE_CXX11_ABI",
    "GetAttrEntry",
    "GetItemEntry",
    "InternalError",
    "MAX_RECURSION_DEPTH",
    "MSVC_DISABLE_CONSTEXPR_MUTEX_CONSTRUCTOR",
    "MappingEntry",
    "NamedTupleEntry",
    "OPTREE_HAS_FROZENDICT",
    "OPTREE_HAS_READ_WRITE_LOCK",
    "OPTREE_HAS_SUBINTERPRETER_SUPPORT",
    "PYBIND11_HAS_INTERNALS_WITH_SMART_HOLDER_SUPPORT",
    "PYBIND11_HAS_NATIVE_ENUM",
    "PYBIND11_HAS_SUBINTERPRETER_SUPPORT",
    "PYBIND11_INTERNALS_ID",
    "PYBIND11_INTERNALS_VERSION",
    "PYBIND11_MODULE_LOCAL_ID",
    "PYBIND11_VERSION_HEX",
    "PY_VERSION",
    "PY_VERSION_HEX",
    "PyStructSequence_UnnamedField",
    "PyTreeAccessor",
    "PyTreeEntry",
    "PyTreeIter",
    "PyTreeKind",
    "PyTreeSpec",
    "Py_DEBUG",
    "Py_GIL_DISABLED",
    "Py_TPFLAGS_BASETYPE",
    "SequenceEntry",
    "StructSequenceEntry",
    "flatten",
    "flatten_with_path",
    "get_alive_interpreter_ids",
    "get_current_interpreter_id",
    "get_main_interpreter_id",
    "get_num_interpreters_alive",
    "get_num_interpreters_seen",
    "get_registry_size",
    "is_current_interpreter_main",
    "is_dict_insertion_ordered",
    "is_leaf",
    "is_namedtuple",
    "is_namedtuple_class",
    "is_namedtuple_instance",
    "is_structseq",
    "is_structseq_class",
    "is_structseq_instance",
    "make_from_collection",
    "make_leaf",
    "make_none",
    "namedtuple_fields",
    "register_node",
    "set_dict_insertion_ordered",
    "structseq_fields",
    "unregister_node",
]

TABLE: tuple[str, ...] = (
    'sorted(set(dir(optree)) & set(optree.__all__)) == sorted(optree.__all__)',
    'optree.__all__[:105]',
    'optree.pytree.__all__',
    'optree.treespec.__all__',
    'optree.accessors.__all__',
    'optree.registry.__all__',
    'optree.typing.__all__',
    'optree.ops.__all__',
    'optree.dataclasses.__all__',
    'optree.functools.__all__',
    '[(k.name, k.value) for k in PyTreeKind], PyTreeKind.NUM_KINDS',
    'optree._C.__doc__',
    *(f'hasattr(optree._C, {n!r})' for n in PRIVATE_NAMES),
    'sorted(n for n in dir(optree.PyTreeSpec) if not n.startswith("_"))',
    'sorted(n for n in optree._C.BUILDTIME_METADATA)',
    'optree.MAX_RECURSION_DEPTH, optree.NONE_IS_LEAF, optree.NONE_IS_NODE',
    'optree._C.get_registry_size("ns"), optree._C.get_registry_size("other")',
    'len(optree.registry._NODETYPE_REGISTRY)',
    *(f'[plain_signature(optree.{n})] if isinstance(optree.{n}, (types.FunctionType, types.BuiltinFunctionType)) else []'
      for n in PUBLIC_FUNCTIONS),
    '[(n, getattr(optree, n).__module__) for n in optree.__all__ '
    'if hasattr(getattr(optree, n), "__module__") and n != "PyTreeDef"]',
    *(f'plain_signature(optree.{n})' for n in (
        'dataclasses.field', 'dataclasses.dataclass', 'dataclasses.make_dataclass',
        'dataclasses.register_node', 'pytree.reexport', 'registry.register_pytree_node.get',
        'utils.total_order_sorted', 'utils.safe_zip', 'utils.unzip2', 'functools.partial',
        'PyTreeAccessor', 'PyTreeEntry', 'registry.PyTreeNodeRegistryEntry',
    )),
    '[repr(register_pytree_node.get(t).kind) + repr(register_pytree_node.get(t).path_entry_type) '
    'for t in (type(None), tuple, list, dict, OrderedDict, defaultdict, deque, P, '
    'collections.namedtuple, time.struct_time, C)]',
    'register_pytree_node.get(int), register_pytree_node.get(N)',
    'sorted(map(str, register_pytree_node.get(namespace="ns")))',
    'list(map(str, register_pytree_node.get()))',
    'PyTreeSpec()',
    'PyTree[int]',
    'PyTree[int, "T"]',
    'PyTree[int, 3]',
    'PyTree[PyTree[int]] == PyTree[int]',
    'PyTree()',
    'PyTreeTypeVar("T", int)',
    'PyTreeTypeVar("", int)',
    'PyTreeTypeVar(3, int)',
    'isinstance(structseq(time.struct_time, 0), optree.typing.StructSequence)',
    'optree.typing.StructSequence([1])',
    'type("S", (optree.typing.StructSequence,), {})',
    'optree.dataclasses.dataclass(int, namespace="x")',
    'optree.dataclasses.dataclass(3, namespace="x")',
    'optree.dataclasses.dataclass(type("A", (), {}), namespace=3)',
    'optree.dataclasses.dataclass(type("A", (), {}))',
    'optree.dataclasses.register_node(int, namespace="x")',
    'optree.dataclasses.field(pytree_node=True, init=False)',
    'optree.dataclasses.field(default=1, default_factory=list)',
    'optree.dataclasses.make_dataclass("A", ["x"], namespace={})',
    'tree_leaves(optree.dataclasses.make_dataclass("A", ["x", "y"], namespace="mk")(1, [2]), namespace="mk")',
    'optree.functools.partial(max, 1, [2], key=3)',
    'tree_flatten(optree.functools.partial(max, 1, [2], key=3))',
    'tree_paths(optree.functools.partial(max, 1, [2], key=3))',
    'tree_map(lambda x: x, optree.functools.partial(optree.functools.partial(max, 1), 2))',
    'optree.pytree.reexport(namespace=3)',
    'optree.pytree.reexport(namespace="x", module="")',
    'optree.pytree.reexport(namespace="x", module="a b")',
    'optree.pytree.reexport(namespace="x", module="os")',
    'optree.pytree.nope',
    'optree.nope',
    'optree.integrations.nope',
    'sorted(n for n in dir(optree.integrations) if not n.startswith("__"))',
    *(f'prefix_errors({a}, {b})[0]("tree")' for a, b in [
        ('(1, 2)', '[1, 2]'), ('[1]', '[1, 2]'), ('{"a": 1}', '{"b": 1}'), ('[{"a": [1]}]', '[{"a": 3}]'),
        ('{"a": 1, "b": 2}', '{"a": 1}'), ('C(1, meta=1)', 'C(1, meta=2)'), ('P(1, 2)', 'Q(1, 2)'),
        ('P(1, [2])', 'P(1, (2,))'), ('None', '1'), ('[None]', '[[1]]'), ('deque([1])', 'deque([1, 2])'),
        ('P(1, 2)', '(1, 2)'), ('structseq(time.struct_time, 0)', '[1]'), ('M(1, 2)', 'M(1)'),
        ('OrderedDict(a=1)', '{"b": 1}'), ('defaultdict(int, a=1)', '{"b": 1}'), ('C(1, 2)', 'M(1, 2)'),
    ]),
    *(f'{f}({a})' for f in (
        'is_namedtuple', 'is_namedtuple_class', 'is_namedtuple_instance', 'namedtuple_fields',
        'is_structseq', 'is_structseq_class', 'is_structseq_instance', 'structseq_fields',
        'optree._C.is_namedtuple', 'optree._C.namedtuple_fields', 'optree._C.structseq_fields',
        'optree._C.is_structseq_class',
    ) for a in ('P', 'P(1, 2)', 'P3', 'tuple', '()', 'time.struct_time', 'structseq(os.stat_result, 0)',
                'os.stat_result', 'int', '1', 'None', 'E', 'optree.typing.StructSequence', '')),
    *(f'register_pytree_node({a})' for a in (
        '3, len, len, namespace="x"', 'list, len, len, namespace="x"', 'list, len, len, namespace=GLOBAL',
        'U, len, len, namespace=""', 'U, len, len, namespace=3', 'U, 3, len, namespace="x"',
        'U, len, 3, namespace="x"', 'U, len, len', 'U, len, len, path_entry_type=3, namespace="x"',
        'U, len, len, path_entry_type=int, namespace="x"', 'C, len, len, namespace="ns"',
        'C, len, len, namespace=GLOBAL', 'P, len, len, namespace="x"', 'time.struct_time, len, len, namespace="x"',
        'type(None), len, len, namespace="x"', 'OrderedDict, len, len, namespace="x"',
    )),
    *(f'unregister_pytree_node({a})' for a in (
        '3, namespace="x"', 'list, namespace="x"', 'list, namespace=GLOBAL', 'U, namespace=""',
        'U, namespace=3', 'U', 'U, namespace="x"', 'U, namespace=GLOBAL', 'P, namespace="x"', 'P, namespace=GLOBAL',
        'time.struct_time, namespace="x"', 'N, namespace=GLOBAL', 'C, namespace="other"',
    )),
    *(f'register_pytree_node_class({a})' for a in (
        '3, namespace="x"', 'U, namespace="x"', 'U', '"x", namespace="y"', '""', 'U, namespace=""',
        'U, namespace=3', 'U, path_entry_type=3, namespace="x"', 'list, namespace="x"',
        'type("A", (), {"__tree_flatten__": 1}), namespace="x"',
        'type("A", (), {"__tree_flatten__": len}), namespace="x"',
        'type("A", (), {"tree_flatten": len}), namespace="x"',
    )),
    *(f'register_pytree_node.get({a})' for a in ('3', 'int, namespace=3', '"x"', 'namespace=None')),
    'repr(unregister_pytree_node(N, namespace="ns").path_entry_type), '
    'register_pytree_node(N, lambda n: (iter(n.items), n.meta, [f"e{i}" for i in range(len(n.items))]), '
    'rebuild(N), path_entry_type=GetAttrEntry, namespace="ns")',
    *(f'attempt({cls}, {args})' for cls in (
        'PyTreeEntry', 'GetItemEntry', 'GetAttrEntry', 'FlattenedEntry', 'AutoEntry', 'SequenceEntry',
        'MappingEntry', 'NamedTupleEntry', 'StructSequenceEntry', 'DataclassEntry',
    ) for args in (
        '0, list, PyTreeKind.LIST', '"a", dict, PyTreeKind.DICT', '0, P, PyTreeKind.NAMEDTUPLE',
        '0, P, PyTreeKind.CUSTOM', '7, os.stat_result, PyTreeKind.STRUCTSEQUENCE', '0, int, PyTreeKind.LEAF',
        '0, type(None), PyTreeKind.NONE', '"a.b c", U, PyTreeKind.CUSTOM', '1',
    )),
    *(f'attempt(lambda e: (e.codify(), e.codify("n"), e([5, 6])), {cls}({args}))' for cls in (
        'PyTreeEntry', 'GetItemEntry', 'GetAttrEntry', 'FlattenedEntry', 'AutoEntry', 'SequenceEntry',
        'MappingEntry', 'NamedTupleEntry', 'StructSequenceEntry',
    ) for args in ('0, P, PyTreeKind.CUSTOM', '"x", dict, PyTreeKind.CUSTOM', '1, os.stat_result, PyTreeKind.CUSTOM')),
    'PyTreeAccessor([1])',
    'PyTreeAccessor() + 1',
    'PyTreeAccessor() * "a"',
    'PyTreeAccessor() + ()',
    'tree_accessors([1])[0] + tree_accessors({"a": 2})[0]',
    'tree_accessors([1])[0][0] + tree_accessors({"a": 2})[0][0]',
    'tree_accessors([[1]])[0][0:1]',
    'tree_accessors([1])[0] * 3',
    'treespec_frozendict()',
    'treespec_from_collection(3)',
    'treespec_list([3])',
    'attempt(operator.lt, tree_structure(1), 3)',
    'PyTreeKind(12)',
    'list(optree._C.PyTreeIter([1, [2]]))',
    'attempt(optree._C.PyTreeIter)',
    'attempt(pickle.dumps, tree_iter([1]))',
    'tree_map(lambda x: next(iter(())), [1, 2])',
    'tree_map_(lambda x: (_ for _ in ()).throw(StopIteration), [1, 2])',
    *(f'tree_leaves([1, 2], is_leaf=lambda x: {v})' for v in
      ('1', '0', 'None', '""', '"a"', '[]', '[0]', 'object()', '1.5')),
    *(f'{f}(tree_structure([1, {{"b": 2, "a": (3,)}}]), {i})' for f in ('treespec_entry', 'treespec_child')
      for i in ('0', '1', '-1', '2', '-3', 'True', '1.0', '"0"', 'None', '10**30', '-(10**30)')),
    *(f'optree.utils.total_order_sorted({a})' for a in (
        '[3, 1, 2]', '["b", 1, "a", None]', '[1, "a"], reverse=True', '[(2, 1), (1, 2)], key=lambda t: t[1]',
        '[U(2), U(1)]', '[U(2), 1, "x"]', '[1j, 2j]', '3',
    )),
    'list(optree.utils.safe_zip([1], [1, 2]))',
    'list(optree.utils.safe_zip())',
    'optree.utils.unzip2([(1, 2), (3, 4)])',
    'optree.utils.unzip2([(1, 2, 3)])',
    'optree.registry.DictMetaData("ab", original_keys=["a"])',
    'optree.registry.DictMetaData("ab", original_keys=["a", "c"])',
    'optree.registry.DictMetaData("ab", original_keys=["a", "c"], check_keys_consistency=False)',
    'optree.registry.DictMetaData("ba", original_keys=["a", "b"])',
    'copy.deepcopy(optree.registry.DictMetaData("ba", original_keys=["a", "b"]))',
    'pickle.loads(pickle.dumps(optree.registry.DictMetaData("ba", original_keys=["a", "b"])))',
    'tree_flatten(nest(1000))[1].num_nodes',
    'tree_flatten(nest(1001))',
    'tree_flatten_with_path(nest(1001))',
    'list(tree_iter(nest(1001)))',
    'tree_structure(nest(999)).compose(tree_structure(nest(999))).paths()',
    'tree_structure(nest(999)).compose(tree_structure(nest(999))).accessors()',
)  # fmt: skip

STATES = (
    '()', '3', '((), False, "")', '(((1,0,None,None,None,1,1,None),), False)',
    *(f'({nodes}, {none}, {ns!r})' for nodes in (
        '((1,0,None,None,None,1,1,None),)', '((1,0,None,None,None,1,1),)', '((1,0,None,None,None,2,1,None),)',
        '((1,0,1,None,None,1,1,None),)', '((1,1,None,None,None,1,1,None),)', '((99,0,None,None,None,1,1,None),)',
        '((-1,0,None,None,None,1,1,None),)', '((2,0,None,None,None,0,1,None),)', '((2,0,None,None,None,1,1,None),)',
        *(f'((1,0,None,None,None,1,1,None),({node}))' for node in (
            '4,1,None,None,None,1,2,None', '4,1,None,None,None,1,2', '4,1,0,None,None,1,2,None',
            '4,1,None,(0,),None,1,2,None', '4,1,None,None,list,1,2,None', '4,2,None,None,None,1,2,None',
            '4,0,None,None,None,1,2,None', '4,-1,None,None,None,1,2,None', '4,1,None,None,None,1,2,{}',
            '4,1,None,None,None,2,2,None', '4,1,None,None,None,1,3,None', '3,1,None,None,None,1,2,None',
            '5,1,["a"],None,None,1,2,{"a":None}', '5,1,["a"],None,None,1,2', '5,1,["a"],None,None,1,2,None',
            '5,1,[],None,None,1,2,{}', '5,1,["a","b"],None,None,1,2,{"a":None}', '5,1,["a"],None,None,1,2,{"b":None}',
            '5,1,["a"],None,None,1,2,{"a":None,"b":None}', '5,1,None,None,None,1,2,{"a":None}',
            '5,1,("a",),None,None,1,2,{"a":None}', '5,1,["a"],None,None,1,2,["a"]', '5,1,[[]],None,None,1,2,{"a":None}',
            '7,1,["a"],None,None,1,2,None', '7,1,["a"],None,None,1,2,{"a":None}', '7,1,["a","a"],None,None,1,2,None',
            '8,1,(int,["a"]),None,None,1,2,{"a":None}', '8,1,[int,["a"]],None,None,1,2,{"a":None}',
            '8,1,(3,["a"]),None,None,1,2,{"a":None}', '8,1,(None,["a"]),None,None,1,2,{"a":None}',
            '8,1,["a"],None,None,1,2,{"a":None}', '8,1,(int,),None,None,1,2,{"a":None}',
            '8,1,(int,["a"],1),None,None,1,2,{"a":None}', '9,1,None,None,None,1,2,None', '9,1,3,None,None,1,2,None',
            '9,1,0,None,None,1,2,None', '9,1,-1,None,None,1,2,None', '9,1,"x",None,None,1,2,None', '9,1,True,None,None,1,2,None',
            '6,1,P,None,None,1,2,None', '6,1,E,None,None,1,2,None', '6,1,int,None,None,1,2,None', '6,1,None,None,None,1,2,None',
            '10,1,time.struct_time,None,None,1,2,None', '10,1,P,None,None,1,2,None', '0,1,None,None,C,1,2,None',
            '0,1,"m",("e",),C,1,2,None', '0,1,None,("e","f"),C,1,2,None', '0,1,None,["e"],C,1,2,None', '0,1,None,3,C,1,2,None',
            '0,1,None,None,list,1,2,None', '0,1,None,None,U,1,2,None', '0,1,None,None,None,1,2,None', '0,1,None,None,3,1,2,None',
            '0,1,None,None,P,1,2,None', '0,1,None,None,N,1,2,None', '0,1,None,None,C,1,2,{}', '11,1,["a"],None,None,1,2,{"a":None}',
        )),
    ) for none in (False, True) for ns in ('', 'ns')),
)  # fmt: skip

ATOMS = ('1', '2', '"s"', 'None', '3.5', '()', '[]', '{}', 'OrderedDict()', 'deque()', 'E()', 'L([1])',
         'D(a=1)', 'True', 'deque(maxlen=2)', 'defaultdict(None)', 'C()', 'Counter("aab")', 'frozenset()')  # fmt: skip
KEYS = (('"a"', '"b"', '"c"'), ('3', '1', '2'), ('"b"', '1', 'None'), ('(1, 2)', '"z"', '2.5'),
        ('U(1)', 'U(2)', '"k"'), ('U(2)', 'U(1)'), ('"é"', '"e"', '"Z"'), ('True', '0', '2.5'),
        tuple(f'"k{i}"' for i in range(20)), tuple(str(i) for i in range(18)))  # fmt: skip


class Generator:
    """Random programs from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mapping(self, depth: int) -> str:
        keys = list(self.random.choice(KEYS))
        self.random.shuffle(keys)
        if len(keys) > 16:  # a wide dictionary stays shallow
            depth = 1
        else:
            keys = keys[: self.random.randint(1, len(keys))]
        return "{" + ", ".join(f"{key}: {self.tree(depth - 1)}" for key in keys) + "}"

    def items(self, depth: int, low: int = 0) -> str:
        count = self.random.randint(low, 3)
        return ", ".join(self.tree(depth - 1) for _ in range(count))

    def tree(self, depth: int | None = None) -> str:
        if depth is None:
            depth = self.random.choice((0, 1, 1, 2, 2, 3))
        if depth <= 0 or self.random.random() < 0.12:
            return self.random.choice(ATOMS)
        kind = self.random.randrange(16)
        if kind in (0, 1):
            return f"[{self.items(depth)}]"
        if kind in (2, 3):
            items = self.items(depth)
            return f"({items},)" if items else "()"
        if kind in (4, 5, 6):
            return self.mapping(depth)
        if kind == 7:
            return f"OrderedDict({self.mapping(depth)})"
        if kind == 8:
            return (
                f"defaultdict({self.random.choice(('int', 'list', 'None'))}, {self.mapping(depth)})"
            )
        if kind == 9:
            return f"deque([{self.items(depth)}], maxlen={self.random.choice(('None', '3', '5'))})"
        if kind == 10:
            return f"{self.random.choice('PPQ')}({self.tree(depth - 1)}, {self.tree(depth - 1)})"
        if kind == 11:
            return f"P3({self.tree(depth - 1)}, {self.tree(depth - 1)})"
        if kind == 12:
            return self.random.choice(
                ("structseq(time.struct_time, 5)", "structseq(os.stat_result, 3)", "nest(3)")
            )
        cls = "CNM"[kind - 13]
        items = self.items(depth)
        separator = ", " if items else ""
        return f"{cls}({items}{separator}meta={self.random.choice(('None', '1', '[2]'))})"

    def changed(self, tree: str) -> str:
        """Return a variant of ``tree``: with a subtree replaced, or a kind or key changed."""
        swaps = [
            ('[1', '[1, 1'), ('"a"', '"q"'), ('P(', 'Q('), ('[]', '()'), ('1', '[1, 2]'), ('2', '(2,)'),
            ('None', '1'), ('C(', 'M('), ('OrderedDict(', 'dict('), ('defaultdict(int, ', 'OrderedDict('),
            ('meta=1', 'meta=2'), ('maxlen=3', 'maxlen=None'), ('"s"', '{"s": [0]}'), ('3.5', 'None'),
            ('deque(', 'list('), ('()', '(1,)'), ('{}', '{"a": 1}'), ('P3(', 'P('), ('3', '[None]'),
        ]  # fmt: skip
        self.random.shuffle(swaps)
        for old, new in swaps:
            if old in tree and self.random.random() < 0.8:
                places = [m.start() for m in re.finditer(re.escape(old), tree)]
                place = self.random.choice(places)
                candidate = tree[:place] + new + tree[place + len(old) :]
                try:
                    compile(candidate, "", "eval")
                except SyntaxError:
                    continue
                if "maxlen=" not in candidate or "list(" not in candidate:
                    return candidate
        return tree

    def options(self) -> str:
        parts = []
        if self.random.random() < 0.3:
            parts.append("none_is_leaf=True")
        if self.random.random() < 0.45:
            parts.append(f"namespace={self.random.choice(('ns', 'ns', 'other'))!r}")
        return "".join(f", {part}" for part in parts)

    def predicate(self) -> str:
        return self.random.choice((
            '', '', '', ', is_leaf=lambda x: isinstance(x, tuple)', ', is_leaf=lambda x: x is None',
            ', is_leaf=lambda x: type(x) is list', ', is_leaf=lambda x: isinstance(x, dict) and len(x) > 1',
            ', is_leaf=lambda x: 1 // 0', ', is_leaf=lambda x: isinstance(x, Node)',
        ))  # fmt: skip

    def program(self) -> str:
        r = self.random
        t, o, p = self.tree(), self.options(), self.predicate()
        u = self.changed(t) if r.random() < 0.75 else self.tree()
        s = f"tree_structure({t}{p}{o})"
        s2 = f"tree_structure({u}{o})"
        n = r.randint(0, 6)
        pattern = r.choice((
            f'tree_flatten({t}{p}{o})', f'tree_flatten_with_path({t}{p}{o})', f'tree_flatten_with_accessor({t}{p}{o})',
            f'list(tree_iter({t}{p}{o}))', f'tree_leaves({t}{p}{o})', s, f'tree_paths({t}{p}{o})',
            f'tree_map(lambda x: ("m", x), {t}{p}{o})', f'tree_map(lambda x, y: (x, y), {t}, {u}{p}{o})',
            f'tree_map_with_path(lambda q, x, y: (q, y), {t}, {u}{p}{o})',
            f'tree_map_with_accessor(lambda q, x: q.codify("t"), {t}{p}{o})', f'tree_map_(lambda x, y: 0, {t}, {u}{p}{o})',
            f'tree_map(lambda x, y, z: (x, y, z), {t}, {u}, {t}{o})',
            f'tree_replace_nones("none", {t})', f'tree_partition(lambda x: isinstance(x, int), {t}{p}{o})',
            f'tree_broadcast_prefix({t}, {u}{p}{o})', f'broadcast_prefix({t}, {u}{p}{o})',
            f'tree_broadcast_common({t}, {u}{p}{o})', f'broadcast_common({t}, {u}{p}{o})',
            f'tree_broadcast_map(lambda x, y: (x, y), {t}, {u}{p}{o})',
            f'tree_broadcast_map(lambda x, y, z: (x, y, z), {t}, {u}, {self.changed(u)}{o})',
            f'tree_broadcast_map_with_path(lambda q, x, y: (q, x), {t}, {u}{o})',
            f'[e("t") for e in prefix_errors({t}, {u}{p}{o})]',
            f'tree_transpose_map(lambda x: [x, {{"k": x}}], {t}{p}{o})',
            f'tree_transpose_map(lambda x: {self.tree(1)}, {t}{p}{o})',
            f'tree_transpose({s}, {s2}, tree_map(lambda x: {u}, {t}{p}{o}))',
            f'tree_transpose({s}, tree_structure([1, (2,)]{o}), {s}.compose(tree_structure([1, (2,)]{o})).unflatten(range({s}.num_leaves * 2)))',
            f'tree_reduce(lambda a, b: (a, b), {t}{o})', f'attempt(tree_sum, {t})', f'attempt(tree_max, {t})',
            f'attempt(tree_all, {t}{o}), attempt(tree_any, {t}{o})',
            f'attempt(tree_flatten_one_level, {t}{p}{o})', f'tree_flatten_one_level({t}{o}).type, tree_flatten_one_level({t}{o}).path_entry_type',
            f'(lambda l: l.unflatten_func(l.metadata, tuple(l.children)))(tree_flatten_one_level({t}{o}))',
            f'tree_is_leaf({t}{p}{o})', f'all_leaves([{t}, {u}]{p}{o})',
            f'{s}.unflatten(range({n}))', f'{s}.unflatten(iter(range({n})))', f'{s}.unflatten(range({s}.num_leaves))',
            f'{s}.traverse(range({s}.num_leaves), lambda x: ("n", x), lambda x: ("l", x))', f'{s}.traverse(range({n}))',
            f'{s}.walk(range({s}.num_leaves), lambda *a: a, str)', f'{s}.walk(range({n}), lambda *a: a)', f'{s}.walk(range({s}.num_leaves))',
            f'{s}.flatten_up_to({u})', f'{s}.flatten_up_to({t})', f'{s}.broadcast_to_common_suffix({s2})', f'{s}.compose({s2})',
            f'{s}.transform(None, lambda x: {s2})', f'{s}.transform(lambda x: x)',
            f'{s}.transform(lambda x: treespec_tuple(x.children(){o}))', f'{s}.transform(lambda x: {s2}, None)',
            f'{s}.transform(lambda x: treespec_ordereddict(zip(x.entries(), x.children()){o}))',
            f'{s}.paths(), {s}.entries(), {s}.accessors()', f'{s}.children(), {s}.one_level()',
            f'{s}.num_leaves, {s}.num_nodes, {s}.num_children, {s}.none_is_leaf, {s}.namespace, {s}.type, {s}.kind',
            f'{s}.is_leaf(), {s}.is_leaf(strict=False), {s}.is_one_level(), len({s})',
            f'{s} == {s2}, {s} != {s2}, {s} <= {s2}, {s} < {s2}, {s} >= {s2}, {s} > {s2}, ({s} == {s2}) <= (hash({s}) == hash({s2}))',
            f'{s}.is_prefix({s2}), {s}.is_prefix({s2}, strict=True), {s}.is_suffix({s2}), {s}.is_suffix({s2}, strict=True)',
            f'pickle.loads(pickle.dumps({s}, {n % 6}))', f'copy.deepcopy({s})', f'copy.copy({s})', f'{s}.__reduce__()',
            f'{s}.entry({n - 3})', f'{s}.child({n - 3})',
            f'treespec_from_collection(tree_map(lambda x: treespec_leaf(none_is_leaf={"none_is_leaf" in o}), {t}{o}){o})',
            f'treespec_list([{s}, {s2}]{o})', f'treespec_dict({{"b": {s}, 1: {s2}}}{o})', f'treespec_deque([{s}], 3{o})',
            f'treespec_tuple([{s}, {s2}])', f'treespec_from_collection(C({s}, {s2}, meta=1){o})', f'treespec_namedtuple(P({s}, {s2}){o})',
            f'treespec_defaultdict(int, {{3: {s}, "b": {s2}}}{o})', f'treespec_ordereddict(b={s}, a={s2}{o})',
            f'(lambda c: [c.__enter__(), {s}, tree_leaves({t}{o}), list(tree_iter({t}{o})), attempt(tree_flatten_one_level, {t}{o}), '
            f'c.__exit__(None, None, None)])(dict_insertion_ordered(True, namespace={r.choice(("GLOBAL", chr(34) + "ns" + chr(34)))}))',
            f'(lambda c, f: [c.__enter__(), f(), c.__exit__(None, None, None), f()])'
            f'(dict_insertion_ordered(True, namespace="ns"), lambda: ({s} == {s2}, {s} <= {s2}, attempt(lambda: treespec_dict({{"b": {s}, "a": {s2}}}{o}))))',
            f'attempt(tree_map, lambda x: x, [{t}, X({u}, meta={r.choice(("raise", "one", "four", "none", "int", "entries", "unflatten"))!r})]{o})',
        ))  # fmt: skip
        return pattern  # noqa: RET504

    def programs(self, count: int) -> Iterator[str]:
        for _ in range(count):
            yield self.program()


def bare_programs() -> Iterator[str]:
    for state in STATES:
        yield f"(lambda s: (s.__setstate__({state}), s)[1])(PyTreeSpec.__new__(PyTreeSpec))"


def pickle_programs(generator: Generator, count: int) -> list[str]:
    return [
        f"base64.b64encode(pickle.dumps(tree_structure({generator.tree()}{generator.options()}), "
        f"{i % 6})).decode()"
        for i in range(count)
    ]


# Comparison ---------------------------------------------------------------------------------------


def compare(
    programs: list[str], ours: list[str], theirs: list[str], limit: int, verbose: bool
) -> int:
    allowed: dict[str, int] = {}
    differences = 0
    for code, mine, other in zip(programs, ours, theirs):
        if mine == other:
            continue
        for deliberate in DELIBERATE:
            if deliberate.matches(code, mine, other):
                allowed[deliberate.reason] = allowed.get(deliberate.reason, 0) + 1
                if verbose:
                    print(f"allowed: {code}\n  ours:      {mine}\n  published: {other}")
                break
        else:
            differences += 1
            if differences <= limit:
                print(f"program:   {code}\n  ours:      {mine}\n  published: {other}\n")
    for reason, count in sorted(allowed.items()):
        print(f"deliberate: {count:5d} x {reason}")
    return differences


def exchange_pickles(
    sides: tuple[Side, Side], generator: Generator, count: int, timeout: float
) -> int:
    programs = pickle_programs(generator, count)
    differences = 0
    for writer, reader in (sides, sides[::-1]):
        written = writer.run(programs, timeout)
        loads, expected = [], []
        for code, text in zip(programs, written):
            payload = text.strip("'")
            try:
                base64.b64decode(payload, validate=True)
            except ValueError:
                continue
            loads.append(f"pickle.loads(base64.b64decode({payload!r}))")
            expected.append(re.sub(r"^base64.*?dumps\((.*), \d\)\)\.decode\(\)$", r"\1", code))
        read = reader.run(loads, timeout)
        fresh = reader.run(expected, timeout)
        wrong = [row for row in zip(expected, read, fresh) if row[1] != row[2]]
        differences += len(wrong)
        for code, got, want in wrong[:5]:
            print(f"pickle of {code}\n  written by {writer.name}, read by {reader.name}: {got}")
            print(f"  expected: {want}\n")
        print(f'{len(loads)} pickles written by {writer.name} loaded by {reader.name}: '
              f'{len(wrong)} differ')  # fmt: skip
    return differences


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--published", required=True, help="Python that imports optree 0.20.0")
    parser.add_argument("--published-path", help="PYTHONPATH for --published")
    parser.add_argument("--ours", help="Python that imports the optree under test")
    parser.add_argument("--ours-path", help="PYTHONPATH for --ours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=6000, help="random programs")
    parser.add_argument("--limit", type=int, default=40, help="differences to print")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one program")
    parser.add_argument("--verbose", action="store_true", help="print deliberate differences too")
    arguments = parser.parse_args()

    source = root / "packages" / "optree" / "src"
    ours_path = arguments.ours_path
    if arguments.ours is None and ours_path is None and any(source.glob("optree/_C*")):
        ours_path = str(source)
    ours = Side("ours", arguments.ours or sys.executable, ours_path)
    theirs = Side("published", arguments.published, arguments.published_path)
    for side in (ours, theirs):
        print(side.describe())

    generator = Generator(arguments.seed)
    programs = [*TABLE, *bare_programs(), *generator.programs(arguments.count)]
    results: dict[str, list[str]] = {}
    threads = [
        threading.Thread(target=lambda s=side: results.update({s.name: s.run(programs, arguments.timeout)}))
        for side in (ours, theirs)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    differences = compare(
        programs, results["ours"], results["published"], arguments.limit, arguments.verbose
    )
    print(f"{len(programs)} programs: {differences} differences")
    failures = sum("Error: " in outcome for outcome in results["published"])
    print(f"({failures} of them raise in the published package)")
    differences += exchange_pickles((ours, theirs), generator, 300, arguments.timeout)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
