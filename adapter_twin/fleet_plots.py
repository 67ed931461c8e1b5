"""Figures of fleets: each function draws one result and returns a closed figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from adapter_twin.style import INK, finish, legend_outside, shades

if TYPE_CHECKING:
    from adapter_twin.fleet.placement import Placement
    from adapter_twin.planning.demand import Demand

MOST_DRAWN = 60
"""GPUs; of more, the first ones."""


def packing(demand: Demand, placement: Placement) -> Figure:
    """Draw what each GPU serves: a bar of its adapters' loads, coloured by rank.

    Parameters
    ----------
    demand : Demand
    placement : Placement
    """
    tokens = demand.lengths.mean_input_tokens + demand.lengths.mean_output_tokens
    plans = placement.replicas[:MOST_DRAWN]
    ranks = sorted({adapter.rank for adapter in demand.adapters})
    colors = shades(ranks, "rank")
    figure, axes = plt.subplots(figsize=(8.5, 0.26 * len(plans) + 1.4))
    for row, plan in enumerate(plans):
        own = [
            (demand.adapters[i].rank, share * demand.adapters[i].request_rate * tokens)
            for i, share in zip(plan.adapters, plan.shares, strict=True)
        ]
        own.sort(key=lambda part: (part[0], -part[1]))
        widths = np.array([load for _, load in own])
        left = np.cumsum(widths) - widths
        axes.barh(
            np.full(len(own), row), widths, left=left, color=[colors[rank] for rank, _ in own],
            edgecolor="w", linewidth=np.where(widths > 0.01 * widths.sum(), 0.3, 0.0), height=0.8,
        )  # fmt: skip
        told = f" {len(own)} adapters on {plan.engine.max_loras} slots"
        axes.text(widths.sum(), row, told, va="center", fontsize=7, color=INK)
    axes.set_yticks(range(len(plans)), [f"GPU {row}" for row in range(len(plans))], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="offered load (tokens/s), a segment for each adapter", xlim=(0, None))
    handles = [Patch(color=colors[rank], label=f"{rank}") for rank in ranks]
    legend_outside(axes, handles=handles, title="rank")
    return finish(figure)
