"""The window of a sweep's runs: start-up transient, length and replications."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np

from adapter_twin.laws import Calibration
from adapter_twin.plan.criterion import Criterion
from adapter_twin.plan.grid import GRID, evaluate, grid_runs, simulate_quietly
from adapter_twin.service.metrics import ttft_s
from adapter_twin.workload.files import records, run_to_workload

if TYPE_CHECKING:
    import pandas as pd

WORKLOAD = "workload_id"
CONFIGURATION = ["served_adapters", "adapter_slots"]

MINUTE_S = 60.0


def settling(runs: pd.DataFrame, calibration: Calibration, seeds: Sequence[int]) -> pd.DataFrame:
    """Return how service settles after an empty start.

    Parameters
    ----------
    runs : pandas.DataFrame
        See `adapter_twin.plan.grid.grid_runs`; ``run_id`` tells them apart.
    calibration : Calibration
    seeds : sequence of int
        Of the traffic; figures are medians over them.

    Returns
    -------
    pandas.DataFrame
        ``run_id``, ``minute`` of the window, ``mean_ttft_ms`` of the requests that arrived in it
        and got a token, ``in_flight``: requests sent and not complete at its end.
    """
    import pandas as pd

    tables = []
    for row in records(runs):
        for seed in seeds:
            engine, workload = run_to_workload(row)
            run = simulate_quietly(workload, engine, calibration, seed)
            minute = (run.records.arrival_s / MINUTE_S).astype(int)
            ttft_ms = pd.Series(1e3 * ttft_s(run.records)).groupby(minute).mean()
            ends_s = MINUTE_S * (ttft_ms.index.to_numpy() + 1)
            arrived = np.searchsorted(run.records.arrival_s, ends_s)
            complete = np.searchsorted(np.sort(run.records.end_s), ends_s)  # NaN sorts last
            tables.append(
                pd.DataFrame(
                    {
                        "run_id": row["run_id"],
                        "minute": ttft_ms.index,
                        "mean_ttft_ms": ttft_ms.to_numpy(),
                        "in_flight": arrived - complete,
                    }
                )
            )
    joined = pd.concat(tables)
    return joined.groupby(["run_id", "minute"], sort=False).median().reset_index()


def repeat_windows(
    workloads: pd.DataFrame,
    calibration: Calibration,
    windows_s: Sequence[float],
    seeds: Sequence[int],
    *,
    jobs: int = -1,
) -> pd.DataFrame:
    """Predict workloads on the whole grid, in windows of different lengths and with several seeds.

    Returns
    -------
    pandas.DataFrame
        As `adapter_twin.plan.grid.evaluate`, with ``seed``.
    """
    import pandas as pd

    tasks = (
        joblib.delayed(_evaluate)(row, duration_s, seed, calibration)
        for row in records(workloads)
        for duration_s in windows_s
        for seed in seeds
    )
    tables: list[pd.DataFrame] = joblib.Parallel(jobs)(tasks)
    return pd.concat(tables, ignore_index=True)


def _evaluate(
    row: dict[str, Any], duration_s: float, seed: int, calibration: Calibration
) -> pd.DataFrame:
    runs = grid_runs(row, GRID, GRID, duration_s)
    return evaluate(runs, calibration, seed=seed).assign(seed=seed)


def judge(runs: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """Choose each workload's optimum from every single window, and tell what the pick is worth.

    The longest windows tell it, all their seeds together.

    Parameters
    ----------
    runs : pandas.DataFrame
        See `repeat_windows`.
    criterion : Criterion
        What is picked by.

    Returns
    -------
    pandas.DataFrame
        One row per workload, ``duration_s`` and ``seed``: ``served_adapters``, ``adapter_slots``,
        ``total_throughput`` of the pick; ``same_served``: the long windows choose as many adapters;
        ``regret``: percent of throughput lost by their account (all of it if the pick starves);
        ``starves``.
    """
    by = [WORKLOAD, "duration_s", "seed"]
    picks = criterion.ranked(runs, within=by).drop_duplicates(by)
    longest = runs[runs.duration_s == runs.duration_s.max()]
    truth = longest.groupby([WORKLOAD, *CONFIGURATION], as_index=False).mean(numeric_only=True)
    truth["feasible_start"] = truth.feasible_start > 0
    best = Criterion().ranked(truth, within=[WORKLOAD]).drop_duplicates(WORKLOAD)
    truth["reached"] = truth.total_throughput.where(Criterion().feasible(truth), 0.0)
    judged = picks[[*by, *CONFIGURATION, "total_throughput"]].merge(
        truth[[WORKLOAD, *CONFIGURATION, "reached"]], on=[WORKLOAD, *CONFIGURATION]
    )
    top = judged[[WORKLOAD]].merge(best, on=WORKLOAD)
    judged["same_served"] = judged.served_adapters == top.served_adapters
    judged["regret"] = 100 * (1 - judged.reached / top.total_throughput)
    judged["starves"] = judged.reached == 0
    return judged.drop(columns="reached")


def by_window(picks: pd.DataFrame) -> pd.DataFrame:
    """Return how good picks are, by the window's length.

    Returns
    -------
    pandas.DataFrame
        ``duration_s``; ``same_served`` and ``starves``, percent of the picks; ``regret``, percent
        on average; ``throughput_scatter``: standard deviation over seeds of the throughput at the
        optimum, in percent, on average over workloads whose seeds choose as many adapters.
    """
    groups = picks.groupby(["duration_s", WORKLOAD])
    spread = groups.agg(
        deviation=("total_throughput", "std"),
        mean=("total_throughput", "mean"),
        different=("served_adapters", "nunique"),
    ).query("different == 1")
    scatter = (100 * spread.deviation / spread["mean"]).groupby("duration_s").mean()
    means = picks.groupby("duration_s")[["same_served", "starves", "regret"]].mean()
    means[["same_served", "starves"]] *= 100
    return means.assign(throughput_scatter=scatter).reset_index()


def by_margin(runs: pd.DataFrame, margins: Sequence[float]) -> pd.DataFrame:
    """Return how good the picks of windows are, by the safety margin that they are made with."""
    import pandas as pd

    rows = []
    for margin in margins:
        picks = judge(runs, Criterion(margin=margin))
        row = {"starves": 100 * picks.starves.mean(), "regret": picks.regret.mean()}
        rows.append({"margin": 100 * margin, **row})
    return pd.DataFrame(rows)
