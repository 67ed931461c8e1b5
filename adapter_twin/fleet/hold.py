"""Placements in the twin: every GPU is simulated, and one that starves gives adapters away."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.kinds import Group, Kinds
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.placement import Placement, ReplicaPlan, replica_workload
from adapter_twin.laws import Calibration
from adapter_twin.parallel import share_out
from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import simulate_quietly
from adapter_twin.plan.logged import ANSWERED_S, stretch
from adapter_twin.service.metrics import service, tpot_s, waits_ms
from adapter_twin.twin.simulate import draw_requests
from adapter_twin.workload.lengths import Floats
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.trace import Trace
from adapter_twin.workload.traffic import Workload

GPU_FIGURES = (
    *("offered_tokens_per_s", "total_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms"),
    *("worst_adapter", "worst_adapter_mean_ttft_ms"),
)
"""These are kept of a GPU's service (`adapter_twin.service.metrics.service`)."""

ROUNDS = 8
"""A placement is repaired this many times at most."""

MOST_STARVING = 0.5
"""Where more than this share of the GPUs starve, the oracle is at fault, and no move helps."""

GIVEN_AWAY = 0.05
"""A GPU that starves gives this share of its load away in a round, the lightest adapters first."""

WIDENING = 1.5
"""The deviation of the number of adapters with requests grows by this where waits break the SLO."""

REACHED = 0.97
"""From this share of a limit on, it is the one that is missed, or one of both."""


class Bound(NamedTuple):
    """What no placement that the oracles accept is below, see `adapter_twin.fleet.proof.bound`.

    Attributes
    ----------
    gpus : int
    price_per_hour : float
        0 where no prices are told.
    """

    gpus: int
    price_per_hour: float


@dataclass(frozen=True, slots=True)
class Held:
    """A placement of which every GPU serves in the twin.

    Attributes
    ----------
    kinds : Kinds
        That it was placed by.
    bound : Bound
        Of those.
    placement : Placement
    checked : pandas.DataFrame
        See `check_placement`.
    repaired : int
        GPUs from which adapters were moved after the check.
    """

    kinds: Kinds
    bound: Bound
    placement: Placement
    checked: pd.DataFrame
    repaired: int

    @property
    def gpus(self) -> int:
        """Their number."""
        return len(self.placement.replicas)

    @property
    def price_per_hour(self) -> float:
        """Of all GPUs, 0 where no prices are told."""
        return math.fsum(self.kinds.prices[plan.kind] for plan in self.placement.replicas)

    @property
    def cost(self) -> float:
        """What counts of them, by the objective."""
        return self.price_per_hour if self.kinds.by_price else self.gpus

    @property
    def least_cost(self) -> float:
        """What counts of the bound."""
        return self.bound.price_per_hour if self.kinds.by_price else self.bound.gpus


class NotServed(AdapterTwinError):
    """GPUs of a placement do not serve in the twin, and moving adapters does not help.

    Attributes
    ----------
    placement : Placement
    checked : pandas.DataFrame
    """

    def __init__(self, placement: Placement, checked: pd.DataFrame) -> None:
        self.placement, self.checked = placement, checked
        starving = int((~checked.serves).sum())
        super().__init__(
            f"placement: {starving} of {len(checked)} GPUs do not serve in the twin, and moving "
            "adapters does not help; relax the slo or give a larger margin"
        )


def split_trace(trace: Trace, placement: Placement, seed: int) -> NDArray[np.int32]:
    """Return the replica that each request goes to, by the shares of its adapter.

    Requests of an adapter that is nowhere, and of the base model, go to -1.

    Parameters
    ----------
    trace : Trace
    placement : Placement
    seed : int
        Of the choice between replicas of one adapter.

    Returns
    -------
    int32, shape (requests,)
    """
    homes: dict[int, list[tuple[int, float]]] = {}
    for index, plan in enumerate(placement.replicas):
        for adapter, share in zip(plan.adapters, plan.shares, strict=True):
            homes.setdefault(adapter, []).append((index, share))
    requests = pd.Series(trace.adapter).groupby(trace.adapter).indices
    replica = np.full(len(trace), -1, np.int32)
    rng = np.random.default_rng([seed, 1])
    for adapter, parts in homes.items():
        own = requests.get(adapter, [])
        where, shares = zip(*parts, strict=True)
        if len(parts) == 1:
            replica[own] = where[0]
        else:
            replica[own] = rng.choice(where, len(own), p=np.array(shares) / sum(shares))
    return replica


