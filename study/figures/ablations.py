"""Figures of the chapters on the published twin and on limits."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from adapter_twin.service.validate import LIGHT, NEAR_SATURATION, STARVED
from study.figures.style import (
    BLUE,
    GREEN,
    GREY,
    LABELS,
    dots,
    finish,
    legend_outside,
    shades,
    split_label,
)

REGIMES = (LIGHT, NEAR_SATURATION, STARVED)


def _plain(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, few of them."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def errors(table: pd.DataFrame) -> Figure:
    """Draw errors by ablation and regime with their intervals, a panel per figure of service.

    Parameters
    ----------
    table : pandas.DataFrame
        As `study.ch14_ablation.error_table`.
    """
    names = list(dict.fromkeys(table["ablation"]))
    figures = list(dict.fromkeys(table["figure"]))
    figure, panels = plt.subplots(
        1, len(figures), figsize=(9.5, 0.5 * len(names) + 1.2), squeeze=False, sharey=True
    )
    for name, axes in zip(figures, panels[0], strict=True):
        part = table[table["figure"] == name]
        dots(axes, part, "ablation", names, "regime", shades(REGIMES))
        kind = "MAPE" if (part["measure"] == "mape").all() else "median error"
        axes.set(title=split_label(name)[0], xlabel=f"{kind} (%)", xscale="log")
        _plain(axes.xaxis)
    panels[0, 0].invert_yaxis()
    legend_outside(panels[0, -1])
    return finish(figure)


def extrapolation(table: pd.DataFrame) -> Figure:
    """Draw errors over how far outside the fitted range a run is, a panel per figure of service.

    Parameters
    ----------
    table : pandas.DataFrame
        As `study.ch14_limits.extrapolation`.
    """
    figures = [name for name in LABELS if name in set(table["figure"])]
    markers = {"adapter_slots": "o", "max_lora_rank": "s"}
    figure, panels = plt.subplots(1, len(figures), figsize=(9.5, 3.2), squeeze=False)
    for name, axes in zip(figures, panels[0], strict=True):
        for column, part in table[table["figure"] == name].groupby("column"):
            for fit, color, label in (("seen", GREY, "in the fit"), ("left_out", BLUE, "left out")):
                axes.plot(
                    part["times"], part[fit], markers[str(column)], ms=4, color=color,
                    alpha=0.8, label=f"{LABELS.get(str(column), 'rank')}, {label}",
                )  # fmt: skip
        axes.set(title=split_label(name)[0], xlabel="times the highest value fitted", xscale="log")
        axes.set(yscale="symlog", ylim=(0, None))
        axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    panels[0, 0].set_ylabel("median error (%)")
    legend_outside(panels[0, -1])
    return finish(figure)


def seed_spread(table: pd.DataFrame) -> Figure:
    """Draw the median TTFT of simulated hours over the load, and how far apart seeds put it.

    Parameters
    ----------
    table : pandas.DataFrame
        As `study.ch14_limits.seed_spread`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2))
    load = 100 * table["utilisation"]
    left.fill_between(load, table["low"] / 1e3, table["high"] / 1e3, color=BLUE, alpha=0.25, lw=0)
    left.plot(load, table["middle"] / 1e3, "o-", ms=3.5, color=BLUE)
    left.set(ylabel="median TTFT (s)")
    right.plot(load, table["spread"], "o-", ms=3.5, color=BLUE)
    right.set(ylabel="highest by lowest seed")
    for axes in (left, right):
        axes.set(xlabel="offered load (% of capacity)", yscale="log")
        _plain(axes.yaxis)
    return finish(figure)


def learning_curve(table: pd.DataFrame) -> Figure:
    """Draw errors of held-out runs over the steps calibrated on, a panel per figure of service.

    Parameters
    ----------
    table : pandas.DataFrame
        As `study.ch14_limits.learning_curve`.
    """
    figures = [name for name in LABELS if name in table]
    figure, panels = plt.subplots(1, len(figures), figsize=(9.5, 3.2), squeeze=False)
    for name, axes in zip(figures, panels[0], strict=True):
        for part, color, label in (
            ("batches", BLUE, "fewer batches of every engine"),
            ("engines", GREEN, "fewer engines"),
        ):
            draws = table[table["part"] == part]
            axes.plot(draws["steps"], draws[name], "o", ms=4, alpha=0.7, color=color, label=label)
        axes.axhline(table.loc[table["share"] == 1, name].iloc[0], color=GREY, lw=1, ls="--")
        axes.set(
            title=split_label(name)[0], xlabel="steps calibrated on", xscale="log", yscale="log"
        )
        _plain(axes.xaxis)
        _plain(axes.yaxis)
    panels[0, 0].set_ylabel("MAPE of held-out runs (%)")
    legend_outside(panels[0, -1])
    return finish(figure)
