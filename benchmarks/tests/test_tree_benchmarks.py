# SPDX-License-Identifier: Apache-2.0
"""The trees are what they claim to be, and a wrong or slow library is noticed."""

from __future__ import annotations

import importlib
import pickle
import types
from collections import OrderedDict, deque
from typing import Any

import pytest
from benchmarks.harness import results
from benchmarks.harness.case import Prepared
from benchmarks.harness.rival import Rival, RivalError, prepare
from benchmarks.harness.worker import measure
from benchmarks.optree import (
    answers,
    expected,
    report,
    rivals,
    shortfalls,
    threads,
    threads_report,
    trees,
)
from benchmarks.optree import operations as operations_table
from benchmarks.optree.rivals import OURS
from benchmarks.optree.targets import BASELINE, FLOORS

import optree

LEAVES = {
    "resnet18": 244,
    "resnet50": 640,
    "resnet101": 1252,
    "resnet152": 1864,
    "resnet50_dicts": 640,
    "dict3": 3,
    "tuple3": 3,
    "state_flat": 1000,
    "state_nested": 1000,
    "dict10k": 10_000,
    "list10k": 10_000,
    "million": 1_000_000,
    "namedtuples": 5000,
    "deep500": 501,
    "leaf": 1,
    "custom1000": 2000,
    "dataclass1000": 2000,
}

WALK = types.SimpleNamespace(NONE_IS_LEAF=False, SORTS_DICT=True, SORTS_ORDERED_DICT=False)


