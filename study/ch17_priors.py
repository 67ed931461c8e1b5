"""Tables of the chapter on GPUs, models and engines that were not measured.

``python -m study.ch17_priors`` prints the constants of steps of `LATER`, as ``data/engines`` has
them, fitted through the twin to the one run of it that has been published with each request's
times, which is without adapters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.special import ndtri

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import Calibration
from adapter_twin.laws.front_end import FrontEndLaw
from adapter_twin.laws.prior import SPEEDS, UNKNOWN, prior_calibration
from adapter_twin.laws.roofline import ENGINE_CONSTANTS
from adapter_twin.laws.step_time import Floats, batch_features
from adapter_twin.plan.criterion import DEFAULT_SLO, MARGIN, Criterion
from adapter_twin.plan.grid import GRID, simulate_quietly
from adapter_twin.plan.optimum import CONFIGURATION, optimum
from adapter_twin.service.intervals import LEAST_SPREAD
from adapter_twin.tables import datasets
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.engine_versions import WITH_ADAPTERS, engine_version
from adapter_twin.workload.gpus import gpu_steps, steps_from
from adapter_twin.workload.shipped import facts
from adapter_twin.workload.trace import BASE_MODEL, Trace
from adapter_twin.workload.traffic import Lengths, Workload
from study import measured_grids
from study.ch01_to_06 import MEAN_INPUT_TOKENS, MEAN_OUTPUT_TOKENS
from study.left_out import region_errors
from study.results import read_expected

SHARES = (0.8, 0.9)
"""Intervals of priors are to hold this share of the runs."""

GPU, LATER, MODEL = "rtx-pro-6000", "0.19.0", "llama-3.1-8b-instruct"
REPORT = datasets.REPOSITORY / "data" / "public" / f"vllm-{LATER}_{GPU}_llama-3.1-8b.parquet"

FITTED = ("step_ms", "sequence_ms")
"""The run tells these; what it does not tell is taken from `WITH_ADAPTERS`, as a guess."""

ERROR, OBSERVATIONS = 0.04, 20.0
"""The relative error of a request's times; all of them together count for this many."""

LEAST_DOUBT = 0.15
"""A constant that one run tells is not taken to be surer than those of `WITH_ADAPTERS`."""

SLOTS, RANK = 32, 16
"""Steps with adapters are told of an engine with these."""

BATCH, CONTEXT_TOKENS = 32, 400
"""The figure shows a batch of n decoding requests, with m tokens each."""

SERVICE = ("total_throughput", "mean_ttft_ms")

ENGINE = EngineConfig(model=MODEL, max_loras=0, max_num_seqs=128, max_num_batched_tokens=2048)
"""That of the run."""


def model_errors() -> pd.DataFrame:
    """Return the errors of priors of models left out, as `study.left_out.region_errors`."""
    errors = region_errors(datasets.load("runs"), read_expected("left_out_models"))
    return errors[errors["measure"].isin(["mape", "median_error"])]


def coverage() -> pd.DataFrame:
    """Return the share of runs of models left out that lie in the intervals of their priors.

    Returns
    -------
    DataFrame
        ``figure``, ``asked`` and ``covered`` in percent, ``n_runs``.
    """
    told = read_expected("left_out_models").set_index("run_id")
    measured = datasets.load("runs").set_index("run_id").loc[told.index]
    rows = []
    for figure in LEAST_SPREAD:
        off = np.abs(np.log(told[figure] / measured[figure])) / told[f"{figure}_spread"]
        for share in SHARES:
            inside = off[off.notna()] <= ndtri((1 + share) / 2)
            rows.append((figure, 100 * share, 100 * inside.mean(), len(inside)))
    return pd.DataFrame(rows, columns=["figure", "asked", "covered", "n_runs"])


