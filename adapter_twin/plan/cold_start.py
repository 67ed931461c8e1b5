"""The states in which a server settles that starts cold, under all its load."""

from __future__ import annotations

from typing import Any

import pandas as pd

from adapter_twin.laws import Calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.steady_state import draw_traffic, serve
from adapter_twin.service.intervals import cautious
from adapter_twin.service.states import states
from adapter_twin.workload.engine_config import EngineConfig

STARTS = 4


def cold_start_states(
    demand: Demand, engine: EngineConfig, calibration: Calibration
) -> list[dict[str, Any]]:
    """Simulate starts of a server on which no adapter has been used, and tell its `states`.

    First uses hold requests back, and what has piled up by then may keep the batches large. The
    traffic is that of a plan's windows.

    Parameters
    ----------
    demand : Demand
    engine : EngineConfig
    calibration : Calibration
        Of a prior, laws are slower than most which it allows.

    Returns
    -------
    list of dict
        See `adapter_twin.service.states.states`; figures are those of
        `adapter_twin.plan.steady_state.FIGURES`.
    """
    laws = cautious(calibration)
    seeds = range(demand.seed, demand.seed + STARTS)
    starts = (serve(draw_traffic(demand, laws, seed=seed), engine, laws) for seed in seeds)
    return states(pd.DataFrame([window.figures for window in starts]))
