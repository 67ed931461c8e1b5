"""What a GPU can hold at most, for each load and width of slots: see `adapter_twin.fleet.bound`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from adapter_twin.config import EngineConfig
from adapter_twin.fleet.capacity import TRACE, Oracle
from adapter_twin.fleet.levels import LOWER, Levels
from adapter_twin.planning.replica import HOUR_S

Floats = NDArray[np.float64]

FINE, COARSE = 0.97, 0.8
"""Ratios of neighbouring loads: fine ones above half of the highest, coarse ones below."""

LOWEST = 0.05
"""Load of the lowest level by the highest one."""

LIGHT = 0.005
"""Of the capacity: with less, requests run for half as long at least."""

OVERLOAD = 2.0
"""Of the capacity: with that, batches are as full as they get."""

TOLERANCE = 1.002
"""Active adapters by slots: the polling queue's wait is found to within 1.001."""


def levels_of(oracle: Oracle) -> Levels:
    """Ask the oracle's model what GPUs can hold, for the ranks of its parts."""
    levels = [
        level for rank in np.unique(oracle.parts.rank) for level in _of_rank(oracle, int(rank))
    ]
    columns = (np.array(column) for column in zip(*levels, strict=True))
    rank, high, most_active, residence_s, served = columns
    return Levels(rank, high, most_active, residence_s, served, oracle.longest_wait_s)


def _of_rank(oracle: Oracle, rank: int) -> Iterator[tuple[int, float, float, Floats, float]]:
    """Yield the fields of the levels of one rank."""
    slo = oracle.demand.slo
    engines = oracle.engines.all(len(oracle.parts), rank)
    capacities = {
        engine.max_loras: curve
        for engine, curve in zip(engines, _capacities(oracle, engines), strict=True)
    }
    few = [engine for engine in engines if engine.max_loras & (engine.max_loras - 1) == 0]
    few = few or engines[:1]
    capacity = max(curve[1][0] for curve in capacities.values())
    light = LIGHT * capacity
    alone = oracle.table([light], few)
    served = (alone.total_throughput / alone.offered_tokens_per_s).max()
    # tokens that are emitted by those asked for: requests that run at the end do not complete
    emitted = served / (1 - 1.01 * alone.running.max() / light / HOUR_S)
    least = oracle.threshold / emitted
    fullest = oracle.table([OVERLOAD * capacity], few).running.max()
    needed = 1 / oracle.most_utilisation
    highest = max(curve[1][0] for curve in capacities.values()) / needed
    for low, high in _ranges(highest):
        load = max(low, light)
        longest_s = oracle.longest_wait_s + fullest / (least * load)
        share = max(least, 1 - longest_s / HOUR_S)
        state = oracle.table([share * load], few)
        running = float(state.running.min())
        most = max(
            min(TOLERANCE * slots, _most_distinct(*curve, needed * low))
            for slots, curve in capacities.items()
        )
        # the number running fluctuates around its mean
        most /= 1 - 0.5 / max(np.sqrt(running), 1.0)
        if slo is not None and slo.itl_ms is not None:
            most = min(most, _most_in_time(oracle, rank, share * load, most, slo.itl_ms))
        if most > 0:
            residence_s = _residences_s(oracle, rank, share * load, most)
            yield rank, high, most, residence_s if low >= light else residence_s / 2, share


def _residences_s(oracle: Oracle, rank: int, load: float, most: float) -> Floats:
    """Return how long a request runs at least, in s, with more than `LOWER` adapters active."""
    adapters = min(most, oracle.engines.most_slots(rank))
    distinct, ranges = np.unique(np.maximum(LOWER * adapters, 1).astype(int), return_inverse=True)
    residences = []
    for count in distinct.tolist():
        engine = oracle.engines.make(count, rank, count)
        residences.append(oracle.table([load / count] * count, [engine]).running[0] / load)
    return np.array(residences)[ranges]


def _ranges(highest: float) -> Iterator[tuple[float, float]]:
    high = highest
    while high > LOWEST * highest:
        low = high * (FINE if high > highest / 2 else COARSE)
        yield low, high
        high = low
    yield 0.0, high


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
        engine = oracle.engines.make(count, rank, count)
        itl_ms = oracle.table([load / count] * count, [engine]).mean_itl_ms[0]
        return bool(itl_ms <= limit_ms)

    low, high = 0, int(min(most, oracle.engines.most_slots(rank))) + 1
    if high - 1 >= 1 and in_time(high - 1):
        return most
    high -= 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if in_time(middle) else (low, middle)
    return float(high) if low else 0.0
