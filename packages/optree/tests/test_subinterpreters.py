# SPDX-License-Identifier: Apache-2.0
"""Several interpreters in one process, where the Python version and the build support them.

Each test runs in a subprocess, because an extension that fails on its second import could end the
test session.
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

# The kinds of subinterpreters in this Python version: with their own lock, and with a shared lock.
KINDS = ["own lock", "shared lock"] if sys.version_info >= (3, 12) else ["shared lock"]

PRELUDE = """
import builtins, sys, textwrap
BUILTIN = 8 + hasattr(builtins, 'frozendict')  # since Python 3.15
try:
    import _interpreters as low
except ImportError:
    import _xxsubinterpreters as low
def create():
    if sys.version_info >= (3, 13):
        return low.create('isolated' if KIND == 'own lock' else 'legacy')
    if sys.version_info >= (3, 12):
        return low.create(isolated=KIND == 'own lock')
    return low.create(isolated=False) if sys.version_info >= (3, 10) else low.create()
class Interpreter:
    def __init__(self): self.own = create()
    def run(self, code):
        failure = low.run_string(self.own, textwrap.dedent(code))
        if failure is not None:
            raise RuntimeError(failure)
    def close(self): low.destroy(self.own)
PATH = repr(sys.path)
SETUP = f'import sys; sys.path[:] = {PATH}; BUILTIN = {BUILTIN}\\n'
WORK = SETUP + textwrap.dedent('''
    import optree
    from collections import namedtuple
    assert optree._C.get_registry_size() == BUILTIN, optree._C.get_registry_size()
    assert optree.tree_leaves({'b': [1], 'a': (2, None)}) == [2, 1]
    P = namedtuple('P', 'x y')
    assert optree.tree_map(str, P(1, [2])) == P('1', ['2'])
    class Node: pass
    optree.register_pytree_node(Node, lambda n: ((1,), None), lambda m, c: Node(), namespace='x')
    spec = optree.tree_structure([Node(), {'k': 1}], namespace='x')
    import pickle
    assert pickle.loads(pickle.dumps(optree.tree_structure([1]))) == optree.tree_structure([1])
    assert optree._C.get_registry_size('x') == BUILTIN + 1
    with optree.dict_insertion_ordered(True, namespace='order'):
        assert optree.tree_leaves({'b': 1, 'a': 2}, namespace='order') == [1, 2]
''')
"""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check(kind: str, code: str) -> None:
    full = f"KIND = {kind!r}\n" + PRELUDE + textwrap.dedent(code) + "\nprint('fine')\n"
    done = subprocess.run(
        [sys.executable, '-X', 'faulthandler', '-W', 'ignore::DeprecationWarning',
         '-W', 'ignore:remaining subinterpreters:RuntimeWarning', '-c', full],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "fine", "")


def test_main_first(kind: str) -> None:
    check(
        kind,
        """
        import optree
        class Node: pass
        optree.register_pytree_node(Node, lambda n: ((1,), None), lambda m, c: 0, namespace='main')
        for _ in range(3):
            other = Interpreter()
            other.run(WORK)
            other.close()
        assert optree.tree_leaves([Node()], namespace='main') == [1]
        assert optree._C.get_registry_size('x') == BUILTIN
    """,
    )


def test_other_first(kind: str) -> None:
    check(
        kind,
        """
        other = Interpreter()
        other.run(WORK)
        import optree
        assert optree._C.get_registry_size() == BUILTIN
        assert optree.tree_leaves([1, {'a': 2}]) == [1, 2]
        other.run("assert optree.tree_leaves([Node()], namespace='x') == [1]")
        other.close()
        assert optree.tree_leaves([1, {'a': 2}]) == [1, 2]
    """,
    )


def test_only_in_others(kind: str) -> None:
    check(
        kind,
        """
        for _ in range(5):
            other = Interpreter()
            other.run(WORK)
            other.close()
    """,
    )


def test_several_at_once(kind: str) -> None:
    check(
        kind,
        """
        others = [Interpreter() for _ in range(4)]
        for other in others:
            other.run(WORK)
        for other in others:
            other.run("assert optree.tree_leaves([Node(), 2], namespace='x') == [1, 2]")
        for other in reversed(others):
            other.close()
    """,
    )


def test_in_threads(kind: str) -> None:
    check(
        kind,
        """
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
    """,
    )


def test_ended_with_live_objects(kind: str) -> None:
    check(
        kind,
        """
        import optree
        for _ in range(3):
            other = Interpreter()
            other.run(WORK + textwrap.dedent('''
                import atexit, builtins
                class Late:
                    def __del__(self, leaves=optree.tree_leaves, spec=spec):
                        assert leaves([1, {'a': 2}]) == [1, 2]
                        assert repr(spec)
                builtins.kept = [spec, optree.tree_iter([1, Node()], namespace='x'), Late()]
                builtins.kept.append(builtins.kept)
                next(builtins.kept[1])
                atexit.register(lambda: optree.tree_map(str, {'b': 1}))
            '''))
            other.close()
        assert optree.tree_leaves([1, {'a': 2}]) == [1, 2]
    """,
    )


def test_left_alive_at_exit(kind: str) -> None:
    check(
        kind,
        """
        import optree
        other = Interpreter()
        other.run(WORK)
        kept = optree.tree_structure([1])
    """,
    )


def test_interpreters_are_counted(kind: str) -> None:
    check(
        kind,
        """
        import optree
        C = optree._C
        main = C.get_main_interpreter_id()
        assert C.is_current_interpreter_main()
        assert C.get_current_interpreter_id() == main
        assert C.get_alive_interpreter_ids() == {main}
        other = Interpreter()
        other.run(WORK + textwrap.dedent('''
            C = optree._C
            assert not C.is_current_interpreter_main()
            me = C.get_current_interpreter_id()
            assert me != C.get_main_interpreter_id()
            assert C.get_alive_interpreter_ids() == {me, C.get_main_interpreter_id()}
        '''))
        assert C.get_num_interpreters_alive() == C.get_num_interpreters_seen() == 2
        other.close()
        assert C.get_alive_interpreter_ids() == {main}
        assert C.get_num_interpreters_seen() == 2
    """,
    )


def test_a_failed_import_leaves_nothing(kind: str) -> None:
    check(
        kind,
        """
        import optree
        other = Interpreter()
        other.run(SETUP + textwrap.dedent('''
            import atexit
            register = atexit.register
            def refuse(*args): raise LookupError('refused')
            atexit.register = refuse
            try:
                import optree
            except ImportError as error:
                assert isinstance(error.__cause__, LookupError)
            else:
                raise AssertionError('imported')
            atexit.register = register
        '''))
        assert optree._C.get_num_interpreters_alive() == optree._C.get_num_interpreters_seen() == 1
        other.close()
    """,
    )


def test_a_namedtuple_class_belongs_to_its_interpreter(kind: str) -> None:
    check(
        kind,
        """
        import optree
        from collections import namedtuple
        for i in range(5):
            other = Interpreter()
            other.run(WORK + "assert not optree.is_namedtuple_class(tuple)")
            P = namedtuple('P', 'x y')
            assert optree.tree_structure(P(1, 2)).unflatten([3, 4]) == P(3, 4)
            other.close()
            assert optree.tree_map(str, P(1, 2)) == P('1', '2')
    """,
    )
