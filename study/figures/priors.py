"""Figures of the chapter on GPUs that were not measured."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from study.figures import style


def steps(table: pd.DataFrame) -> Figure:
    """Draw the time of a step by GPU, a point for each engine.

    The table is that of `study.ch17_priors.steps_by_gpu`, of one batch.
    """
    told = {0: "no adapters", 1: "adapters"}
    engines = [
        f"vLLM {version}, {told[int(slots > 0)]}"
        for version, slots in zip(table["version"], table["slots"], strict=True)
    ]
    table = table.assign(engine=engines).sort_values("step_ms")
    order = table[table["slots"] > 0]["gpu"].tolist()
    figure, axes = plt.subplots(figsize=(8.5, 5.5))
    sns.pointplot(
        table, y="gpu", x="step_ms", hue="engine", order=order, linestyle="none",
        palette=style.shades(table["engine"]), markersize=6, ax=axes,
    )  # fmt: skip
    axes.set(xlabel="time of a step (ms)", ylabel="")
    axes.set_xscale("log")
    style.ticks(axes.xaxis, {10, 20, 50, 100})
    style.legend_outside(axes)
    return style.finish(figure)
