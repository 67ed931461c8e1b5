"""Figures of simulated runs, and of the measurements beside them."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullLocator

from adapter_twin.service.metrics import STARVATION_THRESHOLD
from adapter_twin.service.perfetto import step_starts_s
from adapter_twin.twin.records import Simulation
from study.figures import style

TWINS = ("measured", "ours", "authors")
REGIMES = ("light", "near saturation", "starved", "client collapsed")


def service(swept: pd.DataFrame) -> Figure:
    """Draw throughput and TTFT over the served adapters, a line per slot count.

    The table is that of `study.ch01_to_06.sweep`.
    """
    labels = {"total_throughput": style.LABELS["total_throughput"], "p99_ttft_ms": "p99 TTFT (s)"}
    grid = style.measures(
        swept[swept["feasible_start"]].assign(p99_ttft_ms=swept["p99_ttft_ms"] / 1e3), labels,
        kind="line", x="served_adapters", hue="adapter_slots", marker="o", ms=5, height=3.8,
        palette=style.shades(swept["adapter_slots"], "adapter slots"), title="adapter slots",
    )  # fmt: skip
    left, right = grid.axes.flat
    offered = swept.groupby("served_adapters")["offered_tokens_per_s"].first()
    left.plot(offered, color=style.GREY, ls="--", lw=1)
    left.fill_between(
        offered.index, STARVATION_THRESHOLD * offered, 0, color="0.5", alpha=0.12, lw=0
    )
    left.text(0.97, 0.06, "starved", transform=left.transAxes, ha="right", color=style.GREY)
    left.annotate(
        "offered", (offered.index[-1], offered.iloc[-1]), (-8, 0), textcoords="offset points",
        ha="right", va="center", color=style.GREY,
    )  # fmt: skip
    left.set_ylim(0, None)
    right.set_yscale("log")
    grid.set(xlabel="served adapters")
    return style.finish(grid)


def timeline(run: Simulation) -> Figure:
    """Draw each request as it waits and is served, and the adapters of every step's batch."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=(3, 1))
    records = run.records
    colors = style.SERIES[: int(records.adapter.max()) + 1]
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
    style.legend_outside(top, title="adapter")
    bottom.step(run.steps["end_s"], run.steps["adapters"], where="pre", color=style.INK, lw=1)
    bottom.plot(run.steps["end_s"], run.steps["waiting"], color=style.COLORS["alarm"], lw=1)
    bottom.set(xlabel="time (s)", ylabel="count", xlim=(0, run.duration_s))
    bottom.legend(
        ["adapters in the batch", "requests waiting"], frameon=False, ncols=2,
        loc="lower center", bbox_to_anchor=(0.5, 1),
    )  # fmt: skip
    return style.finish(figure)


def step_durations(run: Simulation) -> Figure:
    """Draw each step's duration over its batched tokens; steps that loaded an adapter stand out."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    duration_ms = 1e3 * (run.steps["end_s"] - step_starts_s(run))
    colors = {"no load": style.BLUE, "with adapter loads": style.COLORS["alarm"]}
    kinds = np.where(run.steps["loads"] > 0, "with adapter loads", "no load")
    sns.scatterplot(
        x=run.steps["tokens"], y=duration_ms, hue=kinds, hue_order=colors, palette=colors, s=12,
        linewidth=0, ax=axes,
    )  # fmt: skip
    axes.set(xlabel="tokens in the batch", ylabel="step (ms)", xscale="log", ylim=(0, None))
    axes.legend(frameon=False)
    return style.finish(figure)


def long_tail(tail: pd.DataFrame) -> Figure:
    """Draw mean TTFT by popularity of the adapter, a line per slot count."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    sns.lineplot(
        x=tail["adapter"] + 1, y=style.smoothed(tail, ["adapter_slots"], "mean_ttft_ms", 5),
        hue=tail["adapter_slots"], palette=style.shades(tail["adapter_slots"], "adapter slots"),
        ax=axes,
    )  # fmt: skip
    axes.set(xlabel="adapter, most popular first", ylabel="mean TTFT (ms)", yscale="log")
    axes.legend(title="adapter slots", frameon=False)
    return style.finish(figure)


def memory(law: pd.DataFrame, measured: pd.DataFrame | None) -> Figure:
    """Draw KV-cache tokens over slots by rank, one panel per model, and measured starts if any."""
    colors = style.shades(law["max_lora_rank"], "rank")
    drawn: dict[str, Any] = {
        "x": "adapter_slots",
        "y": "kv_cache_tokens",
        "hue": "max_lora_rank",
        "palette": colors,
    }
    grid = style.panels(
        law, kind="line", col="model", col_order=sorted(law["model"].unique()), share=False,
        height=3.6, title="max. rank", **drawn,
    )  # fmt: skip
    for model, axes in grid.axes_dict.items():
        if measured is not None:
            own = measured[(measured["model"] == model) & measured["max_lora_rank"].isin(colors)]
            sns.scatterplot(own, **drawn, s=20, linewidth=0, legend=False, ax=axes)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    grid.set(ylim=(0, None)).set_axis_labels("adapter slots", "KV-cache tokens")
    return style.finish(grid)


