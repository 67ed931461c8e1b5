"""Figures of the chapter on vLLM's chain of evictions."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from study.figures.style import BLUE, COLORS, GREY, LABELS, finish, legend_outside, shades

RULE_COLORS = {"vLLM": COLORS["ours"], "one line changed": GREY}


def walk(table: pd.DataFrame) -> Figure:
    """Draw who is copied as steps walk over their batches.

    Parameters
    ----------
    table : pandas.DataFrame
        As `study.ch16_chain.walk`.
    """
    figure, axes = plt.subplots(figsize=(8.5, 4.5))
    kinds = {"touched": "0.85", "copied again": COLORS["alarm"], "joins": BLUE}
    sns.scatterplot(
        table, x="place", y="step", hue="what", hue_order=list(kinds), palette=kinds, s=42,
        linewidth=0, ax=axes,
    )  # fmt: skip
    axes.set(xlabel="place in the order in which a step touches its adapters", ylabel="step")
    axes.invert_yaxis()
    axes.grid(visible=False)
    legend_outside(axes)
    return finish(figure)


def copies(beside: pd.DataFrame) -> Figure:
    """Draw simulated over measured copies by slots, for both rules.

    Parameters
    ----------
    beside : pandas.DataFrame
        As `study.ch16_chain.measured_copies`.
    """
    figure, axes = plt.subplots(figsize=(8.5, 3.8))
    axes.axhspan(1 / 1.5, 1.5, color="0.93", zorder=0)
    axes.axhline(1, color=GREY, linewidth=1)
    sns.boxplot(
        beside, x="gpu_loras", y="ratio", hue="rule", hue_order=list(RULE_COLORS),
        palette=RULE_COLORS, fliersize=2, linewidth=0.8, log_scale=(False, True), ax=axes,
    )  # fmt: skip
    axes.set(xlabel=LABELS["adapter_slots"], ylabel="copies, simulated by measured")
    axes.yaxis.set_major_formatter("{x:g}")
    legend_outside(axes)
    return finish(figure)


def cost(table: pd.DataFrame) -> Figure:
    """Draw what the chain costs over slots, a line per load and rule.

    Parameters
    ----------
    table : pandas.DataFrame
        As `study.ch16_chain.cost`.
    """
    shown = table.assign(loading=100 * table.loading_share, p99_s=table.p99_ttft_ms / 1e3)
    panels = {
        "loading": "time spent on loading (%)",
        "mean_itl_ms": LABELS["mean_itl_ms"],
        "p99_s": "p99 TTFT (s)",
    }
    figure, all_axes = plt.subplots(1, len(panels), figsize=(10.5, 3.4))
    loads = shades(table.load.unique())
    for axes, (name, label) in zip(all_axes, panels.items(), strict=True):
        sns.lineplot(
            shown, x="adapter_slots", y=name, hue="load", palette=loads, style="rule",
            style_order=list(RULE_COLORS), ax=axes, legend=axes is all_axes[-1],
        )  # fmt: skip
        axes.set(xlabel=LABELS["adapter_slots"], ylabel=label, xscale="log")
        axes.set_xticks(
            [slots for slots in (8, 16, 32, 64, 128) if slots in set(table.adapter_slots)]
        )
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    all_axes[-1].set(yscale="log")
    legend_outside(all_axes[-1])
    return finish(figure)
