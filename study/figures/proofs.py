"""Figures of the chapter on what was recommended."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from adapter_twin.prove.rivals import TWIN
from study.figures import style

COLUMNS = 4
"""Panels stand at most four in a row."""


def slots(runs: pd.DataFrame, picks: pd.DataFrame) -> Figure:
    """Draw mean TTFT over adapter slots, measured and predicted, a panel per workload.

    Full dots served the workload, hollow ones did not; a band marks what was recommended.

    Parameters
    ----------
    runs : pandas.DataFrame
        What `adapter_twin.prove.outcome.service` returns.
    picks : pandas.DataFrame
        Of `adapter_twin.prove.outcome.Outcome`.
    """
    chosen = picks[picks.method == TWIN].set_index("workload").adapter_slots
    count = runs.workload.nunique()
    shown = runs.assign(
        predicted=runs.predicted_mean_ttft_ms.where(runs.predicted_starts),
        measured=runs.mean_ttft_ms.where(runs.starts & runs.serves),
        **{"measured, does not serve": runs.mean_ttft_ms.where(runs.starts & ~runs.serves)},
    )
    grid = sns.FacetGrid(
        shown, col="workload", col_wrap=min(count, COLUMNS), sharex=False, height=2.5, aspect=0.92
    )
    grid.map_dataframe(
        sns.lineplot, x="adapter_slots", y="predicted", errorbar=None, color=style.COLORS["ours"],
        lw=1.3, label="predicted", legend=False,
    )  # fmt: skip
    ink = style.COLORS["measured"]
    for column, fill in (("measured", ink), ("measured, does not serve", "none")):
        grid.map_dataframe(
            sns.scatterplot, x="adapter_slots", y=column, s=20, ec=ink, fc=fill, label=column,
            legend=False,
        )  # fmt: skip
    grid.set(xscale="log", yscale="log").set_titles("{col_name}").add_legend()
    grid.set_axis_labels(style.LABELS["adapter_slots"], style.LABELS["mean_ttft_ms"])
    for name, axes in grid.axes_dict.items():
        if pd.notna(slots := chosen[name]):
            axes.axvspan(slots / 1.12, slots * 1.12, color=style.BLUE, alpha=0.15, lw=0)
        started = runs[(runs.workload == name) & runs.starts]
        style.ticks(axes.xaxis, started.adapter_slots, fontsize="x-small")
    return style.finish(grid)


def regrets(chosen: pd.DataFrame, methods: pd.DataFrame) -> Figure:
    """Draw what each method's choices cost: a dot per workload, and the mean with its interval.

    Parameters
    ----------
    chosen, methods : pandas.DataFrame
        What `choices` and `methods` of `adapter_twin.prove.comparison` return.
    """
    names = list(methods.method)[::-1]
    places = {name: place for place, name in enumerate(names)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 0.36 * len(names) + 1.3), sharey=True)
    at, rows = methods.method.map(places), chosen.method.map(places)
    # equal ones would hide each other
    rows = rows + np.random.default_rng(0).uniform(-0.15, 0.15, len(rows))
    for column, axes in (("regret", left), ("ttft_ratio", right)):
        axes.plot(chosen[column], rows, "o", ms=4, color=style.GREY, alpha=0.7, mew=0)
        axes.plot(methods[column], at, "o", ms=6, color=style.COLORS["ours"])
    left.hlines(at, methods.low, methods.high, color=style.COLORS["ours"], lw=2, alpha=0.6)
    left.set_xscale("symlog", linthresh=1)
    style.ticks(left.xaxis, (0, 1, 10, 100))
    left.set_xlabel("throughput lost against the best (%)")
    left.set_yticks(range(len(names)), names)
    right.axvline(1, color=style.INK, lw=0.8)
    right.set(xscale="log", xlabel="mean TTFT by the lowest one that serves")
    right.xaxis.set_major_formatter("{x:g}")
    return style.finish(figure)


def fairness(adapters: pd.DataFrame) -> Figure:
    """Draw p99 TTFT of each adapter by its popularity, a panel per workload.

    Dots are measured, lines predicted (running medians over nine adapters); a colour per number of
    slots.

    Parameters
    ----------
    adapters : pandas.DataFrame
        What `study.ch15_proof.per_adapter` returns.
    """
    adapters = adapters.sort_values("place", ignore_index=True)
    groups = ["workload", "adapter_slots"]
    adapters["smooth"] = style.smoothed(adapters, groups, "predicted_p99_ttft_ms", 9)
    colors = style.shades(adapters.adapter_slots, "adapter slots")
    grid = style.panels(
        adapters, kind="scatter", x="place", y="p99_ttft_ms", col="workload",
        col_order=sorted(adapters.workload.unique()), hue="adapter_slots", palette=colors,
        s=9, alpha=0.6, linewidth=0, height=3.6, title="adapter slots",
    )  # fmt: skip
    grid.map_dataframe(
        sns.lineplot, x="place", y="smooth", hue="adapter_slots", palette=colors, lw=1.5,
        estimator=None, legend=False,
    )  # fmt: skip
    grid.set(xscale="log", yscale="log")
    grid.set_axis_labels("adapter, most popular first", style.LABELS["p99_ttft_ms"])
    return style.finish(grid)