def bands(
    table: pd.DataFrame, x: str, by: str, panel: str | None, *, xlabel: str, ylabel: str,
    log: str = "xy", title: str = "",
) -> Figure:  # fmt: skip
    """Draw medians with their quartiles over a column, a line per value of another.

    Parameters
    ----------
    table : pandas.DataFrame
        ``low``, ``median`` and ``high`` of each row, and the columns named here.
    x, by : str
    panel : str, optional
        The column that has a panel for each of its values.
    xlabel, ylabel : str
    log : str
        The axes that are logarithmic.
    title : str
        Title of the legend. Where it is a key of `study.figures.style.SCALES`, lines have the
        colours of that scale.
    """
    levels = sorted(table[by].unique())
    long = table.melt([x, by, *filter(None, [panel])], ["low", "median", "high"], value_name="y")
    facets: dict[str, Any] = {}
    if panel:
        facets = {"col": panel, "col_order": sorted(table[panel].unique())}
    colors = style.shades(levels, title) if title in style.SCALES else style.SERIES[: len(levels)]
    grid = style.panels(
        long, kind="line", x=x, y="y", hue=by, estimator="median", errorbar=("pi", 100),
        palette=colors, marker="o", ms=4, lw=1.3, err_kws={"alpha": 0.15, "lw": 0}, height=3.6,
        width=8.2 if panel else 5.2, title=title or by, **facets,
    )  # fmt: skip
    grid.set(**{f"{axis}scale": "log" for axis in log}).set_axis_labels(xlabel, ylabel)
    return style.finish(grid)


def step_costs(costs: pd.DataFrame) -> Figure:
    """Draw what the parts of a step cost over the tokens in its batch, a panel per model.

    The table is that of `study.ch01_to_06.step_costs`.
    """
    grid = style.panels(
        costs, kind="line", x="tokens", y="cost", hue="part", col="model", lw=1.5, title="",
    )  # fmt: skip
    grid.set(xscale="log", ylim=(0, None)).set_axis_labels("tokens in the batch", "ms per step")
    for axes in grid.axes.flat:
        style.ticks(axes.xaxis, 2.0 ** np.arange(5, 12))
    return style.finish(grid)


def errors(table: pd.DataFrame, figures: list[str]) -> Figure:
    """Draw the error of both twins by regime with its interval, a panel per figure.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows of `adapter_twin.service.validate.Validation.errors` of one measure, by regime.
    """
    regimes = [name for name in REGIMES if name in set(table["regime"])]
    shown = table[table["figure"].isin(figures)].replace({"twin": style.LABELS})
    shown = shown.sort_values("figure", key=lambda names: names.map(figures.index))
    colors = {style.LABELS[twin]: style.COLORS[twin] for twin in ("ours", "authors")}
    grid = style.dots(shown, "regime", regimes, "figure", by="twin", colors=colors, row_height=0.55)
    grid.set(xlabel="MAPE (%)", xscale="log")
    for axes in grid.axes.flat:
        style.plain_numbers(axes.xaxis)
    return style.finish(grid)


def curves(table: pd.DataFrame, figures: list[str]) -> Figure:
    """Draw figures of service over the served adapters: measured and by the twins.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per run and ``twin`` (`TWINS`), of one model and workload.
    """
    long = table.melt(["twin", "adapter_slots", "served_adapters"], figures, "figure", "drawn")
    long = long.replace({"twin": style.LABELS}).dropna(subset="drawn")
    twins = {style.LABELS[twin]: style.COLORS[twin] for twin in TWINS}
    grid = style.panels(
        long, kind="line", x="served_adapters", y="drawn", row="figure", col="adapter_slots",
        hue="twin", hue_order=twins, palette=twins, style="twin", style_order=twins,
        markers=dict(zip(twins, "o..", strict=True)), dashes=False, lw=1.2, share="row", height=2.4,
        width=2.2 * table["adapter_slots"].nunique(), title="",
    )  # fmt: skip
    grid.set_titles("").set_xlabels("served adapters")
    for name, row in zip(figures, grid.axes, strict=True):
        row[0].set_ylabel(style.LABELS.get(name, name))
        if "ttft" in name:
            row[0].set_yscale("log")  # shared along the row
    for slots, axes in zip(grid.col_names, grid.axes[0], strict=True):
        axes.set_title(f"{slots} slots")
    return style.finish(grid)


def against_measured(table: pd.DataFrame, by: str) -> Figure:
    """Draw predictions over measurements, a panel per figure; the line is agreement.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``figure``, ``measured``, ``predicted`` and `by`, which gives the colours.
    by : str
    """
    grid = style.panels(
        table.astype({by: str}), kind="scatter", x="measured", y="predicted", col="figure",
        hue=by, palette="colorblind", sharex=False, share=False, s=18, alpha=0.7, linewidth=0,
        width=min(3.2 * table["figure"].nunique(), 9), title=by.replace("_", " "),
    )  # fmt: skip
    grid.set(xscale="log", yscale="log")
    for name, axes in grid.axes_dict.items():
        own = table.loc[table["figure"] == name, ["measured", "predicted"]]
        low, high = own.min().min(), own.max().max()
        axes.plot((low, high), (low, high), color=style.INK, lw=0.8)
        axes.set_title(style.LABELS.get(name, name))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(_few_ticks(high / low))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    return style.finish(grid)


def _few_ticks(ratio: float) -> Locator:
    """Return the ticks of a logarithmic axis whose ends are in that ratio."""
    if ratio < 5:
        return MaxNLocator(4)
    return LogLocator(subs=(1, 2, 5) if ratio < 50 else (1,))
