"""Tables of the chapter on fleets: placements, routers, failures, moving traffic, policies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import joblib
import numpy as np
import pandas as pd

from adapter_twin.fleet.cluster import Failure, simulate_cluster
from adapter_twin.fleet.kinds import Kinds
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups, best_greedy, first_fit_decreasing
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.proof.bound import lower_bound
from adapter_twin.fleet.routers import ROUTERS
from adapter_twin.fleet.strategies import place_and_hold
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.parallel import workers
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.service.metrics import mean_interval, service_of
from adapter_twin.twin.policies import CostAware, Drain, Merge, Policy, UnifiedPool
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.adapters import zipf_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.traffic import Lengths, Workload
from study.baselines import first_fit_by_count, round_robin
from study.ch01_to_06 import MEAN_INPUT_TOKENS, MEAN_OUTPUT_TOKENS
from study.drift import Drift, place_again
from study.placement_scenarios import MODEL, PlacementScenario

LENGTHS = Lengths(mean_input_tokens=MEAN_INPUT_TOKENS, mean_output_tokens=MEAN_OUTPUT_TOKENS)

METHODS: dict[str, Callable[[Oracle], Groups]] = {
    "round robin, blind to ranks": round_robin,
    "first fit by count": first_fit_by_count,
    "first fit by load (sequel paper)": first_fit_decreasing,
    "best greedy": best_greedy,
}
BEST = "best greedy and local search"
"""These are the ways of placing, the simplest first; `BEST` is that of `place`."""

NARROW, WIDE = 8, 32
ROUTED_ADAPTERS = 256
"""Routers are compared on slots and adapters of these ranks."""

ROUTER_NAMES = (
    "random",
    "round robin",
    "least outstanding",
    "adapter affinity",
    "rank-aware",
    "placed",
)
"""The chapter names routers so; only under "placed" has each adapter one home."""

FINER = 2
"""The bound takes finer steps where a placement is not at it."""


ADAPTERS, GPUS = 400, 4

KINDS: dict[str, Drift] = {
    "steady": Drift(churn=0.0),
    "diurnal": Drift(churn=0.0, swing=0.3),
    "bursty adapters": Drift(churn=0.0, burst_cv=1.0),
    "drifting popularity": Drift(churn=0.2),
    "all together": Drift(churn=0.2, swing=0.3, burst_cv=1.0),
}
"""All kinds of traffic have the same mean; an epoch is five minutes, a swing an hour."""

POLICIES: dict[str, Policy] = {
    "vLLM": Policy(),
    "drain (SGLang)": Drain(max_wait_s=2.0),
    "cost-aware eviction (Chameleon)": CostAware(),
    "shared pool (S-LoRA)": UnifiedPool(),
    "merged execution (dLoRA)": Merge(),
}


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
        held = place_and_hold(Kinds.of(scenario.demand), jobs=1)
        (oracle,), bound, gpus = held.kinds.oracles, held.bound.gpus, held.gpus
        if bound < gpus:
            bound = max(bound, lower_bound(oracle, finer=FINER))
        placed = {name: len(method(oracle)) for name, method in METHODS.items()}
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


def how_often(
    laws: Calibration,
    kinds: Mapping[str, Drift],
    every_s: Sequence[float | None],
    seeds: Sequence[int],
    *,
    gpus: int = GPUS,
    rate: float = 75.0,
    duration_s: float = 3600.0,
) -> pd.DataFrame:
    """Serve traffic that changes, with homes chosen anew at intervals.

    Parameters
    ----------
    laws : Calibration
    kinds : mapping of Drift
        By name.
    every_s : sequence of float
        Intervals between two choices; None: never.
    seeds : sequence of int
    gpus : int
    rate : float
        Requests/s of all adapters together.
    duration_s : float

    Returns
    -------
    pandas.DataFrame
        A row per kind of ``traffic`` and interval ``every_s`` (NaN: never): means over seeds of
        `study.drift.place_again`, ``low`` and ``high`` of the p99 TTFT over them.
    """
    asked = Demand(model=MODEL, adapters=zipf_adapters(ADAPTERS, rate, 1.2, [16]), lengths=LENGTHS)
    engine = EngineConfig(model=MODEL, max_loras=48, max_cpu_loras=ADAPTERS // 2, max_lora_rank=16)
    tasks = [(kind, every, seed) for kind in kinds for every in every_s for seed in seeds]
    found = joblib.Parallel(-1)(
        joblib.delayed(place_again)(
            asked, engine, gpus, laws, kinds[kind], every_s=every, duration_s=duration_s, seed=seed
        )
        for kind, every, seed in tasks
    )
    rows = [
        {"traffic": kind, "every_s": float("nan") if every is None else every} | row
        for (kind, every, _), row in zip(tasks, found, strict=True)
    ]
    return over_seeds(rows, ["traffic", "every_s"])


def compare_policies(
    laws: Calibration, seeds: Sequence[int], duration_s: float, *, adapters: int = 240
) -> pd.DataFrame:
    """Serve a long tail of adapters on one GPU with too few slots for it, by every policy.

    Parameters
    ----------
    laws : Calibration
    seeds : sequence of int
    duration_s : float
    adapters : int

    Returns
    -------
    pandas.DataFrame
        A row per policy: means over seeds of ``served`` (percent of the tokens), ``mean_itl_ms``,
        ``mean_ttft_ms``, ``p99_ttft_ms``, ``worst_ttft_ms``, the longest mean TTFT of an adapter,
        and ``loads`` per 100 requests; ``low`` and ``high`` of the p99 TTFT.
    """
    workload = Workload(
        adapters=zipf_adapters(adapters, 18.0, 0.9, [16]), duration_s=duration_s, lengths=LENGTHS
    )
    engine = EngineConfig(model=MODEL, max_loras=24, max_cpu_loras=adapters, max_lora_rank=16)
    tasks = [(name, seed) for name in POLICIES for seed in seeds]
    rows = joblib.Parallel(-1)(
        joblib.delayed(_under)(name, workload, engine, laws, seed) for name, seed in tasks
    )
    return over_seeds(rows, ["policy"])


def _under(
    name: str, workload: Workload, engine: EngineConfig, laws: Calibration, seed: int
) -> dict[str, Any]:
    run = simulate(workload, engine, laws, seed=seed, policy=POLICIES[name])
    service = service_of(run)
    return {
        "policy": name,
        "served": 100 * service["total_throughput"] / service["offered_tokens_per_s"],
        **{key: service[key] for key in ("mean_itl_ms", "mean_ttft_ms", "p99_ttft_ms")},
        "worst_ttft_ms": service["worst_adapter_mean_ttft_ms"],
        "loads": 100 * run.steps.loads.sum() / service["arrived_requests"],
    }
