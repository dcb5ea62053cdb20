# SPDX-License-Identifier: Apache-2.0
"""Bar plots of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class PlottingError(Exception):
    """Matplotlib is not installed."""


def draw_bars(
    path: Path,
    title: str,
    panels: Sequence[tuple[str, Sequence[str], Sequence[tuple[str, Sequence[float | None]]]]],
    ylabel: str,
) -> None:
    """Draw groups of bars on a logarithmic axis, a panel beside a panel, into a PNG file.

    Args:
        path: the file to write; its folder is made.
        title: text over all panels.
        panels: for each panel its title, the names of the groups, and the series: a label and
            one height a group, None where there is none.
        ylabel: text beside the axis.

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
        figsize=(4.2 * len(panels), 4.0),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, groups, series) in zip(axes[0], panels):
        width = 0.8 / len(series)
        for index, (label, heights) in enumerate(series):
            places = [
                group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))
            ]
            drawn = axis.bar(places, [height or 0.0 for height in heights], width, label=label)
            texts = ["" if height is None else f"{height:.3g}" for height in heights]
            axis.bar_label(drawn, texts, fontsize=6, rotation=90, padding=2)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(name)
        axis.set_xticks(range(len(groups)), groups, fontsize=8)
        axis.set_yscale("log")
        axis.margins(y=0.15)
    axes[0][0].set_ylabel(ylabel)
    figure.suptitle(title)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
