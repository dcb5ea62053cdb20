# SPDX-License-Identifier: Apache-2.0
"""Several interpreters in one process, as far as this Python and this build allow.

Each test runs in a subprocess: an extension that cannot be imported twice must not take the test
session with it.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import optree

pytestmark = [
    pytest.mark.skipif(sys.implementation.name != "cpython", reason="CPython only"),
    pytest.mark.skipif(
        not optree._C.OPTREE_HAS_SUBINTERPRETER_SUPPORT, reason="built without subinterpreters"
    ),
]

PRELUDE = """
import sys, textwrap
if sys.version_info >= (3, 14):
    from concurrent import interpreters
    class Interpreter:
        def __init__(self): self.own = interpreters.create()
        def run(self, code): self.own.exec(textwrap.dedent(code))
        def close(self): self.own.close()
else:
    try:
        import _interpreters as low
    except ImportError:
        import _xxsubinterpreters as low
    class Interpreter:
        def __init__(self): self.own = low.create()
        def run(self, code):
            failure = low.run_string(self.own, textwrap.dedent(code))
            if failure is not None:
                raise RuntimeError(failure)
        def close(self): low.destroy(self.own)
PATH = repr(sys.path)
SETUP = f'import sys; sys.path[:] = {PATH}\\n'
WORK = SETUP + textwrap.dedent('''
    import optree
    from collections import namedtuple
    assert optree._C.get_registry_size() == 8, optree._C.get_registry_size()
    assert optree.tree_leaves({'b': [1], 'a': (2, None)}) == [2, 1]
    P = namedtuple('P', 'x y')
    assert optree.tree_map(str, P(1, [2])) == P('1', ['2'])
    class Node: pass
    optree.register_pytree_node(Node, lambda n: ((1,), None), lambda m, c: Node(), namespace='x')
    spec = optree.tree_structure([Node(), {'k': 1}], namespace='x')
    import pickle
    assert pickle.loads(pickle.dumps(optree.tree_structure([1]))) == optree.tree_structure([1])
    assert optree._C.get_registry_size('x') == 9
    with optree.dict_insertion_ordered(True, namespace='order'):
        assert optree.tree_leaves({'b': 1, 'a': 2}, namespace='order') == [1, 2]
''')
"""


def check(code: str) -> None:
    full = PRELUDE + textwrap.dedent(code) + "\nprint('fine')\n"
    done = subprocess.run(
        [sys.executable, '-X', 'faulthandler', '-W', 'ignore::DeprecationWarning', '-c', full],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "fine", "")


def test_main_first() -> None:
    check("""
        import optree
        class Node: pass
        optree.register_pytree_node(Node, lambda n: ((1,), None), lambda m, c: 0, namespace='main')
        for _ in range(3):
            other = Interpreter()
            other.run(WORK)
            other.close()
        assert optree.tree_leaves([Node()], namespace='main') == [1]
        assert optree._C.get_registry_size('x') == 8
    """)


def test_other_first() -> None:
    check("""
        other = Interpreter()
        other.run(WORK)
        import optree
        assert optree._C.get_registry_size() == 8
        assert optree.tree_leaves([1, {'a': 2}]) == [1, 2]
        other.run("assert optree.tree_leaves([Node()], namespace='x') == [1]")
        other.close()
        assert optree.tree_leaves([1, {'a': 2}]) == [1, 2]
    """)


def test_only_in_others() -> None:
    check("""
        for _ in range(5):
            other = Interpreter()
            other.run(WORK)
            other.close()
    """)


def test_several_at_once() -> None:
    check("""
        others = [Interpreter() for _ in range(4)]
        for other in others:
            other.run(WORK)
        for other in others:
            other.run("assert optree.tree_leaves([Node(), 2], namespace='x') == [1, 2]")
        for other in reversed(others):
            other.close()
    """)


def test_in_threads() -> None:
    check("""
        import threading
        failures = []
        def work():
            try:
                other = Interpreter()
                other.run(WORK)
                other.close()
            except BaseException as error:
                failures.append(error)
        for _ in range(3):
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
        assert not failures, failures
    """)
