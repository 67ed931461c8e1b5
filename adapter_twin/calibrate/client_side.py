"""The client's side: laws fitted to what the twin of the engine leaves unexplained of a run."""

from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from joblib import delayed

from adapter_twin.laws.calibration import Calibration
from adapter_twin.parallel import share_out
from adapter_twin.service.metrics import summarize
from adapter_twin.twin.simulate import simulate_run
from adapter_twin.workload.lengths import Floats

SETTLED_S = 300.0
"""First uses disturb the scrapes before this time."""

SPELL_S = 300.0
"""Scrapes are compared in medians over spells of this length, one in every two."""

START_S = 120.0
"""Nearly all first uses happen in this first part of a run."""

PAUSES_MS = np.arange(0.0, 525.0, 25.0)
"""These are the candidates for the pause of a first use."""

PAUSE_SHARES = np.linspace(0.8, 1.0, 5)
"""The share of a read of the metrics in which the server pauses is looked for among these."""

RESAMPLES = 1000
"""The runs are resampled this many times for the interval of the pause."""


class Observed(NamedTuple):
    """A measured run as the twin serves it; running requests are the mean over its steps."""

    total_throughput: float
    median_ttft_ms: float
    p99_itl_ms: float
    running: float
    pauses: Any  # recarray of `adapter_twin.twin.clock.PAUSES`


def fit_first_use(
    calibration: Calibration, runs: pd.DataFrame, series: pd.DataFrame, jobs: int
) -> None:
    """Fit the front end's pause at the first use of an adapter, in place.

    At the start of a run first uses come faster than the front end can take them, and hold back all
    other requests: the pause is the one with which as many requests run in the twin as did.

    Parameters
    ----------
    calibration : Calibration
    runs : DataFrame
        Runs that served all that was offered; those with many adapters tell the most.
    series : DataFrame
        Their samples (table ``series``).
    jobs : int
        Processes.
    """
    law = calibration.front_end
    by_run = dict(tuple(series.groupby("run_id", observed=True)))
    misses = np.array(
        share_out(
            (
                delayed(_start_misses)(calibration, row, by_run[row["run_id"]])
                for row in runs.to_dict("records")
            ),
            jobs,
        )
    )
    law.first_use_ms_ = float(PAUSES_MS[misses.mean(axis=0).argmin()])
    resampled = np.random.default_rng(0).integers(0, len(misses), (RESAMPLES, len(misses)))
    best_ms = PAUSES_MS[misses[resampled].mean(axis=1).argmin(axis=1)]
    law.interval_["first_use_ms_"] = np.percentile(best_ms, [2.5, 97.5]).tolist()


def _start_misses(calibration: Calibration, row: dict[Any, Any], samples: pd.DataFrame) -> Floats:
    """Return by how much the twin misses the running requests of a run's start, by `PAUSES_MS`."""
    at_s = np.arange(0.0, START_S, 2.0)
    measured = np.interp(at_s, samples.t_s, samples.running)
    start = {**row, "duration_s": START_S}
    misses = []
    for pause_ms in PAUSES_MS:
        front_end = copy(calibration.front_end)
        front_end.first_use_ms_ = float(pause_ms)
        steps = simulate_run(start, replace(calibration, front_end=front_end)).steps
        running = np.append(steps.running, 0)[np.searchsorted(steps.end_s, at_s)]
        misses.append(float(np.abs(running - measured).mean() / row["running_mean"]))
    return np.array(misses)


def observe(calibration: Calibration, runs: pd.DataFrame, jobs: int) -> list[Observed]:
    """Simulate runs as they were measured, by the laws fitted so far.

    Parameters
    ----------
    calibration : Calibration
    runs : DataFrame
        Table ``runs``.
    jobs : int
        Processes.
    """
    rows = runs.to_dict("records")
    return list(share_out((delayed(_observe)(calibration, row) for row in rows), jobs))


def _observe(calibration: Calibration, row: dict[str, Any]) -> Observed:
    run = simulate_run(row, calibration)
    summary = summarize(run.records, run.gaps, run.duration_s)
    return Observed(
        *(summary["total_throughput"], summary["median_ttft_ms"], summary["p99_itl_ms"]),
        float(run.steps.running.mean()),
        run.pauses,
    )


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
) -> list[tuple[float, ...]]:
    """Return simulated labels, names and running requests, and the measured ms, by spell."""
    t_s = samples.t_s.to_numpy()
    gap_s, at_s = np.diff(t_s), t_s[1:]
    scrapes = []
    for low_s in np.arange(SETTLED_S, duration_s - SPELL_S, 2 * SPELL_S):
        here = (at_s > low_s) & (at_s < low_s + SPELL_S)
        if here.any():
            pause = pauses[np.searchsorted(pauses.start_s, low_s + SPELL_S / 2) - 1]
            measured_ms = 1e3 * (float(np.median(gap_s[here])) - period_s)
            scrapes.append((*map(float, (pause.labels, pause.names, pause.running)), measured_ms))
    return scrapes


def fit_pause_share(calibration: Calibration, runs: pd.DataFrame, jobs: int) -> None:
    """Fit the share of a read of the metrics in which the server pauses, in place.

    The 99th percentile of the gaps between tokens is about as long as these pauses, for a read
    every two seconds holds up more than a hundredth of all tokens. The share is the least point of
    a parabola through the squared misses, which moves little where one of them does.

    Parameters
    ----------
    calibration : Calibration
    runs : DataFrame
        Measured without a queue.
    jobs : int
        Processes.
    """
    misses = [
        np.log([run.p99_itl_ms for run in observe(candidate, runs, jobs)] / runs.p99_itl_ms)
        for candidate in (_pausing(calibration, share) for share in PAUSE_SHARES.tolist())
    ]
    calibration.measurement.scrape_pause_share_ = least_point(
        PAUSE_SHARES, np.square(misses).mean(axis=1)
    )


def least_point(at: Floats, values: Floats) -> float:
    """Return where a parabola through noisy values is least, within the range of `at`.

    Parameters
    ----------
    at, values : float64, shape (points,)

    Examples
    --------
    >>> round(least_point(np.array([0.0, 1.0, 2.0, 3.0]), np.array([4.0, 1.0, 0.0, 1.0])), 6)
    2.0
    """
    curve, slope, _ = np.polyfit(at, values, 2)
    if curve <= 0:
        return float(at[np.argmin(values)])
    return float(np.clip(-slope / (2 * curve), at.min(), at.max()))


def _pausing(calibration: Calibration, share: float) -> Calibration:
    measurement = copy(calibration.measurement)
    measurement.scrape_pause_share_ = share
    return replace(calibration, measurement=measurement)
