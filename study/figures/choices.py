"""Figures of the chapters on planning."""

from __future__ import annotations

import re
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from adapter_twin.service.metrics import STARVATION_THRESHOLD
from study.figures import style

TARGET_LABELS = {
    "served_adapters": "served adapters N*",
    "adapter_slots": "adapter slots G*",
    "total_throughput": "throughput",
}
FEATURE_COLORS = {"paper": style.COLORS["authors"], "traffic": style.COLORS["ours"]}


def settling(table: pd.DataFrame) -> Figure:
    """Draw how TTFT and the requests in flight settle after an empty start.

    The table is that of `study.ch08_window.settling`.
    """
    labels = {"mean_ttft_ms": style.LABELS["mean_ttft_ms"], "in_flight": "requests in flight"}
    grid = style.measures(
        table.assign(in_flight=table.in_flight.clip(lower=0.5)), labels, kind="line", x="minute",
        hue="run_id", title="",
    )  # fmt: skip
    grid.set(xlabel="minute of arrival", yscale="log")
    grid.axes_dict[labels["in_flight"]].set_xlabel("minute")
    return style.finish(grid)


def optima(labels: pd.DataFrame) -> Figure:
    """Draw the optimum's adapters over the load of one, coloured by its slots.

    Parameters
    ----------
    labels : pandas.DataFrame
        See `adapter_twin.learn.sweep.label`, with ``adapter_load`` in tokens/s.
    """
    grid = style.panels(
        labels, kind="scatter", x="adapter_load", y="served_adapters", col="model",
        col_order=sorted(labels["model"].unique()), hue="adapter_slots",
        palette=style.shades(labels["adapter_slots"], "adapter slots"), title="adapter slots G*",
        alpha=0.7, s=16, linewidth=0,
    )  # fmt: skip
    grid.set(xscale="log", yscale="log")
    grid.set_axis_labels("load of an adapter (tokens/s)", TARGET_LABELS["served_adapters"])
    style.ticks(grid.axes[0, 0].yaxis, labels["served_adapters"])
    return style.finish(grid)


def model_errors(comparison: pd.DataFrame, measure: str = "test_half_smape") -> Figure:
    """Draw the error of every model, a panel per target, by set of features.

    Parameters
    ----------
    comparison : pandas.DataFrame
        See `adapter_twin.learn.surrogates.compare`, of one language model.
    measure : str
        A column of it.
    """
    named = comparison.assign(features=comparison.features + " features")
    grid = style.panels(
        named, kind="scatter", x=measure, y="model", col="target", hue="features", s=25,
        linewidth=0, palette={f"{name} features": color for name, color in FEATURE_COLORS.items()},
        height=0.27 * comparison.model.nunique() + 1.3, title="", sharex=False,
    )  # fmt: skip
    grid.set(xlim=(0, None)).set_axis_labels("halved SMAPE (%)", "")
    for target, axes in grid.axes_dict.items():
        axes.set_title(TARGET_LABELS[target])
    grid.axes[0, 0].invert_yaxis()
    return style.finish(grid)


def small_tree(tree: Any, names: list[str]) -> Figure:
    """Draw a regression tree of a logarithm, with the values themselves in its nodes."""
    from sklearn.tree import plot_tree

    figure, axes = plt.subplots(figsize=(9.5, 1.15 * tree.get_depth() + 1.6))
    nodes = plot_tree(
        tree, feature_names=names, impurity=False, proportion=False, precision=4, filled=True,
        rounded=True, fontsize=8, ax=axes,
    )  # fmt: skip
    for node in nodes:
        text = node.get_text().replace("samples =", "workloads:")
        node.set_text(re.sub(r"value = (\S+)", _plain, text))
    return style.finish(figure)


def _plain(found: re.Match[str]) -> str:
    return f"predicted: {np.exp(float(found[1])):.3g}"


def importance(table: pd.DataFrame) -> Figure:
    """Draw by how much the error grows where a feature is permuted, a panel per model.

    The table is that of `study.ch09_explain.importance`.
    """
    named = table.assign(feature=table.feature.str.replace("_", " "))
    features = named.feature.unique()
    height = 0.27 * len(features) + 1.3
    grid = sns.catplot(
        named, kind="bar", x="increase", y="feature", order=features, col="model", color=style.BLUE,
        width=0.6, saturation=1, height=height, aspect=9.5 / table.model.nunique() / height,
        sharex=False,
    )  # fmt: skip
    grid.map(plt.hlines, "feature", "low", "high", color=style.INK, lw=1.5)
    grid.set_titles("{col_name}").set_axis_labels("points of halved SMAPE", "")
    return style.finish(grid)


