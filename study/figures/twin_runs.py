"""Figures of the study: each function draws one table and returns a closed figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullLocator

from adapter_twin.service.metrics import STARVATION_THRESHOLD
from adapter_twin.service.perfetto import step_starts_s
from adapter_twin.twin.records import Simulation
from study.figures.style import (
    BLUE,
    COLORS,
    GREY,
    INK,
    LABELS,
    SCALES,
    SERIES,
    dots,
    finish,
    legend_outside,
    shades,
    split_label,
)

TWINS = ("measured", "ours", "authors")


def service(swept: pd.DataFrame) -> Figure:
    """Draw throughput and TTFT over the served adapters, a line per slot count.

    Parameters
    ----------
    swept : pandas.DataFrame
        As `study.ch01_to_06.sweep`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    offered = swept.groupby("served_adapters")["offered_tokens_per_s"].first()
    left.plot(offered, color=GREY, ls="--", lw=1)
    left.fill_between(
        offered.index, STARVATION_THRESHOLD * offered, 0, color="0.5", alpha=0.12, lw=0
    )
    left.text(0.97, 0.06, "starved", transform=left.transAxes, ha="right", color=GREY)
    colors = shades(swept["adapter_slots"], "adapter slots")
    for slots, line in swept[swept["feasible_start"]].groupby("adapter_slots"):
        style = {"color": colors[int(str(slots))], "marker": "o", "ms": 4, "label": f"{slots}"}
        left.plot(line["served_adapters"], line["total_throughput"], **style)
        right.plot(line["served_adapters"], line["p99_ttft_ms"] / 1e3, **style)
    left.annotate(
        "offered", (offered.index[-1], offered.iloc[-1]), (-8, 0), textcoords="offset points",
        ha="right", va="center", color=GREY,
    )  # fmt: skip
    left.set(xlabel="served adapters", ylabel=LABELS["total_throughput"], ylim=(0, None))
    right.set(xlabel="served adapters", ylabel="p99 TTFT (s)", yscale="log")
    right.legend(title="adapter slots", frameon=False)
    return finish(figure)


def timeline(run: Simulation) -> Figure:
    """Draw each request as it waits and is served, and the adapters of every step's batch."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=(3, 1))
    records = run.records
    colors = SERIES[: int(records.adapter.max()) + 1]
    rows = np.arange(len(records))
    until_s = np.nan_to_num(records.scheduled_s, nan=run.duration_s)
    end_s = np.nan_to_num(records.end_s, nan=run.duration_s)
    shade = [colors[adapter] for adapter in records.adapter]
    top.hlines(rows, records.arrival_s, until_s, colors="0.75", lw=1.5)
    top.hlines(rows, until_s, np.maximum(end_s, until_s), colors=shade, lw=5)
    top.plot(records.first_token_s, rows, "k|", ms=7)
    top.invert_yaxis()
    top.set(ylabel="request")
    top.grid(axis="y", visible=False)
    for adapter, color in enumerate(colors):
        top.plot([], [], color=color, lw=5, label=f"{adapter}")
    legend_outside(top, title="adapter")
    bottom.step(run.steps["end_s"], run.steps["adapters"], where="pre", color=INK, lw=1)
    bottom.plot(run.steps["end_s"], run.steps["waiting"], color=COLORS["alarm"], lw=1)
    bottom.set(xlabel="time (s)", ylabel="count", xlim=(0, run.duration_s))
    bottom.legend(
        ["adapters in the batch", "requests waiting"], frameon=False, ncols=2,
        loc="lower center", bbox_to_anchor=(0.5, 1),
    )  # fmt: skip
    return finish(figure)


def step_durations(run: Simulation) -> Figure:
    """Draw each step's duration over its batched tokens; steps that loaded an adapter stand out."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    duration_ms = 1e3 * (run.steps["end_s"] - step_starts_s(run))
    loads = run.steps["loads"] > 0
    for chosen, label, color in (
        (~loads, "no load", BLUE),
        (loads, "with adapter loads", COLORS["alarm"]),
    ):
        axes.plot(run.steps["tokens"][chosen], duration_ms[chosen], ".", color=color, label=label)
    axes.set(xlabel="tokens in the batch", ylabel="step (ms)", xscale="log", ylim=(0, None))
    axes.legend(frameon=False)
    return finish(figure)


