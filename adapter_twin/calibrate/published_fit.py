"""The fit of a calibration to the published tables of one-hour runs."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import compress
from typing import Any

import numpy as np
import pandas as pd

from adapter_twin import __version__
from adapter_twin.calibrate.client_side import (
    fit_first_use,
    fit_overhead,
    fit_pause_share,
    fit_scrapes,
    observe,
)
from adapter_twin.calibrate.step_observations import simulate_copies, step_observations
from adapter_twin.calibrate.through_twin import Response
from adapter_twin.laws.calibration import RANGES, Calibration
from adapter_twin.laws.emitted_lengths import EarlyStopLaw, LengthLaw
from adapter_twin.laws.front_end import FrontEndLaw, MeasurementLaw
from adapter_twin.laws.loading import LoadingLaw
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.prior import known_constants
from adapter_twin.laws.roofline import Prior, RooflineLaw
from adapter_twin.laws.scheduling import SchedulingLaw, of_scheduler_runs
from adapter_twin.workload.gpus import gpu_memory_gib
from adapter_twin.workload.lengths import LengthMarginals
from adapter_twin.workload.models import model_shape

TABLES = (
    *("runs", "series", "windows", "steps", "base_steps"),
    *("adapter_loads", "memory", "scheduler_runs"),
)
"""A calibration is fitted to these tables."""

LONGEST_OUTPUTS = (None, 1000.0, 900.0, 800.0, 700.0)
"""Output lengths may be cut off here, in tokens of the histogram; None does not cut."""

GATED_WAITING = 600.0
"""From this many waiting requests on, in the mean, a run counts as gated by its slots."""

CLIENT_SIDE_STRIDE = 3
"""One completed run in this many is simulated to fit the client's side."""


def calibrate(
    tables: dict[str, pd.DataFrame],
    marginals: LengthMarginals,
    model: str,
    *,
    gpu: str,
    engine_version: str,
    source: dict[str, Any],
    jobs: int = 1,
    prior: Prior | None = None,
    response: Response | None = None,
) -> Calibration:
    """Fit all laws of one model.

    The laws of the engine come first, from the tables alone, but for copies of adapters: these are
    the twin's, and are taken out of the measured step times. What only shows at the client, the
    front end's overhead and the cost of reading the metrics, is fitted to what the twin of the
    engine leaves unexplained. Last the step-time law is fitted through the twin.

    Parameters
    ----------
    tables : dict of DataFrame
        `TABLES`, by name.
    marginals : LengthMarginals
        Histogram of the traffic's lengths.
    model, gpu, engine_version : str
    source : dict
        Where the tables come from, kept in the provenance.
    jobs : int
        Processes for the simulations.
    prior : mapping, optional
        Of the step-time law; left out, what is known of the GPU and the engine's version.
    response : Response, optional
        Of the twin, of these runs and others, where it is known; it takes minutes.

    Returns
    -------
    Calibration
    """
    prior = prior or known_constants(gpu, engine_version)
    runs = tables["runs"][tables["runs"].model == model]
    clean = fitted_runs(runs)
    unsaturated = unsaturated_runs(clean)
    windows = tables["windows"]
    busy = windows[windows.run_id.isin(unsaturated.run_id) & (windows.running > 5)]
    lengths = LengthLaw().fit(marginals, busy)
    scheduling = SchedulingLaw().fit(of_scheduler_runs(tables["scheduler_runs"]))
    starts = tables["memory"][tables["memory"].model == model]
    memory = MemoryLaw(model_shape(model), engine_version, gpu_memory_gib(gpu)).fit(starts)
    observations = step_observations(tables, model, lengths, scheduling, memory)
    series = tables["series"][tables["series"].run_id.isin(unsaturated.run_id)]
    calibration = assemble(
        *(model, gpu, source, runs.dropna(subset=["duration_s"])),
        rows={"runs": len(runs), "step_times": len(observations.step_ms)},
        memory=memory,
        step_time=RooflineLaw(memory.shape).fit(observations, prior),
        loading=LoadingLaw(model).fit(tables["adapter_loads"]),
        scheduling=scheduling,
        front_end=FrontEndLaw(),
        early_stop=EarlyStopLaw().fit(unsaturated, series),
        lengths=lengths,
        measurement=MeasurementLaw(),
    )
    # Copies of adapters depend on the step time and on the lengths, and both on them: two rounds
    # settle the step time, so that the lengths are chosen well, and a third one goes by these.
    for _ in range(2):
        calibration = without_copies(calibration, tables, clean, jobs, prior)
    calibration = _choose_longest_output(calibration, clean, marginals, busy, jobs)
    calibration = without_copies(calibration, tables, clean, jobs, prior)
    fit_first_use(calibration, unsaturated, series, jobs)
    _fit_client_side(calibration, clean, unsaturated, tables["series"], jobs)
    response = Response.of(calibration, clean, jobs) if response is None else response
    of_runs = response.of_runs(clean.run_id)
    calibration = without_copies(calibration, tables, clean, jobs, prior, of_runs)
    _fit_client_side(calibration, clean, unsaturated, tables["series"], jobs)
    return calibration


