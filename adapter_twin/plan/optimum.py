"""The optimum of a traffic mix: how many adapters a GPU serves best, with how many slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapter_twin import __version__
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws import load_calibration
from adapter_twin.plan.candidates import Candidates
from adapter_twin.plan.criterion import MARGIN, Criterion
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import GRID, check_grids, evaluate, grid_runs
from adapter_twin.plan.steady_state import planned_on, typical_figures
from adapter_twin.workload.files import parse_rates, records, run_to_workload
from adapter_twin.workload.scenario import config_hash

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
        expects; ``starved``; ``criterion`` in words; ``at_edge``: the grid ends at the chosen
        number of adapters, more might be served; ``alternatives``: the configurations that tie in
        the grid, then the next best ones, on a ``prior`` of cautious laws.

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
    import pandas as pd

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
    ranked = criterion.ranked(table)
    if ranked.empty:
        raise AdapterTwinError(_why_none(table, criterion))
    for row in records(ranked.drop_duplicates("served_adapters")):
        engine, traffic = run_to_workload(row)
        demand = Demand(
            model=engine.model,
            adapters=traffic.adapters,
            lengths=traffic.lengths,
            slo=criterion.slo,
            calibration=calibration,
            seed=seed,
            engine=engine.flags,
            slots=tuple(slots for slots in slots_grid if slots <= row["served_adapters"]),
        )
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
    best = {"served_adapters": row["served_adapters"], "adapter_slots": slots}
    fitted.warn_outside_range(demand.engine_with(slots), traffic)
    others = ranked[(ranked[[*CONFIGURATION]] != pd.Series(best)).any(axis=1)]
    shown = others.iloc[: int(others.tied.sum()) + ALTERNATIVES]
    told = typical_figures(windows, demand)
    return {
        **best,
        **{name: told[name] for name in SERVICE},
        "starved": False,
        "criterion": str(criterion),
        "at_edge": best["served_adapters"] == max(served_grid),
        "calibration": fitted.name,
        "prior": fitted.origin or None,
        "seed": seed,
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
