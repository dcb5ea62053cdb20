# SPDX-License-Identifier: Apache-2.0
"""Bar plots of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class PlottingError(Exception):
    """Matplotlib is not installed."""


def draw_bars(
    path: Path,
    title: str,
    panels: Sequence[tuple[str, Sequence[str], Sequence[tuple[str, Sequence[float | None]]]]],
    ylabel: str,
    *,
    note: str = "",
    description: str = "",
    slanted: bool = False,
) -> None:
    """Draw groups of bars on a logarithmic axis, panels side by side, into a PNG file.

    Args:
        path: the file to write; its folder is made.
        title: text over all panels.
        panels: for each panel its title, the names of the groups, and the series: a label and
            one height per group, None for a missing one.
        ylabel: text beside the axis.
        note: text under the title: the machine and the date.
        description: stored in the file, for programs.
        slanted: whether the names of the groups are too long to fit side by side.

    Raises:
        PlottingError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PlottingError(
            "expected matplotlib to draw the plot, found none; install it (pip install matplotlib)"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(4.2 * len(panels), 5.0 if slanted else 4.0),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for axis, (name, groups, series) in zip(axes[0], panels):
        shown = [(n, *one) for n, one in enumerate(series) if any(h is not None for h in one[1])]
        width = 0.8 / max(1, len(shown))
        for index, (number, label, heights) in enumerate(shown):
            places = [
                group + (index - (len(shown) - 1) / 2) * width for group in range(len(groups))
            ]
            # A series keeps its colour and its place in the legend if other panels lack it.
            drawn = axis.bar(
                places, [h or 0.0 for h in heights], width, label=label, color=f"C{number}"
            )
            handles.setdefault(label, drawn)
            texts = ["" if height is None else f"{height:.3g}" for height in heights]
            axis.bar_label(drawn, texts, fontsize=6, rotation=90, padding=2)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(name)
        slope: dict[str, Any] = {"rotation": 60, "ha": "right"} if slanted else {}
        axis.set_xticks(range(len(groups)), groups, fontsize=8, **slope)
        axis.set_yscale("log")
        axis.margins(y=0.15)
    axes[0][0].set_ylabel(ylabel)
    figure.suptitle(f"{title}\n{note}".strip(), fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Description": description})
    pyplot.close(figure)
