"""A lower bound on the number of GPUs, or their price, proven by a price on every adapter.

**The certificate.** Every adapter gets a price such that no set that the oracle accepts on one GPU
costs more than 1. Then a placement needs as many GPUs as the prices sum to. A *level* is a rank of
slots and a range ``[low, high]`` of a GPU's load in requests/s. At each level several *measures* of
an adapter are known of which a set that the oracle accepts there has at most 1 in sum; a mean of
them, with weights of the level's own, has that, too. An adapter's price is the lowest of these
means over the levels of its rank and above. A linear program chooses the weights. Prices are summed
over the very adapters, so neither its rounding nor its tolerance can spoil the proof.

**The measures**, and why an accepted set has at most 1 of them:

1. *Load* by ``high``.
2. *Active share* by the most active adapters. None waits longer for a slot than
   `Oracle.longest_wait_s`. With that wait an adapter holds a slot for at least a share of the time
   that the polling queue (`adapter_twin.capacity.slot_sharing`) tells from its rate and from how
   long a request runs; these shares sum to the slots at most. Of the steps that decide the
   capacity it is in the batch as often as M/G/infinity says, or as it holds a slot. These sum to
   the distinct adapters in a batch at most, which are limited: the more there are, the lower the
   capacity, and it has to be above ``low`` by `Oracle.most_utilisation`. The capacity is asked for
   equal adapters that each have a slot, for all numbers of both; it is convex in the number of
   adapters, so chords lie above it. Requests run the longer the more adapters are active, so ranges
   of their number are told apart.
3. *Dual feasible functions* of the load (Fekete and Schepers, 2001): where ``x`` sums to 1 at
   most, so does ``ceil((k + 1) x - 1) / k``.
4. The *number* of adapters with at least some rate, by the most that a GPU serves of adapters with
   just that rate (`adapter_twin.fleet.proof.envelope`).

**Several kinds of GPU.** Each kind has levels and weights, and so prices, of its own; one linear
program chooses all of them, in which an adapter costs what it does on the kind where that is least.
`least_cost` then deals adapters to kinds, perhaps in fractions, for whole GPUs.

They hold for placements that do not split the oracle's parts any further: an adapter that never
leaves its slot may take less in parts.

**What it rests on.** It is proven for the model, not for GPUs, and takes for granted what the
calibrations' laws do: another adapter in the batch, a wait, a load into a slot or a queue never
make a step faster; what serves adapters serves fewer of them, or with fewer requests. Where laws
of the step change with its tokens, ITL may fall as load grows; that is measured and allowed for
(`adapter_twin.fleet.proof.envelope`). Tests try random sets.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import block_array, coo_array, eye_array, hstack

from adapter_twin.errors import require
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.proof.envelope import Levels, levels_of
from adapter_twin.workload.lengths import Floats

Ints = NDArray[np.int64]

SIMILAR_RATES = 0.03
"""Rates that differ by less are one type in the linear program, at the highest of them; by as many
times more as there are kinds of GPU."""

ROUNDING = 1e-6
"""This many GPUs are taken off before a sum of prices is rounded up."""

IMPOSSIBLE = 10
"""An adapter costs this many GPUs where no GPU can have it."""

LIMIT_S = 20.0
"""The program of several kinds of GPU ends then; what it has proven by then is a bound as well."""

INFEASIBLE = 2
"""SciPy's status of a program without a solution."""

STEPS = (1, 2, 3, 4, 5)
"""These are the dual feasible functions of the load: by the first, two adapters of above half a
GPU's load are two GPUs', and so on."""


def priced(levels: Levels, weights: Floats, rates: ArrayLike, ranks: ArrayLike) -> Floats:
    """Return prices in GPUs, of which a set of adapters that one GPU serves has at most 1.

    Parameters
    ----------
    levels : Levels
    weights : float64, shape (measures, n)
        How much each of `measures` counts, level by level; they sum to 1.
    rates, ranks : array_like
        The adapters' requests/s, and ranks of slots.
    """
    rate, rank = np.asarray(rates, float), np.asarray(ranks, np.int64)
    different, places = np.unique(rate, return_inverse=True)
    by_level = (weights[:, :, None] * measures(levels, different)).sum(axis=0)
    prices = np.full(len(rate), np.inf)
    for width in np.unique(rank):
        cheapest = by_level[levels.rank >= width].min(axis=0)
        own = rank == width
        prices[own] = cheapest[places[own]]
    return prices


