"""What the chapter on fleets tabulates of placements, routers and failures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import joblib
import numpy as np
import pandas as pd

from adapter_twin.fleet.cluster import Failure, simulate_cluster
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups, best_greedy, first_fit_decreasing
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.proof.bound import lower_bound
from adapter_twin.fleet.routers import ROUTERS
from adapter_twin.fleet.strategies import place_and_hold
from adapter_twin.laws import load_calibration
from adapter_twin.parallel import workers
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.service.metrics import mean_interval
from adapter_twin.workload.scenario import EngineConfig, Lengths, zipf_adapters
from study.baselines import first_fit_by_count, round_robin
from study.ch01_to_06 import MEAN_INPUT_TOKENS, MEAN_OUTPUT_TOKENS
from study.placement_scenarios import MODEL, PlacementScenario

LENGTHS = Lengths(mean_input_tokens=MEAN_INPUT_TOKENS, mean_output_tokens=MEAN_OUTPUT_TOKENS)

METHODS: dict[str, Callable[[Oracle], Groups]] = {
    "round robin, blind to ranks": round_robin,
    "first fit by count": first_fit_by_count,
    "first fit by load (sequel paper)": first_fit_decreasing,
    "best greedy": best_greedy,
}
BEST = "best greedy and local search"
"""Ways of placing, the simplest first, and what `place` does."""

NARROW, WIDE = 8, 32
ROUTED_ADAPTERS = 256
"""Ranks of the slots, and of the adapters, that routers are compared on."""

ROUTER_NAMES = (
    "random",
    "round robin",
    "least outstanding",
    "adapter affinity",
    "rank-aware",
    "placed",
)
"""Routers as the chapter names them; only under "placed" has each adapter one home."""

FINER = 2
"""Steps of the bound, where a placement is not at it."""


def compare_placements(
    drawn: Iterable[PlacementScenario], *, scheduler: str | None = None
) -> pd.DataFrame:
    """Place scenarios by every method; the best one's placements are simulated and repaired.

    Parameters
    ----------
    drawn : iterable of PlacementScenario
    scheduler : str, optional
        Address of a Dask scheduler whose workers do the work, see `adapter_twin.parallel.workers`.

    Returns
    -------
    pandas.DataFrame
        A row per scenario: ``name, ranks, zipf_exponent, skewed, adapters``, whether it has an
        ``slo``; ``bound``; the GPUs of each of `METHODS` and of `BEST`, of which every GPU serves
        in the twin; ``repaired`` GPUs among these.
    """
    tasks = (joblib.delayed(_place)(scenario) for scenario in drawn)
    with workers(scheduler):
        return pd.DataFrame(joblib.Parallel(-1)(tasks))


def _place(scenario: PlacementScenario) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lengths and ranks beyond those measured
        held = place_and_hold(Oracle(scenario.demand), jobs=1)
        bound, gpus = held.bound, len(held.placement.replicas)
        if bound < gpus:
            bound = max(bound, lower_bound(held.oracle, finer=FINER))
        placed = {name: len(method(held.oracle)) for name, method in METHODS.items()}
    return {
        "name": scenario.name,
        "ranks": scenario.ranks,
        "zipf_exponent": scenario.zipf_exponent,
        "skewed": scenario.skewed,
        "adapters": len(scenario.demand.adapters),
        "slo": scenario.demand.slo is not None,
        "bound": bound,
        **placed,
        BEST: gpus,
        "repaired": held.repaired,
    }


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Return how many GPUs each method uses above the bound, in percent, with 95 % intervals.

    Intervals are of the mean over scenarios, by bootstrap. ``saved``: GPUs that the best method
    saves on a skewed scenario on average, in percent of the method's.
    """
    rows = []
    for name in (*METHODS, BEST):
        gap = 100 * (table[name] / table.bound - 1).to_numpy()
        low, high = mean_interval(gap)
        skewed = table[table.skewed]
        saved = 100 * (1 - skewed[BEST] / skewed[name]).mean()
        rows.append((name, int(table[name].sum()), gap.mean(), low, high, gap.max(), saved))
    return pd.DataFrame(
        rows, columns=["method", "GPUs", "gap", "low", "high", "largest gap", "saved"]
    )


