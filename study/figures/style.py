"""The look of the study's figures: one theme, and one colour for each thing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

if TYPE_CHECKING:
    import pandas as pd

BLUE, ORANGE, GREEN, VERMILION, PINK, BROWN = sns.color_palette("colorblind", 6).as_hex()
INK, GREY = "0.25", "0.5"

SERIES = (BLUE, ORANGE, GREEN, PINK, BROWN)
"""Things without an order that a figure tells apart have these colours."""

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
"""Things with an order have a colour map, whose range is spanned on a logarithmic scale."""


def use_style() -> None:
    """Set the theme of all figures."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85)
    plt.rcParams.update({"figure.dpi": 144, "axes.spines.top": False, "axes.spines.right": False})


def shades(values: Iterable[Any], of: str = "") -> dict[Any, Any]:
    """Return a colour for each value of something that has an order.

    Parameters
    ----------
    values : iterable
    of : str, optional
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


def panels(
    table: pd.DataFrame, *, width: float = 8.2, height: float = 3.4, title: str | None = None,
    share: bool | str = True, **drawn: Any,
) -> sns.FacetGrid:  # fmt: skip
    """Draw a table by `seaborn.relplot`, a panel per value of ``col``, titled by it.

    Parameters
    ----------
    table : pandas.DataFrame
    width, height : float
        Inches of a row of panels, without the legend.
    title : str, optional
        Title of the legend, where that is not the name of its column.
    share : bool or str
        The y-axes that are shared, as in `matplotlib.pyplot.subplots`.
    **drawn
        Arguments of `seaborn.relplot` and of what it draws. A line has all of its rows as points.
    """
    count = table[drawn["col"]].nunique() if "col" in drawn else 1
    if "hue" in drawn:
        drawn = {"palette": list(SERIES[: table[drawn["hue"]].nunique()])} | drawn
    if drawn.get("kind") == "line":
        drawn = {"estimator": None, "mew": 0} | drawn
    grid = sns.relplot(
        table.reset_index(drop=True), height=height, aspect=width / count / height,
        facet_kws={"sharey": share, "sharex": drawn.pop("sharex", True)}, **drawn,
    )  # fmt: skip
    if title is not None:
        grid.legend.set_title(title)
    return _titled(grid)


def _titled(grid: sns.FacetGrid) -> sns.FacetGrid:
    """Title each panel by its value, a figure of service by its name without the unit."""
    for value, axes in grid.axes_dict.items():
        axes.set_title(split_label(str(value))[0])
    return grid


def measures(table: pd.DataFrame, labels: dict[str, str], **drawn: Any) -> sns.FacetGrid:
    """Draw `panels` of several columns, each with its label at its own y-axis.

    Parameters
    ----------
    table : pandas.DataFrame
    labels : dict of str
        Label of each column that is drawn.
    **drawn
        Arguments of `panels`.
    """
    others = [name for name in table if name not in labels]
    long = table.rename(columns=labels).melt(others, [*labels.values()], "measure", "drawn")
    grid = panels(long, y="drawn", col="measure", share=False, **drawn).set_titles("")
    for label, axes in grid.axes_dict.items():
        axes.set_ylabel(label)
    return grid


def dots(
    table: pd.DataFrame, row: str, rows: Iterable[str], panel: str, *, by: str | None = None,
    colors: dict[str, Any] | None = None, row_height: float = 0.5,
) -> sns.FacetGrid:  # fmt: skip
    """Draw values with their intervals in rows, a panel per value of one more column.

    Parameters
    ----------
    table : pandas.DataFrame
        ``value``, ``low``, ``high`` and the columns `row`, `panel` and `by`.
    row : str
    rows : iterable of str
        From top to bottom; no other is drawn.
    panel : str
    by : str, optional
        What stands beside each other within a row.
    colors : dict, optional
        Of the values of `by`, from top to bottom within a row.
    row_height : float
        Inches.
    """
    rows, count = list(rows), table[panel].nunique()
    table = table[table[row].isin(rows)]
    height = row_height * len(rows) + 1.2
    shifts = 0.24 * (np.arange(len(colors)) - (len(colors) - 1) / 2) if colors else [0.0]
    grid = sns.FacetGrid(
        table, col=panel, hue=by, hue_order=colors, palette=colors, hue_kws={"shift": shifts},
        sharex=False, height=height, aspect=8.2 / count / height,
    )  # fmt: skip

    def draw(data: pd.DataFrame, color: Any, shift: float = 0.0, label: str | None = None) -> None:
        at = data[row].map(rows.index) + shift
        plt.hlines(at, data["low"], data["high"], color=color, lw=2, alpha=0.5)
        plt.plot(data["value"], at, "o", ms=5, color=color, label=label)

    grid.map_dataframe(draw, **({} if by else {"color": BLUE}))
    if by:
        grid.add_legend(title="")
    grid.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5), ylabel="")
    return _titled(grid)


def smoothed(table: pd.DataFrame, by: Sequence[str], column: str, rows: int) -> pd.Series[float]:
    """Return the running median of a column over some rows of each group.

    Parameters
    ----------
    table : pandas.DataFrame
        In the order in which its rows are to be run over.
    by : sequence of str
    column : str
    rows : int
    """
    groups = table.groupby(list(by))[column]
    return groups.transform(lambda own: own.rolling(rows, center=True, min_periods=1).median())


def ticks(axis: Axis, values: Iterable[float], **settings: Any) -> None:
    """Put ticks with plain numbers at some values of a logarithmic axis, and no others."""
    at = sorted(set(values))
    axis.set_ticks(at, [f"{value:g}" for value in at], **settings)
    axis.set_minor_locator(NullLocator())


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, few of them."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def legend_outside(axes: Axes, **settings: Any) -> None:
    """Put a legend to the right of a panel."""
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), **settings)


def finish(drawn: Figure | sns.FacetGrid) -> Figure:
    """Lay a figure out and close it: a notebook shows what a cell returns."""
    drawn.tight_layout()
    figure: Figure = drawn if isinstance(drawn, Figure) else drawn.figure
    plt.close(figure)
    return figure