def measures(levels: Levels, rates: Floats) -> Floats:
    """Return the shares of a GPU that adapters take, by measures that each sum to 1 at most.

    They are the load, the active share, the `STEPS` of the load, and the numbers above thresholds.

    Returns
    -------
    float64, shape (measures, levels, m)
    """
    load = rates / levels.high[:, None]
    active = levels.active(rates)
    stepped = [np.maximum(np.ceil((k + 1) * load) - 1, 0) / k for k in STEPS]
    most = np.where(levels.most > 0, levels.most, 1 / IMPOSSIBLE)
    counted = (rates >= levels.thresholds[:, None, None]) / most.T[:, :, None]
    return np.concatenate([np.stack([load, active, *stepped]), counted])


def best_weights(
    oracles: Sequence[Oracle], levels: Sequence[Levels], costs: Floats, available: Floats
) -> list[Floats]:
    """Choose, for each kind of GPU, the weights of the prices that prove most of a fleet's cost.

    Parameters
    ----------
    oracles : sequence of Oracle
        Of the kinds, with the same parts.
    levels : sequence of Levels
        Of these.
    costs, available : float64, shape (kinds,)
        What a GPU counts, and how many there are, infinite without a limit.

    Returns
    -------
    list of float64, shape (measures, n)
        See `priced`.
    """
    rates, ranks, takes, counts = _types(oracles, len(oracles) * SIMILAR_RATES / levels[0].finer)
    few = np.flatnonzero(np.isfinite(available))
    measured = [measures(own, rates) for own in levels]
    # maximise counts @ price - available @ extra with, for every kind, level and type,
    # price[type] <= sum of weight[level] measured[level, type], weights of a cost and its extra
    rows: list[list[Any]] = []
    limits = list[Floats]()
    for k, (own, of) in enumerate(zip(levels, measured, strict=True)):
        level, kind = np.nonzero((own.rank[:, None] >= ranks[k]) & takes[k])
        row, level_count = np.arange(len(level)), of.shape[1]
        price = coo_array((np.ones(len(row)), (row, kind)), shape=(len(row), len(rates)))
        weighed = hstack(
            [
                coo_array((-one[level, kind], (row, level)), shape=(len(row), level_count))
                for one in of
            ]
        )
        summed = hstack([eye_array(level_count)] * len(of))
        others = [None] * len(levels)
        extra = [coo_array(-np.ones((level_count, 1)) * (few == k))] if len(few) else []
        rows.append([price, *others[:k], weighed, *others[k + 1 :], *([None] * len(extra))])
        rows.append([None, *others[:k], summed, *others[k + 1 :], *extra])
        limits += [np.zeros(len(row)), np.full(level_count, costs[k])]
    sizes = [of.shape[0] * of.shape[1] for of in measured]
    solution = linprog(
        np.concatenate([-counts, np.zeros(sum(sizes)), available[few]]),
        A_ub=block_array(rows, format="csr"),
        b_ub=np.concatenate(limits),
        method="highs-ipm",  # any weights prove something, so its tolerance does no harm
    )
    found, first = list[Floats](), len(rates)
    for of, size, cost in zip(measured, sizes, costs, strict=True):
        weights = np.zeros(of.shape[:2])
        weights[0] = cost  # any weights prove something
        if solution.x is not None:
            weights = np.maximum(solution.x[first : first + size].reshape(weights.shape), 0)
        first += size
        found.append(weights / np.maximum(weights.sum(axis=0), cost))
    return found