def long_tail(tail: pd.DataFrame) -> Figure:
    """Draw mean TTFT by popularity of the adapter, a line per slot count."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    colors = shades(tail["adapter_slots"], "adapter slots")
    for slots, line in tail.groupby("adapter_slots"):
        smooth = line["mean_ttft_ms"].rolling(5, center=True, min_periods=1).median()
        axes.plot(line["adapter"] + 1, smooth, color=colors[int(str(slots))], label=f"{slots}")
    axes.set(xlabel="adapter, most popular first", ylabel="mean TTFT (ms)", yscale="log")
    axes.legend(title="adapter slots", frameon=False)
    return finish(figure)


def memory(law: pd.DataFrame, measured: pd.DataFrame | None) -> Figure:
    """Draw KV-cache tokens over slots by rank, one panel per model, and measured starts if any."""
    models = sorted(law["model"].unique())
    figure, panels = plt.subplots(1, len(models), figsize=(9.5, 3.6), squeeze=False)
    colors = shades(law["max_lora_rank"], "rank")
    for model, axes in zip(models, panels[0], strict=True):
        for rank, line in law[law["model"] == model].groupby("max_lora_rank"):
            color = colors[int(str(rank))]
            axes.plot(line["adapter_slots"], line["kv_cache_tokens"], color=color, label=f"{rank}")
            if measured is not None:
                points = measured[
                    (measured["model"] == model) & (measured["max_lora_rank"] == rank)
                ]
                axes.plot(
                    points["adapter_slots"], points["kv_cache_tokens"], "o", color=color, ms=4
                )
        axes.set(title=model, xlabel="adapter slots", ylabel="KV-cache tokens", ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:,.0f}")
    legend_outside(panels[0, -1], title="max. rank")
    return finish(figure)


def bands(
    table: pd.DataFrame, x: str, by: str, panel: str | None, *, xlabel: str, ylabel: str,
    log: str = "xy", title: str = "",
) -> Figure:  # fmt: skip
    """Draw medians with their quartiles over `x`, a line per `by`, a panel per `panel`.

    Where `title` is a key of `study.figures.style.SCALES`, lines have the colours of that scale.
    """
    panels = sorted(table[panel].unique()) if panel else [""]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.75 * max(len(panels), 1.3), 3.6), squeeze=False, sharey=True
    )
    levels = sorted(table[by].unique())
    colors = shades(levels, title) if title in SCALES else dict(zip(levels, SERIES, strict=False))
    for name, ax in zip(panels, axes[0], strict=True):
        part = table[table[panel] == name] if panel else table
        for level, color in colors.items():
            line = part[part[by] == level]
            ax.plot(line[x], line["median"], "o-", color=color, ms=3.5, lw=1.3, label=f"{level}")
            ax.fill_between(line[x], line["low"], line["high"], color=color, alpha=0.15, lw=0)
        ax.set(xlabel=xlabel, title=name)
        ax.set_xscale("log" if "x" in log else "linear")
        ax.set_yscale("log" if "y" in log else "linear")
    axes[0, 0].set_ylabel(ylabel)
    legend_outside(axes[0, -1], title=title or by)
    return finish(figure)


def coefficients(terms: pd.DataFrame) -> Figure:
    """Draw the step-time law's coefficients with their intervals, a panel per regime of tokens.

    Parameters
    ----------
    terms : pandas.DataFrame
        As `study.ch01_to_06.step_costs`.
    """
    regimes = list(dict.fromkeys(terms["regime"]))
    names = list(dict.fromkeys(terms["term"]))[::-1]
    figure, panels = plt.subplots(
        1, len(regimes), figsize=(9.5, 0.28 * len(names) + 1.2), sharey=True, squeeze=False
    )
    for regime, axes in zip(regimes, panels[0], strict=True):
        part = terms[terms["regime"] == regime]
        places = [names.index(term) for term in part["term"]]
        axes.hlines(places, part["low"], part["high"], color=GREY)
        axes.plot(part["cost"], places, "o", ms=4, color=BLUE)
        axes.axvline(0, color=INK, lw=0.8)
        axes.set(xlabel="ms per step", yticks=range(len(names)))
        axes.set_title(regime, fontsize="small")
        axes.set_yticklabels(names)
    return finish(figure)


def errors(table: pd.DataFrame, figures: list[str]) -> Figure:
    """Draw the error of both twins by regime with its interval, a panel per figure.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows of `adapter_twin.service.validate.Validation.errors` of one measure, by regime.
    """
    regimes = [r for r in ("light", "near saturation", "starved", "client collapsed")
               if r in set(table["regime"])]  # fmt: skip
    figure, panels = plt.subplots(1, len(figures), figsize=(9.5, 3.4), squeeze=False, sharey=True)
    colors = {twin: COLORS[twin] for twin in ("ours", "authors")}
    for name, axes in zip(figures, panels[0], strict=True):
        dots(axes, table[table["figure"] == name], "regime", regimes, "twin", colors)
        axes.set(title=split_label(name)[0], xlabel="MAPE (%)", xscale="log")
    panels[0, 0].invert_yaxis()
    legend_outside(panels[0, -1])
    return finish(figure)


def curves(table: pd.DataFrame, figures: list[str]) -> Figure:
    """Draw figures of service over the served adapters: measured and by the twins.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per run and ``twin`` (`TWINS`), of one model and workload.
    """
    slots = sorted(table["adapter_slots"].unique())
    figure, panels = plt.subplots(
        len(figures), len(slots), figsize=(2.5 * len(slots), 2.4 * len(figures) + 0.3),
        sharex=True, sharey="row", squeeze=False,
    )  # fmt: skip
    for name, row in zip(figures, panels, strict=True):
        for count, axes in zip(slots, row, strict=True):
            for twin in TWINS:
                line = table[(table["twin"] == twin) & (table["adapter_slots"] == count)]
                line = line.sort_values("served_adapters").dropna(subset=[name])
                if len(line):
                    marker = "o" if twin == "measured" else "."
                    axes.plot(
                        line["served_adapters"], line[name], marker, ls="-", lw=1.2, ms=5,
                        color=COLORS[twin], label=LABELS[twin],
                    )  # fmt: skip
        row[0].set_ylabel(LABELS.get(name, name))
        if "ttft" in name:
            row[0].set_yscale("log")  # shared along the row
    for count, top, bottom in zip(slots, panels[0], panels[-1], strict=True):
        top.set_title(f"{count} slots")
        bottom.set_xlabel("served adapters")
    panels[0, 0].legend(frameon=False)
    return finish(figure)


def against_measured(table: pd.DataFrame, by: str) -> Figure:
    """Draw predictions over measurements, a panel per figure; the line is agreement.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``figure``, ``measured``, ``predicted`` and `by`, which gives the colours.
    by : str
    """
    figures = list(dict.fromkeys(table["figure"]))
    width = min(3.2 * len(figures) + 1.4, 10.5)
    figure, panels = plt.subplots(1, len(figures), figsize=(width, 3.4), squeeze=False)
    for name, axes in zip(figures, panels[0], strict=True):
        part = table[table["figure"] == name]
        for label, points in part.groupby(by, sort=False):
            axes.plot(points["measured"], points["predicted"], "o", ms=4, alpha=0.7, label=label)
        ends = part[["measured", "predicted"]].stack().agg(["min", "max"])
        axes.plot(ends, ends, color=INK, lw=0.8)
        axes.set(xscale="log", yscale="log", title=LABELS.get(name, name), xlabel="measured")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(_few_ticks(ends["max"] / ends["min"]))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    panels[0, 0].set_ylabel("predicted")
    legend_outside(panels[0, -1], title=by.replace("_", " "))
    return finish(figure)


def _few_ticks(ratio: float) -> Locator:
    """Return the ticks of a logarithmic axis whose ends are in that ratio."""
    if ratio < 5:
        return MaxNLocator(4)
    return LogLocator(subs=(1, 2, 5) if ratio < 50 else (1,))