def check_placement(
    demand: Demand,
    placement: Placement,
    calibrations: Calibration | Sequence[Calibration],
    *,
    seed: int = 0,
    duration_s: float = HOUR_S,
    jobs: int = -1,
) -> pd.DataFrame:
    """Simulate every GPU of a placement with the requests that are routed to it.

    Parameters
    ----------
    demand : Demand
    placement : Placement
    calibrations : Calibration or sequence of Calibration
        One for all GPUs, or one for each.
    seed : int
    duration_s : float
        Of drawn traffic; a log is replayed, see `adapter_twin.plan.logged.stretch`.
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    pandas.DataFrame
        A row per GPU: ``adapters, adapter_slots, max_lora_rank``, `GPU_FIGURES`, and ``serves``:
        does not starve, and meets the SLO. With an SLO its ``slo_attainment`` and, at its
        percentile, the requests' ``slo_ttft_ms``, counting what still waits with its wait so far,
        and ``slo_itl_ms``.
    """
    if isinstance(calibrations, Calibration):
        calibrations = [calibrations] * len(placement.replicas)
    trace, answered_s = demand.trace, 0.0 if demand.trace is None else ANSWERED_S
    if trace is None:
        trace = draw_requests(demand.workload(duration_s), calibrations[0], seed=seed)
    else:
        trace, duration_s, _ = stretch(trace, seed - demand.seed, lead_in_s=0.0)
    replica = split_trace(trace, placement, seed)
    tasks = []
    for index, (plan, laws) in enumerate(zip(placement.replicas, calibrations, strict=True)):
        own = np.flatnonzero(replica == index)
        requests = trace.take(own)
        number = pd.Index(plan.adapters).get_indexer(pd.Index(requests.adapter))
        requests = replace(requests, adapter=number.astype(np.int32))
        workload = replica_workload(demand, plan, duration_s + answered_s)
        arguments = plan, workload, requests, laws, demand.slo, seed, duration_s
        tasks.append(joblib.delayed(_serve)(*arguments))
    return pd.DataFrame(share_out(tasks, jobs))


def _serve(
    plan: ReplicaPlan,
    workload: Workload,
    trace: Trace,
    calibration: Calibration,
    slo: Slo | None,
    seed: int,
    end_s: float,
) -> dict[str, Any]:
    """Simulate one GPU; return its row of `check_placement`."""
    run = simulate_quietly(workload, plan.engine, calibration, seed, trace)
    told = service(run.records, run.gaps, end_s, slo=slo, adapters=workload.adapters)
    row: dict[str, Any] = {
        "adapters": len(plan.adapters),
        "adapter_slots": plan.engine.max_loras,
        "max_lora_rank": plan.engine.max_lora_rank,
        **{name: told[name] for name in GPU_FIGURES},
        "serves": not told["starved"],
    }
    if slo is not None:
        row["slo_attainment"] = told["slo_attainment"]
        row["serves"] &= told["slo_attainment"] >= slo.percentile / 100
        itl_ms = 1e3 * tpot_s(run.records)
        itl_ms = itl_ms[np.isfinite(itl_ms)]
        ttft_ms = waits_ms(run.records, end_s)
        row["slo_ttft_ms"] = float(np.percentile(ttft_ms, slo.percentile))
        row["slo_itl_ms"] = float(np.percentile(itl_ms, slo.percentile)) if len(itl_ms) else np.nan
    return row


