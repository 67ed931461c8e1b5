"""The optimum of a traffic mix: how many adapters a GPU serves best, with how many slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapter_twin import __version__
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.parallel import share_out
from adapter_twin.plan.candidates import HOUR_S, Candidates
from adapter_twin.plan.criterion import MARGIN, Criterion
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import GRID, check_grids, evaluate, grid_runs
from adapter_twin.plan.logged import described, read_busiest
from adapter_twin.plan.steady_state import planned_on, typical_figures
from adapter_twin.workload.files import parse_ranks, parse_rates, records, run_to_workload
from adapter_twin.workload.scenario import config_hash
from adapter_twin.workload.strict import read

if TYPE_CHECKING:
    import pandas as pd

CONFIGURATION = ("served_adapters", "adapter_slots")
SERVICE = ("total_throughput", "mean_ttft_ms", "p99_ttft_ms")

ALTERNATIVES = 10
"""This number of the next best configurations is shown beside those that tie."""


def optimum(
    workload: Mapping[str, Any],
    calibration: str = "auto",
    *,
    served_grid: Sequence[int] = GRID,
    slots_grid: Sequence[int] = GRID,
    criterion: Criterion | None = None,
    duration_s: float = 3600.0,
    seed: int = 0,
    jobs: int = -1,
) -> dict[str, Any]:
    """Find the configuration with the highest throughput that starves no request.

    Parameters
    ----------
    workload : mapping
        ``model``, ``rates_per_adapter`` and ``ranks``, dealt over however many adapters are served,
        ``mean_input_tokens`` and ``mean_requested_output_tokens``, as in a runs table.
    calibration : str
    served_grid, slots_grid : sequence of int
        Numbers of served adapters and of slots to choose from.
    criterion : Criterion, optional
        The paper's rule with a safety margin of `MARGIN` if left out.
    duration_s : float
        Window of each run of the grid, on a server on which each adapter has been used.
    seed : int
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    dict
        ``served_adapters``, the best of the grid; ``adapter_slots``, what `recommend` chooses for
        them; ``total_throughput`` in tokens/s, ``mean_ttft_ms`` and ``p99_ttft_ms`` that it
        expects; ``starved``; ``traffic`` and ``criterion`` in words; ``at_edge``: the grid ends at
        the chosen number of adapters, more might be served; ``alternatives``: the configurations
        that tie in the grid, then the next best ones, on a ``prior`` of cautious laws.

    Raises
    ------
    AdapterTwinError
        Bad input, or no configuration of the grid satisfies the criterion.

    Examples
    --------
    >>> workload = {
    ...     "model": "llama-3.1-8b-instruct",
    ...     "rates_per_adapter": "0.4",
    ...     "ranks": "16",
    ...     "mean_input_tokens": 223,
    ...     "mean_requested_output_tokens": 198,
    ... }
    >>> grids = {"served_grid": [16, 32, 128], "slots_grid": [8, 16, 32]}
    >>> found = optimum(workload, **grids, duration_s=300, jobs=1)
    >>> found["served_adapters"], found["adapter_slots"]
    (32, 32)
    """
    check_grids(tuple(served_grid), tuple(slots_grid))
    highest = max(parse_rates(workload["rates_per_adapter"]))
    require(highest > 0, "rates: all are zero; give at least one above zero")
    criterion = criterion or Criterion(margin=MARGIN)
    fitted = load_calibration(calibration, workload["model"])
    fitted.warn_if_prior()
    runs = grid_runs(workload, served_grid, slots_grid, duration_s, fitted.version)
    if runs.empty:
        raise AdapterTwinError("slots_grid: all are above served_grid; lower the slots")
    table = evaluate(runs, planned_on(fitted), seed=seed, slo=criterion.slo, jobs=jobs)
    rows = {row["served_adapters"]: row for row in records(runs)}

    def demand_of(served: int) -> Demand:
        engine, traffic = run_to_workload(rows[served])
        return Demand(
            model=engine.model,
            adapters=traffic.adapters,
            lengths=traffic.lengths,
            slo=criterion.slo,
            calibration=calibration,
            seed=seed,
            engine=engine.flags,
            slots=tuple(slots for slots in slots_grid if slots <= served),
        )

    return _answer(table, demand_of, criterion, fitted, max(served_grid))


def optimum_of_log(
    log: str | Path,
    model: str,
    ranks: str,
    calibration: str = "auto",
    *,
    served_grid: Sequence[int] = GRID,
    slots_grid: Sequence[int] = GRID,
    criterion: Criterion | None = None,
    seed: int = 0,
    jobs: int = -1,
) -> dict[str, Any]:
    """Find how many of a log's adapters a GPU serves best: the busiest, with their own requests.

    The log is replayed without the requests of the other adapters; those to the base model stay.

    Parameters
    ----------
    log : path-like
        See `adapter_twin.workload.request_log`.
    model : str
    ranks : str
        As in a runs table, dealt over the log's adapters, the busiest one first.
    calibration : str
    served_grid, slots_grid : sequence of int
        Numbers of served adapters and of slots to choose from. Where the log has fewer adapters
        than the grid's last number, all of them are served as well.
    criterion : Criterion, optional
    seed, jobs : int
        As for `optimum`.

    Returns
    -------
    dict
        As of `optimum`.

    Raises
    ------
    AdapterTwinError
        Bad input, a log that names no adapters, or nothing satisfies the criterion.
    """
    import joblib
    import pandas as pd

    check_grids(tuple(served_grid), tuple(slots_grid))
    criterion = criterion or Criterion(margin=MARGIN)
    fitted = load_calibration(calibration, model)
    fitted.warn_if_prior()
    keys, trace = read_busiest(Path(log), parse_ranks(ranks))
    about = {"model": model, "slo": criterion.slo, "calibration": calibration, "seed": seed}
    whole, fewest = replace(read(Demand, keys | about), trace=trace), min(slots_grid)
    sizes = sorted({min(size, len(whole.adapters)) for size in served_grid})
    sizes = [size for size in sizes if size >= fewest]
    require(bool(sizes), "slots_grid: all are above the served adapters; lower the slots")

    def demand_of(served: int) -> Demand:
        slots = tuple(slots for slots in slots_grid if slots <= served)
        return replace(whole.only(np.arange(served)), slots=slots)

    tasks = (joblib.delayed(_replayed)(demand_of(size), criterion.margin) for size in sizes)
    table = pd.concat(share_out(tasks, jobs), ignore_index=True)
    return _answer(table, demand_of, criterion, fitted, max(served_grid))


def _replayed(demand: Demand, margin: float) -> pd.DataFrame:
    """Return the service of a demand by its slots, as rows of a grid."""
    table = Candidates.of(demand, margin).table()
    return table.assign(served_adapters=len(demand.adapters), max_lora_rank=demand.max_lora_rank)


def _answer(
    table: pd.DataFrame,
    demand_of: Callable[[int], Demand],
    criterion: Criterion,
    fitted: Calibration,
    last: int,
) -> dict[str, Any]:
    """Choose from a grid's table, and have the search for slots confirm the choice.

    Parameters
    ----------
    table : pandas.DataFrame
    demand_of : callable
        Returns the demand of a number of served adapters, with the grid's slots.
    criterion : Criterion
    fitted : Calibration
    last : int
        Where the grid of served adapters ends.
    """
    import pandas as pd

    ranked = criterion.ranked(table)
    if ranked.empty:
        raise AdapterTwinError(_why_none(table, criterion))
    for served in ranked.served_adapters.drop_duplicates().tolist():
        demand = demand_of(served)
        replica = Candidates.of(demand, criterion.margin)
        chosen = replica.choose(replica.table())
        if chosen is not None:
            break
    else:
        raise AdapterTwinError(
            "served_grid: what serves in the grid's window does not in further ones, so close is "
            "it to the edge; give fewer served adapters"
        )
    slots, windows = int(chosen[0].adapter_slots), chosen[1]
    best = {"served_adapters": served, "adapter_slots": slots}
    fitted.warn_outside_range(demand.engine_with(slots), demand.workload(HOUR_S))
    others = ranked[(ranked[[*CONFIGURATION]] != pd.Series(best)).any(axis=1)]
    shown = others.iloc[: int(others.tied.sum()) + ALTERNATIVES]
    told = typical_figures(windows, demand)
    return {
        **best,
        **{name: told[name] for name in SERVICE},
        "starved": False,
        "traffic": described(demand.trace, demand.arrivals),
        "criterion": str(criterion),
        "at_edge": served == last,
        "calibration": fitted.name,
        "prior": fitted.origin or None,
        "seed": demand.seed,
        "version": __version__,
        "config_hash": config_hash(demand),
        "alternatives": shown[[*CONFIGURATION, *SERVICE, "tied"]].to_dict("records"),
    }


def _why_none(table: Any, criterion: Criterion) -> str:
    """Say what stands in the way of every configuration."""
    if not table.feasible_start.any():
        return (
            f"slots_grid: the GPU starts with none of these slots at rank "
            f"{table.max_lora_rank.iloc[0]}; give fewer slots"
        )
    if criterion.slo is not None and Criterion(margin=criterion.margin).feasible(table).any():
        best = table.slo_attainment.max()
        return (
            f"slo: no configuration of the grid meets it; the best one does for {best:.1%} of the "
            f"requests, {criterion.slo.percentile:g} % are asked: relax it or serve fewer adapters"
        )
    return (
        "served_grid: every configuration starves; give fewer served adapters (the least now is "
        f"{table.served_adapters.min()}) or lower rates"
    )
