# SPDX-License-Identifier: Apache-2.0
"""Classes made from functions look and behave like classes that were written by hand."""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
import subprocess
import sys
import typing

import pytest
import torch

import torchopt
from torchopt.index import ALIASES, OPTIMIZERS, PUBLISHED
from torchopt.optim.from_function import class_from

CLASSES = [getattr(torchopt, f"{form}{c}") for c in OPTIMIZERS.values() for form in ("", "Meta")]
FUNCTIONS = {c: getattr(torchopt, f) for f, c in OPTIMIZERS.items()}


def function_of(cls: type) -> typing.Any:
    return FUNCTIONS[cls.__name__.removeprefix("Meta")]


def class_id(cls: type) -> str:
    return cls.__name__


@pytest.mark.parametrize("cls", CLASSES, ids=class_id)
def test_a_class_says_where_it_is(cls: type) -> None:
    home = importlib.import_module(cls.__module__)
    assert getattr(home, cls.__qualname__) is cls
    assert cls.__qualname__ == cls.__name__
    assert cls.__init__.__qualname__ == f"{cls.__name__}.__init__"  # type: ignore[misc]
    assert cls.__init__.__module__ == cls.__module__  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(cls)) is cls
    package = "torchopt.optim.meta" if cls.__name__.startswith("Meta") else "torchopt.optim"
    name = function_of(cls).__name__
    assert cls.__module__ == (f"{package}.{name}" if name in PUBLISHED else package)


@pytest.mark.parametrize("cls", CLASSES, ids=class_id)
def test_the_docstring_describes_every_argument_and_no_other(cls: type) -> None:
    text = inspect.getdoc(cls) or ""
    sections = re.findall(r"(?m)^(\w+):$", text)
    assert sections in (
        ["Args", "Raises", "References", "Example"],
        ["Args", "Raises", "Example"],
    )
    args = re.split(r"(?m)^Args:\n|^Raises:\n", text)[1]
    described = re.findall(r"(?m)^    (\w+): \S", args)
    assert described == list(inspect.signature(cls).parameters)
    summary, above, *_ = text.split("\n\n")
    assert summary.endswith("Optimizer`.")
    if not above.startswith("Args:"):  # the equation
        assert above in inspect.getdoc(function_of(cls))


@pytest.mark.parametrize("cls", CLASSES, ids=class_id)
def test_annotations_can_be_resolved(cls: type) -> None:
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    assert hints.keys() == {*inspect.signature(cls).parameters, "return"}
    of_function = typing.get_type_hints(function_of(cls))
    assert {name: hints[name] for name in of_function if name in hints and name != "return"} == {
        name: hint for name, hint in of_function.items() if name in hints and name != "return"
    }


def transformation_of(cls: type, **settings: object) -> tuple[object, dict[str, object]]:
    """Construct an optimizer and return what its function was called with."""
    net = torch.nn.Linear(2, 2)
    stepped = net if cls.__name__.startswith("Meta") else net.parameters()
    globals_ = cls.__init__.__globals__  # type: ignore[misc]
    function, calls = globals_["_function"], []

    def recorded(*arguments: object) -> object:
        calls.append(dict(zip(function.names, arguments, strict=True)))
        return function(*arguments)

    globals_["_function"] = recorded
    try:
        optimizer = cls(stepped, **settings)
    finally:
        globals_["_function"] = function
    (arguments,) = calls
    return optimizer, arguments


@pytest.mark.parametrize("cls", CLASSES, ids=class_id)
def test_every_argument_reaches_the_function_or_the_base(cls: type) -> None:
    """Also the defaults, which are those of the class."""
    parameters = inspect.signature(cls).parameters
    options = {"first_order": True, "detach_every": 3, "compensated": False, "in_8_bits": False}
    given = {name: value for name, value in options.items() if name in parameters}
    optimizer, arguments = transformation_of(cls, lr=0.25, **given)
    assert {name: getattr(optimizer, name) for name in given} == given
    own = [name for name in list(parameters)[1:] if name not in options]
    assert arguments == {name: 0.25 if name == "lr" else parameters[name].default for name in own}
    expected = set(inspect.signature(function_of(cls)).parameters)
    assert set(own) == expected - ({"moment_requires_grad"} - set(parameters))


