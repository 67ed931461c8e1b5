"""Figures of the reference study's overheads: of each table of `study.published_overheads`."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from study.figures import style
from study.published_overheads import REQUEST_TOKENS, VARIED, most_served


def caching_problem(points: pd.DataFrame) -> Figure:
    """Draw the table of the same name: a panel per thing varied, crosses at `most_served`."""
    figure, grid = plt.subplots(2, 2, figsize=(8.5, 6.4), sharey=True)
    best = most_served(points)
    for name, axes in zip(VARIED, grid.flat, strict=True):
        for table, look in ((points, {"marker": "."}), (best, {"marker": "X", "ls": ""})):
            own = table[table["varied"] == name]
            sns.lineplot(
                own, x="adapters", y="total_throughput", hue=own["level"].map("{:g}".format),
                palette=[*style.shades(own["level"]).values()], legend=table is points, ax=axes,
                mew=0, ms=9, **look,
            )  # fmt: skip
        axes.set(ylabel=style.LABELS["total_throughput"])
        axes.label_outer()
        style.legend_outside(axes, title=name)
    grid[0, 0].set_ylim(0, None)  # shared by all
    return style.finish(figure)


def memory_overhead(points: pd.DataFrame) -> Figure:
    """Draw the table of the same name: two sizes of requests, and the running ones of the first."""
    shown = (
        ("medium", "total_throughput", style.LABELS["total_throughput"]),
        ("large", "total_throughput", style.LABELS["total_throughput"]),
        ("medium", "running", "running requests (mean)"),
    )
    return _panels(points, shown, "adapter_slots", style.LABELS["adapter_slots"])


def compute_overhead(points: pd.DataFrame) -> Figure:
    """Draw the table of the same name: two sizes of requests, and the ITL of the first."""
    shown = (
        ("small", "total_throughput", style.LABELS["total_throughput"]),
        ("medium", "total_throughput", style.LABELS["total_throughput"]),
        ("small", "mean_itl_ms", style.LABELS["mean_itl_ms"]),
    )
    return _panels(points, shown, "adapters", "adapters in use")


def _panels(
    points: pd.DataFrame, shown: tuple[tuple[str, str, str], ...], x: str, xlabel: str
) -> Figure:
    """Draw a panel for each pair of request size and figure, a line per rank and model."""
    parts = [
        points[points["requests"] == requests].assign(drawn=points[value], panel=panel)
        for panel, (requests, value, _) in enumerate(shown)
    ]
    table = pd.concat(parts).rename(columns={"max_lora_rank": "max. rank"})
    dashes = dict(zip(sorted(table["model"].unique(), reverse=True), ("", (1, 1)), strict=False))
    looks: dict[str, Any] = {"style": "model", "dashes": dashes} if len(dashes) > 1 else {}
    grid = style.panels(
        table.astype({"max. rank": int}), kind="line", x=x, y="drawn", col="panel", marker=".",
        hue="max. rank", palette=style.shades(table["max. rank"], "rank"), lw=1.3, share=False,
        height=3.2, **looks,
    )  # fmt: skip
    grid.set(xlabel=xlabel, ylim=(0, None))
    for (requests, _, label), axes in zip(shown, grid.axes.flat, strict=True):
        axes.set(title=f"{requests} requests", ylabel=label)
    return style.finish(grid)


def load_impact(impact: pd.DataFrame) -> Figure:
    """Draw the table of the same name: bars by rank and size of requests, a panel per source."""
    grid = sns.catplot(
        impact.astype({"rank": "int"}), kind="bar", x="rank", y="impact", hue="requests",
        hue_order=list(REQUEST_TOKENS), palette=list(style.SERIES[:3]), saturation=1,
        col="source", col_order=["disk", "memory"], sharey=False, height=3.2, aspect=1.25,
    )  # fmt: skip
    grid.axes_dict["disk"].set_title("load from disk")
    grid.axes_dict["memory"].set_title("load from host memory")
    grid.set_ylabels("load by decoding time (%)")
    return style.finish(grid)
