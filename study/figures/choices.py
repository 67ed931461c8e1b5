"""Figures of the chapters on planning: each draws one table and returns a closed figure."""

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
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from adapter_twin.service.metrics import STARVATION_THRESHOLD
from study.figures.style import (
    BLUE,
    COLORS,
    GREY,
    INK,
    LABELS,
    ORANGE,
    SERIES,
    finish,
    legend_outside,
    shades,
)

TARGET_LABELS = {
    "served_adapters": "served adapters N*",
    "adapter_slots": "adapter slots G*",
    "total_throughput": "throughput",
}
FEATURE_COLORS = {"paper": COLORS["authors"], "traffic": COLORS["ours"]}


def settling(table: pd.DataFrame) -> Figure:
    """Draw how TTFT and the requests in flight settle after an empty start.

    Parameters
    ----------
    table : pandas.DataFrame
        See `study.ch08_window.settling`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), sharex=True)
    for (name, line), color in zip(table.groupby("run_id", sort=False), SERIES, strict=False):
        left.plot(line.minute, line.mean_ttft_ms, color=color, label=str(name))
        right.plot(line.minute, line.in_flight.clip(lower=0.5), color=color)
    left.set(xlabel="minute of arrival", ylabel="mean TTFT (ms)", yscale="log")
    right.set(xlabel="minute", ylabel="requests in flight", yscale="log")
    left.legend(frameon=False)
    return finish(figure)


def optima(labels: pd.DataFrame) -> Figure:
    """Draw the optimum's adapters over the load of one, coloured by its slots.

    Parameters
    ----------
    labels : pandas.DataFrame
        See `adapter_twin.learn.sweep.label`, with ``adapter_load`` in tokens/s.
    """
    models = sorted(labels["model"].unique())
    figure, panels = plt.subplots(
        1, len(models), figsize=(4.9 * max(len(models), 1.2), 3.8), squeeze=False, sharey=True
    )
    slots = sorted(int(g) for g in labels.adapter_slots.unique())
    colors = shades(slots, "adapter slots")
    for model, axes in zip(models, panels[0], strict=True):
        for count, points in labels[labels["model"] == model].groupby("adapter_slots"):
            axes.plot(
                points.adapter_load, points.served_adapters, "o", ms=4, alpha=0.7,
                color=colors[int(str(count))], label=f"{int(str(count))}",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", title=model, xlabel="load of an adapter (tokens/s)")
        served = sorted(labels.served_adapters.unique())
        axes.set_yticks(served, [f"{n:g}" for n in served])
        axes.yaxis.set_minor_locator(NullLocator())
    panels[0, 0].set_ylabel(TARGET_LABELS["served_adapters"])
    handles = [Line2D([], [], marker="o", ls="", color=colors[g], label=f"{g}") for g in slots]
    legend_outside(panels[0, -1], handles=handles, title="adapter slots G*")
    return finish(figure)


def model_errors(comparison: pd.DataFrame, measure: str = "test_half_smape") -> Figure:
    """Draw the error of every model, a panel per target, by set of features.

    Parameters
    ----------
    comparison : pandas.DataFrame
        See `adapter_twin.learn.surrogates.compare`, of one language model.
    measure : str
        A column of it.
    """
    targets = list(dict.fromkeys(comparison.target))
    models = list(dict.fromkeys(comparison.model))
    figure, panels = plt.subplots(
        1, len(targets), figsize=(9.5, 0.27 * len(models) + 1.3), squeeze=False, sharey=True
    )
    for target, axes in zip(targets, panels[0], strict=True):
        own = comparison[comparison.target == target]
        for features, points in own.groupby("features"):
            at = [models.index(name) for name in points.model]
            color = FEATURE_COLORS[str(features)]
            axes.plot(points[measure], at, "o", ms=5, color=color, label=f"{features} features")
        axes.set(title=TARGET_LABELS[target], xlabel="halved SMAPE (%)", xlim=(0, None))
    panels[0, 0].set_yticks(range(len(models)), models)
    panels[0, 0].invert_yaxis()
    legend_outside(panels[0, -1])
    return finish(figure)


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
    return finish(figure)


def _plain(found: re.Match[str]) -> str:
    return f"predicted: {np.exp(float(found[1])):.3g}"


def importance(table: pd.DataFrame) -> Figure:
    """Draw by how much the error grows where a feature is permuted, a panel per model.

    Parameters
    ----------
    table : pandas.DataFrame
        See `study.ch09_explain.importance`.
    """
    models = list(dict.fromkeys(table.model))
    features = list(dict.fromkeys(table.feature))
    figure, panels = plt.subplots(
        1, len(models), figsize=(9.5, 0.27 * len(features) + 1.3), squeeze=False, sharey=True
    )
    for model, axes in zip(models, panels[0], strict=True):
        own = table[table.model == model]
        at = [features.index(name) for name in own.feature]
        axes.barh(at, own.increase, color=BLUE, height=0.6)
        axes.hlines(at, own.low, own.high, color=INK, lw=1.5)
        axes.set(title=model, xlabel="points of halved SMAPE")
    panels[0, 0].set_yticks(range(len(features)), [name.replace("_", " ") for name in features])
    panels[0, 0].invert_yaxis()
    return finish(figure)


def dependence(table: pd.DataFrame, ylabel: str) -> Figure:
    """Draw partial dependence, a panel per feature, a line per model.

    Parameters
    ----------
    table : pandas.DataFrame
        See `study.ch09_explain.dependence`.
    ylabel : str
    """
    features = list(dict.fromkeys(table.feature))
    figure, panels = plt.subplots(1, len(features), figsize=(9.5, 3.4), squeeze=False, sharey=True)
    for feature, axes in zip(features, panels[0], strict=True):
        own = table[table.feature == feature]
        for (model, line), color in zip(own.groupby("model", sort=False), SERIES, strict=False):
            axes.plot(line.value, line.predicted, color=color, label=str(model))
        axes.set(xlabel=feature.replace("_", " "), yscale="log")
        if own.value.min() > 0 and own.value.max() > 20 * own.value.min():
            axes.set_xscale("log")
    panels[0, 0].set_ylabel(ylabel)
    legend_outside(panels[0, -1])
    return finish(figure)


def regret(table: pd.DataFrame) -> Figure:
    """Draw the throughput that each way of choosing loses, and how many of its picks starve.

    Parameters
    ----------
    table : pandas.DataFrame
        See `study.ch08_to_10.methods`.
    """
    figure, axes = plt.subplots(figsize=(8.5, 0.24 * len(table) + 1.2))
    kinds = list(dict.fromkeys(table.kind))
    names = list(table.method)
    for kind, color in zip(kinds, SERIES, strict=False):
        own = table[table.kind == kind]
        at = [names.index(name) for name in own.method]
        axes.barh(at, own.regret.clip(lower=0.1), color=color, height=0.7, label=kind)
    for place, (lost, starving) in enumerate(zip(table.regret, table.starving_picks, strict=True)):
        note = f" {lost:.2g}" + (f", {starving} starve" if starving else "")
        axes.text(max(float(lost), 0.1), place, note, va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(
        xlabel="mean regret (% of the best measured throughput)", xscale="log", xlim=(0.1, 300)
    )
    legend_outside(axes)
    return finish(figure)


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
    return finish(figure)


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
    axes.set(xlabel=LABELS["served_adapters"], ylabel=LABELS["adapter_slots"])
    if picked is not None:
        x, y = table.columns.get_loc(picked[0]), table.index.get_loc(picked[1])
        axes.plot(int(str(x)) + 0.5, int(str(y)) + 0.5, "*", color="w", mec="k", ms=14)


def sobol(table: pd.DataFrame) -> Figure:
    """Draw first-order and total Sobol indices with their intervals, a panel per answer.

    Parameters
    ----------
    table : pandas.DataFrame
        See `study.ch11_sensitivity.sobol_indices`.
    """
    answers, factors = list(dict.fromkeys(table.answer)), list(dict.fromkeys(table.factor))
    figure, panels = plt.subplots(
        1, len(answers), figsize=(9.8, 0.33 * len(factors) + 1.4), squeeze=False, sharey=True
    )
    for answer, axes in zip(answers, panels[0], strict=True):
        own = table[table.answer == answer].set_index("factor").reindex(factors)
        for column, shift, color, name in (
            ("first", -0.15, BLUE, "alone"),
            ("total", 0.15, ORANGE, "with interactions"),
        ):
            at = np.arange(len(factors)) + shift
            half = own[f"{column}_conf"]
            axes.hlines(at, own[column] - half, own[column] + half, color=color, lw=1.5)
            axes.plot(own[column], at, "o", ms=4, color=color, label=name)
        axes.axvline(0, color=GREY, lw=0.8)
        axes.set(title=answer.replace("_", " "), xlabel="Sobol index")
    panels[0, 0].set_yticks(range(len(factors)), [name.replace("_", " ") for name in factors])
    panels[0, 0].invert_yaxis()
    legend_outside(panels[0, -1])
    return finish(figure)
