# SPDX-License-Identifier: Apache-2.0
"""PyTorch uses this optree: its C++ pytree module and its compiler work with it.

Each test runs in a subprocess, so that registrations made by PyTorch do not affect other tests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import textwrap

import pytest

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch"),
]


@pytest.fixture(autouse=True)
def installed() -> None:
    """Fail if optree is not installed: PyTorch reads the distribution metadata before using it."""
    try:
        importlib.metadata.version("optree")
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("optree is importable but not installed: PyTorch ignores it; pip install it")


def check(code: str) -> None:
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code) + "\nprint('fine')\n"],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().endswith("fine")


def test_cxx_pytree() -> None:
    check("""
        import optree, torch
        import torch.utils._cxx_pytree as pytree
        from collections import OrderedDict, defaultdict, deque, namedtuple
        P = namedtuple('P', 'x y')
        assert pytree.PyTreeSpec is optree.PyTreeSpec
        trees = [1, None, [1, None], (1,), {'b': 1, 'a': [2]}, OrderedDict(b=1, a=2), deque([1], 3),
                 defaultdict(list, b=1, a=2), P(1, [2]), torch.ones(2)]
        for tree in trees:
            leaves, spec = pytree.tree_flatten(tree)
            again = pytree.tree_unflatten(leaves, spec)
            assert type(again) is type(tree)
            assert pytree.tree_structure(tree) == spec
            assert len(pytree.tree_leaves(tree)) == spec.num_leaves
            if type(tree) in (int, list, tuple, dict, OrderedDict):
                assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
        assert pytree.tree_leaves({'b': 1, 'a': 2}) == [1, 2]
        assert pytree.tree_map(lambda x: x * 2, {'b': 1, 'a': [2]}) == {'b': 2, 'a': [4]}
        assert pytree.tree_map(lambda x, y: x + y, (1, [2]), (3, [4])) == (4, [6])
        assert pytree.tree_map_only(int, lambda x: -x, [1, 'a']) == [-1, 'a']
        assert pytree.tree_all(lambda x: x > 0, [1, 2])
        assert pytree.tree_is_leaf(1) and not pytree.tree_is_leaf([1])
        assert list(pytree.tree_iter([1, [2]])) == [1, 2]
        class Node:
            def __init__(self, x): self.x = x
        pytree.register_pytree_node(Node, lambda n: ([n.x], None), lambda c, m: Node(*c),
                                    serialized_type_name='Node')
        assert pytree.tree_map(lambda x: x + 1, Node(1)).x == 2
        assert pytree.treespec_leaf().is_leaf()
        assert optree.tree_leaves({'b': 1, 'a': 2}) == [2, 1]
    """)


COMPILE = """
    import torch, optree, warnings
    from collections import OrderedDict, defaultdict, deque, namedtuple
    torch._dynamo.config.recompile_limit = 64
    P = namedtuple('P', 'x y')
    class Node:
        def __init__(self, x, y): self.x, self.y = x, y
    optree.register_pytree_node(Node, lambda n: ((n.x, n.y), None), lambda m, c: Node(*c),
                                namespace='compiled')
    a, b = torch.ones(2), torch.arange(2.0)
    trees = {{
        'list': [a, b], 'tuple': (a, b), 'dict': {{'b': a, 'a': b}}, 'namedtuple': P(a, b),
        'nested': {{'z': [a, (b,)], 'y': {{'w': a}}}}, 'constants': [a, 2, 3.0],
        'OrderedDict': OrderedDict(b=a, a=b), 'defaultdict': defaultdict(list, b=a, a=b),
        'deque': deque([a, b]), 'mixed': [OrderedDict(k=a), deque([b]), (a, {{'x': b}})],
        'none': [a, None, b], 'custom': [Node(a, b)],
    }}
    def run(name, function, *args):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend='eager')
        got, expected = compiled(*args), function(*args)
        flat = lambda x: optree.tree_leaves(x, namespace='compiled')
        assert type(got) is type(expected), (name, type(got), type(expected))
        got, expected = flat(got), flat(expected)
        assert len(got) == len(expected), name
        for x, y in zip(got, expected):
            same = x == y if isinstance(x, str) else torch.equal(*map(torch.as_tensor, (x, y)))
            assert same, (name, x, y)
    functions = {functions}
    failures = []
    for label, function in functions.items():
        for name, tree in trees.items():
            try:
                run(name, function, tree)
            except Exception as error:
                failures.append((label, name, type(error).__name__, str(error)[:400]))
    assert not failures, failures
"""
FUNCTIONS = {
    'map': "lambda t: optree.tree_map(lambda x: x * 2, t, namespace='compiled')",
    'map_two': "lambda t: optree.tree_map(lambda x, y: x + y, t, t, namespace='compiled')",
    'map_is_leaf': "lambda t: optree.tree_map(lambda x: x * 2, t, is_leaf=lambda x: "
                   "isinstance(x, torch.Tensor), namespace='compiled')",
    'flatten_unflatten': "lambda t: (lambda leaves, spec: optree.tree_unflatten(spec, "
                         "[x + 1 for x in leaves]))(*optree.tree_flatten(t, namespace='compiled'))",
    'leaves': "lambda t: [x + 1 for x in optree.tree_leaves(t, namespace='compiled')]",
    'one_level': "lambda t: (lambda node: node.unflatten_func(node.metadata, list(node.children)))"
                 "(optree.tree_flatten_one_level(t, namespace='compiled'))",
    'one_level_parts': "lambda t: (lambda node: [a + len(node.entries), str(node.kind), "
                       "node.type.__name__])("
                       "optree.tree_flatten_one_level(t, namespace='compiled'))",
    'reduce': "lambda t: optree.tree_reduce(lambda x, y: x + y, t, namespace='compiled')",
}  # fmt: skip


def test_compile_without_graph_breaks() -> None:
    functions = "{" + ", ".join(f"{name!r}: {code}" for name, code in FUNCTIONS.items()) + "}"
    check(textwrap.dedent(COMPILE).format(functions=functions))


def test_importing_optree_does_not_import_torch() -> None:
    check("import optree, sys; assert 'torch' not in sys.modules")
