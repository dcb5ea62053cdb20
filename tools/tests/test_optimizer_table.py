# SPDX-License-Identifier: Apache-2.0
"""The table of optimizers in the manual agrees with the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import optimizer_table
from torchopt import alias
from torchopt.base import GradientTransformation


def test_the_page_has_the_measured_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert optimizer_table.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- optimizers:begin -->\n\nold\n\n<!-- optimizers:end -->\n")
    monkeypatch.setattr(optimizer_table, "PAGE", page)
    monkeypatch.setattr(optimizer_table, "optimizer_table", lambda: "new\n")
    assert optimizer_table.main(["--check"]) == 1
    assert optimizer_table.main([]) == 0
    assert optimizer_table.main(["--check"]) == 0


def test_a_sign_has_no_derivative_and_its_state_is_counted() -> None:
    def make(lr: float = 1e-3, unused: float = 1.0) -> GradientTransformation:
        """Return steps by signs.

        References:
            A. B. Author, C. D. Other, A Title, 2001, https://example.org/2001.01234
        """

        def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
            return {name: -lr * g.sign() for name, g in updates.items()}, state

        return GradientTransformation(lambda params: dict(params), update)

    assert optimizer_table.differentiable_in("signs", make) == ["`lr`"]
    assert optimizer_table.state_bytes(make) == 4.0
    assert optimizer_table.paper(make) == "[Author and Other, 2001](https://example.org/2001.01234)"


def test_the_figures_of_adam_are_those_of_its_definition() -> None:
    torch.manual_seed(0)
    assert round(optimizer_table.state_bytes(alias.adam), 1) == 8.0  # two moments in float32
    assert optimizer_table.native(alias.adam) == "yes"
    assert optimizer_table.native(alias.lamb) == "in part"  # the ratio of norms follows
    assert optimizer_table.native(alias.yogi) == optimizer_table.NOTHING
