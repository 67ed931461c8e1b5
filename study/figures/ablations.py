"""Figures of the chapters on the published twin and on limits."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from adapter_twin.service.validate import LIGHT, NEAR_SATURATION, STARVED
from study.figures import style

REGIMES = (LIGHT, NEAR_SATURATION, STARVED)


def errors(table: pd.DataFrame) -> Figure:
    """Draw errors by ablation and regime with their intervals, a panel per figure of service.

    The table is that of `study.ch14_ablation.error_table`.
    """
    names = list(dict.fromkeys(table["ablation"]))
    grid = style.dots(table, "ablation", names, "figure", by="regime", colors=style.shades(REGIMES))
    measures = table.groupby("figure")["measure"].first()
    for name, axes in grid.axes_dict.items():
        kind = "MAPE" if measures[name] == "mape" else "median error"
        axes.set(xlabel=f"{kind} (%)", xscale="log")
        style.plain_numbers(axes.xaxis)
    return style.finish(grid)


def extrapolation(table: pd.DataFrame) -> Figure:
    """Draw errors over how far outside the fitted range a run is, a panel per figure of service.

    The table is that of `study.ch14_limits.extrapolation`.
    """
    fits = {"seen": "in the fit", "left_out": "left out"}
    long = table.melt(["figure", "column", "times"], list(fits), "fit", "error")
    columns = long["column"].replace(style.LABELS | {"max_lora_rank": "rank"})
    long["run"] = columns + ", " + long["fit"].map(fits)
    runs = sorted(set(long["run"]))
    colors = {name: style.BLUE if fits["left_out"] in name else style.GREY for name in runs}
    grid = style.panels(
        long, kind="scatter", x="times", y="error", col="figure", share=False, sharex=False,
        col_order=[name for name in style.LABELS if name in set(table["figure"])],
        hue="run", hue_order=runs, palette=colors, style="run", style_order=runs, s=18, alpha=0.8,
        markers={name: "s" if "rank" in name else "o" for name in runs}, linewidth=0, title="",
        clip_on=False,
    )  # fmt: skip
    grid.set(xscale="log", yscale="symlog", ylim=(0, None))
    grid.set_axis_labels("times the highest value fitted", "median error (%)")
    for axes in grid.axes.flat:
        style.ticks(axes.xaxis, (1, 2, 4, 8))
        axes.yaxis.set_major_formatter("{x:g}")
    return style.finish(grid)


def seed_spread(table: pd.DataFrame) -> Figure:
    """Draw the median TTFT of simulated hours over the load, and how far apart seeds put it.

    The table is that of `study.ch14_limits.seed_spread`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2))
    load = 100 * table["utilisation"]
    left.fill_between(
        load, table["low"] / 1e3, table["high"] / 1e3, color=style.BLUE, alpha=0.25, lw=0
    )
    for axes, drawn, label in (
        (left, table["middle"] / 1e3, "median TTFT (s)"),
        (right, table["spread"], "highest by lowest seed"),
    ):
        axes.plot(load, drawn, "o-", ms=3.5, color=style.BLUE)
        axes.set(xlabel="offered load (% of capacity)", ylabel=label, yscale="log")
        style.plain_numbers(axes.yaxis)
    return style.finish(figure)


def learning_curve(table: pd.DataFrame) -> Figure:
    """Draw errors of held-out runs over the steps calibrated on, a panel per figure of service.

    The table is that of `study.ch14_limits.learning_curve`.
    """
    figures = [name for name in style.LABELS if name in table]
    ways = {"batches": "fewer batches of every engine", "engines": "fewer engines"}
    long = table.melt(["part", "share", "steps"], figures, "figure", "error")
    colors = dict(zip(ways.values(), (style.BLUE, style.GREEN), strict=True))
    grid = style.panels(
        long.assign(way=long["part"].map(ways)), kind="scatter", x="steps", y="error",
        col="figure", share=False, hue="way", palette=colors, alpha=0.7, linewidth=0, s=18,
        title="",
    )  # fmt: skip
    grid.set(xscale="log", yscale="log")
    grid.set_axis_labels("steps calibrated on", "MAPE of held-out runs (%)")
    for name, axes in grid.axes_dict.items():
        axes.axhline(table.loc[table["share"] == 1, name].iloc[0], color=style.GREY, lw=1, ls="--")
        style.plain_numbers(axes.xaxis)
        style.plain_numbers(axes.yaxis)
    return style.finish(grid)
