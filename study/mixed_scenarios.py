"""Small demands on several kinds of GPU: drawn at random, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.kinds import Kinds
from adapter_twin.fleet.strategies import best
from adapter_twin.plan.demand import Demand
from adapter_twin.workload.gpu_fleet import GpuFleet, GpuKind
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.traffic import Lengths
from study.exact import lowest_cost
from study.placement_scenarios import EXPONENTS, LENGTHS, RANK_MIXES, draw_demand

GPUS = ("h100-64gb", "a100-80gb-sxm", "l40s", "a10g")
"""Two or three of these are to be had; prices are about what they do, and drawn."""

PRICES = (3.5, 2.0, 1.2, 0.8)
PRICE_SPREAD = 0.3
"""The logarithm of a price is off by this standard deviation."""

PARTS = (5, 8)
"""As many adapters make a demand, for the exact program tries all sets of them."""


def small_demands(count: int, seed: int = 0) -> Iterator[Demand]:
    """Yield small demands, half of them by price; some kinds are few."""
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        prompt, output = LENGTHS[rng.integers(len(LENGTHS))]
        demand = draw_demand(
            rng,
            int(rng.integers(PARTS[0], PARTS[1] + 1)),
            float(rng.uniform(1.5, 4.0)),
            float(rng.choice(EXPONENTS[:3])),
            str(rng.choice(list(RANK_MIXES))),
            Lengths(mean_input_tokens=prompt, mean_output_tokens=output),
            (None, Slo(ttft_ms=2000.0))[number % 2],
        )
        chosen = np.sort(rng.choice(len(GPUS), int(rng.integers(2, 4)), replace=False))
        noise = np.exp(PRICE_SPREAD * rng.standard_normal(len(chosen)))
        kinds = [
            GpuKind(
                calibration=f"auto@{GPUS[k]}",
                price_per_hour=round(PRICES[k] * factor, 2),
                available=int(rng.integers(1, 3)) if place == 0 and number % 3 == 0 else None,
            )
            for place, (k, factor) in enumerate(zip(chosen, noise, strict=True))
        ]
        fleet = GpuFleet(kinds=tuple(kinds), objective="price" if number % 4 < 2 else "gpus")
        yield replace(demand, fleet=fleet)


def compare_with_exact(count: int, seed: int = 0) -> pd.DataFrame:
    """Return the rows of `against_exact` of small demands, but for those that nothing serves."""
    rows = []
    for demand in small_demands(count, seed):
        with suppress(AdapterTwinError):
            rows.append(against_exact(demand))
    return pd.DataFrame(rows)


def against_exact(demand: Demand) -> dict[str, Any]:
    """Return the cost of a placement, of the exact program and of the bound.

    Returns
    -------
    dict
        ``objective``, ``parts``, ``cost``, ``exact`` and ``bound``.
    """
    kinds = Kinds.of(demand)
    groups, bound = best(kinds)
    return {
        "objective": demand.fleet.objective,
        "parts": len(kinds.oracles[0].parts),
        "cost": kinds.cost(groups),
        "exact": lowest_cost(kinds),
        "bound": bound.price_per_hour if kinds.by_price else bound.gpus,
    }