def dependence(table: pd.DataFrame, ylabel: str) -> Figure:
    """Draw partial dependence, a panel per feature, a line per model.

    Parameters
    ----------
    table : pandas.DataFrame
        See `study.ch09_explain.dependence`.
    ylabel : str
    """
    grid = style.panels(
        table, kind="line", x="value", y="predicted", col="feature", hue="model",
        sharex=False, title="",
    )  # fmt: skip
    grid.set(yscale="log").set_titles("").set_axis_labels("", ylabel)
    for feature, axes in grid.axes_dict.items():
        axes.set_xlabel(feature.replace("_", " "))
        low, high = table.loc[table.feature == feature, "value"].agg(["min", "max"])
        if low > 0 and high > 20 * low:
            axes.set_xscale("log")
    return style.finish(grid)


def regret(table: pd.DataFrame) -> Figure:
    """Draw the throughput that each way of choosing loses, and how many of its picks starve.

    The table is that of `study.ch08_to_10.methods`.
    """
    figure, axes = plt.subplots(figsize=(8.5, 0.24 * len(table) + 1.2))
    sns.barplot(
        table.assign(regret=table.regret.clip(lower=0.1)), x="regret", y="method", hue="kind",
        palette=list(style.SERIES[: table.kind.nunique()]), dodge=False, width=0.7, saturation=1,
        ax=axes,
    )  # fmt: skip
    for place, (lost, starving) in enumerate(zip(table.regret, table.starving_picks, strict=True)):
        note = f" {lost:.2g}" + (f", {starving} starve" if starving else "")
        axes.text(max(float(lost), 0.1), place, note, va="center", fontsize=8, color=style.INK)
    axes.set(xlabel="mean regret (% of the best measured throughput)", xscale="log", ylabel="")
    axes.set_xlim(0.1, 300)
    style.legend_outside(axes)
    return style.finish(figure)


def service_map(runs: pd.DataFrame, picked: tuple[int, int] | None = None) -> Figure:
    """Draw the served share and the mean TTFT over the grid of adapters and slots.

    Parameters
    ----------
    runs : pandas.DataFrame
        Predicted runs of one workload (`adapter_twin.plan.grid.evaluate`).
    picked : tuple of int, optional
        Served adapters and slots of the optimum, marked.
    """
    share = runs.assign(
        share=100 * runs.total_throughput / runs.offered_tokens_per_s,
        ttft_s=runs.mean_ttft_ms / 1e3,
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.8, 3.9), sharey=True)
    _map(left, share, "share", "load served (%)", picked, vmin=40, vmax=100)
    _map(right, share, "ttft_s", "mean TTFT (s)", picked, cmap="rocket_r", norm=LogNorm())
    starved = share.pivot_table(index="adapter_slots", columns="served_adapters", values="share")
    for axes in (left, right):
        axes.contour(
            np.arange(starved.shape[1]) + 0.5, np.arange(starved.shape[0]) + 0.5, starved,
            levels=[100 * STARVATION_THRESHOLD], colors="k", linewidths=1.2,
        )  # fmt: skip
    return style.finish(figure)


def _map(
    axes: Axes, runs: pd.DataFrame, value: str, label: str, picked: tuple[int, int] | None,
    cmap: str = "viridis", **scale: Any,
) -> None:  # fmt: skip
    table = runs.pivot_table(
        index="adapter_slots", columns="served_adapters", values=value, dropna=False
    )
    sns.heatmap(table, ax=axes, cmap=cmap, cbar_kws={"label": label}, **scale)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel=style.LABELS["served_adapters"], ylabel=style.LABELS["adapter_slots"])
    if picked is not None:
        x, y = table.columns.get_loc(picked[0]), table.index.get_loc(picked[1])
        axes.plot(int(str(x)) + 0.5, int(str(y)) + 0.5, "*", color="w", mec="k", ms=14)


def sobol(table: pd.DataFrame) -> Figure:
    """Draw first-order and total Sobol indices with their intervals, a panel per answer.

    The table is that of `study.ch11_sensitivity.sobol_indices`.
    """
    named = table.replace("_", " ", regex=True)
    colors = {"alone": style.BLUE, "with interactions": style.ORANGE}
    parts = []
    for column, kind in zip(("first", "total"), colors, strict=True):
        index, half = table[column], table[f"{column}_conf"]
        parts.append(named.assign(value=index, low=index - half, high=index + half, index=kind))
    indices, factors = pd.concat(parts, ignore_index=True), list(named.factor.unique())
    grid = style.dots(
        indices, "factor", factors, "answer", by="index", colors=colors, row_height=0.33
    )
    for axes in grid.axes.flat:
        axes.axvline(0, color=style.GREY, lw=0.8)
    grid.set_xlabels("Sobol index")
    return style.finish(grid)
