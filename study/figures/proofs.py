"""Figures of the chapter on what was recommended: each draws one table and returns it closed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from adapter_twin.prove.rivals import TWIN
from study.figures.style import BLUE, COLORS, GREY, INK, LABELS, finish, legend_outside, shades

COLUMNS = 4


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
    names = list(dict.fromkeys(runs.workload))
    columns = min(len(names), COLUMNS)
    rows = -(-len(names) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(2.3 * columns + 1.6, 2.5 * rows + 0.4), squeeze=False, sharey=True
    )
    chosen = picks[picks.method == TWIN].set_index("workload").adapter_slots
    for name, axes in zip(names, panels.flat, strict=False):
        own = runs[runs.workload == name]
        started = own[own.starts]
        line = own[own.predicted_starts].groupby("adapter_slots").predicted_mean_ttft_ms.mean()
        axes.plot(line, color=COLORS["ours"], lw=1.3, label="predicted")
        for serves, label in ((True, "measured"), (False, "measured, does not serve")):
            dots = started[started.serves == serves]
            axes.plot(
                dots.adapter_slots, dots.mean_ttft_ms, "o", ms=4.5, label=label,
                color=COLORS["measured"], mfc=COLORS["measured"] if serves else "none",
            )  # fmt: skip
        if pd.notna(chosen[name]):
            axes.axvspan(chosen[name] / 1.12, chosen[name] * 1.12, color=BLUE, alpha=0.15, lw=0)
        axes.set(xscale="log", yscale="log", title=name)
        ticks = sorted(started.adapter_slots.unique())
        axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize="x-small")
        axes.xaxis.set_minor_locator(NullLocator())
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel(LABELS["adapter_slots"])
    for axes in panels[:, 0]:
        axes.set_ylabel(LABELS["mean_ttft_ms"])
    legend_outside(panels[0, -1])
    return finish(figure)


def regrets(chosen: pd.DataFrame, methods: pd.DataFrame) -> Figure:
    """Draw what each method's choices cost: a dot per workload, and the mean with its interval.

    Parameters
    ----------
    chosen, methods : pandas.DataFrame
        What `choices` and `methods` of `adapter_twin.prove.comparison` return.
    """
    names = list(methods.method)[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 0.36 * len(names) + 1.3), sharey=True)
    places = {name: place for place, name in enumerate(names)}
    rows = chosen.method.map(places)
    rng = np.random.default_rng(0)
    rows = rows + rng.uniform(-0.15, 0.15, len(rows))  # equal ones would hide each other
    left.plot(chosen.regret, rows, "o", ms=4, color=GREY, alpha=0.7, mew=0)
    at = methods.method.map(places)
    left.hlines(at, methods.low, methods.high, color=COLORS["ours"], lw=2, alpha=0.6)
    left.plot(methods.regret, at, "o", ms=6, color=COLORS["ours"])
    left.set_xscale("symlog", linthresh=1)
    left.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    left.set(xlabel="throughput lost against the best (%)", yticks=range(len(names)))
    left.set_yticklabels(names)
    right.plot(chosen.ttft_ratio, rows, "o", ms=4, color=GREY, alpha=0.7, mew=0)
    right.plot(methods.ttft_ratio, at, "o", ms=6, color=COLORS["ours"])
    right.axvline(1, color=INK, lw=0.8)
    right.set(xscale="log", xlabel="mean TTFT by the lowest one that serves")
    right.xaxis.set_major_formatter("{x:g}")
    return finish(figure)


def fairness(adapters: pd.DataFrame) -> Figure:
    """Draw p99 TTFT of each adapter by its popularity, a panel per workload.

    Dots are measured, lines predicted (running medians over nine adapters); a colour per number of
    slots.

    Parameters
    ----------
    adapters : pandas.DataFrame
        What `study.ch15_proof.per_adapter` returns.
    """
    names = list(dict.fromkeys(adapters.workload))
    figure, panels = plt.subplots(1, len(names), figsize=(9.5, 3.6), squeeze=False, sharey=True)
    colors = shades(adapters.adapter_slots, "adapter slots")
    for name, axes in zip(names, panels[0], strict=True):
        for slots, line in adapters[adapters.workload == name].groupby("adapter_slots"):
            line = line.sort_values("place")
            color = colors[int(str(slots))]
            axes.plot(line.place, line.p99_ttft_ms, "o", ms=3, alpha=0.6, color=color)
            smooth = line.predicted_p99_ttft_ms.rolling(9, center=True, min_periods=1).median()
            axes.plot(line.place, smooth, color=color, lw=1.5)
        axes.set(title=name, xlabel="adapter, most popular first", xscale="log", yscale="log")
    panels[0, 0].set_ylabel(LABELS["p99_ttft_ms"])
    for slots, color in colors.items():
        panels[0, -1].plot([], [], color=color, label=f"{slots}")
    legend_outside(panels[0, -1], title="adapter slots")
    return finish(figure)
