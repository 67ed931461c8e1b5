"""What a study measured, run by run and adapter by adapter, beside what the twin predicts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapter_twin.laws import load_calibration
from adapter_twin.laws.calibration import Calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import simulate_quietly
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.prove.rivals import CALIBRATION, PLAN
from adapter_twin.service import metrics
from adapter_twin.service.client_records import to_records
from adapter_twin.service.metrics import waits_ms
from adapter_twin.tables import datasets
from adapter_twin.twin.records import Records
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.strict import read, require

if TYPE_CHECKING:
    import pandas as pd

WARM_UP = 0.25
"""Share of a window after which starvation is judged. Over a whole short window even a server that
keeps up completes too little, for it begins empty and ends with requests under way."""

RUN = ["workload", "adapter_slots", "repeat"]
"""What tells the runs of a study apart."""

FIGURES = (
    "total_throughput",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "mean_itl_ms",
    "slo_attainment",
)
"""Measured and, with the prefix ``predicted_``, predicted of each run."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a study left: plan, calibration, and the tables measured.

    Attributes
    ----------
    demands : dict of str to Demand
        By workload.
    picks : pandas.DataFrame
        ``workload, method, adapter_slots``, the last one missing where a method names none.
    recommended : dict of str to dict
        What was said of each workload before anything was measured, or ``{"refused": why}``.
    calibration : Calibration
        Of a server on which every adapter has been used, as those of a study have.
    runs, requests : pandas.DataFrame
        See `adapter_twin.tables.campaign_schemas`.
    """

    demands: dict[str, Demand]
    picks: pd.DataFrame
    recommended: dict[str, dict[str, Any]]
    calibration: Calibration
    runs: pd.DataFrame
    requests: pd.DataFrame


def read_outcome(folder: str | Path) -> Outcome:
    """Read the folder of a study, complete or not.

    Raises
    ------
    AdapterTwinError
        It holds no study, or one of which nothing is measured yet.
    """
    import pandas as pd

    path = Path(folder, PLAN)
    require(path.is_file(), f"{path}: missing; `adapter-twin prove` writes it")
    workloads = json.loads(path.read_text(encoding="utf-8"))["workloads"]
    demands = {name: read(Demand, plan["demand"], name) for name, plan in workloads.items()}
    rows = [
        {"workload": name, "method": method, "adapter_slots": slots}
        for name, plan in workloads.items()
        for method, slots in plan["picks"].items()
    ]
    measured = Path(folder, "runs.parquet").is_file()
    require(measured, f"{folder}: nothing is measured yet; run `adapter-twin prove` again")
    tables = datasets.read_campaign(folder)
    model = next(iter(demands.values())).model
    return Outcome(
        demands=demands,
        picks=pd.DataFrame(rows).astype({"adapter_slots": "Int64"}),
        recommended={
            name: plan.get("recommended", {"refused": plan.get("refused")})
            for name, plan in workloads.items()
        },
        calibration=warmed_up(load_calibration(str(Path(folder, CALIBRATION)), model)),
        runs=tables["runs"].rename(columns={"source_path": "workload"}),
        requests=tables["requests"],
    )


def service(outcome: Outcome) -> pd.DataFrame:
    """Return what each run measured, and what the twin predicts of the very same requests.

    Returns
    -------
    pandas.DataFrame
        A row per run: `RUN`; ``starts``, ``starved`` and ``serves`` (starts, is not starved, and
        meets the SLO), `FIGURES`; and the same with the prefix ``predicted_``. All are those of
        `adapter_twin.service.metrics.service`; starvation is judged after the `WARM_UP`.
    """
    import pandas as pd

    rows = [_pair(outcome, run) for _, run in outcome.runs.iterrows()]
    return pd.DataFrame(rows).sort_values(RUN, ignore_index=True)


def _pair(outcome: Outcome, run: pd.Series[Any]) -> dict[str, Any]:
    slo = outcome.demands[run.workload].slo
    sides = {"": _measured(outcome, run), "predicted_": _predicted(outcome, run)}
    told = {
        f"{prefix}{name}": value
        for prefix, records in sides.items()
        for name, value in _figures(records, slo, float(run.duration_s)).items()
    }
    return {**{name: run[name] for name in RUN}, **told}


def _measured(outcome: Outcome, run: pd.Series[Any]) -> Records | None:
    if run.status != "ok":
        return None
    return to_records(outcome.requests[outcome.requests.run_id == run.run_id])


def _predicted(outcome: Outcome, run: pd.Series[Any]) -> Records | None:
    """Predict a run from its configuration, and the seed of its load generator."""
    demand, laws = outcome.demands[run.workload], outcome.calibration
    engine = demand.engine(int(run.adapter_slots))
    if not laws.memory.starts(engine.max_loras, engine.max_lora_rank):
        return None
    workload = demand.workload(float(run.duration_s))
    return simulate_quietly(workload, engine, laws, int(run.seed)).records


def _figures(records: Records | None, slo: Slo | None, duration_s: float) -> dict[str, Any]:
    if records is None:
        return {"starts": False, "starved": True, "serves": False, **dict.fromkeys(FIGURES, np.nan)}
    told = metrics.service(records, None, duration_s, slo=slo)
    warm = metrics.service(records, None, duration_s, warm_up_s=WARM_UP * duration_s)
    met = slo is None or told["slo_attainment"] >= slo.percentile / 100
    return {
        "starts": True,
        "starved": warm["starved"],
        "serves": met and not warm["starved"],
        **{name: told.get(name, np.nan) for name in FIGURES},
    }


def waits(outcome: Outcome) -> pd.DataFrame:
    """Return every request's time to first token, measured and predicted.

    Returns
    -------
    pandas.DataFrame
        A row per request of the runs that started, measured and predicted: `RUN`, ``adapter``,
        its ``request_rate`` and ``place`` by popularity from 1; ``ttft_ms``,
        ``predicted_ttft_ms``, as `adapter_twin.service.metrics.waits_ms` tells them.
    """
    import pandas as pd

    parts = []
    for _, run in outcome.runs.iterrows():
        seen, foreseen = _measured(outcome, run), _predicted(outcome, run)
        if seen is None or foreseen is None:
            continue
        part = {
            **{name: run[name] for name in RUN},
            "adapter": seen.adapter,
            "ttft_ms": waits_ms(seen, float(run.duration_s)),
            "predicted_ttft_ms": waits_ms(foreseen, float(run.duration_s)),
        }
        parts.append(pd.DataFrame(part))
    table = pd.concat(parts, ignore_index=True)
    return table.join(_popularity(outcome), on=["workload", "adapter"])


def per_adapter(requests: pd.DataFrame) -> pd.DataFrame:
    """Return the 99th percentile of each adapter's waits over all repeats.

    Parameters
    ----------
    requests : pandas.DataFrame
        What `waits` returned.

    Returns
    -------
    pandas.DataFrame
        A row per workload, number of slots and adapter that was asked: ``place``, ``requests``,
        ``p99_ttft_ms`` and ``predicted_p99_ttft_ms``.
    """
    return _percentiles(requests, ["workload", "adapter_slots", "adapter", "place"])


def by_popularity(requests: pd.DataFrame) -> pd.DataFrame:
    """Return the same for groups of adapters: the most popular tenth, the rarer half, the others.

    ``group`` tells them apart.
    """
    import pandas as pd

    adapters = requests.groupby("workload").place.transform("max")
    edges = pd.DataFrame({"first": 0.1 * adapters, "last": 0.5 * adapters})
    group = np.select(
        [requests.place <= edges["first"], requests.place > edges["last"]],
        ["most popular tenth", "rarer half"],
        "between",
    )
    return _percentiles(requests.assign(group=group), ["workload", "adapter_slots", "group"])


def _percentiles(requests: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    groups = requests.groupby(by)
    told = groups[["ttft_ms", "predicted_ttft_ms"]].quantile(0.99)
    names = {"ttft_ms": "p99_ttft_ms", "predicted_ttft_ms": "predicted_p99_ttft_ms"}
    return told.rename(columns=names).assign(requests=groups.size()).reset_index()


def _popularity(outcome: Outcome) -> pd.DataFrame:
    """Return rate and place of every adapter, indexed by workload and adapter."""
    import pandas as pd

    rows = [
        {"workload": name, "adapter": i, "request_rate": adapter.request_rate}
        for name, demand in outcome.demands.items()
        for i, adapter in enumerate(demand.adapters)
    ]
    table = pd.DataFrame(rows)
    place = table.groupby("workload").request_rate.rank(ascending=False, method="first")
    return table.assign(place=place.astype(int)).set_index(["workload", "adapter"])