def _fit_client_side(
    calibration: Calibration,
    runs: pd.DataFrame,
    unsaturated: pd.DataFrame,
    series: pd.DataFrame,
    jobs: int,
) -> None:
    """Fit the front end's overhead and the reads of the metrics, in place."""
    observed = runs.iloc[::CLIENT_SIDE_STRIDE]
    light = observed.run_id.isin(unsaturated.run_id)
    for _ in range(2):  # the overhead depends a little on the scrapes, and they on the overhead
        seen = observe(calibration, observed, jobs)
        fit_overhead(calibration, observed[light], list(compress(seen, light)))
        fit_scrapes(calibration, observed, seen, series)
    fit_pause_share(calibration, observed[light], jobs)


def assemble(
    model: str,
    gpu: str,
    source: dict[str, Any],
    measured: pd.DataFrame,
    *,
    rows: dict[str, int],
    **laws: Any,
) -> Calibration:
    """Put fitted laws together, with their range and provenance.

    Parameters
    ----------
    model, gpu, source
        As for `calibrate`.
    measured : DataFrame
        Runs whose configurations are the valid range.
    rows : dict of int
        Rows that the laws were fitted to, by kind.
    **laws : Estimator
    """
    ranges = measured[list(RANGES)].agg(["min", "max"])
    return Calibration(
        name=f"{model}@{gpu}-vllm{laws['memory'].version}",
        model=model,
        gpu=gpu,
        **laws,
        valid_range={column: ranges[column].tolist() for column in RANGES},
        provenance={
            "source": source,
            "rows": rows,
            "date": datetime.now(UTC).date().isoformat(),
            "version": __version__,
        },
    )


def fitted_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Select the completed runs whose client did not collapse."""
    return runs[(runs.status == "ok") & ~runs.client_collapsed]


def without_copies(
    calibration: Calibration,
    tables: Mapping[str, pd.DataFrame],
    runs: pd.DataFrame,
    jobs: int,
    prior: Prior,
    response: Response | None = None,
) -> Calibration:
    """Fit the step-time law again, to what the twin's own copies of adapters leave.

    Parameters
    ----------
    calibration : Calibration
    tables : mapping
        `TABLES`, by name.
    runs : DataFrame
        Those of the model, see `fitted_runs`.
    jobs : int
        Processes for the simulations.
    prior : mapping
        Of the constants.
    response : Response, optional
        Of the twin to them: the law is fitted to what the runs served as well.
    """
    copies, known = simulate_copies(calibration, runs, jobs), calibration
    observations = step_observations(
        tables, known.model, known.lengths, known.scheduling, known.memory, copies
    )
    also = response.errors if response else None
    law = RooflineLaw(known.memory.shape).fit(observations, prior, also)
    return replace(calibration, step_time=law)


def unsaturated_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Select, among completed runs, those that served all that was offered, without a queue."""
    offered = runs.offered_request_rate * (
        runs.mean_input_tokens + runs.mean_requested_output_tokens
    )
    return runs[(runs.total_throughput > 0.97 * offered) & (runs.waiting_mean < 1)]


def _choose_longest_output(
    calibration: Calibration,
    runs: pd.DataFrame,
    marginals: LengthMarginals,
    windows: pd.DataFrame,
    jobs: int,
) -> Calibration:
    """Cut the output lengths off where the twin serves slot-gated runs as they were served.

    The longest output of an adapter's requests holds its slot; the histogram's tail, read off a
    figure, is the least certain part of it.
    """
    gated = (runs.adapter_slots < runs.served_adapters) & (runs.waiting_mean > GATED_WAITING)
    rows = runs[gated].iloc[::2]
    candidates = {
        f"{longest or np.inf:g}": replace(
            calibration, lengths=LengthLaw(longest).fit(marginals, windows)
        )
        for longest in LONGEST_OUTPUTS
    }
    errors = {}
    for longest, candidate in candidates.items():
        served = np.array([run.total_throughput for run in observe(candidate, rows, jobs)])
        errors[longest] = 100 * np.abs(served / rows.total_throughput - 1)
    means = {longest: float(error.mean()) for longest, error in errors.items()}
    best = min(means, key=means.__getitem__)
    # One standard error: the least change to the histogram that does about as well as the best.
    enough = means[best] + errors[best].std() / np.sqrt(len(rows))
    chosen = candidates[next(longest for longest in means if means[longest] <= enough)]
    chosen.lengths.throughput_error_percent_ = means
    return chosen
