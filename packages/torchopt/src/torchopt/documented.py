# SPDX-License-Identifier: Apache-2.0
"""Complete the docstrings of optimizers with the parts that they share.

A docstring in the source describes what is special to its function. The arguments, exceptions and
references that it leaves out are added when the function is defined, so that `help` and the manual
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
    "eps": "Added to the square root in the denominator, >= 0.",
    "weight_decay": "Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.",
    "moment_requires_grad": "Make the initial moments leaves that require a gradient.",
    "maximize": "Maximise the objective instead of minimising it.",
}
DECOUPLED = "Coefficient of the decoupled decay, >= 0: adds -lr * weight_decay * p to the update."
RAISES = "    ValueError: A hyper-parameter is out of range."
#: What every optimizer does, for those whose docstring has no example of its own.
EXAMPLE = """\
    >>> import torch, torchopt
    >>> optimizer = {call}
    >>> params = {{"w": torch.tensor([3.0, -4.0])}}
    >>> state = optimizer.init(params)
    >>> for _ in range(10):  # minimize |w|^2
    ...     grads = {{"w": 2 * params["w"]}}
    ...     updates, state = optimizer.update(grads, state, params=params, inplace=False)
    ...     params = torchopt.apply_updates(params, updates, inplace=False)
    >>> bool(params["w"].square().sum() < 25)
    True"""

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "References", "Example")

F = TypeVar("F", bound=Callable[..., Any])


def documented(like: Callable[..., Any] | None = None, **arguments: str) -> Callable[[F], F]:
    """Return the decorator that completes the docstring of an optimizer.

    Args:
        like: The function whose descriptions of arguments and whose references are taken over. If
            it returns the direction, and the docstring does not say what the update is, a sentence
            about that is added.
        arguments: Descriptions of arguments that no other docstring has.
    """

    def decorate(function: F) -> F:
        found = sections(getattr(like, "__doc__", None) or "")
        others = {"Raises": RAISES}
        if "References" in found:
            others["References"] = found["References"]
        if "lr" in inspect.signature(function).parameters:
            others["Example"] = EXAMPLE.format(call=f"torchopt.{function.__name__}()")
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
    """Add to the docstring of `function` what it leaves out.

    Args:
        function: The function. The entries and sections that it has stay as they are.
        arguments: Descriptions of arguments by name. They take precedence over `ARGUMENTS`.
        others: Sections by name. If an argument is added, so is `Raises`.
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
    """Return the sections of a docstring by heading; the key of the text before them is ""."""
    parts = re.split(rf"(?m)^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(docstring))
    return {name: text.rstrip() for name, text in zip(["", *parts[1::2]], parts[::2])}


def joined(parts: Mapping[str, str]) -> str:
    """Return the docstring that has these `sections`."""
    rest = [f"{name}:\n{parts[name]}" for name in SECTIONS if name in parts]
    return "\n\n".join([parts[""], *rest]) + "\n"


def entries(section: str) -> dict[str, str]:
    """Return the description of each argument in a section of arguments."""
    found = re.findall(r"(?ms)^    (\w+): (.*?)(?=^    \w|\Z)", section)
    return {name: text.rstrip() for name, text in found}