@pytest.mark.parametrize("name", LEAVES)
def test_a_tree_has_its_leaves_each_numbered_once(name: str) -> None:
    leaves = answers.expected_leaves(trees.make_tree(name, trees.numbered_leaf()), WALK)
    assert len(leaves) == LEAVES[name]
    distinct = {leaf.number for leaf in leaves}
    module = name.startswith("resnet")  # a tensor of a module appears in two places
    assert len(distinct) == (len(leaves) // 2 if module else len(leaves))


def test_every_tree_of_the_matrix_has_floors_and_a_known_size() -> None:
    assert set(FLOORS) == set(trees.TREES)
    assert set(LEAVES) == {*trees.TREES, *trees.SPECIAL_TREES}


def test_the_wide_dict_is_not_inserted_in_sorted_order() -> None:
    keys = list(trees.make_tree("dict10k", trees.numbered_leaf()))
    assert keys != sorted(keys)


@pytest.mark.parametrize(("kind", "shared"), [("same", True), ("equal", False)])
def test_keys_of_a_first_visit_are_known(kind: str, shared: bool) -> None:
    one, other = (trees.cold_batch(f"state_flat_{kind}", salt)[0] for salt in ("a", "b"))
    assert list(one) == list(other)
    assert all((a is b) is shared for a, b in zip(one, other))


def test_new_keys_are_new_in_every_tree() -> None:
    batches = [trees.cold_batch("state_flat_new", salt) for salt in ("a", "b")]
    keys = [key for batch in batches for tree in batch for key in tree]
    assert len(set(keys)) == len(keys)


class Library:
    """A small pytree library for dicts and tuples, right unless told otherwise."""

    NONE_IS_LEAF = False
    SORTS_DICT = True
    SORTS_ORDERED_DICT = False

    def __init__(self, fault: str = "") -> None:
        self._fault = fault

    def parts(self, tree: Any) -> tuple[list[Any], Any]:
        leaves = answers.expected_leaves(tree, WALK)
        return (leaves[::-1] if self._fault == "order" else leaves), tree

    def rebuild(self, spec: Any, leaves: list[Any]) -> Any:
        return self._rebuild(spec, iter(leaves))

    def _rebuild(self, spec: Any, leaves: Any) -> Any:
        if isinstance(spec, dict):
            made = {key: self._rebuild(spec[key], leaves) for key in sorted(spec)}
            return OrderedDict(made) if self._fault == "type" else made
        if isinstance(spec, tuple):
            return tuple(self._rebuild(child, leaves) for child in spec)
        return next(leaves)

    def map_(self, function: Any, tree: Any) -> Any:
        leaves = [function(leaf) for leaf in answers.expected_leaves(tree, WALK)]
        if self._fault == "map" and len(leaves) > 1:
            leaves[0] = leaves[1]
        return self._rebuild(tree, iter(leaves))


def test_a_right_answer_passes() -> None:
    leaf = trees.numbered_leaf()
    answers.check_core(Library(), ({"b": leaf(), "a": leaf()}, leaf()))


@pytest.mark.parametrize(
    ("fault", "operation"), [("order", "flatten"), ("type", "unflatten"), ("map", "map")]
)
def test_a_wrong_answer_is_named(fault: str, operation: str) -> None:
    leaf = trees.numbered_leaf()
    with pytest.raises(answers.WrongAnswerError, match=rf"^{operation}: "):
        answers.check_core(Library(fault), ({"b": leaf(), "a": leaf()}, leaf()))


def test_answers_differ_when_types_order_or_leaves_differ() -> None:
    leaf = trees.Leaf
    trees_that_differ = [
        [leaf(0), leaf(1)],
        [leaf(1), leaf(0)],
        (leaf(0), leaf(1)),
        {"a": leaf(0), "b": leaf(1)},
        {"b": leaf(1), "a": leaf(0)},
        OrderedDict(a=leaf(0), b=leaf(1)),
        [[leaf(0)], leaf(1)],
    ]
    assert len({answers.digest(tree) for tree in trees_that_differ}) == len(trees_that_differ)
    assert answers.digest([leaf(0)]) == answers.digest([leaf(0)])


RIVALS = ("optree_api", "torch_pytree")
ON_TREES = [
    (operation, tree)
    for operation in expected.CHECKS
    for tree in (
        ("custom1000", "dataclass1000")
        if operation in operations_table.CUSTOM
        else ("dict3", "resnet50", "state_flat")
    )
]


def answered(module: str, operation: str, tree: str) -> tuple[Any, Any, Any]:
    """Return a rival, its answer, and the inputs of the statement."""
    rival = importlib.import_module(f"benchmarks.optree.rivals.{module}")
    found = operations_table.statement_of(rival, operation)
    if found is None:
        return rival, None, None
    inputs = operations_table.Inputs(rival, tree)
    setup, statement = found
    code = compile(f"{setup}\n{statement}", "<benchmark>", "exec")
    names = inputs.names(rival, set(code.co_names))
    exec(setup, names)
    try:
        return rival, eval(statement, names), inputs
    finally:
        if "mode" in names:
            names["mode"].__exit__(None, None, None)


def test_every_operation_outside_the_matrix_is_checked() -> None:
    others = {*operations_table.OTHER, *operations_table.CUSTOM}
    assert set(expected.CHECKS) == others


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch unpickles it itself
@pytest.mark.parametrize("module", RIVALS)
@pytest.mark.parametrize(("operation", "tree"), ON_TREES)
def test_right_answers_of_other_operations_pass(module: str, operation: str, tree: str) -> None:
    rival, answer, inputs = answered(module, operation, tree)
    if inputs is not None:
        expected.check_other(rival, operation, answer, inputs)


def wrong(answer: Any) -> Any:
    """Return an answer of the same kind with another content."""
    if isinstance(answer, bool):
        return not answer
    if isinstance(answer, (int, str, bytes)):
        other = {int: 7, str: "(*)", bytes: pickle.dumps(None)}
        return other[type(answer)]
    if isinstance(answer, deque):
        return deque([0])
    if isinstance(answer, dict):
        first, second, *_ = answer
        return type(answer)(answer, **{first: answer[second], second: answer[first]})
    if isinstance(answer, list):
        return [*answer[:-2], answer[-1], answer[-2]]
    if isinstance(answer, tuple):
        return (wrong(answer[0]), *answer[1:])
    if isinstance(answer, trees.Leaf):
        return None
    return type(answer)() if answer is None else optree.tree_structure([0, 0])


ALL_ALIKE = {"map_two", "custom_map", "partition"}  # every leaf of the answer is the same


@pytest.mark.parametrize("operation", [x for x in expected.CHECKS if x not in ALL_ALIKE])
def test_wrong_answers_of_other_operations_are_noticed(operation: str) -> None:
    tree = "custom1000" if operation in operations_table.CUSTOM else "dict3"
    rival, answer, inputs = answered("optree_api", operation, tree)
    with pytest.raises((answers.WrongAnswerError, ValueError)):
        expected.check_other(rival, operation, wrong(answer), inputs)


def test_wrong_values_of_leaves_are_noticed() -> None:
    rival, answer, inputs = answered("optree_api", "custom_map", "custom1000")
    answer[7].left = True
    with pytest.raises(answers.WrongAnswerError, match=r"^custom_map: leaf 14 is True"):
        expected.check_other(rival, "custom_map", answer, inputs)
    rival, answer, inputs = answered("optree_api", "map_two", "dict3")
    with pytest.raises(answers.WrongAnswerError, match=r"^map_two: leaf 0 is True"):
        expected.check_other(rival, "map_two", {**answer, "bias": True}, inputs)
    rival, answer, inputs = answered("optree_api", "partition", "dict3")
    with pytest.raises(answers.WrongAnswerError, match=r"^partition: leaf 0 is Leaf"):
        expected.check_other(rival, "partition", answer[::-1], inputs)


def test_a_cold_case_never_times_the_same_input_twice() -> None:
    made: list[list[int]] = []
    seen: list[list[int]] = []
    names: dict[str, Any] = {"seen": seen}

    def renew() -> None:
        made.append([len(made)])
        names["trees"] = made[-1]

    prepared = Prepared("seen.append(trees)", names, renew=renew)
    samples = measure(prepared, seconds=0.002, sample_seconds=1.0, collect=False)
    assert seen == made
    assert len(samples) == len(made)


def test_a_folder_that_is_not_there_is_reported(tmp_path: Any) -> None:
    rival = Rival("x", "X", "x", site=tmp_path / "nowhere")
    with pytest.raises(RivalError, match="there is no folder"):
        prepare(rival)


def _result(
    ours: float,
    baseline: float,
    jax: float,
    *,
    tree: str = "dict3",
    operation: str = "flatten",
    collect: bool = False,
) -> dict[str, Any]:
    figures = {OURS: ours, BASELINE: baseline, "jax": jax}
    cells = [
        {"tree": tree, "operation": operation, "rival": name, "gc": collect}
        | {"status": "ok", "min": 0.9 * seconds, "median": seconds}
        for name, seconds in figures.items()
    ]
    rivals = {name: {"label": name, "available": True} for name in figures}
    return {"rivals": rivals, "cells": cells}


def test_misses_name_floors_and_faster_rivals() -> None:
    assert report.misses(_result(1e-6, 10e-6, 2e-6)) == []
    below, behind = report.misses(_result(1e-6, 2e-6, 0.5e-6))
    why = f"({shortfalls.UNEXPLAINED})"
    assert below == f"dict of 3, flatten: 2x the speed of {BASELINE}, floor 6x {why}"
    assert behind == f"dict of 3, flatten: jax takes 0.5x our time {why}"


def test_the_collector_has_its_own_table_and_no_floors() -> None:
    result = _result(1e-6, 2e-6, 0.5e-6, collect=True)
    (behind,) = shortfalls.shortfalls(result)
    assert str(behind) == "dict of 3, flatten, collector on: jax takes 0.5x our time"
    assert report.matrix_table(result).count("\n") == 1
    assert report.matrix_gc_table(result).count("\n") == 2
    result = _result(1e-6, 2e-6, 0.5e-6)
    assert report.matrix_table(result).count("\n") == 2
    assert report.matrix_gc_table(result) == "Not measured: `--gc off` was given."


def test_exceptions_are_listed_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = shortfalls.Reason("it pays", "custom_flatten", tree="dataclass1000", rival="jax")
    monkeypatch.setattr(shortfalls, "REASONS", (reason,))
    result = _result(1e-6, 2e-6, 0.5e-6, tree="dataclass1000", operation="custom_flatten")
    (exception,) = shortfalls.shortfalls(result)
    assert exception.reason == "it pays"
    row = report.exceptions_table(result).splitlines()[2]
    assert [text.strip() for text in row.strip("| ").split("|")] == [
        *("1000 dataclasses", "flatten", "jax", "0.5x", exception.reason)
    ]
    assert report.exceptions_table(_result(1e-6, 10e-6, 2e-6)).startswith("None: ")


def test_reasons_are_for_cells_that_exist() -> None:
    operations = {*operations_table.LABELS, *shortfalls.MEMORY}
    names = {rival.name for rival in rivals.rivals()}
    known = {*trees.TREES, *trees.SPECIAL_TREES, *trees.COLD_TREES}
    for reason in shortfalls.REASONS:
        assert reason.operation in operations
        assert reason.tree is None or reason.tree in known
        assert reason.rival is None or reason.rival in names


def test_a_library_that_takes_less_memory_is_an_exception() -> None:
    cells = [
        {"tree": "state_flat", "operation": "memory", "rival": name, "gc": False, "status": "ok"}
        | {"leaves": 1000, "first_bytes": size, "further_bytes": size, "peak_bytes": None}
        for name, size in ((OURS, 2000), ("torch", 1000), ("jax", 3000))
    ]
    names = {name: {"label": name} for name in (OURS, "torch", "jax")}
    first, further = shortfalls.shortfalls({"rivals": names, "cells": cells})
    line = "transformer state, flat, bytes of the first spec: torch takes 0.5x our bytes"
    assert str(first) == line
    assert first.reason.startswith("the first spec pays for the keys in both orders")
    assert (further.operation, further.reason) == ("further_bytes", shortfalls.UNEXPLAINED)


def test_plots_are_drawn(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    result = _result(1e-6, 10e-6, 2e-6, tree="resnet18")
    result |= {"created": "2026-01-01", "machine": {"processor": "P", "cores": 2}}
    report.leads_plot(result, tmp_path / "leads.png")
    drawn = (tmp_path / "leads.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert b"2026-01-01" in drawn


def test_threads_are_timed_together() -> None:
    calls: list[str] = []
    wall, spent = threads.measure([lambda: calls.append("a"), lambda: calls.append("b")], 40)
    assert calls.count("a") == calls.count("b") == 42  # two untimed
    assert wall > 0
    assert spent > 0


def test_scaling_has_a_row_a_tree_and_operation() -> None:
    cell = {"tree": "t", "operation": "o", "min": 2e-6}
    cell |= {which: {"throughput": 1.5, "cost": 1.25} for which in ("own", "shared")}
    result = results.new_result(
        "optree_threads", {}, {"python": "3.13", "optree": "1", "lock": False, "rounds": 7}
    )
    result["cells"].append(cell)
    row = threads_report.scaling_table(result).splitlines()[2]
    texts = [text.strip() for text in row.strip("| ").split("|")]
    assert texts == ["t", "o", "2 µs", "1.5x", "1.5x", "1.25x", "1.25x"]
    assert "without the interpreter lock" in threads_report.machine_lines(result)


def test_a_result_is_read_back_as_it_was_written(tmp_path: Any) -> None:
    result = _result(1e-6, 2.5e-6, 0.5e-6)
    results.write_result(result, tmp_path / "speed.json")
    assert results.read_result("speed", tmp_path) == result
    with pytest.raises(FileNotFoundError, match="measure them first"):
        results.read_result("other", tmp_path)
