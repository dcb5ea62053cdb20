# SPDX-License-Identifier: Apache-2.0
"""The verdicts of the comparison with the published torchopt: same, more, and different."""

from __future__ import annotations

import inspect
from typing import Any

import compare_published_torchopt as compare


def described(function: Any) -> dict[str, Any]:
    return {
        "kind": "function",
        "module": "torchopt.x",
        "name": "f",
        "signature": [
            [p.name, p.kind.name, None if p.default is p.empty else repr(p.default)]
            for p in inspect.signature(function).parameters.values()
        ],
    }


def published(a, b=1, *args, c=2, **kwargs): ...


def more(a, b=1, *others, c=2, new=None, **options): ...


def positional(a, new=None, b=1, *args, c=2, **kwargs): ...


def required(a, b=1, *args, c=2, new, **kwargs): ...


def default(a, b=2, *args, c=2, **kwargs): ...


def test_new_keyword_arguments_are_more_of_the_same() -> None:
    assert compare.differences(described(published), described(published)) == ([], [])
    assert compare.differences(described(published), described(more)) == ([], ["(new=)"])


def test_other_orders_defaults_and_required_arguments_are_different() -> None:
    for other in (positional, required, default):
        wrong, _ = compare.differences(described(published), described(other))
        assert len(wrong) == 1, other
        assert wrong[0].startswith("signature: (a, b=1, *args, c=2, **kwargs), here ")


def test_names_without_a_reason_are_reported() -> None:
    theirs = {"modules": {"torchopt.x": {"f": described(published), "g": described(published)}}}
    ours = {"modules": {"torchopt.x": {"f": described(default)}}}
    rows = compare.compare_names(theirs, ours)
    assert [(row.name, row.verdict) for row in rows] == [
        ("torchopt.x", "same"),
        ("torchopt.x.f", "DIFFERENT"),
        ("torchopt.x.g", "DIFFERENT"),
    ]
    assert "| `torchopt.x.g` | DIFFERENT | missing |" in compare.markdown(rows, "0.7.3", "1.0.0")
    assert compare.compare_names(ours, ours)[1].verdict == "same"


def test_reasons_and_programs_are_sound() -> None:
    programs = compare.all_programs()
    assert len(set(programs)) > 500
    for code in (*programs, *compare.PICKLES):
        compile(code, "<program>", "eval")
    for pattern, _ in compare.PROGRAM_REASONS:
        assert any(compare.reason_of(code, ((pattern, "x"),)) for code in programs), pattern
