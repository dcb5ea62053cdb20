# SPDX-License-Identifier: Apache-2.0
"""At interpreter exit nothing is printed, nothing crashes, and containers are still nodes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-X', 'dev', '-W', 'error', *flags, '-c', textwrap.dedent(code)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def check(code: str, *output: str) -> None:
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines() == list(output)


def test_exit_with_live_objects() -> None:
    check("""
        import optree
        class Node: pass
        optree.register_pytree_node(Node, lambda n: ((1,), n), lambda m, c: Node(), namespace='x')
        kept = [optree.tree_structure([Node(), {'b': 1, Node: 2}], namespace='x')]
        iterator = optree.tree_iter([1, [2, Node()]], is_leaf=lambda x: False)
        next(iterator)
        kept.append(iterator)
        kept.append(kept)
        print('fine')
    """, 'fine')  # fmt: skip


def test_objects_kept_by_builtins() -> None:
    check("""
        import builtins, optree, sys
        builtins.kept = optree.tree_structure({'a': [1, optree.functools.partial(max, 1)]})
        sys.kept = (optree.tree_iter([1]), optree.tree_accessors([1]))
    """)


def test_finalizers_that_use_the_package() -> None:
    check("""
        import optree
        class Late:
            def __del__(self, leaves=optree.tree_leaves, spec=optree.tree_structure([0, {'a': 0}])):
                result = spec.unflatten([1, 2])
                assert result == [1, {'a': 2}], result
                repr(spec), hash(spec), spec == spec
        late = Late()
        import sys
        sys.late = Late()
    """)


@pytest.mark.differs_from_published
def test_containers_stay_containers_until_the_end() -> None:
    check("""
        import atexit
        def late():
            import optree
            assert optree.tree_leaves([1, {'a': (2,)}]) == [1, 2]
            assert optree.tree_map(str, [1]) == ['1']
            assert optree._C.get_registry_size() >= 8
            print('late', flush=True)
        atexit.register(late)
        import optree
    """, 'late')  # fmt: skip


@pytest.mark.differs_from_published
def test_exit_while_another_thread_flattens() -> None:
    for _ in range(3):
        done = run("""
            import threading, time, optree
            def work():
                while True:
                    optree.tree_map(lambda x: x, [1, {'a': (2, [3])}] * 10)
            threading.Thread(target=work, daemon=True).start()
            time.sleep(0.05)
            print('leaving', flush=True)
        """)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "leaving\n"
        assert "Traceback" not in done.stderr


# What three daemon threads do when the process ends. Nearly all of their time is spent in `busy`.
WALKS = {
    "f_node of walk": "spec.walk([1] * spec.num_leaves, busy)",
    "f_node of traverse": "spec.traverse([1] * spec.num_leaves, busy)",
    "path entries": "optree.tree_accessors([Node()] * 10, namespace='n')",
    "comparisons of keys": "optree.tree_leaves([{Key(2): 1, Key(1): 2}] * 10)",
    "hashes of keys": "hash(keyed)",
    "matches of keys": "optree.broadcast_prefix({Key(2): 1, Key(1): 2}, {Key(1): [1], Key(2): 2})",
    "matches of ordered keys": "optree.tree_leaves(OrderedDict([(Key(2), 1), (Key(1), 2)]))",
    "keys of prefixes": "keyed <= other_keyed",
    "keys of other trees": "expect(ValueError, keyed.flatten_up_to, {Key(3): 1, Key(4): 2})",
    "keys of new trees": "keyed.unflatten([1, 2])",
    "keys of pickles": "optree.PyTreeSpec.__new__(optree.PyTreeSpec).__setstate__(state)",
    "reprs in messages": "expect(ValueError, spec.flatten_up_to, Key(1))",
    "truths of answers": "optree.tree_leaves([1], is_leaf=lambda x: Truth())",
    "iterables": "spec.unflatten(Leaves())",
    "indices": "expect(IndexError, spec.child, Index())",
    "finalizers of results": "optree.tree_map_(Dying, [1, 2, 3])",
    "finalizers of unused leaves": "expect(ValueError, spec.unflatten, map(Dying, [1, 2, 3]))",
}


@pytest.mark.differs_from_published
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_exit_while_another_thread_runs_the_code_of(walk: str) -> None:
    code = """
        import threading, time, optree
        from collections import OrderedDict
        def busy(*args):
            for _ in range(200): pass
        class Key:
            def __init__(self, number): self.number = number
            def __hash__(self): busy(); return self.number
            def __eq__(self, other): busy(); return self.number == other.number
            def __lt__(self, other): busy(); return self.number < other.number
            def __repr__(self): busy(); return 'Key'
        class Truth:
            def __bool__(self): busy(); return True
        class Leaves:
            def __iter__(self): busy(); return iter(range(spec.num_leaves))
        class Index:
            def __index__(self): busy(); return 1000
        class Dying:
            def __init__(self, leaf): pass
            def __del__(self): busy()
        class Node: pass
        class Entry(optree.GetItemEntry):
            def __init__(self, *fields): busy(); super().__init__(*fields)
        optree.register_pytree_node(
            Node, lambda node: ((1, 2), None), lambda _, children: Node(),
            path_entry_type=Entry, namespace='n',
        )
        spec = optree.tree_structure([1, {'a': (2, [3])}] * 10)
        keyed = optree.tree_structure({Key(2): 1, Key(1): 2})
        other_keyed = optree.tree_structure({Key(1): 1, Key(2): 2})
        state = keyed.__getstate__()
        def expect(error, function, *args):
            try:
                function(*args)
            except error:
                return
            raise AssertionError(function)
        def work():
            while True:
                WALK
        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.05)
        print('leaving', flush=True)
    """
    for _ in range(3):
        done = run(code.replace("WALK", walk))
        assert done.returncode == 0, done.stderr
        assert done.stdout == "leaving\n"
        assert done.stderr == ""


def test_exit_through_an_exception() -> None:
    done = run("""
        import optree
        optree.tree_map(lambda x: 1 // 0, [1])
    """)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ZeroDivisionError: ")


def test_reimport_after_removal() -> None:
    check("""
        import sys, optree
        spec = optree.tree_structure([1, {'a': 2}])
        for name in [n for n in sys.modules if n == 'optree' or n.startswith('optree.')]:
            if name != 'optree._C':
                del sys.modules[name]
        assert spec.unflatten([3, 4]) == [3, {'a': 4}]
        print(repr(spec))
    """, "PyTreeSpec([*, {'a': *}])")  # fmt: skip


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_fork() -> None:
    check("""
        import os, optree, sys
        class Node: pass
        optree.register_pytree_node(Node, lambda n: ((1,), None), lambda m, c: Node(), namespace='x')
        pid = os.fork()
        if pid == 0:
            assert optree.tree_leaves([Node(), 2], namespace='x') == [1, 2]
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert optree.tree_leaves([Node(), 2], namespace='x') == [1, 2]
    """)  # noqa: E501
