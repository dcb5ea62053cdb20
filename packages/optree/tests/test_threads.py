# SPDX-License-Identifier: Apache-2.0
"""Threads share structures and iterators, and register classes while others flatten."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from trees import NAMESPACE, TREES, Box, Pair, Ring, is_same

import optree

FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()
THREADS, ROUNDS = (32, 128) if FREE_THREADED else (4, 16)


def together(function: Callable[[], Any], rounds: int = ROUNDS) -> list[Any]:
    """Call ``function`` from several threads at the same time, ``rounds`` times in each."""
    barrier = threading.Barrier(THREADS)

    def run() -> list[Any]:
        barrier.wait(timeout=60)
        return [function() for _ in range(rounds)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(run) for _ in range(THREADS)]
            return [result for future in futures for result in future.result(timeout=120)]
    finally:
        sys.setswitchinterval(interval)


ROWS = [row for row in TREES if row.name not in {"deep", "wide", "wide_dict", "comb"}]


def test_shared_structures() -> None:
    options = {"namespace": NAMESPACE}
    trees = [(row.make(), row.reversible) for row in ROWS]
    expected = [
        (optree.tree_leaves(tree, **options), optree.tree_structure(tree, **options), tree, same)
        for tree, same in trees
    ]
    texts = [repr(treespec) for _, treespec, _, _ in expected]

    def work() -> None:
        for (leaves, treespec, tree, reversible), text in zip(expected, texts):
            found, other = optree.tree_flatten(tree, **options)
            assert all(a is b for a, b in zip(found, leaves))
            assert other == treespec
            assert hash(other) == hash(treespec)
            assert repr(treespec) == text
            rebuilt = treespec.unflatten(leaves)
            assert not reversible or is_same(rebuilt, tree)
            assert len(treespec.paths()) == len(treespec.accessors()) == len(leaves)
            assert len(treespec.flatten_up_to(tree)) == len(leaves)
            assert pickle.loads(pickle.dumps(treespec)) == treespec

    together(work, max(1, ROUNDS // 4))


def test_one_iterator_for_many_threads() -> None:
    count = 5000
    iterator = optree.tree_iter([[i, {"k": (i + count,)}] for i in range(count)])
    barrier = threading.Barrier(THREADS)

    def drain() -> list[int]:
        barrier.wait(timeout=60)
        return list(iterator)

    with ThreadPoolExecutor(THREADS) as pool:
        parts = [future.result(60) for future in [pool.submit(drain) for _ in range(THREADS)]]
    order = {leaf: i for i, leaf in enumerate(x for i in range(count) for x in (i, i + count))}
    for part in parts:
        positions = [order[leaf] for leaf in part]
        assert positions == sorted(positions)
    assert sorted(leaf for part in parts for leaf in part) == list(range(2 * count))


def test_an_iterator_that_runs_python_code_lets_threads_wait_for_their_turn() -> None:
    inside: list[int] = []

    def slow(_: Any) -> bool:
        inside.append(1)
        time.sleep(0.0005)  # lets the other threads run, which must wait
        assert len(inside) == 1
        inside.pop()
        return False

    iterator = optree.tree_iter(list(range(100)), is_leaf=slow)
    parts = together(lambda: next(iterator, None), rounds=100)
    assert sorted(leaf for leaf in parts if leaf is not None) == list(range(100))


def test_an_iterator_refuses_to_be_entered_again_by_its_own_thread() -> None:
    failures: list[str] = []

    def nested(_: Any) -> bool:
        with pytest.raises(RuntimeError, match="already iterating") as info:
            next(iterator)
        failures.append(str(info.value))
        return False

    iterator = optree.tree_iter([1, 2], is_leaf=nested)
    assert list(iterator) == [1, 2]
    assert len(failures) == 3


def test_registering_while_flattening() -> None:
    counter = iter(range(10**6))
    lock = threading.Lock()

    def work() -> None:
        with lock:
            namespace = f"thread {next(counter)}"
        cls = type("Local", (), {})
        optree.register_pytree_node(
            cls, lambda n: ((1, [2]), None), lambda m, c: c, namespace=namespace
        )
        with pytest.raises(ValueError, match="already registered"):
            optree.register_pytree_node(cls, len, len, namespace=namespace)
        assert optree.tree_leaves([cls(), 3], namespace=namespace) == [1, 2, 3]
        assert optree.tree_leaves([Pair(1, 2), Ring(3)], namespace=NAMESPACE) == [1, 2, 3]
        assert optree._C.get_registry_size(namespace) > 8
        optree.unregister_pytree_node(cls, namespace=namespace)
        with pytest.raises(ValueError, match="is not registered"):
            optree.unregister_pytree_node(cls, namespace=namespace)

    size = optree._C.get_registry_size()
    together(work)
    assert optree._C.get_registry_size() == size


def test_registering_one_class_from_many_threads() -> None:
    cls = type("Contended", (), {})
    outcomes: list[str] = []

    def work() -> None:
        try:
            optree.register_pytree_node(
                cls, lambda n: ((1,), None), lambda m, c: cls(), namespace="contended"
            )
            outcomes.append("registered")
        except ValueError:
            pass
        optree.tree_leaves(cls(), namespace="contended")
        try:
            optree.unregister_pytree_node(cls, namespace="contended")
            outcomes.append("unregistered")
        except ValueError:
            pass

    together(work)
    assert outcomes.count("registered") == outcomes.count("unregistered") > 0
    assert optree.register_pytree_node.get(cls, namespace="contended") is None


def test_new_namedtuple_classes_in_many_threads() -> None:
    from collections import namedtuple

    def work() -> None:
        cls = namedtuple("cls", ["x", "y"])
        leaves, treespec = optree.tree_flatten([cls(1, (2,)), Box("p", p=3)], namespace=NAMESPACE)
        assert leaves == [1, 2, 3]
        assert treespec.unflatten(leaves)[0] == cls(1, (2,))

    together(work)


def test_reading_while_another_thread_changes_the_tree() -> None:
    tree: dict[str, Any] = {"items": list(range(50)), "map": {str(i): i for i in range(50)}}
    stop = threading.Event()

    def change() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            tree["map"][f"x{i % 7}"] = i
            tree["map"].pop(f"x{(i + 3) % 7}", None)
            tree["items"].append(i)
            del tree["items"][50:]

    thread = threading.Thread(target=change)
    thread.start()

    def read() -> None:
        try:
            leaves, treespec = optree.tree_flatten(tree)
            assert len(leaves) == treespec.num_leaves
            list(optree.tree_iter(tree))
            optree.tree_map(lambda x: x, tree)
        except (RuntimeError, KeyError, IndexError):
            pass

    try:
        together(read)
    finally:
        stop.set()
        thread.join()


DEADLOCK = """
    import faulthandler, gc, sys, threading, time, weakref
    faulthandler.dump_traceback_later(40, exit=True)
    import optree
    sys.setswitchinterval(1e-6)
    stop = threading.Event()

    class Meta(type):
        def __repr__(cls):
            optree.tree_leaves([1, {{'a': 2}}])
            optree._C.get_registry_size()
            return 'Meta'

    def flatten():
        while not stop.is_set():
            optree.tree_leaves([1, (2, {{'k': 3}})], namespace='busy')
            optree._C.get_registry_size('busy')
            {pause}

    def churn():
        for i in range({rounds}):
            class Cls(metaclass=Meta):
                pass
            weakref.finalize(Cls, optree.tree_leaves, [1])
            optree.register_pytree_node(Cls, lambda n: ((), None), lambda m, c: None, namespace='busy')
            {failure}
            optree.unregister_pytree_node(Cls, namespace='busy')
            del Cls
            if i % 50 == 0:
                gc.collect()

    threads = [threading.Thread(target=flatten) for _ in range(3)]
    churners = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads + churners:
        thread.start()
    for thread in churners:
        thread.join()
    stop.set()
    for thread in threads:
        thread.join()
    faulthandler.cancel_dump_traceback_later()
    print('fine')
"""  # noqa: E501
FAILURES = {
    "none": "pass",
    "unregister": (
        "\n            try: optree.unregister_pytree_node(Cls, namespace='other')"
        '\n            except ValueError as e: assert "Meta" in str(e)'
    ),
    "register": (
        "\n            try: optree.register_pytree_node(Cls, len, len, namespace='busy')"
        '\n            except ValueError as e: assert "Meta" in str(e)'
    ),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=list(FAILURES))
def test_no_deadlock(failure: str) -> None:
    # In free-threaded builds, creating a class waits until all other threads have stopped. Busy
    # threads on few cores make it wait for long.
    rounds, pause = (30, "time.sleep(0.001)") if FREE_THREADED else (300, "pass")
    code = textwrap.dedent(DEADLOCK.format(failure=failure, rounds=rounds, pause=pause))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "fine"), done.stderr