def test_optimizers_of_equal_numbers_share_a_transformation() -> None:
    net = torch.nn.Linear(2, 2)
    first, second = (torchopt.MetaAdam(net, lr=0.5, eps=1e-3) for _ in range(2))
    assert first.impl is second.impl
    assert torchopt.MetaAdam(net, lr=0.5, eps=1e-2).impl is not first.impl
    assert torchopt.MetaAdam(net, lr=1).impl is not torchopt.MetaAdam(net, lr=1.0).impl
    betas = (0.5, 0.25)
    assert torchopt.Adam(net.parameters(), betas=betas).impl is not first.impl


@pytest.mark.parametrize("kind", ["tensor", "tensors in a tuple", "schedule", "integers"])
def test_what_may_change_is_made_again(kind: str) -> None:
    net = torch.nn.Linear(2, 2)
    given: dict[str, object] = {
        "tensor": {"lr": torch.tensor(0.1)},
        "tensors in a tuple": {"betas": (torch.tensor(0.9), 0.99)},
        "schedule": {"lr": lambda count: 0.1},
        "integers": {"betas": (0, 0.9)},
    }[kind]
    first, second = (torchopt.MetaAdam(net, **given) for _ in range(2))
    assert first.impl is not second.impl


def test_a_refused_number_is_refused_again() -> None:
    net = torch.nn.Linear(2, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="learning rate"):
            torchopt.MetaSGD(net, lr=-1.0)


def test_the_switch_to_trees_makes_other_transformations() -> None:
    net = torch.nn.Linear(2, 2)
    flat = torchopt.MetaSGD(net, lr=0.5).impl
    torchopt.alias.utils._set_use_chain_flat(False)
    try:
        assert torchopt.MetaSGD(net, lr=0.5).impl is not flat
    finally:
        torchopt.alias.utils._set_use_chain_flat(True)
    assert torchopt.MetaSGD(net, lr=0.5).impl is flat


@pytest.mark.parametrize("cls", CLASSES, ids=class_id)
def test_wrong_arguments_are_refused_by_name(cls: type) -> None:
    net = torch.nn.Linear(2, 2)
    stepped = net if cls.__name__.startswith("Meta") else net.parameters()
    with pytest.raises(TypeError, match=rf"{cls.__name__}.__init__\(\).*'learning_rate'"):
        cls(stepped, learning_rate=0.1)
    with pytest.raises(TypeError, match=rf"{cls.__name__}.__init__\(\) missing"):
        cls(lr=0.1)


@pytest.mark.parametrize("cls", CLASSES, ids=class_id)
def test_users_can_subclass(cls: type) -> None:
    class Mixin:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.seen = True
            super().__init__(*args, **kwargs)

    class Halved(cls):  # type: ignore[misc, valid-type]
        """Half the step size."""

        def __init__(self, stepped: object, lr: float) -> None:
            super().__init__(stepped, lr=lr / 2)

    class First(Mixin, cls):  # type: ignore[misc, valid-type]
        pass

    net = torch.nn.Linear(2, 2)
    for subclass in (Halved, First):
        stepped = net if cls.__name__.startswith("Meta") else list(net.parameters())
        optimizer = subclass(stepped, lr=0.5)
        assert isinstance(optimizer, cls)
        assert optimizer.state_dict()
    assert First(stepped, lr=0.5).seen
    assert Halved.__doc__ == "Half the step size."


def test_second_names_are_the_same_classes() -> None:
    for other, name in ALIASES.items():
        assert getattr(torchopt, other) is getattr(torchopt, name)
        assert getattr(torchopt, f"Meta{other}") is getattr(torchopt, f"Meta{name}")


@pytest.mark.parametrize("package", ["optim", "optim.meta"])
def test_published_modules_have_their_classes_in_a_fresh_interpreter(package: str) -> None:
    form = "Meta" if package == "optim.meta" else ""
    pickled = {  # protocol 0, as the published package writes it
        f"{form}{OPTIMIZERS[name]}": f"ctorchopt.{package}.{name}\n{form}{OPTIMIZERS[name]}\n."
        for name in OPTIMIZERS
        if name in PUBLISHED
    }
    program = f"import pickle\nfor text in {[*pickled.values()]}:\n"
    program += "    print(pickle.loads(text.encode()).__name__)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == list(pickled), run.stderr


def test_a_function_without_docstring_makes_a_class_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As under `python -OO`."""
    monkeypatch.setattr(torchopt.lion, "__doc__", None)
    assert class_from(torchopt.lion, "Lion", torchopt.optim._CLASSIC).__doc__ is None
