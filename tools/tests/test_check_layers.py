# SPDX-License-Identifier: Apache-2.0
"""Each rule of check_layers.py is tested on a small tree that breaks only that rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import check_layers as layers

OPTREE_CPP, TORCHOPT_CSRC = layers.CPP
OPTREE, TORCHOPT = layers.PYTHON


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


GOOD_CPP = {
    "spec/node.h": "#include <absl/container/inlined_vector.h>\n",
    "spec/tree.h": '#include "spec/node.h"\n',
    "cpython/compat.h": "#include <Python.h>\n#if PY_VERSION_HEX < 0x030A0000\n#endif\n",
    "support/ref.h": '#include <Python.h>\n#include "cpython/compat.h"\n',
    "nodes/list.cpp": (
        '#include "spec/tree.h"\n#include "support/ref.h"\nconst Kind kind = Kind::list;\n'
    ),
    "walk/flatten.h": '#include "nodes/../spec/tree.h"\n',
    "bind/module.cpp": '#include <pybind11/pybind11.h>\n#include "walk/flatten.h"\n',
    "tests/test_tree.cpp": '#include "spec/tree.h"\n',
}


def cpp_violations(tmp_path: Path, tree: layers.CppTree, files: dict[str, str]) -> list[str]:
    write(tmp_path, {f"{tree.root}/{name}": text for name, text in files.items()})
    return layers.check_cpp(tree, tmp_path).violations


def test_a_tree_that_keeps_every_rule_has_no_violation(tmp_path: Path) -> None:
    assert cpp_violations(tmp_path, OPTREE_CPP, GOOD_CPP) == []


def test_includes_that_cross_layers_are_counted(tmp_path: Path) -> None:
    write(tmp_path, {f"{OPTREE_CPP.root}/{name}": text for name, text in GOOD_CPP.items()})
    report = layers.check_cpp(OPTREE_CPP, tmp_path)
    assert report.edges["nodes", "spec"] == 1
    assert report.edges["nodes", "support"] == 1
    assert report.edges["bind", "walk"] == 1
    assert "nodes        1  ──▶ spec(1)  support(1)" in "\n".join(
        layers.draw_cpp(OPTREE_CPP, report)
    )


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("spec/up.h", '\n#include "nodes/list.h"\n', "spec/up.h:2: includes"),
        (
            "support/up.h",
            '#include "spec/node.h"\n',
            "support/ may include cpython, not spec/",
        ),
        (
            "nodes/up.cpp",
            '#include "../walk/flatten.h"\n',
            "nodes/ may include spec, support, cpython, not walk/",
        ),
        ("walk/up.cpp", '#include "bind/names.h"\n', "not bind/"),
        ("nodes/cast.cpp", "int a;\n#include <pybind11/cast.h>\n", "nodes/cast.cpp:2: "),
        ("walk/cast.cpp", "void f(pybind11::object);\n", "pybind11 appears only in bind/"),
        ("spec/python.h", "#include <Python.h>\n", "spec/ and its tests know no Python"),
        ("spec/python.h", "struct S { PyObject* p; };\n", "spec/ and its tests know no Python"),
        ("tests/python.cpp", "#include <Python.h>\n", "spec/ and its tests know no Python"),
        ("walk/table.h", "absl::InlinedVector<int, 8> v;\n", "only spec/node*.h names Abseil"),
        ("cpython/up.h", '#include "support/ref.h"\n', "cpython/ may include no other layer"),
        ("walk/old.cpp", "#if PY_VERSION_HEX < 0x030D0000\n", "versions of Python are told apart"),
        ("nodes/pypy.h", "# ifdef PYPY_VERSION\n", "versions of Python are told apart"),
        ("walk/free.cpp", "#ifdef Py_GIL_DISABLED\n", "builds of Python are told apart"),
        ("nodes/list.cpp", "auto p = list->ob_item;\n", "what CPython hides"),
        ("bind/dict.cpp", "f(_PyDict_NewPresized(3));\n", "what CPython hides"),
        ("walk/text.cpp", "if (kind == Kind::list) return;\n", "kinds are told apart in nodes/"),
        ("bind/text.cpp", "switch (kind) { case Kind::dict: break; }\n", "kinds are told apart"),
        ("spec/tree2.h", "#include <absl/types/span.h>\n", "only spec/node*.h names Abseil"),
        ("bind/torch.cpp", "#include <torch/extension.h>\n", "no header of torch"),
        ("walk/lost.cpp", '#include "nodes/absent.h"\n', "which is not below packages/optree/cpp"),
        ("helpers/x.h", "int a;\n", "expected a file in one of the layers"),
    ],
)
def test_one_forbidden_line_in_optree_is_one_violation(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    headers = {"nodes/list.h": "", "bind/names.h": ""}
    found = cpp_violations(tmp_path, OPTREE_CPP, {**GOOD_CPP, **headers, name: text})
    assert len(found) == 1
    assert expected in found[0]
    assert found[0].startswith(f"packages/optree/cpp/{name}:")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("math/adam.h", '#include "launch/openmp.h"\n', "math/ may include no other layer"),
        ("launch/x.cpp", "#include <ATen/ATen.h>\n", "no header of torch"),
        ("launch/x.cpp", "#include <pybind11/pybind11.h>\n", "pybind11 appears only in bind/"),
        ("math/x.h", "#pragma omp simd\n", "threads are started in launch/ alone"),
    ],
)
def test_one_forbidden_line_in_torchopt_is_one_violation(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    found = cpp_violations(tmp_path, TORCHOPT_CSRC, {"launch/openmp.h": "", name: text})
    assert len(found) == 1
    assert expected in found[0]


def test_comments_break_no_rule(tmp_path: Path) -> None:
    text = '// #include "nodes/list.h"\n/* PyObject\n#include "walk/x.h" */\n// absl::Span\n'
    assert cpp_violations(tmp_path, OPTREE_CPP, {"spec/a.h": text}) == []


def test_line_numbers_survive_a_comment_block(tmp_path: Path) -> None:
    text = "/* one\n   two */\n\n#include <Python.h>\n"
    [found] = cpp_violations(tmp_path, OPTREE_CPP, {"spec/a.h": text})
    assert found.startswith("packages/optree/cpp/spec/a.h:4:")


def python_violations(tmp_path: Path, tree: layers.PythonTree, files: dict[str, str]) -> list[str]:
    write(tmp_path, {f"{tree.root}/{name}": text for name, text in files.items()})
    return layers.check_python(tree, tmp_path).violations


GOOD_TORCHOPT = {
    "__init__.py": "from torchopt.optim import base\n",
    "errors.py": "",
    "tree.py": "import optree\nfrom torchopt.errors import E\n",
    "tree_function/rule.py": (
        "import torch\nfrom torchopt import tree\nclass F(torch.autograd.Function): pass\n"
    ),
    "pytree.py": "from optree import *\n",
    "transform/adam.py": "from torchopt import tree\nfrom torchopt.kernels import registry\n",
    "kernels/registry.py": "from torchopt.tree import tree_map\n",
    "optim/base.py": "from torchopt.transform.adam import adam\n",
}


def test_a_package_that_keeps_every_rule_has_no_violation(tmp_path: Path) -> None:
    assert python_violations(tmp_path, TORCHOPT, GOOD_TORCHOPT) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("diff/engine.py", "\nimport optree\n", "diff/engine.py:2: imports optree"),
        (
            "optim/sgd.py",
            "def f():\n    from optree import tree_map\n",
            "optim/sgd.py:2: imports optree",
        ),
        ("nn/tree.py", "import optree\n", "nn/tree.py:1: imports optree"),
        (
            "transform/x.py",
            "from torchopt.optim import base\n",
            "layer 3 (transform) may import only",
        ),
        (
            "transform/x.py",
            "import torchopt.diff\n",
            "(transform) may import only lower layers, not layer 3",
        ),
        (
            "kernels/x.py",
            "from torchopt import transform\n",
            "(kernels) may import only lower layers, not layer 3",
        ),
        ("optim/x.py", "from torchopt import linalg\n", "a re-export; import its home"),
        ("stray/x.py", "", "expected a module of a layer, got stray"),
        (
            "optim/x.py",
            "from torch.autograd import Function as Fn\n\nclass A(Fn): pass\n",
            "optim/x.py:3: class A subclasses torch.autograd.Function",
        ),
        (
            "diff/x.py",
            "import torch\nclass A(torch.autograd.Function): pass\n",
            "class A subclasses torch.autograd.Function",
        ),
    ],
)
def test_one_forbidden_line_in_the_python_of_torchopt_is_one_violation(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    found = python_violations(tmp_path, TORCHOPT, {**GOOD_TORCHOPT, name: text})
    assert len(found) == 1
    assert expected in found[0]


def test_optree_may_import_torch_only_in_integrations_or_late(tmp_path: Path) -> None:
    late = "def f():\n    import torch\n"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    files = {"integrations/torch.py": "import torch\n", "late.py": late, "typed.py": typed}
    assert python_violations(tmp_path, OPTREE, files) == []
    for text in ("import torch\n", "try:\n    import torch\nexcept ImportError:\n    pass\n"):
        [found] = python_violations(tmp_path, OPTREE, {"ops.py": text})
        assert "ops.py" in found
        assert "imports torch" in found


def test_optree_may_never_import_torchopt(tmp_path: Path) -> None:
    [found] = python_violations(tmp_path, OPTREE, {"a.py": "def f():\n    import torchopt\n"})
    assert "allowed in nowhere" in found


def test_main_fails_on_a_violation_and_draws_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path, {"cpp/spec/a.h": "", "cpp/walk/b.h": '#include "spec/a.h"\n'})
    tree = dataclasses.replace(OPTREE_CPP, root="cpp")
    monkeypatch.setattr(layers, "CPP", (tree,))
    monkeypatch.setattr(layers, "PYTHON", ())
    monkeypatch.setattr(layers.check_cpp, "__defaults__", (root,))
    assert layers.main() == 0
    assert "walk         1  ──▶ spec(1)" in capsys.readouterr().out
    write(root, {"cpp/spec/a.h": '#include "walk/b.h"\n'})
    assert layers.main() == 1
    assert "cpp/spec/a.h:1: includes" in capsys.readouterr().err
