"""The outcome of a study, run by run, beside what the twin predicts of the same requests."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adapter_twin.errors import require
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import simulate_quietly
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.prove.rivals import CALIBRATION, PLAN
from adapter_twin.service import metrics
from adapter_twin.service.client_records import to_records
from adapter_twin.tables import datasets
from adapter_twin.twin.records import Records
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.strict import read

WARM_UP = 0.25
"""Starvation is judged after this share of a window. Over a whole short window even a server that
keeps up completes too little, for it begins empty and ends with requests under way."""

RUN = ["workload", "adapter_slots", "repeat"]
"""These columns tell the runs of a study apart."""

FIGURES = (
    *("total_throughput", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_itl_ms"),
    "slo_attainment",
)
"""These figures are measured and, with the prefix ``predicted_``, predicted of each run."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Plan, calibration and measured tables of a study.

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
        See `adapter_twin.tables.campaign_schemas`; without runs that are doubtful.
    """

    demands: dict[str, Demand]
    picks: pd.DataFrame
    recommended: dict[str, dict[str, Any]]
    calibration: Calibration
    runs: pd.DataFrame
    requests: pd.DataFrame

    def measured(self, run: "pd.Series[Any]") -> Records | None:
        """Return what the client saw of a run, a row of `runs`; None where it failed."""
        if run.status != "ok":
            return None
        return to_records(self.requests[self.requests.run_id == run.run_id])

    def predicted(self, run: "pd.Series[Any]") -> Records | None:
        """Predict a run from its configuration and the seed of its load generator.

        None where no engine starts with its slots.
        """
        demand, laws = self.demands[run.workload], self.calibration
        engine = demand.engine_with(int(run.adapter_slots))
        if not laws.memory.starts(engine):
            return None
        workload = demand.workload(float(run.duration_s))
        return simulate_quietly(workload, engine, laws, int(run.seed)).records


def read_outcome(folder: str | Path) -> Outcome:
    """Read the folder of a study, complete or not.

    Raises
    ------
    AdapterTwinError
        It holds no study, or one of which nothing is measured yet.
    """
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
    runs = tables["runs"].rename(columns={"source_path": "workload"})
    # A doubtful run tells nothing of a configuration; its repeat would compare the others unevenly.
    of_repeat = runs.workload + runs.repeat.astype(str)
    doubtful = runs.status.str.startswith("doubtful:")
    runs = runs[~of_repeat.isin(of_repeat[doubtful])]
    require(len(runs) > 0, f"{folder}: no run is to be trusted; see the status of its runs")
    model = next(iter(demands.values())).model
    return Outcome(
        demands=demands,
        picks=pd.DataFrame(rows).astype({"adapter_slots": "Int64"}),
        recommended={
            name: plan.get("recommended", {"refused": plan.get("refused")})
            for name, plan in workloads.items()
        },
        calibration=warmed_up(load_calibration(str(Path(folder, CALIBRATION)), model)),
        runs=runs,
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
    rows = []
    for _, run in outcome.runs.iterrows():
        slo, duration_s = outcome.demands[run.workload].slo, float(run.duration_s)
        seen = _figures(outcome.measured(run), slo, duration_s)
        foreseen = _figures(outcome.predicted(run), slo, duration_s)
        names = {f"predicted_{name}": value for name, value in foreseen.items()}
        rows.append({**run[RUN], **seen, **names})
    return pd.DataFrame(rows).sort_values(RUN, ignore_index=True)


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
