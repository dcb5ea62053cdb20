# SPDX-License-Identifier: Apache-2.0
"""Registered dataclasses are dataclasses for type checkers too."""

from __future__ import annotations

import dataclasses

from typing_extensions import assert_type

import optree
import optree.dataclasses
import optree.functools


@optree.dataclasses.dataclass(namespace="static-types")
class Layer:
    weight: float
    bias: float = optree.dataclasses.field(default=0.0)
    sizes: list[int] = optree.dataclasses.field(default_factory=list, pytree_node=False)


@optree.dataclasses.register_node("static-types")
@dataclasses.dataclass
class Point:
    x: float
    y: float


def uses() -> None:
    layer = Layer(1.0, sizes=[2])
    assert_type(layer, Layer)
    assert_type(layer.bias, float)
    assert_type(layer.sizes, list[int])
    assert_type(Point(1.0, 2.0).x, float)
    assert_type(optree.dataclasses.replace(layer, bias=1.0), Layer)


def scaled(x: float, by: float) -> str:
    return str(by * x)


def partial_functions() -> None:
    partial = optree.functools.partial(scaled, by=2.0)
    assert_type(partial, optree.functools.partial[str])
    assert_type(partial(1.0), str)


def wrong_arguments() -> None:
    Layer()  # type: ignore[call-arg]
    Layer("1.0")  # type: ignore[arg-type]
    Layer(1.0, 2.0, [3], 4)  # type: ignore[call-arg]
    assert Layer(1.0).width  # type: ignore[attr-defined]
    optree.dataclasses.dataclass(Layer)  # type: ignore[call-overload]
