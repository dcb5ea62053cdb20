# SPDX-License-Identifier: Apache-2.0
"""Type checkers know every optimizer in its three forms, with every argument, and nothing else."""

from __future__ import annotations

import torch
from typing_extensions import assert_type

import torchopt
from torchopt.optim.adam import Adam
from torchopt.optim.meta.sgd import MetaSGD


def right(net: torch.nn.Module) -> None:
    assert_type(torchopt.Lion(net.parameters(), lr=0.1), torchopt.Lion)
    assert_type(torchopt.MetaLion(net, lr=0.1, first_order=True), torchopt.MetaLion)
    assert_type(Adam(net.parameters()), torchopt.Adam)
    assert_type(MetaSGD(net, 0.1, 0.9), torchopt.MetaSGD)
    assert_type(torchopt.yogi(0.1), torchopt.base.GradientTransformation)
    assert_type(torchopt.optim.Adadelta(net.parameters()), torchopt.AdaDelta)
    assert_type(torchopt.MetaSophia(net, batch_size=2.0).impl, torchopt.base.GradientTransformation)


def wrong(net: torch.nn.Module) -> None:
    torchopt.MetaLyon  # type: ignore[attr-defined]  # noqa: B018
    torchopt.lyon(0.1)  # type: ignore[attr-defined]
    torchopt.optim.MetaLion  # type: ignore[attr-defined]  # noqa: B018
    torchopt.MetaLion(net, learning_rate=0.1)  # type: ignore[call-arg]
    torchopt.Lion(net.parameters(), betas=0.9)  # type: ignore[arg-type]
    torchopt.SGD(net.parameters())  # type: ignore[call-arg]
    torchopt.Adam(net.parameters(), moment_requires_grad=True)  # type: ignore[call-arg]
