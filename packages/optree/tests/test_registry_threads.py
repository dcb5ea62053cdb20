# SPDX-License-Identifier: Apache-2.0
"""The registry used by several threads at once, compared with a model of each thread's actions.

Every thread has classes of its own, so the model of its registrations is exact whatever the other
threads do. All threads also contend for one class; of that one, only the number of registrations
minus that of unregistrations is known.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import optree
from optree.registry import _NODETYPE_REGISTRY, GLOBAL_NAMESPACE

THREADS = 3
CLASSES = 2
NAMESPACES = ["machine 0", "machine 1", GLOBAL_NAMESPACE]
SHARED = "machine shared"


class Node:
    """A node with children; two nodes are equal if their classes and their children are."""

    def __init__(self, *children: Any) -> None:
        self.children = children

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.children == other.children  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]


def name_of(namespace: Any) -> str:
    return namespace if isinstance(namespace, str) else ""


class Actor:
    """The classes, registrations and specs of one thread; its methods raise if optree is wrong."""

    def __init__(self, contended: type) -> None:
        self.classes = [type(f"Own{i}", (Node,), {}) for i in range(CLASSES)]
        self.contended = contended
        self.balance = 0
        self.registered: set[tuple[int, int]] = set()
        self.kept: list[tuple[optree.PyTreeSpec, list[int], Any]] = []

    def is_node(self, index: int, namespace: int) -> bool:
        return bool({(index, namespace), (index, len(NAMESPACES) - 1)} & self.registered)

    def register(self, index: int, namespace: int) -> None:
        cls = self.classes[index]

        def attempt() -> None:
            optree.register_pytree_node(
                cls,
                lambda node: (node.children, None),
                lambda _, children: cls(*children),
                namespace=NAMESPACES[namespace],
            )

        if (index, namespace) in self.registered:
            with pytest.raises(ValueError, match="already registered"):
                attempt()
        else:
            attempt()
            self.registered.add((index, namespace))

    def unregister(self, index: int, namespace: int) -> None:
        def attempt() -> None:
            optree.unregister_pytree_node(self.classes[index], namespace=NAMESPACES[namespace])

        if (index, namespace) in self.registered:
            attempt()
            self.registered.discard((index, namespace))
        else:
            with pytest.raises(ValueError, match="is not registered"):
                attempt()

    def flatten(self, index: int, namespace: int) -> None:
        node = self.classes[index](1, {"b": 2, "a": [3]})
        tree = [0, node, (4,)]
        leaves, treespec = optree.tree_flatten(tree, namespace=name_of(NAMESPACES[namespace]))
        if not self.is_node(index, namespace):
            assert leaves == [0, node, 4]
            assert treespec.num_nodes == 5
            return
        assert leaves == [0, 1, 3, 2, 4]
        assert treespec.type is list
        assert treespec.child(1).type is type(node)
        assert treespec.unflatten(leaves) == tree
        assert optree.tree_map(lambda x: x, tree, namespace=treespec.namespace) == tree
        self.kept.append((treespec, leaves, tree))

    def unflatten(self, index: int, namespace: int) -> None:
        del index, namespace
        for treespec, leaves, tree in self.kept[-4:]:  # whether or not it is still registered
            assert treespec.unflatten(leaves) == tree

    def contend(self, index: int, namespace: int) -> None:
        del index, namespace
        try:
            optree.register_pytree_node(
                self.contended, lambda node: ((7,), None), lambda _, c: None, namespace=SHARED
            )
            self.balance += 1
        except ValueError as error:
            assert "already registered" in str(error)  # noqa: PT017
        tree = self.contended()
        assert optree.tree_leaves(tree, namespace=SHARED) in ([7], [tree])
        try:
            optree.unregister_pytree_node(self.contended, namespace=SHARED)
            self.balance -= 1
        except ValueError as error:
            assert "is not registered" in str(error)  # noqa: PT017


ACTIONS = ["register", "unregister", "flatten", "unflatten", "contend"]
SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(ACTIONS),
        st.integers(0, CLASSES - 1),
        st.integers(0, len(NAMESPACES) - 1),
    ),
    max_size=12,
)


class RegistryMachine(RuleBasedStateMachine):
    """A state machine: each step gives every thread a script, and all scripts run at once."""

    def __init__(self) -> None:
        super().__init__()
        contended = type("Contended", (Node,), {})
        self.actors = [Actor(contended) for _ in range(THREADS)]
        self.pool = ThreadPoolExecutor(THREADS)
        self.size = optree._C.get_registry_size()

    @rule(scripts=st.tuples(*[SCRIPTS] * THREADS))
    def run(self, scripts: tuple[list[tuple[str, int, int]], ...]) -> None:
        barrier = threading.Barrier(THREADS)

        def play(actor: Actor, script: list[tuple[str, int, int]]) -> None:
            barrier.wait(timeout=60)
            for action, index, namespace in script:
                getattr(actor, action)(index, namespace)

        for future in [self.pool.submit(play, *pair) for pair in zip(self.actors, scripts)]:
            future.result(timeout=60)

    @invariant()
    def nothing_is_lost(self) -> None:
        balance = sum(actor.balance for actor in self.actors)
        assert balance in {0, 1}
        registered = sum(len(actor.registered) for actor in self.actors)
        assert optree._C.get_registry_size() == self.size + registered + balance
        assert len(_NODETYPE_REGISTRY) == optree._C.get_registry_size() + 2
        for actor in self.actors:
            for index, cls in enumerate(actor.classes):
                for namespace, name in enumerate(NAMESPACES):
                    entry = optree.register_pytree_node.get(cls, namespace=name_of(name))
                    assert (entry is not None) == actor.is_node(index, namespace)

    def teardown(self) -> None:
        self.pool.shutdown()
        for actor in self.actors:
            for index, namespace in actor.registered:
                optree.unregister_pytree_node(actor.classes[index], namespace=NAMESPACES[namespace])
        if sum(actor.balance for actor in self.actors) == 1:
            optree.unregister_pytree_node(self.actors[0].contended, namespace=SHARED)
        assert optree._C.get_registry_size() == self.size


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(
    max_examples=20, stateful_step_count=6, deadline=None, derandomize=True
)
