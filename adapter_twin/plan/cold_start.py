"""The states in which a server settles that starts cold, under all its load."""

from __future__ import annotations

from typing import Any

import pandas as pd

from adapter_twin.laws import Calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.steady_state import WindowTraffic, serve
from adapter_twin.service.intervals import cautious
from adapter_twin.service.states import states
from adapter_twin.twin.simulate import draw_requests
from adapter_twin.workload.scenario import EngineConfig

STARTS = 4

SETTLED_S = WINDOW_S = 900.0
"""After this time most first uses are over, and batches stay as large as they have become."""


def cold_start_states(
    demand: Demand, engine: EngineConfig, calibration: Calibration
) -> list[dict[str, Any]]:
    """Simulate starts of a server on which no adapter has been used, and tell its `states`.

    First uses hold requests back, and what has piled up by then may keep the batches large. A log
    is taken at its mean rates.

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
    workload = demand.workload(SETTLED_S + WINDOW_S)
    laws = cautious(calibration)
    served = []
    for seed in range(demand.seed, demand.seed + STARTS):
        trace = draw_requests(workload, laws, seed=seed)
        traffic = WindowTraffic(workload, demand.slo, seed, trace, warm_up_s=SETTLED_S)
        served.append(serve(traffic, engine, laws).figures)
    return states(pd.DataFrame(served))
