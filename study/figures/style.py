"""The look of the study's figures: one theme, and one colour for each thing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import pandas as pd

BLUE, ORANGE, GREEN, VERMILION, PINK, BROWN = sns.color_palette("colorblind", 6).as_hex()
INK, GREY = "0.25", "0.5"

SERIES = (BLUE, ORANGE, GREEN, PINK, BROWN)
"""Of things without an order that a figure tells apart."""

COLORS = {
    "measured": INK,
    "ours": BLUE,
    "authors": ORANGE,  # the reference study's twin, labels and features
    "alarm": VERMILION,  # what a reader should look at: loads, waits
}
LABELS = {
    "measured": "measured",
    "ours": "this twin",
    "authors": "the authors' twin",
    "total_throughput": "total throughput (tokens/s)",
    "mean_itl_ms": "mean ITL (ms)",
    "median_ttft_ms": "median TTFT (ms)",
    "mean_ttft_ms": "mean TTFT (ms)",
    "p99_ttft_ms": "p99 TTFT (ms)",
    "served_adapters": "served adapters",
    "adapter_slots": "adapter slots",
}

SCALES = {"adapter slots": ("viridis", 4, 512), "rank": ("flare", 4, 64)}
"""Of things with an order, the colour map and the range that it spans, on a logarithmic scale."""


def use_style() -> None:
    """Set the theme of all figures."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85)
    plt.rcParams.update({"figure.dpi": 144, "axes.spines.top": False, "axes.spines.right": False})


def shades(values: Iterable[Any], of: str = "") -> dict[Any, Any]:
    """Return a colour for each value of something that has an order.

    Parameters
    ----------
    values : iterable
    of : str
        A key of `SCALES`: a count then has the same colour in every figure. Left out, the values
        share out a colour map among them.
    """
    levels = sorted(set(values))
    if of:
        name, low, high = SCALES[of]
        at = np.log(np.clip(levels, low, high) / low) / np.log(high / low)
        colors = sns.color_palette(name, as_cmap=True)(at)
    else:
        colors = sns.color_palette("viridis", len(levels) + 1)
    return dict(zip(levels, colors, strict=False))


def split_label(figure: str) -> tuple[str, str]:
    """Return the name and the unit of a figure of service, empty where it has none.

    >>> split_label("mean_itl_ms")
    ('mean ITL', 'ms')
    """
    name, _, unit = LABELS.get(figure, figure).partition(" (")
    return name, unit.removesuffix(")")


def dots(
    axes: Axes, table: pd.DataFrame, row: str, rows: list[str], by: str, colors: dict[str, Any]
) -> None:
    """Draw values with their intervals: rows by one column, beside each other by another.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    table : pandas.DataFrame
        ``value``, ``low``, ``high`` and the columns `row` and `by`.
    row, by : str
    rows : list of str
        From top to bottom.
    colors : dict
        Of the values of `by`, from top to bottom within a row.
    """
    for place, (value, color) in enumerate(colors.items()):
        part = table[table[by] == value].set_index(row).reindex(rows)
        at = np.arange(len(rows)) + 0.24 * (place - (len(colors) - 1) / 2)
        axes.hlines(at, part["low"], part["high"], color=color, lw=2, alpha=0.5)
        axes.plot(part["value"], at, "o", ms=5, color=color, label=LABELS.get(value, value))
    axes.set_yticks(range(len(rows)), rows)


def legend_outside(axes: Axes, **settings: Any) -> None:
    """Put a legend to the right of a panel."""
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), **settings)


def finish(figure: Figure) -> Figure:
    """Lay a figure out and close it: a notebook shows what a cell returns."""
    figure.tight_layout()
    plt.close(figure)
    return figure
