"""The most that a GPU can hold, for each load and width of slots, for the lower bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin.capacity.slot_sharing import visits_s
from adapter_twin.fleet.oracle import TRACE, Oracle
from adapter_twin.fleet.proof.counting import most_adapters, thresholds_of
from adapter_twin.fleet.proof.levels import Levels, ranges
from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.workload.scenario import EngineConfig

Floats = NDArray[np.float64]
Capacities = Mapping[int, tuple[Floats, Floats]]

FINE, COARSE = 86, 14
"""Loads above half of the highest, and below."""

FEW = 16
"""Adapters at whose highest loads there are levels."""

LOWEST = 0.05
"""Load of the lowest level by the highest one."""

LIGHT = 0.005
"""Of the capacity: with less, requests run for half as long at least."""

OVERLOAD = 2.0
"""Of the capacity: with that, batches are as full as they get."""

TOLERANCE = 1.002
"""Active adapters by slots: the polling queue's wait is found to within 1.001."""


def levels_of(oracle: Oracle, finer: int = 1) -> Levels:
    """Ask the oracle's model what GPUs can hold, for the ranks of its parts.

    Parameters
    ----------
    oracle : Oracle
    finer : int
        Levels are so many times as fine: the bound gets tighter, and takes longer.
    """
    thresholds = thresholds_of(oracle.parts.rate)
    ranks = [int(rank) for rank in np.unique(oracle.parts.rank)]
    columns = zip(*(_of_rank(oracle, rank, thresholds, finer) for rank in ranks), strict=True)
    rank, high, most_active, residence_s, running, most = map(np.concatenate, columns)
    return Levels(
        rank,
        high,
        most_active,
        residence_s,
        running,
        oracle.longest_wait_s,
        thresholds,
        most,
        finer,
    )


def _of_rank(oracle: Oracle, rank: int, thresholds: Floats, finer: int) -> tuple[NDArray[Any], ...]:
    """Return the fields of the levels of one rank."""
    engines = oracle.engines.all(len(oracle.parts), rank)
    capacities = {
        engine.max_loras: curve
        for engine, curve in zip(engines, _capacities(oracle, engines), strict=True)
    }
    fastest = max(curve[1][0] for curve in capacities.values())
    slowest = min(curve[1][-1] for curve in capacities.values())
    light, needed = LIGHT * fastest, 1 / oracle.most_utilisation
    low, high = _loads(capacities, needed, finer)
    loads = _served(oracle, rank, engines, fastest, np.maximum(low, light))

    most_active = np.array([_most_active(capacities, needed * load) for load in low])
    patience = _patience(oracle, rank, high)
    limit_ms = patience * oracle.itl_limit_ms
    if np.isfinite(limit_ms):
        limited = zip(loads, most_active, strict=True)
        most_active = np.array([_most_in_time(oracle, rank, *one, limit_ms) for one in limited])
    residence_s = _running(oracle, rank, loads, most_active, finer) / loads[:, None]
    residence_s[low < light] /= 2
    running = _running(oracle, rank, np.maximum(needed * low, slowest), most_active, finer)
    most = np.tile(most_adapters(oracle, rank, thresholds, patience), (len(low), 1))
    some = most_active > 0
    columns = np.full(len(low), rank), high, most_active, residence_s, running, most
    return tuple(column[some] for column in columns)


def _served(
    oracle: Oracle, rank: int, engines: list[EngineConfig], fastest: float, loads: Floats
) -> Floats:
    """Return what is served of loads at least, in requests/s: the rest still waits or runs.

    Parameters
    ----------
    oracle : Oracle
    rank : int
        Of the slots.
    engines : list of EngineConfig
    fastest : float
        Highest capacity in requests/s.
    loads : float64, shape (n,)
        In requests/s.
    """
    few = [engine for engine in engines if engine.max_loras & (engine.max_loras - 1) == 0]
    few, light = few or engines[:1], LIGHT * fastest
    alone = oracle.table([light], few)
    served = (alone.total_throughput / alone.offered_tokens_per_s).max()
    # tokens that are emitted by those asked for: requests that run at the end do not complete
    emitted = served / (1 - 1.01 * alone.running.max() / light / HOUR_S)
    least = oracle.threshold / emitted
    fullest = oracle.table([OVERLOAD * fastest], few).running.max()
    shortest = oracle.alike(least * loads, np.ones_like(loads, int), rank).running.to_numpy()
    late_s = _longest_mean_wait_s(oracle, rank, loads, shortest / (least * loads))
    late_s += fullest / (least * loads)
    return np.asarray(loads * np.maximum(least, 1 - late_s / HOUR_S))


