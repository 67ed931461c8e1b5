"""Tables of the chapter on the published twin: its labels, its TTFT, and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from adapter_twin.capacity.analytic import predict_analytic
from adapter_twin.laws import load_calibration
from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.service.metrics import is_starved, summarize
from adapter_twin.service.validate import pair_runs
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.files import records, run_to_workload
from study import measured_grids
from study.ch08_to_10 import judged_by_twin

TREES = ("small tree, depth 2", "small tree, depth 4", "small tree, depth 6", "decision tree")
"""The labels are learnt by these models of the optimum."""


def as_published(sweep: pd.DataFrame) -> pd.DataFrame:
    """Return a sweep of this twin in the columns of the published one (``authors_twin_sweep``).

    Runs that were too hopeless to simulate get what the analytic model says they serve: the
    published rule may choose them.
    """
    skipped = sweep.feasible_start & ~sweep.simulated
    served = predict_analytic(sweep[skipped].astype(dict.fromkeys(measured_grids.WORKLOAD, str)))
    tokens = sweep.mean_input_tokens + sweep.mean_requested_output_tokens
    table = sweep.assign(
        total_throughput=sweep.total_throughput.astype(float),
        offered_rate_req_s=sweep.offered_tokens_per_s / tokens,
        pool_in=sweep.mean_input_tokens,
        pool_out=sweep.mean_requested_output_tokens,
    )
    table.loc[skipped, "total_throughput"] = served.total_throughput
    return table[table.feasible_start]


def label_ablation(
    grids: pd.DataFrame,
    sweep: pd.DataFrame,
    authors_sweep: pd.DataFrame,
    models: Sequence[str] = TREES,
) -> pd.DataFrame:
    """Train the same models on four sets of labels, and look up what their picks served.

    Either twin's sweep is labelled with and without the published rule, which keeps the first point
    of a curve over N where no point of it is feasible.

    Parameters
    ----------
    grids : pandas.DataFrame
        See `study.measured_grids.measured_grids`.
    sweep : pandas.DataFrame
        Of this twin, see `adapter_twin.learn.sweep.read_sweep`.
    authors_sweep : pandas.DataFrame
        Table ``authors_twin_sweep``.
    models : sequence of str
        Of `adapter_twin.learn.surrogates.MODELS`, given the paper's features.

    Returns
    -------
    pandas.DataFrame
        A row per ``twin``, ``rule`` and ``model``: ``labels`` and, of these, ``starving_labels`` in
        percent, by this twin; measured ``workloads`` picked for, and
        `study.measured_grids.paper_style` of the picks.
    """
    rows = []
    for twin, table in (("this twin", as_published(sweep)), ("published twin", authors_sweep)):
        offered = table.offered_rate_req_s * (table.pool_in + table.pool_out)
        feasible = ~is_starved(table.total_throughput, offered)
        for rule, kept in (("no label", table[feasible]), ("first point", table)):
            labels = measured_grids.authors_picks(kept).astype(
                dict.fromkeys(measured_grids.WORKLOAD, str)
            )
            starving = judged_by_twin(labels, sweep)["starving"]
            about = {"labels": len(labels), "starving_labels": starving}
            for model in models:
                picks = measured_grids.model_picks(
                    grids, labels.assign(has_optimum=True), "paper", model
                )
                costs = measured_grids.cost(picks, grids)
                row = {"twin": twin, "rule": rule, "model": model, **about}
                rows.append({**row, "workloads": len(costs), **measured_grids.paper_style(costs)})
    return pd.DataFrame(rows)


def tokens_per_request(
    runs: pd.DataFrame, predictions: Mapping[str, pd.DataFrame], authors: pd.DataFrame
) -> pd.DataFrame:
    """Return how many tokens a request carries: as measured, and in the twins.

    Parameters
    ----------
    runs : pandas.DataFrame
        Table ``runs``, completed runs whose client did not collapse.
    predictions : mapping
        ``this twin`` and ``normal lengths``, see `study.ch14_ablation.predict_with`.
    authors : pandas.DataFrame
        Table ``authors_twin``, of which only some runs tell how many requests completed.

    Returns
    -------
    pandas.DataFrame
        ``requests`` (of whom), mean input plus output ``tokens``, and their ``excess`` over the
        measured ones in percent.
    """
    told = authors[authors["run_id"].isin(runs["run_id"])].dropna(subset=["completed_requests"])
    hours_s = told["run_id"].map(runs.set_index("run_id")["duration_s"])
    tokens = {
        "measured": (runs["input_tokens"] + runs["output_tokens"]).sum()
        / runs["completed_requests"].sum(),
        **{
            name: predictions[name]["tokens_per_request"].mean()
            for name in ("this twin", "normal lengths")
        },
        "published twin": (told["total_throughput"] * hours_s).sum()
        / told["completed_requests"].sum(),
    }
    table = pd.Series(tokens, name="tokens").rename_axis("requests").reset_index()
    return table.assign(excess=100 * (table["tokens"] / tokens["measured"] - 1))


def ttft_convention(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what charging unfinished requests the whole window makes of the mean TTFT.

    Parameters
    ----------
    runs : pandas.DataFrame
        Table ``runs``, completed runs whose client did not collapse.

    Returns
    -------
    pandas.DataFrame
        Medians over the runs by ``regime``: ``unfinished`` requests in percent; mean TTFT in s of
        the completed requests, and of all with the unfinished charged; ``charge``, in percent of
        the latter; ``runs``.
    """
    regime = pair_runs(runs, runs).drop_duplicates("run_id").set_index("run_id").regime
    unfinished = 1 - runs.completed_requests / runs.sent_requests
    completed_s = runs.mean_ttft_ms / 1e3
    charge_s = unfinished * runs.duration_s
    charged_s = (1 - unfinished) * completed_s + charge_s
    table = pd.DataFrame(
        {
            "regime": runs.run_id.map(regime),
            "unfinished": 100 * unfinished,
            "completed_s": completed_s,
            "charged_s": charged_s,
            "charge": 100 * charge_s / charged_s,
        }
    )
    groups = table.groupby("regime")
    return groups.median().assign(runs=groups.size()).reset_index()


