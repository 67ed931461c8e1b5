"""An upper envelope of what a GPU can hold, by levels of its load and of its slots' width.

The oracle's model is asked for capacities and running requests; `Levels` keeps the answers, and
tells from them what part of a GPU an adapter takes at least.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin.capacity.slot_sharing import visits_s
from adapter_twin.fleet.oracle import TRACE, Oracle
from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.lengths import Floats

Capacities = Mapping[int, tuple[Floats, Floats]]

FINE, COARSE = 86, 14
"""There are this many levels above half of the highest load, and below."""

PRICED_EXACTLY = 16
"""Up to this many adapters, the highest load that they can have is a level."""

LOWEST = 0.05
"""The lowest level has this load by the highest one."""

LIGHT_LOAD = 0.005
"""Below this share of the capacity, requests run for half as long at least."""

OVERLOAD = 2.0
"""At this load by the capacity, batches are as full as they get."""

ACTIVE_BY_SLOTS = 1.002
"""Active adapters may exceed slots by this: the polling queue's wait is found to within 1.001."""

THRESHOLDS = 14
"""Adapters are counted from this many rates on: high ones that few have, low ones that all have."""

BELOW = 1e-9
"""These rates lie below the adapters' own by this share."""

RANGE, RANGES = 0.96, 66
"""The active adapters are divided into ranges of this ratio and number, from the most down."""

GRID = 1.015
"""Active shares are computed for rates of this ratio."""

LEAST_RUNNING = 4
"""Below this many running requests, a share of the steps need not grow with their number."""


def ranges(finer: int) -> tuple[Floats, Floats]:
    """Return the upper and the lower ends of the ranges; the last one begins at zero."""
    upper = RANGE ** (np.arange(RANGES * finer) / finer)
    return upper, np.append(upper[1:], 0.0)


@dataclass(frozen=True, slots=True)
class Levels:
    """Levels of a GPU's load, and what it can hold there.

    Attributes
    ----------
    rank : int64, shape (n,)
        ``max_lora_rank``.
    high : float64, shape (n,)
        Load in requests/s.
    most_active : float64, shape (n,)
        Sum of the adapters' active shares.
    residence_s, running : float64, shape (n, ranges)
        With more adapters active than a range's lower end: time for which a request runs at least;
        requests that run at least where the most complete.
    most : int64, shape (n, t)
        Adapters with at least the rate of a threshold, at most; the same at all levels of a rank.
    wait_s : float
        Longest wait of an adapter for a slot.
    thresholds : float64, shape (t,)
        Requests/s of an adapter.
    finer : int
        All steps are this many times as fine.
    """

    rank: NDArray[np.int64]
    high: Floats
    most_active: Floats
    residence_s: Floats
    running: Floats
    most: NDArray[np.int64]
    wait_s: float
    thresholds: Floats
    finer: int = 1

    def active(self, rates: Floats) -> Floats:
        """Return the least part that adapters have in what can be active.

        Parameters
        ----------
        rates : float64, shape (m,)
            Requests/s of one adapter; computed for those of a grid, rounded down.

        Returns
        -------
        float64, shape (n, m)
        """
        place = np.floor(np.log(rates) / np.log(GRID) * self.finer)
        different, back = np.unique(place, return_inverse=True)
        on_grid = GRID ** (different / self.finer)
        part = np.full((len(self.high), len(on_grid)), np.inf)
        each = np.tile(on_grid, len(self.high))
        for i, upper in enumerate(ranges(self.finer)[0]):
            runs_s = np.repeat(self.residence_s[:, i], len(on_grid))
            holding = active_share(each, runs_s, self.wait_s).reshape(part.shape)
            share = batch_share(on_grid / self.high[:, None], self.running[:, i, None], holding)
            part = np.minimum(part, share / (upper * self.most_active[:, None]))
        return np.asarray(part[:, back])


def active_share(rates: Floats, residence_s: Floats, wait_s: float) -> Floats:
    """Return the share of the time in which an adapter holds a slot, if it waits `wait_s` for one.

    Parameters
    ----------
    rates, residence_s : float64, shape (n,)
        Requests/s of the adapter, and how long a request runs.
    wait_s : float
    """
    visit_s = visits_s(rates, residence_s, wait_s)
    return np.asarray(visit_s / (1 / rates + wait_s + visit_s))


def batch_share(of_load: Floats, running: Floats, holding: Floats) -> Floats:
    """Return the share of the steps with an adapter's requests in the batch, of those with a slot.

    The analytic model takes the number running at two points, and weighs them by their tokens.

    Parameters
    ----------
    of_load : float64, shape (n, m)
        The adapter's share of the requests.
    running : float64, shape (n, 1)
        Requests that run on average.
    holding : float64, shape (n, m)
        Share of the time in which the adapter holds a slot.
    """
    spread = np.sqrt(running)
    lower, upper = (
        np.minimum(-np.expm1(-of_load * np.maximum(running + side, 0)), holding)
        for side in (-spread, spread)
    )
    weight = np.where(running > LEAST_RUNNING, (1 + 1 / spread) / 2, 0)
    return np.asarray(lower + weight * (upper - lower))


