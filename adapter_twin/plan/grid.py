"""The service of a traffic mix over a grid of served adapters N and slots G."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby, product
from typing import TYPE_CHECKING, Annotated, Any

import joblib
from pydantic import AfterValidator

from adapter_twin.capacity.analytic import predict_analytic
from adapter_twin.errors import require
from adapter_twin.laws import Calibration
from adapter_twin.parallel import share_out
from adapter_twin.service.metrics import service_of, slo_attainment
from adapter_twin.twin.records import Simulation
from adapter_twin.twin.simulate import draw_requests, simulate
from adapter_twin.workload.engine_config import EngineConfig, ServeFlags
from adapter_twin.workload.engine_versions import EngineVersion, engine_version
from adapter_twin.workload.files import parse_ranks, records, run_to_workload
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.strict import Count, Some, function
from adapter_twin.workload.trace import Trace
from adapter_twin.workload.traffic import Workload

if TYPE_CHECKING:
    import pandas as pd

GRID = (16, 32, 64, 96, 128, 160, 192, 256, 320, 384)
"""The reference study's grids have these numbers of served adapters, and of slots."""

MAX_NUM_SEQS = ServeFlags().max_num_seqs
"""The reference study's engines have this limit."""

FIGURES = (
    *("total_throughput", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms"),
    *("mean_itl_ms", "p99_itl_ms"),
)
"""These figures of `adapter_twin.service.metrics.service_of` are kept of a run."""

STARVING_UTILISATION = 1.6
"""A run starves for certain where its load is this multiple of the analytic capacity."""


def _different(grid: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(grid)) < len(grid):
        raise ValueError("a number is there twice")
    return grid


Grid = Annotated[Some[Count], AfterValidator(_different)]


@function
def check_grids(served_grid: Grid, slots_grid: Grid) -> None:
    """Raise `AdapterTwinError` unless each grid holds different numbers of at least one."""


def slot_rank(ranks: Sequence[int], version: EngineVersion | None = None) -> int:
    """Return the rank at which vLLM reserves slots for a mix of ranks.

    Parameters
    ----------
    ranks : sequence of int
    version : EngineVersion, optional
        Left out, the reference study's.
    """
    sizes = (version or engine_version("0.8.5")).max_lora_ranks
    fitting = [size for size in sizes if size >= max(ranks)]
    require(bool(fitting), f"ranks: {max(ranks)} is above {max(sizes)}, the most that vLLM takes")
    return fitting[0]


def grid_runs(
    workload: Mapping[str, Any],
    served: Sequence[int],
    slots: Sequence[int],
    duration_s: float,
    version: EngineVersion | None = None,
) -> pd.DataFrame:
    """Return the runs of one traffic mix over a grid of (N, G).

    Parameters
    ----------
    workload : mapping
        ``model``, ``rates_per_adapter``, ``ranks`` and lengths, as in a runs table; its
        ``max_num_seqs`` is `MAX_NUM_SEQS` where it is not told.
    served, slots : sequence of int
        Pairs with more slots than served adapters are left out.
    duration_s : float
        Window of each run.
    version : EngineVersion, optional
        See `slot_rank`.
    """
    import pandas as pd

    pairs = [(n, g) for n, g in product(sorted(served), sorted(slots)) if g <= n]
    return pd.DataFrame(
        {
            "run_id": [f"N={n} G={g}" for n, g in pairs],
            "max_num_seqs": MAX_NUM_SEQS,
            **workload,
            "served_adapters": [n for n, _ in pairs],
            "adapter_slots": [g for _, g in pairs],
            "max_lora_rank": slot_rank(parse_ranks(workload["ranks"]), version),
            "duration_s": duration_s,
        }
    )


def evaluate(
    runs: pd.DataFrame,
    calibration: Calibration,
    *,
    seed: int = 0,
    slo: Slo | Mapping[str, Slo] | None = None,
    jobs: int = 1,
) -> pd.DataFrame:
    """Predict the service of the runs of one traffic mix, without any measurement's effect.

    Runs that the GPU refuses to start are not simulated, nor are those past `STARVING_UTILISATION`.
    Runs of the same number of served adapters meet the very same requests.

    Parameters
    ----------
    runs : pandas.DataFrame
        See `grid_runs`.
    calibration : Calibration
    seed : int
    slo : Slo or mapping of str to Slo, optional
        One, or several by the columns that they get in place of ``slo_attainment``.
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    pandas.DataFrame
        `runs` with ``feasible_start``, ``simulated``, ``kv_cache_tokens``,
        ``offered_tokens_per_s`` as configured, `FIGURES` and ``slo_attainment``; no figures where
        a run was not simulated.
    """
    import pandas as pd

    slos = slo if isinstance(slo, Mapping) else {"slo_attainment": slo}
    bounds = predict_analytic(runs, calibration)
    simulated = bounds.feasible_start & (bounds.utilisation < STARVING_UTILISATION)
    rows = records(runs[simulated])
    same_traffic = [list(group) for _, group in groupby(rows, lambda row: row["served_adapters"])]
    tasks = (joblib.delayed(_serve)(group, calibration, seed, slos) for group in same_traffic)
    figures = [row for group in share_out(tasks, jobs) for row in group]
    service = pd.DataFrame(
        figures, index=runs.index[simulated], columns=[*FIGURES, *slos], dtype=float
    )
    known = bounds[["feasible_start", "kv_cache_tokens", "offered_tokens_per_s"]]
    return runs.join(known).assign(simulated=simulated).join(service)


def _serve(
    rows: list[dict[str, Any]], calibration: Calibration, seed: int, slos: Mapping[str, Slo | None]
) -> list[dict[str, float]]:
    """Simulate runs of the same traffic."""
    configured = [run_to_workload(row) for row in rows]
    trace = draw_requests(configured[0][1], calibration, seed=seed)
    figures = []
    for engine, workload in configured:
        run = simulate_quietly(workload, engine, calibration, seed, trace)
        service = service_of(run)
        attained = {
            name: slo_attainment(run.records, slo, run.duration_s)
            for name, slo in slos.items()
            if slo is not None
        }
        figures.append({name: service[name] for name in FIGURES} | attained)
    return figures


def simulate_quietly(
    workload: Workload,
    engine: EngineConfig,
    calibration: Calibration,
    seed: int,
    trace: Trace | None = None,
) -> Simulation:
    """Simulate without a warning of extrapolations: the caller warns, once for many runs.

    Parameters
    ----------
    workload, engine, calibration, seed, trace
        As for `adapter_twin.twin.simulate.simulate`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return simulate(workload, engine, calibration, seed=seed, trace=trace)