def speed(
    runs: pd.DataFrame, authors: pd.DataFrame, *, simpy_runs: int, repeats: int = 3
) -> pd.DataFrame:
    """Time the twins and the analytic model on the same measured hours, on one core.

    This twin is timed in processor time and warm, from the draw of the requests to the summary of
    their records; the published twin's times are those that it reported itself.

    Parameters
    ----------
    runs : pandas.DataFrame
        Table ``runs``.
    authors : pandas.DataFrame
        Table ``authors_twin``.
    simpy_runs : int
        Number of the runs that are simulated under SimPy, too.
    repeats : int
        The fastest counts.

    Returns
    -------
    pandas.DataFrame
        ``simulator``; ``runs``, of one hour each; median ``seconds`` per run; ``times_real_time``.
    """
    rows = records(runs)
    few = rows[:: max(len(rows) // simpy_runs, 1)][:simpy_runs]
    theirs = authors.drop_duplicates("run_id").set_index("run_id").wall_s
    seconds = {
        "this twin, compiled": [_simulation_s(row, "compiled", repeats) for row in rows],
        "this twin, SimPy": [_simulation_s(row, "simpy", 1) for row in few],
        "analytic model": [_fastest(lambda: predict_analytic(runs), repeats + 1) / len(rows)],
        "published twin": theirs[runs.run_id].to_list(),
    }
    # two digits: a time is not more certain than that
    medians = {name: float(f"{np.median(values):.2g}") for name, values in seconds.items()}
    return pd.DataFrame(
        {
            "simulator": list(medians),
            "runs": [len(rows), len(few), len(rows), len(rows)],
            "seconds": list(medians.values()),
            "times_real_time": [HOUR_S / median for median in medians.values()],
        }
    )


def _simulation_s(
    row: dict[str, object], clock: Literal["compiled", "simpy"], repeats: int
) -> float:
    calibration = load_calibration("auto", str(row["model"]))
    engine, workload = run_to_workload(row)

    def run() -> None:
        done = simulate(workload, engine, calibration, observer=True, clock=clock)
        summarize(done.records, done.gaps, done.duration_s)

    return _fastest(run, repeats)


def _fastest(function: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of some calls in s."""
    seconds = []
    for _ in range(repeats):
        start_s = time.process_time()
        function()
        seconds.append(time.process_time() - start_s)
    return min(seconds)
