"""What only shows at the client: fitted to what the twin of the engine leaves unexplained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from adapter_twin.calibration.calibration import Calibration
from adapter_twin.metrics import summarize
from adapter_twin.twin.simulate import simulate_run

SETTLED_S = 300.0
"""Scrapes before that are disturbed by first uses."""

SPELL_S = 300.0
"""Scrapes are compared in medians over spells of that length, one in every two."""


@dataclass(frozen=True)
class Observed:
    """What the twin makes of a measured run.

    Attributes
    ----------
    median_ttft_ms, running : float
        Running requests are the mean over the steps.
    pauses : recarray of `adapter_twin.twin.clock.PAUSES`
    """

    median_ttft_ms: float
    running: float
    pauses: Any


def observe(calibration: Calibration, runs: pd.DataFrame, jobs: int) -> list[Observed]:
    """Simulate runs as they were measured, by the laws fitted so far."""
    rows = runs.to_dict("records")
    return list(Parallel(n_jobs=jobs)(delayed(_observe)(calibration, row) for row in rows))


def _observe(calibration: Calibration, row: dict[str, Any]) -> Observed:
    run = simulate_run(row, calibration)
    summary = summarize(run.records, run.gaps, run.duration_s)
    return Observed(summary["median_ttft_ms"], float(run.steps.running.mean()), run.pauses)


def fit_overhead(calibration: Calibration, runs: pd.DataFrame, seen: list[Observed]) -> None:
    """Fit the front end's overhead on TTFT, in place.

    Parameters
    ----------
    calibration : Calibration
    runs : DataFrame
        Measured without a queue, whose length TTFT would be.
    seen : list of Observed
        The same runs in the twin of `calibration`.
    """
    running = np.array([run.running for run in seen])
    constant_ms, per_running_ms = 1e3 * calibration.front_end.overhead_s
    ttft_ms = np.array([run.median_ttft_ms for run in seen])
    engine_ttft_ms = ttft_ms - constant_ms - per_running_ms * running
    calibration.front_end.fit_overhead(running, engine_ttft_ms, runs.median_ttft_ms.to_numpy(float))


def fit_scrapes(
    calibration: Calibration, runs: pd.DataFrame, seen: list[Observed], series: pd.DataFrame
) -> None:
    """Fit the duration of reads of the metrics, in place.

    Parameters
    ----------
    calibration, runs, seen
        As for `fit_overhead`.
    series : DataFrame
        Samples of the runs: a late one tells how long the read before it took.
    """
    by_run = dict(tuple(series.groupby("run_id", observed=True)))
    period_s = calibration.measurement.scrape_period_s
    scrapes = [
        scrape
        for row, run in zip(runs.to_dict("records"), seen, strict=True)
        for scrape in _scrapes(run.pauses, by_run[row["run_id"]], row["duration_s"], period_s)
    ]
    calibration.measurement.fit(*np.array(scrapes).T)


def _scrapes(
    pauses: Any, samples: pd.DataFrame, duration_s: float, period_s: float
) -> list[tuple[float, float, float]]:
    """Return simulated label sets and names, and the measured duration in ms, by spell."""
    t_s = samples.t_s.to_numpy()
    gap_s, at_s = np.diff(t_s), t_s[1:]
    scrapes = []
    for low_s in np.arange(SETTLED_S, duration_s - SPELL_S, 2 * SPELL_S):
        here = (at_s > low_s) & (at_s < low_s + SPELL_S)
        if here.any():
            pause = pauses[np.searchsorted(pauses.start_s, low_s + SPELL_S / 2) - 1]
            measured_ms = 1e3 * (float(np.median(gap_s[here])) - period_s)
            scrapes.append((float(pause.labels), float(pause.names), measured_ms))
    return scrapes