def served_by_priors() -> pd.DataFrame:
    """Return the best numbers of adapters of the measured grids, as priors of models left out say.

    Returns
    -------
    DataFrame
        A row per workload: ``measured`` N; ``prior`` and ``cautious``, in steps of the grid above
        the measured one. Where nothing serves by a prior, it is one step below the grid.
    """
    grids = measured_grids.measured_grids(datasets.load("runs"))
    told = read_expected("left_out_models_grids")
    measured = measured_grids.measured_optima(grids).set_index(measured_grids.WORKLOAD)
    table = measured[["served_adapters"]].rename(columns={"served_adapters": "measured"})
    for name, cautious in (("prior", False), ("cautious", True)):
        ranked = Criterion(margin=MARGIN).ranked(
            told[told["cautious"] == cautious], within=measured_grids.WORKLOAD
        )
        best = ranked.groupby(measured_grids.WORKLOAD, sort=False)["served_adapters"].first()
        table[name] = best.reindex(table.index, fill_value=0)
    levels = np.sort(grids["served_adapters"].unique())
    place = {name: np.searchsorted(levels, table[name].to_numpy(), side="right") for name in table}
    for name in ("prior", "cautious"):
        table[name] = place[name] - place["measured"]
    return table.reset_index()


def replay(requests: pd.DataFrame, calibration: Calibration) -> pd.DataFrame:
    """Serve the run's requests in the twin, timed where the engine was: without a front end.

    Parameters
    ----------
    requests : DataFrame
        ``arrival_s, prompt_tokens, output_tokens``.
    calibration : Calibration

    Returns
    -------
    DataFrame
        ``first_token_s, end_s``, a row per request.
    """
    trace = Trace(
        arrival_s=requests["arrival_s"].to_numpy(float),
        adapter=np.full(len(requests), BASE_MODEL, np.int32),
        prompt_tokens=requests["prompt_tokens"].to_numpy(np.int32),
        output_tokens=requests["output_tokens"].to_numpy(np.int32),
    )
    lengths = Lengths(
        mean_input_tokens=float(requests["prompt_tokens"].mean()),
        mean_output_tokens=float(requests["output_tokens"].mean()),
    )
    workload = Workload(adapters=(), duration_s=3600.0, lengths=lengths)
    laws = replace(calibration, front_end=FrontEndLaw())
    run = simulate_quietly(workload, ENGINE, laws, 0, trace)
    return run.records.to_frame()[["first_token_s", "end_s"]]


