# SPDX-License-Identifier: Apache-2.0
"""What the docstrings of optimizers have in common, stated once.

A docstring in the source says what is special to its function. The arguments, exceptions and
references that it leaves out are put in when the function is made, so that `help` and the manual
have them all.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["DECOUPLED", "complete", "documented", "entries", "joined", "sections"]

ARGUMENTS = {
    "lr": """\
Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
        or a schedule that maps the number of previous updates to either.""",
    "betas": "Decays of the moments, in [0, 1).",
    "b1": "Decay of the first moment, in [0, 1).",
    "b2": "Decay of the second moment, in [0, 1).",
    "eps": "Added to the root, >= 0.",
    "weight_decay": "Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.",
    "moment_requires_grad": "Make the initial moments leaves that require a gradient.",
    "maximize": "Go up instead of down.",
}
DECOUPLED = "Coefficient of the decoupled decay, >= 0: the update has -lr weight_decay p."
RAISES = "    ValueError: A hyper-parameter out of range."

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "References", "Example")

F = TypeVar("F", bound=Callable[..., Any])


def documented(like: Callable[..., Any] | None = None, **arguments: str) -> Callable[[F], F]:
    """Return the decorator that completes the docstring of an optimizer.

    Args:
        like: Whose arguments of the same name, and whose references, it has. Where it makes the
            direction and the docstring does not say what the update is, it is said.
        arguments: Entries that occur in no other docstring.
    """

    def decorate(function: F) -> F:
        found = sections(getattr(like, "__doc__", None) or "")
        others = {"Raises": RAISES}
        if "References" in found:
            others["References"] = found["References"]
        complete(function, entries(found.get("Args", "")) | arguments, **others)
        text = function.__doc__
        has_lr = [f and "lr" in inspect.signature(f).parameters for f in (function, like)]
        makes_updates = hasattr(like, "rule") and has_lr == [True, False]
        if text and like and makes_updates and "The update is" not in text:
            decoupled = arguments.get("weight_decay") is DECOUPLED
            update = "-lr * (u + weight_decay * p)" if decoupled else "-lr * u"
            direction = f"`torchopt.transform.{like.__name__}`"
            summary, _, rest = text.partition("\n\n")
            said = f"The update is {update}, with u the direction of\n{direction}."
            function.__doc__ = f"{summary}\n\n{said}\n\n{rest}"
        return function

    return decorate


def complete(
    function: Callable[..., Any], arguments: Mapping[str, str] = ARGUMENTS, **others: str
) -> None:
    """Put into the docstring of `function` what it leaves out.

    Args:
        function: Its own entries and sections stay as they are.
        arguments: Entries of arguments by name, before those of `ARGUMENTS`.
        others: Sections by name. Where an argument is put in, `Raises` is too.
    """
    if function.__doc__ is None:  # python -OO
        return
    found = sections(function.__doc__)
    own = entries(found.get("Args", ""))
    known = {**ARGUMENTS, **arguments, **own}
    names = [name for name in inspect.signature(function).parameters if name in known]
    if not own.keys() >= set(names):
        found["Args"] = "\n".join(f"    {name}: {known[name]}" for name in names)
        others.setdefault("Raises", RAISES)
    function.__doc__ = joined({**others, **found})


def sections(docstring: str) -> dict[str, str]:
    """Return the parts of a docstring by their headings, the one before the first by ""."""
    parts = re.split(rf"(?m)^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(docstring))
    return {name: text.rstrip() for name, text in zip(["", *parts[1::2]], parts[::2])}


def joined(parts: Mapping[str, str]) -> str:
    """Return the docstring with these `sections`."""
    rest = [f"{name}:\n{parts[name]}" for name in SECTIONS if name in parts]
    return "\n\n".join([parts[""], *rest]) + "\n"


def entries(section: str) -> dict[str, str]:
    """Return the text of each argument in a section of arguments."""
    found = re.findall(r"(?ms)^    (\w+): (.*?)(?=^    \w|\Z)", section)
    return {name: text.rstrip() for name, text in found}
