"""The states that a server settles in, and how likely each is.

Near saturation larger batches make slower steps, and these larger batches: what a start has piled
up may stay for hours, or never come. A mean over both would be the figure of none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from adapter_twin.laws import load_calibration
from adapter_twin.parallel import track
from adapter_twin.service.intervals import replication
from adapter_twin.service.metrics import service_of
from adapter_twin.twin.policies import make_policy
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.scenario import Scenario

FIGURES = ("total_throughput", "median_ttft_ms", "p99_ttft_ms", "mean_itl_ms", "p99_itl_ms")
"""These are told of a state, after the requests that run at once."""

APART = 1.3
"""Draws are of two states where neighbours differ in their mean ITL by more than this factor."""


def states(draws: pd.DataFrame) -> list[dict[str, Any]]:
    """Tell draws of the same service apart into at most two states, the likelier one first.

    Parameters
    ----------
    draws : DataFrame
        A row each: ``mean_itl_ms`` and other figures.

    Returns
    -------
    list of dict
        ``probability``, the share of the draws, and their median figures.

    Examples
    --------
    >>> states(pd.DataFrame({"mean_itl_ms": [146.0, 71.0, 147.0, 145.0]}))
    [{'probability': 0.75, 'mean_itl_ms': 146.0}, {'probability': 0.25, 'mean_itl_ms': 71.0}]
    """
    ordered = draws.sort_values("mean_itl_ms", ignore_index=True)
    growth = ordered["mean_itl_ms"] / ordered["mean_itl_ms"].shift()
    first_high = int(np.nanargmax(growth)) if growth.max() > APART else len(ordered)
    parts = sorted((ordered[:first_high], ordered[first_high:]), key=len, reverse=True)
    return [
        {"probability": len(part) / len(ordered)}
        | {str(figure): value for figure, value in part.median().items()}
        for part in parts
        if len(part) > 0
    ]


def draw_states(scenario: Scenario, count: int) -> list[dict[str, Any]]:
    """Simulate a scenario with other requests and draws of its laws, and return its `states`.

    Parameters
    ----------
    scenario : Scenario
        One engine.
    count : int
        Draws.
    """
    calibration = load_calibration(scenario.calibration, scenario.engine.model)
    policy = make_policy(scenario.policy, "engine.policy")
    draws = []
    for number in track(range(count), "simulating draws", count):
        run = simulate(
            scenario.workload,
            scenario.engine,
            replication(calibration, number),
            seed=scenario.seed + number,
            observer=scenario.observer,
            policy=policy,
        )
        told = service_of(run, slo=scenario.slo)
        running = {"mean_running_requests": float(run.steps.running.mean())}
        draws.append(running | {figure: told[figure] for figure in FIGURES})
    return states(pd.DataFrame(draws))