def levels_of(oracle: Oracle, finer: int = 1) -> Levels:
    """Ask the oracle's model what GPUs can hold, for the ranks of its parts.

    Parameters
    ----------
    oracle : Oracle
    finer : int
        Levels are this many times as fine: the bound gets tighter, and takes longer.
    """
    taken = oracle.takes()
    thresholds = _thresholds(oracle.parts.rate[taken])
    ranks = [int(rank) for rank in np.unique(oracle.parts.rank[taken])]
    columns = zip(*(_of_rank(oracle, rank, thresholds, finer) for rank in ranks), strict=True)
    rank, high, most_active, residence_s, running, most = map(np.concatenate, columns)
    limits = (oracle.longest_wait_s, thresholds, finer)
    return Levels(rank, high, most_active, residence_s, running, most, *limits)


def _of_rank(oracle: Oracle, rank: int, thresholds: Floats, finer: int) -> tuple[NDArray[Any], ...]:
    """Return the columns of the levels of one rank."""
    engines = oracle.engines.all(len(oracle.parts), rank)
    capacities = {
        engine.max_loras: curve
        for engine, curve in zip(engines, _capacities(oracle, engines), strict=True)
    }
    fastest = max(curve[1][0] for curve in capacities.values())
    slowest = min(curve[1][-1] for curve in capacities.values())
    light, needed = LIGHT_LOAD * fastest, 1 / oracle.most_utilisation
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
    most = np.tile(_most_adapters(oracle, rank, thresholds, patience), (len(low), 1))
    some = most_active > 0
    columns = np.full(len(low), rank), high, most_active, residence_s, running, most
    return tuple(column[some] for column in columns)


def _served(
    oracle: Oracle, rank: int, engines: list[EngineConfig], fastest: float, loads: Floats
) -> Floats:
    """Return what is served of loads at least, in requests/s: the rest still waits or runs.

    The highest capacity in requests/s is `fastest`.
    """
    few = [engine for engine in engines if engine.max_loras & (engine.max_loras - 1) == 0]
    few, light = few or engines[:1], LIGHT_LOAD * fastest
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
    The loads in requests/s come with the highest first.
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
        min(ACTIVE_BY_SLOTS * slots, _most_distinct(*curve, needed))
        for slots, curve in capacities.items()
    )


def _running(oracle: Oracle, rank: int, loads: Floats, most_active: Floats, finer: int) -> Floats:
    """Return how many requests run at least, shape (loads, ranges).

    More adapters are active than each of `ranges` begins with.
    """
    adapters = np.minimum(most_active, oracle.engines.most_slots(rank))
    counts = np.maximum(ranges(finer)[1] * adapters[:, None], 1).astype(int)
    table = oracle.alike(np.broadcast_to(loads[:, None], counts.shape), counts, rank)
    return table.running.to_numpy().reshape(counts.shape)


def _loads(capacities: Capacities, needed: float, finer: int) -> tuple[Floats, Floats]:
    """Return the lowest and the highest load of each level, the highest level first.

    Among them is the most that few adapters can have, so that they are priced by it exactly.
    """
    few = [curve[1][-1] / needed for slots, curve in capacities.items() if slots <= PRICED_EXACTLY]
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

    tried = int(min(most, oracle.engines.most_slots(rank)))
    if tried and in_time(tried):
        return most
    fit = bisect_left(range(1, tried), True, key=lambda count: not in_time(count))
    return fit + 1.0 if fit else 0.0


def _thresholds(rates: Floats) -> Floats:
    """Return rates in requests/s from which on adapters are counted, the lowest one included."""
    different = np.unique(rates)
    if len(different) > THRESHOLDS:
        from_top = np.geomspace(1 / len(rates), 1, THRESHOLDS)
        different = np.unique(np.quantile(rates, 1 - from_top, method="inverted_cdf"))
    return np.asarray((1 - BELOW) * different)


def _most_adapters(
    oracle: Oracle, rank: int, thresholds: Floats, patience: float
) -> NDArray[np.int64]:
    """Return the most adapters with at least each rate in requests/s that one GPU serves."""
    fit = np.zeros(len(thresholds), np.int64)
    too_many = np.full(len(thresholds), len(oracle.parts) + 1)
    while (open_ := np.flatnonzero(too_many - fit > 1)).size:
        # geometric at first: of a long list, few fit
        middle = np.where(fit > 0, (fit + too_many) // 2, np.sqrt(too_many).astype(np.int64))[open_]
        good = oracle.may_serve(thresholds[open_], middle, rank, patience)
        fit[open_] = np.where(good, middle, fit[open_])
        too_many[open_] = np.where(good, too_many[open_], middle)
    return fit