def _longest_mean_wait_s(oracle: Oracle, rank: int, loads: Floats, residence_s: Floats) -> Floats:
    """Return what requests wait on average at most, of adapters that have a load together.

    The head of an adapter's queue waits as long as can be, those that join it half of that on
    average, and those that find the adapter in its slot not at all. Rarer adapters have fewer that
    join: the longest mean is theirs. See `adapter_twin.capacity.slot_sharing`.
    """
    parts, longest_s = oracle.parts, oracle.longest_wait_s
    rates = np.sort(parts.rate[parts.rank <= rank])
    together = np.concatenate([[0.0], np.cumsum(rates)])
    means_s = []
    for load, runs_s in zip(np.clip(loads, rates[0], together[-1]), residence_s, strict=True):
        visit_s = visits_s(rates, np.full(len(rates), runs_s), longest_s)
        waits_s = longest_s * (1 + rates * longest_s / 2) / (1 + rates * (longest_s + visit_s))
        cumulated = np.concatenate([[0.0], np.cumsum(rates * waits_s)])
        means_s.append(np.interp(load, together, cumulated) / load)
    return np.array(means_s)


def _patience(oracle: Oracle, rank: int, loads: Floats) -> float:
    """Return how much longer ITL may be at a lower load, at most.

    Where the law of step times changes with the tokens of a step, steps may get faster with load.

    Parameters
    ----------
    loads : float64, shape (n,)
        In requests/s, the highest first.
    """
    counts = [2**k for k in range(oracle.engines.most_slots(rank).bit_length())]
    table = oracle.alike(np.repeat(loads, len(counts)), np.tile(counts, len(loads)), rank)
    itl_ms = np.where(table.utilisation < 1, table.mean_itl_ms, np.inf)
    itl_ms = itl_ms.reshape(len(loads), len(counts))
    shortest_ms = np.minimum.accumulate(itl_ms, axis=0)
    settled = np.isfinite(itl_ms)
    return float((itl_ms[settled] / shortest_ms[settled]).max())


def _most_active(capacities: Capacities, needed: float) -> float:
    """Return the most adapters that can be active where the capacity is what is needed."""
    return max(
        min(TOLERANCE * slots, _most_distinct(*curve, needed))
        for slots, curve in capacities.items()
    )


def _running(oracle: Oracle, rank: int, loads: Floats, most_active: Floats, finer: int) -> Floats:
    """Return how many requests run at least, with more adapters than each of `ranges` begins with.

    Returns
    -------
    float64, shape (loads, ranges)
    """
    adapters = np.minimum(most_active, oracle.engines.most_slots(rank))
    counts = np.maximum(ranges(finer)[1] * adapters[:, None], 1).astype(int)
    table = oracle.alike(np.broadcast_to(loads[:, None], counts.shape), counts, rank)
    return table.running.to_numpy().reshape(counts.shape)


def _loads(capacities: Capacities, needed: float, finer: int) -> tuple[Floats, Floats]:
    """Return the lowest and the highest load of each level, the highest level first.

    Among them is the most that few adapters can have, so that they are priced by it exactly.
    """
    few = [curve[1][-1] / needed for slots, curve in capacities.items() if slots <= FEW]
    highest = max(curve[1][0] for curve in capacities.values()) / needed
    fine = np.geomspace(highest, highest / 2, finer * FINE)
    coarse = np.geomspace(highest / 2, LOWEST * highest, finer * COARSE)
    high = np.unique([*few, *fine, *coarse])[::-1]
    return np.append(high[1:], 0.0), high


def _capacities(oracle: Oracle, engines: list[EngineConfig]) -> list[tuple[Floats, Floats]]:
    """Return numbers of always active adapters, and the capacity in requests/s, of each engine."""
    sizes = [engine.max_loras for engine in engines]
    steps = {2**k for k in range(11)} | {3 * 2**k for k in range(10)}
    curves: list[tuple[list[float], list[float]]] = [([], []) for _ in engines]
    for count in sorted(steps | set(sizes)):
        asked = [
            i for i, size in enumerate(sizes) if size == count or (size > count and count in steps)
        ]
        if asked:
            table = oracle.table([TRACE / count] * count, [engines[i] for i in asked])
            for i, utilisation in zip(asked, table.utilisation, strict=True):
                curves[i][0].append(count)
                curves[i][1].append(TRACE / utilisation)
    return [(np.array(distinct, float), np.array(capacity)) for distinct, capacity in curves]


def _most_distinct(distinct: Floats, capacity: Floats, needed: float) -> float:
    """Return with how many distinct adapters the capacity is what is needed; no limit if always."""
    if capacity[0] < needed:
        return 0.0
    if capacity[-1] >= needed:
        return np.inf
    return float(np.interp(-needed, -np.minimum.accumulate(capacity), distinct))


def _most_in_time(oracle: Oracle, rank: int, load: float, most: float, limit_ms: float) -> float:
    """Return a number of adapters that is too many for the SLO on ITL, or `most`."""

    def in_time(count: int) -> bool:
        return bool(oracle.alike([load], [count], rank).mean_itl_ms[0] <= limit_ms)

    low, high = 0, int(min(most, oracle.engines.most_slots(rank))) + 1
    if high - 1 >= 1 and in_time(high - 1):
        return most
    high -= 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if in_time(middle) else (low, middle)
    return float(high) if low else 0.0
