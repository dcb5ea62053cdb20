# SPDX-License-Identifier: Apache-2.0
"""Keras as a client: its tree functions run on this optree (opt-in with ``--keras``)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.keras


def test_keras_tree_functions() -> None:
    code = """
        from collections import OrderedDict, namedtuple
        import keras
        from keras.src.tree import optree_impl
        import optree
        tree = keras.tree
        P = namedtuple('P', 'x y')
        nested = {'b': [1, (2, None)], 'a': OrderedDict(z=3, y=4), 'p': P(5, {})}
        assert tree.is_nested(nested) and not tree.is_nested(1)
        flat = tree.flatten(nested)
        assert flat == [3, 4, 1, 2, None, 5], flat
        assert tree.pack_sequence_as(nested, flat) == nested
        assert tree.map_structure(lambda x: x, nested) == nested
        tree.assert_same_structure(nested, nested)
        assert tree.traverse(lambda x: None, nested) == nested
        assert [path for path, _ in tree.flatten_with_path({'k': [1]})] == [('k', 0)]
        print('fine')
    """
    environment = dict(os.environ, KERAS_BACKEND=os.environ.get("KERAS_BACKEND", "jax"))
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True,
        timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()[-4:]) == (0, "fine"), done.stderr[-4000:]
