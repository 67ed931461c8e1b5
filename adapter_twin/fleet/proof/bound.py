"""A lower bound on the number of GPUs, proven for the oracle by a price on every adapter.

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

They hold for placements that do not split the oracle's parts any further: an adapter that never
leaves its slot may take less in parts.

**What it rests on.** It is proven for the model, not for GPUs, and takes for granted what the
calibrations' laws do: another adapter in the batch, a wait, a load into a slot or a queue never
make a step faster; what serves adapters serves fewer of them, or with fewer requests. Where laws
of the step change with its tokens, ITL may fall as load grows; that is measured and allowed for
(`adapter_twin.fleet.proof.envelope`). Tests try random sets.
"""

import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.sparse import block_array, coo_array, eye_array

from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.proof.envelope import Levels, levels_of
from adapter_twin.workload.lengths import Floats

Ints = NDArray[np.int64]

SIMILAR_RATES = 0.03
"""Rates that differ by less are one type in the linear program, at the highest of them."""

ROUNDING = 1e-6
"""This many GPUs are taken off before a sum of prices is rounded up."""

IMPOSSIBLE = 10
"""An adapter costs this many GPUs where no GPU can have it."""

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


def best_weights(oracle: Oracle, levels: Levels) -> Floats:
    """Choose the weights of the prices that prove most for the oracle's demand."""
    rates, ranks, counts = _types(oracle, SIMILAR_RATES / levels.finer)
    measured = measures(levels, rates)
    level, kind = np.nonzero(levels.rank[:, None] >= ranks)
    row, measure_count, level_count = np.arange(len(level)), *measured.shape[:2]
    # maximise counts @ price with price[kind] <= sum of weight[level] measured[level, kind]
    price = coo_array((np.ones(len(row)), (row, kind)), shape=(len(row), len(rates)))
    weighed = [
        coo_array((-of[level, kind], (row, level)), shape=(len(row), level_count))
        for of in measured
    ]
    ones = [eye_array(level_count)] * measure_count
    solution = linprog(
        np.concatenate([-counts, np.zeros(measure_count * level_count)]),
        A_ub=block_array([[price, *weighed], [None, *ones]], format="csr"),
        b_ub=np.concatenate([np.zeros(len(row)), np.ones(level_count)]),
        method="highs-ipm",  # any weights prove something, so its tolerance does no harm
    )
    weights = np.zeros(measured.shape[:2])
    weights[0] = 1  # any weights prove something
    if solution.x is not None:
        weights = np.maximum(solution.x[len(rates) :].reshape(weights.shape), 0)
    return np.asarray(weights / np.maximum(weights.sum(axis=0), 1))


def prices_of(oracle: Oracle, finer: int = 1) -> Floats:
    """Return the prices in GPUs that prove most, of the oracle's parts.

    Parameters
    ----------
    oracle : Oracle
    finer : int
        See `adapter_twin.fleet.proof.envelope.levels_of`.
    """
    levels = levels_of(oracle, finer)
    return priced(levels, best_weights(oracle, levels), oracle.parts.rate, oracle.parts.rank)


def lower_bound(oracle: Oracle, finer: int = 1) -> int:
    """Return a number of GPUs below which the oracle accepts no placement of its parts."""
    return gpus_for(prices_of(oracle, finer))


def gpus_for(prices: Floats) -> int:
    """Return the GPUs that adapters of these prices need at least."""
    return max(math.ceil(float(prices.sum()) - ROUNDING), 1)


def _types(oracle: Oracle, similar: float) -> tuple[Floats, Ints, Floats]:
    """Return the rates, ranks and numbers of parts that are alike: the highest rate of each."""
    rate, rank = pd.Series(oracle.parts.rate), oracle.parts.rank
    alike = rate.groupby([rank, np.floor(np.log(rate) / similar)]).agg(["max", "size"])
    ranks = alike.index.get_level_values(0).to_numpy(np.int64)
    return alike["max"].to_numpy(), ranks, alike["size"].to_numpy(float)
