"""The picture of a placement."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from adapter_twin.fleet.placement import Placement
from adapter_twin.plan.demand import Demand

MOST_DRAWN = 60
"""Of more GPUs, the picture shows the first ones."""

RANKS = (4, 64)
"""The colours span this range of ranks, on a logarithmic scale."""


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
    low, high = np.log(RANKS)
    shades = sns.color_palette("flare", as_cmap=True)
    colors = {rank: shades((np.log(rank) - low) / (high - low)) for rank in ranks}
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
        axes.text(widths.sum(), row, told, va="center", fontsize=7, color="0.25")
    axes.set_yticks(range(len(plans)), [f"GPU {row}" for row in range(len(plans))], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="offered load (tokens/s), a segment for each adapter", xlim=(0, None))
    handles = [Patch(color=colors[rank], label=f"{rank}") for rank in ranks]
    axes.legend(
        handles=handles, title="rank", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.tight_layout()
    plt.close(figure)
    return figure
