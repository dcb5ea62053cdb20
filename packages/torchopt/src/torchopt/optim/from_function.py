# SPDX-License-Identifier: Apache-2.0
"""Make classes from functions: `Adam` and `MetaAdam` from `adam`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from inspect import Parameter
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchopt.base import GradientTransformation
from torchopt.documented import entries, joined, sections
from torchopt.index import PUBLISHED
from torchopt.optimizers import stages
from torchopt.optimizers.stages import _get_use_chain_flat

__all__ = ["Form", "class_from"]


DEFAULTS: dict[str, dict[str, Any]] = {
    "adadelta": {"lr": 1.0, "moment_requires_grad": True},
    "adam": {"moment_requires_grad": True},
    "adamax": {"lr": 2e-3, "eps": 1e-8, "moment_requires_grad": True},
    "radam": {"eps": 1e-8, "moment_requires_grad": True},
    "sgd": {"moment_requires_grad": True},
}
"""Defaults of published classes that differ from those of their functions.

`moment_requires_grad` is an argument of the meta class alone, because steps in place have no
derivative.
"""

POSITIONAL = {
    "sgd": (
        *("lr", "momentum", "weight_decay", "dampening", "nesterov"),
        *("moment_requires_grad", "maximize"),
    ),
}
"""The order of positional arguments of published classes if it is not that of their functions."""

Constructor = Callable[..., GradientTransformation]


class Form(NamedTuple):
    """What all classes of one kind have in common.

    Attributes:
        base: The base class, which steps.
        package: The package of the classes.
        leading: The first argument: what is stepped.
        leading_text: Its line in the docstring.
        summary: First line of the docstring, with a field for the name of the optimizer.
        example: Example in the docstring, with a field for the name of the class.
        dropped: An argument of the functions that the classes do not have.
    """

    base: type
    package: str
    leading: Parameter
    leading_text: str
    summary: str
    example: str
    dropped: str = ""


def class_from(function: Constructor, name: str, form: Form) -> type:
    """Return the class that steps with the transformation that `function` returns.

    Args:
        function: Returns the gradient transformation. The class has the leading argument of
            `form`, followed by those of the function.
        name: The name of the class.
        form: The kind of the class.
    """
    # The arguments of the base class are self, what is stepped, the transformation, and options.
    options = list(inspect.signature(form.base.__init__).parameters.values())[3:]  # type: ignore[misc]
    passed = _arguments(function, form.dropped)
    signature = inspect.Signature([form.leading, *passed, *options])
    made = type(name, (form.base,), {"__doc__": _docstring(function, name, form, signature)})
    # A published class keeps the module that it was published in.
    home = f".{function.__name__}" if function.__name__ in PUBLISHED else ""
    made.__module__ = form.package + home
    made.__init__ = _initializer(made, function, signature, passed)  # type: ignore[misc]
    return made


def _arguments(function: Constructor, dropped: str) -> list[Parameter]:
    """Return the arguments of a function in the order and with the defaults of its classes."""
    own = {p.name: p for p in inspect.signature(function).parameters.values() if p.name != dropped}
    for name, default in DEFAULTS.get(function.__name__, {}).items():
        if name in own:
            own[name] = own[name].replace(default=default)
    order = [name for name in POSITIONAL.get(function.__name__, ()) if name in own]
    positional = [own.pop(n).replace(kind=Parameter.POSITIONAL_OR_KEYWORD) for n in order]
    return [*positional, *own.values()]


def _initializer(
    made: type, function: Constructor, signature: inspect.Signature, passed: Sequence[Parameter]
) -> Callable[..., None]:
    """Return `__init__` with this signature; `passed` are the arguments of the function.

    It is compiled from text, as for dataclasses, so that Python itself binds the arguments.
    `Signature.bind` would take longer than the rest of the construction.
    """
    parameters = ["self"]
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        parameters.append(p.name if p.default is p.empty else f"{p.name}=_defaults[{p.name!r}]")
    stepped, *rest = signature.parameters
    impl = f"_function({', '.join(p.name for p in passed)})"
    options = [f"{name}={name}" for name in rest[len(passed) :]]
    text = (
        f"def __init__({', '.join(parameters)}):\n"
        f"    super(_made, self).__init__({', '.join([stepped, impl, *options])})"
    )
    names: dict[str, Any] = {
        **getattr(function, "__globals__", {}),  # typing.get_type_hints looks names up there
        "Iterable": Iterable,
        "Tensor": Tensor,
        "nn": nn,
        "_function": _Remembering(function, [p.name for p in passed]),
        "_made": made,
        "_defaults": {p.name: p.default for p in signature.parameters.values()},
    }
    exec(compile(text, f"<torchopt: {made.__qualname__}.__init__>", "exec"), names)
    init: Callable[..., None] = names.pop("__init__")
    init.__qualname__, init.__module__ = f"{made.__qualname__}.__init__", made.__module__
    init.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    init.__annotations__["return"] = "None"
    return init


class _Remembering:
    """A function that caches its results for numbers; transformations have no state.

    In meta-learning each task makes the same optimizer again, which would take as long as a step.
    """

    def __init__(self, function: Constructor, names: Sequence[str]) -> None:
        self.function = function
        self.names = names
        self.made: dict[tuple[Any, ...], GradientTransformation] = {}

    def __call__(self, *args: Any) -> GradientTransformation:
        """Return `function(**dict(zip(names, args)))`."""
        kinds = tuple(map(type, args))  # 1, 1.0 and True are equal
        if not _NUMBERS.issuperset(kinds) or not all(
            type(x) is float for arg in args if type(arg) is tuple for x in arg
        ):
            return self.function(**dict(zip(self.names, args)))
        key = (args, kinds, _get_use_chain_flat(), stages.DEFAULT_BACKEND)
        found = self.made.get(key)
        if found is None:
            found = self.function(**dict(zip(self.names, args)))
            if len(self.made) >= 256:
                self.made.clear()
            self.made[key] = found
        return found


_NUMBERS = frozenset((bool, int, float, str, tuple, type(None)))


def _docstring(
    function: Constructor, name: str, form: Form, signature: inspect.Signature
) -> str | None:
    """Return the docstring of a class: that of the function, with the arguments of the class."""
    if function.__doc__ is None or form.base.__doc__ is None:  # python -OO
        return None
    parts = sections(function.__doc__)
    known = entries(sections(form.base.__doc__)["Args"]) | entries(parts["Args"])
    args = (f"    {name}: {known[name]}" for name in list(signature.parameters)[1:])
    _, _, above = parts[""].partition("\n")
    parts[""] = f"{form.summary.format(name=name.removeprefix('Meta'))}\n{above}".rstrip()
    parts["Args"] = "\n".join([f"    {form.leading_text}", *args])
    parts["Example"] = textwrap.indent(form.example.format(name=name), "    ")
    return joined(parts)
