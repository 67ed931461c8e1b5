"""Predictions for a table of runs, from its configuration columns alone."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import joblib
import pandas as pd

from adapter_twin import __version__
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.parallel import share_out, track, workers
from adapter_twin.service.intervals import REPLICATIONS, interval, replication
from adapter_twin.service.metrics import (
    adapter_loading,
    is_starved,
    jain_fairness,
    per_adapter,
    service_of,
    summarize,
)
from adapter_twin.tables.schemas import PREDICTIONS, RUN_CONFIGURATION, validate
from adapter_twin.twin.policies import make_policy
from adapter_twin.twin.records import Simulation
from adapter_twin.twin.simulate import simulate, simulate_run
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import records, run_to_engine, run_to_workload
from adapter_twin.workload.scenario import Scenario


def predict(
    runs: pd.DataFrame,
    calibration: str | Calibration = "auto",
    *,
    seed: int = 0,
    jobs: int = -1,
    observer: bool = True,
    intervals: bool = False,
) -> pd.DataFrame:
    """Predict every run of a table by one simulation each.

    A prediction depends on its own row, the calibration and the seed; which other rows there are,
    their order and `jobs` change nothing. All rows draw from the same seed, so that runs of one
    workload are compared on common random numbers.

    Parameters
    ----------
    runs : pandas.DataFrame
        Columns of `adapter_twin.tables.schemas.RUN_CONFIGURATION`; no other column is read.
    calibration : str or Calibration
        A calibration, its name or path, or ``auto``: the one of each run's model.
    seed : int
    jobs : int
        Processes; -1 is one per core.
    observer : bool
        Include the effect that the reference measurement had on itself.
    intervals : bool
        Also what nine measured runs in ten lie in (`adapter_twin.service.intervals`); that takes
        some more simulations of each run.

    Returns
    -------
    pandas.DataFrame
        Columns of `adapter_twin.tables.schemas.PREDICTIONS`, one row per run, in the order of
        `runs`. A run that the GPU refuses to start has no figures, serves none of its load and so
        is starved.
        ``attrs`` holds calibration names, seed, observer and package version, and goes into a
        Parquet file. ``wall_s`` of a process's first run includes loading the compiled twin.

    Raises
    ------
    AdapterTwinError
        Bad configuration, or no calibration for a model.

    Examples
    --------
    >>> runs = pd.DataFrame(
    ...     {
    ...         "run_id": ["few", "many"],
    ...         "model": "llama-3.1-8b-instruct",
    ...         "rates_per_adapter": "0.1-0.05",
    ...         "ranks": "8-16",
    ...         "served_adapters": [32, 256],
    ...         "adapter_slots": 16,
    ...         "max_lora_rank": 16,
    ...         "max_num_seqs": 2048,
    ...         "duration_s": 60.0,
    ...         "mean_input_tokens": 223.0,
    ...         "mean_requested_output_tokens": 198.0,
    ...     }
    ... )
    >>> predict(runs, jobs=1)[["run_id", "starved"]]
      run_id  starved
    0    few    False
    1   many     True
    """
    require(seed >= 0, f"seed: must be zero or more, got {seed}")
    own = "a table of runs is predicted for vLLM's own; leave the column out, or use simulate"
    require("policy" not in runs, f"policy: {own}")
    checked = validate(runs, RUN_CONFIGURATION, "runs")
    configurations = checked[[name for name in RUN_CONFIGURATION.columns if name in checked]]
    calibrations = load_calibrations(calibration, configurations["model"])
    tasks = (
        joblib.delayed(predict_run)(row, calibrations[row["model"]], seed, observer, intervals)
        for row in configurations.to_dict("records")
    )
    results = share_out(tasks, jobs, "generator")
    predicted, messages = [], dict[str, None]()
    with workers(None):
        for row, raised in track(results, "predicting runs", len(configurations)):
            predicted.append(row)
            messages.update(dict.fromkeys(raised))
    for message in messages:
        warnings.warn(message, stacklevel=2)
    told = [name for name, column in PREDICTIONS.columns.items() if column.required or intervals]
    predictions = pd.DataFrame(predicted, columns=told)
    predictions = validate(predictions, PREDICTIONS, "predictions")
    predictions.attrs = {
        "calibrations": [fitted.name for fitted in calibrations.values()],
        "seed": seed,
        "observer": observer,
        "version": __version__,
    }
    return predictions


def predict_scenario(scenario: Scenario) -> tuple[Simulation, dict[str, Any]]:
    """Simulate one scenario.

    Returns
    -------
    run : Simulation
    service : dict
        The figures of `adapter_twin.service.metrics.service` and
        `adapter_twin.service.metrics.adapter_loading`;
        Jain's index over the adapters' served shares; KV-cache tokens and start-up seconds;
        provenance.

    Raises
    ------
    AdapterTwinError
        No calibration, or a start that the GPU refuses.
    """
    require(scenario.fleet is None, "fleet: this is one engine; leave it out")
    engine, workload = scenario.engine, scenario.workload
    calibration = load_calibration(scenario.calibration, engine.model)
    policy = make_policy(scenario.policy, "engine.policy")
    run = simulate(
        workload,
        engine,
        calibration,
        seed=scenario.seed,
        observer=scenario.observer,
        policy=policy,
    )
    served = per_adapter(run.records, run.duration_s)
    share = served["total_throughput"] / served["offered_tokens_per_s"]
    return run, {
        **service_of(run, slo=scenario.slo),
        "jain_fairness": jain_fairness(share) if len(share) else float("nan"),
        **adapter_loading(run.steps, run.duration_s),
        "kv_cache_tokens": calibration.require_start(engine, slots=policy.reserves_slots),
        "startup_s": calibration.startup_s(engine, workload.adapters),
        "prior": calibration.origin or None,
        **run.provenance,
    }


def load_calibrations(name: str | Calibration, models: pd.Series[Any]) -> dict[str, Calibration]:
    """Load the calibration of each model that occurs, or check that the given one is of it."""
    if isinstance(name, Calibration):
        for model in models.unique():
            require(model == name.model, f"calibration: {name.name} is not of {model}; use auto")
        return {name.model: name}
    return {model: load_calibration(name, model) for model in sorted(models.unique())}


def predict_starts(starts: pd.DataFrame, calibration: str = "auto") -> pd.DataFrame:
    """Predict server starts from the memory laws.

    Parameters
    ----------
    starts : pandas.DataFrame
        Columns ``model``, ``adapter_slots`` and ``max_lora_rank``, and other flags if told.
    calibration : str

    Returns
    -------
    pandas.DataFrame
        `starts` with the columns ``predicted_kv_cache_tokens`` and ``predicted_start``.
    """
    calibrations = load_calibrations(calibration, starts["model"])
    predicted = [_start(calibrations[row["model"]], run_to_engine(row)) for row in records(starts)]
    columns = ["predicted_kv_cache_tokens", "predicted_start"]
    return pd.concat([starts, pd.DataFrame(predicted, starts.index, columns)], axis="columns")


def _start(calibration: Calibration, engine: EngineConfig) -> tuple[float, bool]:
    """Return the KV-cache tokens that the slots leave, and whether vLLM starts with them."""
    calibration.require_known(engine)
    memory = calibration.memory
    return max(memory.kv_cache_tokens(engine), 0.0), memory.starts(engine)


def predict_run(
    row: Mapping[str, Any],
    calibration: Calibration,
    seed: int,
    observer: bool,
    intervals: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Predict one run, as `predict` does.

    Parameters
    ----------
    row : mapping
        See `adapter_twin.workload.files.run_to_workload`.
    calibration : Calibration
    seed : int
    observer, intervals : bool

    Returns
    -------
    prediction : dict
        A row of `adapter_twin.tables.schemas.PREDICTIONS`; figures are missing where a start is
        refused.
    messages : list of str
        The warnings, which a worker process would swallow.
    """
    started_s = time.perf_counter()
    engine, workload = run_to_workload(row)
    kv_cache_tokens, starts = _start(calibration, engine)
    prediction = {
        "run_id": row["run_id"],
        "starved": True,
        "feasible_start": starts,
        "kv_cache_tokens": kv_cache_tokens,
    }
    messages: list[str] = []
    if starts:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                run = simulate_run(row, calibration, seed=seed, observer=observer)
            except AdapterTwinError as error:
                raise AdapterTwinError(f"run {row['run_id']}: {error}") from None
        messages = [str(warning.message) for warning in caught]
        prediction |= summarize(run.records, run.gaps, run.duration_s)
        prediction["starved"] = is_starved(
            prediction["total_throughput"], workload.offered_tokens_per_s
        )
    if starts and intervals:
        prediction |= interval(prediction, replicate(row, calibration, seed, observer), calibration)
    return {**prediction, "wall_s": time.perf_counter() - started_s}, messages


def replicate(
    row: Mapping[str, Any], calibration: Calibration, seed: int, observer: bool
) -> pd.DataFrame:
    """Predict a run again with other requests and draws of the laws, a row each.

    Parameters
    ----------
    row, calibration, seed, observer
        As for `predict_run`.
    """
    return pd.DataFrame(
        predict_run(row, replication(calibration, number), seed + 1 + number, observer)[0]
        for number in range(REPLICATIONS)
    )
