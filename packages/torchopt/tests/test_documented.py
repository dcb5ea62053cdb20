# SPDX-License-Identifier: Apache-2.0
"""The docstring of each optimizer includes the shared parts."""

from __future__ import annotations

import inspect

import pytest

import torchopt
from torchopt.documented import complete, documented, entries, joined, sections
from torchopt.index import OPTIMIZERS, exported

DIRECTIONS = [name for name in exported() if name.startswith("scale_by_")]


@pytest.mark.parametrize("name", [*OPTIMIZERS, *DIRECTIONS])
def test_every_argument_is_described_once_in_the_order_of_the_signature(name: str) -> None:
    function = exported()[name]
    found = sections(function.__doc__)
    arguments = entries(found["Args"])
    assert list(arguments) == list(inspect.signature(function).parameters)
    assert all(arguments.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_errors_of_an_optimizer_are_documented(name: str) -> None:
    assert (
        "ValueError: A hyper-parameter is out of range."
        in sections(exported()[name].__doc__)["Raises"]
    )


def test_decoupled_weight_decay_is_distinguished_from_a_penalty() -> None:
    penalty = [n for n in OPTIMIZERS if "penalty" in exported()[n].__doc__]
    assert {"adam", "sgd", "yogi"} <= set(penalty)
    assert not {"adamw", "adabelief", "lion", "lamb", "muon", "nadamw"} & set(penalty)


def test_own_words_come_before_those_of_the_direction_and_of_all() -> None:
    def direction(rho: float, eps: float) -> None:
        """Return a direction.

        Args:
            rho: Of the direction.
            eps: Of the direction,
                in two lines.

        References:
            A paper.
        """

    @documented(direction, size="Given.")
    def function(lr: float, rho: float, eps: float, size: float, other: float) -> None:
        """Return an optimizer.

        With a paragraph.

        Args:
            rho: Its own.

        Example:
            >>> 1
            1
        """

    found = sections(function.__doc__ or "")
    assert list(found) == ["", "Args", "Raises", "References", "Example"]
    assert found[""] == "Return an optimizer.\n\nWith a paragraph."
    arguments = entries(found["Args"])
    assert list(arguments) == ["lr", "rho", "eps", "size"]
    assert arguments["rho"] == "Its own."
    assert arguments["eps"] == "Of the direction,\n        in two lines."
    assert arguments["size"] == "Given."
    assert found["References"] == "    A paper."


def test_a_docstring_that_is_complete_stays_as_it_is() -> None:
    def function(eps: float) -> None:
        """Return something.

        Args:
            eps: Said here.
        """

    before = inspect.getdoc(function)
    complete(function)
    assert inspect.getdoc(function) == before
    assert joined(sections(torchopt.sgd.__doc__ or "")) == torchopt.sgd.__doc__


def test_without_docstrings_nothing_is_put_in() -> None:
    def function(lr: float) -> None: ...

    complete(function)
    assert documented(function)(function).__doc__ is None