def compare_routers(
    gpus: int,
    rate: float,
    seeds: Sequence[int],
    duration_s: float,
    *,
    fail: bool = False,
    routers: Sequence[str] = ROUTER_NAMES,
) -> pd.DataFrame:
    """Serve the same traffic through every router: half the GPUs with narrow slots, half with wide.

    Every adapter that fits is on every GPU; only under "placed" it has one home.

    Parameters
    ----------
    gpus : int
    rate : float
        Requests/s of all adapters together.
    seeds : sequence of int
    duration_s : float
    fail : bool
        The first GPU is down for the middle third of the window.
    routers : sequence of str
        Of `ROUTER_NAMES`.

    Returns
    -------
    pandas.DataFrame
        A row per router: means over seeds of `adapter_twin.fleet.cluster.ClusterRun.summary` and of
        ``loads`` per 100 requests; ``low`` and ``high`` of the p99 TTFT over the seeds.
    """
    asked = Demand(
        model=MODEL,
        adapters=zipf_adapters(ROUTED_ADAPTERS, rate, 0.9, [NARROW, NARROW, NARROW, WIDE]),
        lengths=LENGTHS,
    )
    tasks = [(name, seed) for name in routers for seed in seeds]
    failures = [Failure(replica=0, at_s=duration_s / 3, down_s=duration_s / 3)] if fail else []
    rows = joblib.Parallel(-1)(
        joblib.delayed(_route)(asked, gpus, name, seed, duration_s, failures)
        for name, seed in tasks
    )
    return over_seeds(rows, ["router"])


def over_seeds(rows: list[dict[str, Any]], by: list[str]) -> pd.DataFrame:
    """Return means over all rows alike in some columns; the lowest and the highest p99 TTFT."""
    table = pd.DataFrame(rows).groupby(by, sort=False, dropna=False)
    spread = table.p99_ttft_ms.agg(["min", "max"])
    return table.mean().assign(low=spread["min"], high=spread["max"]).reset_index()


def _route(
    asked: Demand,
    gpus: int,
    name: str,
    seed: int,
    duration_s: float,
    failures: Sequence[Failure],
) -> dict[str, Any]:
    laws = warmed_up(load_calibration(asked.calibration, asked.model))
    placement = _shared(asked, gpus) if name != "placed" else _apart(asked, gpus)
    router = ROUTERS[name.replace(" ", "_").replace("-", "_")]()
    run = simulate_cluster(
        asked.workload(duration_s), placement, laws, router, seed=seed, failures=failures
    )
    loads = 100 * sum(run.adapter_loads) / len(run.records)
    return {"router": name, **run.summary(), "loads": loads}


def _engine(rank: int, adapters: int) -> EngineConfig:
    slots = min(48, adapters)
    return EngineConfig(model=MODEL, max_loras=slots, max_cpu_loras=adapters, max_lora_rank=rank)


def _shared(asked: Demand, gpus: int) -> Placement:
    """Return GPUs with narrow and with wide slots that each serve all adapters that fit."""
    plans = []
    homes = [gpus if a.rank <= NARROW else gpus - gpus // 2 for a in asked.adapters]
    for gpu in range(gpus):
        rank = NARROW if gpu < gpus // 2 else WIDE
        own = tuple(i for i, adapter in enumerate(asked.adapters) if adapter.rank <= rank)
        shares = tuple(1 / homes[i] for i in own)
        plans.append(ReplicaPlan(_engine(rank, len(own)), own, shares))
    return Placement(tuple(plans))


def _apart(asked: Demand, gpus: int) -> Placement:
    """Return the same GPUs with each adapter on one: loads even, narrow ones where they fit."""
    load = np.zeros(gpus)
    own: list[list[int]] = [[] for _ in range(gpus)]
    order = sorted(
        range(len(asked.adapters)),
        key=lambda i: (-asked.adapters[i].rank, -asked.adapters[i].request_rate),
    )
    for i in order:
        first = 0 if asked.adapters[i].rank <= NARROW else gpus // 2
        gpu = first + int(load[first:].argmin())
        own[gpu].append(i)
        load[gpu] += asked.adapters[i].request_rate
    plans = [
        ReplicaPlan(
            _engine(NARROW if gpu < gpus // 2 else WIDE, len(group)),
            tuple(sorted(group)),
            (1.0,) * len(group),
        )
        for gpu, group in enumerate(own)
    ]
    return Placement(tuple(plans))