def prices_on(
    oracles: Sequence[Oracle], levels: Sequence[Levels], costs: Floats, available: Floats
) -> Floats:
    """Return the prices of the oracles' parts, in GPUs of each kind, that prove most.

    Parameters are those of `best_weights`.

    Returns
    -------
    float64, shape (kinds, parts)
        Infinite where a kind never serves a part.
    """
    weights = best_weights(oracles, levels, costs, available)
    prices = np.full((len(oracles), len(oracles[0].parts)), np.inf)
    for k, oracle in enumerate(oracles):
        parts, taken = oracle.parts, oracle.takes()
        prices[k, taken] = priced(levels[k], weights[k], parts.rate[taken], parts.rank[taken])
    return prices


def prices_of(oracle: Oracle, finer: int = 1) -> Floats:
    """Return the prices in GPUs that prove most, of the parts of GPUs of one kind.

    Parameters
    ----------
    oracle : Oracle
    finer : int
        See `adapter_twin.fleet.proof.envelope.levels_of`.
    """
    return np.asarray(
        prices_on([oracle], [levels_of(oracle, finer)], np.ones(1), np.full(1, np.inf))[0]
    )


def least_cost(prices: Floats, costs: Floats, available: Floats, least_gpus: int = 1) -> float:
    """Return a cost below which no fleet of several kinds of GPU serves parts of these prices.

    Every part is dealt to the kinds, perhaps in fractions, and each kind needs as many whole GPUs
    as the prices of its parts sum to: a mixed-integer program with an integer for each kind.

    Parameters
    ----------
    prices : float64, shape (kinds, parts)
        See `prices_on`.
    costs, available : float64, shape (kinds,)
        See `best_weights`.
    least_gpus : int
        As many GPUs are needed for another reason, such as the copies of an adapter.

    Raises
    ------
    AdapterTwinError
        There are too few GPUs for any placement.
    """
    kind, part = np.nonzero(np.isfinite(prices))
    kinds, parts = prices.shape
    column = np.arange(len(kind))
    dealt = coo_array((np.ones(len(kind)), (part, column)), shape=(parts, len(kind)))
    filled = coo_array((prices[kind, part], (kind, column)), shape=(kinds, len(kind)))
    rows = [[dealt, None], [filled, -eye_array(kinds)], [None, np.ones((1, kinds))]]
    upper = np.concatenate([np.ones(parts), np.full(kinds, ROUNDING), [np.inf]])
    lower = np.concatenate([np.ones(parts), np.full(kinds, -np.inf), [least_gpus]])
    solution = milp(
        np.concatenate([np.zeros(len(kind)), costs]),
        constraints=LinearConstraint(block_array(rows, format="csr"), lower, upper),
        integrality=np.repeat([0, 1], [len(kind), kinds]),
        bounds=Bounds(0, np.concatenate([np.ones(len(kind)), available])),
        options={"time_limit": LIMIT_S, "mip_rel_gap": 0.0},
    )
    require(
        solution.status != INFEASIBLE,
        "fleet.kinds: of those that are available no placement serves; raise available",
    )
    proven = solution.mip_dual_bound
    return 0.0 if proven is None else round(float(proven), 9)


def lower_bound(oracle: Oracle, finer: int = 1) -> int:
    """Return a number of GPUs below which the oracle accepts no placement of its parts."""
    return gpus_for(prices_of(oracle, finer))


def gpus_for(prices: Floats) -> int:
    """Return the GPUs that adapters of these prices need at least."""
    return max(math.ceil(float(prices.sum()) - ROUNDING), 1)


def _types(
    oracles: Sequence[Oracle], similar: float
) -> tuple[Floats, list[Ints], list[NDArray[np.bool_]], Floats]:
    """Return types of parts that are alike: the highest rate of each, and their number.

    In between, for each kind of GPU, the ranks of their slots, and whether any may be served.
    """
    rate = oracles[0].parts.rate
    by = [oracle.parts.rank for oracle in oracles] + [np.floor(np.log(rate) / similar)]
    table = pd.DataFrame({"rate": rate} | {k: own.takes() for k, own in enumerate(oracles)})
    alike = table.groupby(by)
    highest = alike["rate"].max()
    ranks = [highest.index.get_level_values(k).to_numpy(np.int64) for k in range(len(oracles))]
    takes = [alike[k].any().to_numpy(bool) for k in range(len(oracles))]
    return highest.to_numpy(float), ranks, takes, alike.size().to_numpy().astype(float)
