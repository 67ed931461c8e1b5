"""Figures of the chapter on vLLM's chain of evictions."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from study.figures import style

RULE_COLORS = {"vLLM": style.COLORS["ours"], "one line changed": style.GREY}


def walk(table: pd.DataFrame) -> Figure:
    """Draw who is copied as steps walk over their batches.

    The table is that of `study.ch16_chain.walk`.
    """
    figure, axes = plt.subplots(figsize=(8.5, 4.5))
    kinds = {"touched": "0.85", "copied again": style.COLORS["alarm"], "joins": style.BLUE}
    sns.scatterplot(
        table, x="place", y="step", hue="what", hue_order=list(kinds), palette=kinds, s=42,
        linewidth=0, ax=axes,
    )  # fmt: skip
    axes.set(xlabel="place in the order in which a step touches its adapters", ylabel="step")
    axes.invert_yaxis()
    axes.grid(visible=False)
    style.legend_outside(axes)
    return style.finish(figure)


def copies(beside: pd.DataFrame) -> Figure:
    """Draw simulated over measured copies by slots, for both rules.

    The table is that of `study.ch16_chain.measured_copies`.
    """
    figure, axes = plt.subplots(figsize=(8.5, 3.8))
    axes.axhspan(1 / 1.5, 1.5, color="0.93", zorder=0)
    axes.axhline(1, color=style.GREY, linewidth=1)
    sns.boxplot(
        beside, x="gpu_loras", y="ratio", hue="rule", hue_order=list(RULE_COLORS),
        palette=RULE_COLORS, fliersize=2, linewidth=0.8, log_scale=(False, True), ax=axes,
    )  # fmt: skip
    axes.set(xlabel=style.LABELS["adapter_slots"], ylabel="copies, simulated by measured")
    axes.yaxis.set_major_formatter("{x:g}")
    style.legend_outside(axes)
    return style.finish(figure)


def cost(table: pd.DataFrame) -> Figure:
    """Draw what the chain costs over slots, a line per load and rule.

    The table is that of `study.ch16_chain.cost`.
    """
    labels = {
        "loading_share": "time spent on loading (%)",
        "mean_itl_ms": style.LABELS["mean_itl_ms"],
        "p99_ttft_ms": "p99 TTFT (s)",
    }
    grid = style.measures(
        table.assign(loading_share=100 * table.loading_share, p99_ttft_ms=table.p99_ttft_ms / 1e3),
        labels, kind="line", x="adapter_slots", hue="load",
        palette=style.shades(table.load), style="rule", style_order=list(RULE_COLORS), width=9,
    )  # fmt: skip
    grid.set(xscale="log", xlabel=style.LABELS["adapter_slots"])
    for axes in grid.axes.flat:
        style.ticks(axes.xaxis, {8, 16, 32, 64, 128} & set(table.adapter_slots))
    grid.axes_dict[labels["p99_ttft_ms"]].set_yscale("log")
    return style.finish(grid)