def fit_later(requests: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Fit the engine's constants of `LATER` to the run.

    Parameters
    ----------
    requests : DataFrame
        Of the run.

    Returns
    -------
    dict
        By name of `ENGINE_CONSTANTS`, the value and the spread of its logarithm.
    """
    from scipy.optimize import least_squares

    known = {name: engine_version(WITH_ADAPTERS).steps[name] for name in ENGINE_CONSTANTS}
    start = np.array([known[name][0] for name in FITTED])
    weight = math.sqrt(OBSERVATIONS / len(requests)) / ERROR

    def laws(logarithms: Floats) -> Calibration:
        told = {name: (value, UNKNOWN) for name, (value, _) in known.items()}
        told |= {
            name: (value, UNKNOWN)
            for name, value in zip(FITTED, start * np.exp(logarithms), strict=True)
        }
        return prior_calibration(MODEL, GPU, LATER, gpu_steps(GPU) | told)

    def errors(logarithms: Floats) -> Floats:
        made = replay(requests, laws(logarithms))
        off = np.log(_token_gap_s(requests, made) / _token_gap_s(requests, requests))
        late = np.log(made["end_s"] / requests["end_s"])
        return np.concatenate([logarithms / UNKNOWN, weight * off, weight * late])

    found = least_squares(errors, np.zeros(len(FITTED)), diff_step=0.02)
    spread = np.sqrt(np.diag(np.linalg.inv(found.jac.T @ found.jac)))
    values = zip(start * np.exp(found.x), np.maximum(spread, LEAST_DOUBT), strict=True)
    fitted = {
        name: (float(f"{v:.4g}"), float(f"{s:.2g}"))
        for name, (v, s) in zip(FITTED, values, strict=True)
    }
    return {name: (value, UNKNOWN) for name, (value, _) in known.items()} | fitted


def _token_gap_s(requests: pd.DataFrame, times: pd.DataFrame) -> pd.Series[float]:
    """Return the mean time between a request's tokens."""
    return (times["end_s"] - times["first_token_s"]) / (requests["output_tokens"] - 1)


def beside_report(requests: pd.DataFrame, laws: Mapping[str, Calibration]) -> pd.DataFrame:
    """Compare figures of the run with those of some laws.

    Returns
    -------
    DataFrame
        ``figure, measured``; a column of errors in percent for each of `laws`.
    """

    def figures(times: pd.DataFrame) -> dict[str, float]:
        return {
            "output throughput": requests["output_tokens"].sum() / times["end_s"].max(),
            "mean TPOT": 1e3 * _token_gap_s(requests, times).mean(),
            "median TTFT": 1e3 * (times["first_token_s"] - requests["arrival_s"]).median(),
        }

    measured = figures(requests)
    table = pd.DataFrame({"figure": [*measured], "measured": [*measured.values()]})
    for name, calibration in laws.items():
        made = figures(replay(requests, calibration))
        table[name] = [100 * (made[figure] / measured[figure] - 1) for figure in measured]
    return table


def steps_by_gpu(batches: Sequence[int], context_tokens: int) -> pd.DataFrame:
    """Return the time of a decoding step on each GPU of which something is known.

    Parameters
    ----------
    batches : sequence of int
        Requests in the batch.
    context_tokens : int
        Of each of them.

    Returns
    -------
    DataFrame
        ``gpu``, ``speeds from``, ``requests``, ``version``, ``slots`` and ``step_ms``.
    """
    rows = []
    for gpu in facts("gpus"):
        try:
            old, later = (prior_calibration(MODEL, gpu, it) for it in (WITH_ADAPTERS, LATER))
        except AdapterTwinError:  # neither measured nor on a data sheet
            continue
        for calibration, slots in ((old, 0), (old, SLOTS), (later, 0)):
            law, version = calibration.step_time, calibration.memory.version
            for requests in batches:
                tokens = np.array(float(requests))
                batch = batch_features(
                    tokens, tokens, context_tokens * tokens, np.minimum(tokens, slots)
                )
                regime = int(np.searchsorted(law.token_breaks_, requests))
                step_ms = float(law.for_engine(slots, RANK)[regime] @ batch)
                rows.append((gpu, SPEEDS[steps_from(gpu)], requests, version, slots, step_ms))
    columns = ["gpu", "speeds from", "requests", "version", "slots", "step_ms"]
    return pd.DataFrame(rows, columns=columns)


def best_by_gpu(rate: float, grid: Sequence[int] = GRID) -> pd.DataFrame:
    """Return what `adapter_twin.plan.optimum.optimum` answers on every GPU.

    Parameters
    ----------
    rate : float
        Requests/s of each adapter.
    grid : sequence of int
        Adapters and slots to choose from.

    Returns
    -------
    DataFrame
        ``gpu, served_adapters, adapter_slots, total_throughput, mean_ttft_ms``; where the GPU
        serves none, no figures.
    """
    workload = {
        "model": MODEL,
        "rates_per_adapter": f"{rate}",
        "ranks": f"{RANK}",
        "mean_input_tokens": MEAN_INPUT_TOKENS,
        "mean_requested_output_tokens": MEAN_OUTPUT_TOKENS,
    }
    criterion = Criterion(margin=MARGIN, slo=DEFAULT_SLO)
    rows = []
    for gpu in facts("gpus"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the chapter is about them
            try:
                found = optimum(
                    *(workload, f"auto@{gpu}"),
                    served_grid=grid,
                    slots_grid=grid,
                    criterion=criterion,
                )
            except AdapterTwinError:
                found = {}
        rows.append({"gpu": gpu, **{name: found.get(name) for name in (*CONFIGURATION, *SERVICE)}})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    for name, (value, spread) in fit_later(pd.read_parquet(REPORT)).items():
        print(f'"{name}": [{value:.4g}, {spread:.2g}]')