def hold(kinds: Kinds, groups: Sequence[Group], bound: Bound, *, jobs: int = -1) -> Held:
    """Check a placement in the twin and repair what does not serve, until all of it does.

    Parameters
    ----------
    kinds : Kinds
        Its demand has to be served; its oracles decide which sets are tried.
    groups : sequence of Group
        The GPUs.
    bound : Bound
        See `Held`.
    jobs : int
        Processes; -1 is one per core.

    Raises
    ------
    NotServed
        More than `MOST_STARVING` do not serve, or some still do not after `ROUNDS` rounds.
    AdapterTwinError
        A GPU is needed of which no more are to be had.
    """
    demand, changed = kinds.demand, set[int]()
    groups = [Group(kind, list(parts)) for kind, parts in groups]
    for _ in range(ROUNDS):
        placement = kinds.place(groups)
        checked = check_placement(
            demand, placement, kinds.laws(placement), seed=demand.seed, jobs=jobs
        )
        starving = checked.index[~checked.serves].tolist()
        if not starving:
            return Held(kinds, bound, placement, checked, repaired=len(changed))
        if len(starving) > MOST_STARVING * len(groups):
            break
        changed.update(starving)
        rate = kinds.oracles[0].parts.rate
        homeless = [part for k in starving for part in _lightest(rate, groups[k].parts)]
        _take_in(kinds, groups, homeless, exclude=set(starving))
    raise NotServed(placement, checked)


def learn_spread(kinds: Kinds, missed: NotServed) -> Kinds:
    """Return kinds whose oracles know better what an SLO's percentile is by what the model tells.

    Each learns from the GPUs of its kind that miss the SLO.
    """
    services = missed.checked.to_dict("records")
    plans = list(zip(missed.placement.replicas, services, strict=True))
    learned = []
    for kind, oracle in enumerate(kinds.oracles):
        own = [(plan, told) for plan, told in plans if plan.kind == kind and not told["serves"]]
        learned.append(_learn(oracle, own) if own else oracle)
    return replace(kinds, oracles=tuple(learned))


def _learn(oracle: Oracle, missed: Sequence[tuple[ReplicaPlan, Mapping[Any, Any]]]) -> Oracle:
    """Return what an oracle is after GPUs and services that miss the SLO.

    ITL at the percentile is a multiple of the model's mean: the upper quartile of the GPUs whose
    ITL misses the SLO; single ones are repaired. Where TTFT is missed, more adapters than expected
    have requests at a time.
    """
    slo = oracle.demand.slo
    assert slo is not None
    ratios, late = list[float](), False
    for plan, told in missed:
        verdict = oracle.serve_plan(plan)
        if verdict is None:
            continue
        late |= slo.ttft_ms is not None and told["slo_ttft_ms"] > REACHED * slo.ttft_ms
        if slo.itl_ms is not None and told["slo_itl_ms"] > REACHED * slo.itl_ms:
            ratios.append(told["slo_itl_ms"] / verdict.mean_itl_ms)
    needed = float(np.quantile(ratios, 0.75)) if ratios else 0.0
    return Oracle(
        oracle.demand,
        oracle.calibration,
        margin=oracle.criterion.margin,
        itl_spread=max(needed, oracle.itl_spread),
        active_spread=oracle.active_spread * (WIDENING if late or not ratios else 1.0),
        replicate_above=oracle.replicate_above,
        pieces=[0] * len(oracle.demand.adapters),
    )


def _lightest(rate: Floats, group: list[int]) -> list[int]:
    """Take the lightest parts out of a group: `GIVEN_AWAY` of its load, one at least."""
    group.sort(key=lambda part: -float(rate[part]))
    asked, taken = GIVEN_AWAY * float(rate[group].sum()), list[int]()
    while len(group) > 1 and (not taken or float(rate[taken].sum()) < asked):
        taken.append(group.pop())
    return taken


def _take_in(kinds: Kinds, groups: list[Group], parts: list[int], exclude: set[int]) -> None:
    """Put parts on the GPUs with the most room, or on a new one of the cheapest kind that does."""
    rate = kinds.oracles[0].parts.rate
    for part in sorted(parts, key=lambda part: -float(rate[part])):
        others = [group for k, group in enumerate(groups) if k not in exclude]
        for group in sorted(others, key=lambda group: float(rate[group.parts].sum())):
            if kinds.serves(Group(group.kind, [*group.parts, part])):
                group.parts.append(part)
                break
        else:
            new = (Group(kind, [part]) for kind in kinds.with_room(groups))
            found = next(filter(kinds.serves, new), None)
            if found is None:
                raise AdapterTwinError(
                    "fleet.kinds: another GPU is needed after the check in the twin, and no more "
                    "are available; raise available"
                )
            groups.append(found)
