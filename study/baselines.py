"""Baselines for placements: adapters are dealt out without a look at rank or load."""

from __future__ import annotations

import math

import numpy as np

from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups


def round_robin(oracle: Oracle) -> Groups:
    """Deal adapters in their order over the fewest GPUs of which none starves.

    Returns
    -------
    list of list of int
        Indices into ``oracle.parts``, one list per GPU.
    """
    count = len(oracle.parts)
    low, high = 0, least_gpus(oracle)
    while high < count and not all_fit(oracle, _dealt(count, high)):
        low, high = high, min(2 * high, count)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if all_fit(oracle, _dealt(count, middle)) else (middle, high)
    return _dealt(count, high)


def first_fit_by_count(oracle: Oracle) -> Groups:
    """Fill GPUs in turn with as many adapters as fit if all were average.

    An average adapter has the mean rate, and the widest rank, for a GPU may get one of these. Where
    real ones starve a GPU, each gets fewer until none does.

    Returns
    -------
    list of list of int
        Indices into ``oracle.parts``, one list per GPU.
    """
    count = len(oracle.parts)
    low, high = 0, average_adapters(oracle) + 1
    if all_fit(oracle, _blocks(count, high - 1)):
        low = high - 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = all_fit(oracle, _blocks(count, middle))
        low, high = (middle, high) if fits else (low, middle)
    return _blocks(count, max(low, 1))


def average_adapters(oracle: Oracle) -> int:
    """Return how many adapters of the mean rate and the widest rank one GPU serves."""
    parts = oracle.parts
    low, high = 1, len(parts) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = oracle.serve_alike(middle, float(parts.rate.mean()), int(parts.rank.max()))
        low, high = (middle, high) if fits else (low, middle)
    return low


def least_gpus(oracle: Oracle) -> int:
    """Return how many GPUs the load takes at least."""
    load = float(oracle.parts.rate.sum()) / oracle.most_alone(int(oracle.parts.rank.min()))
    return max(math.floor(load), 1)


def _dealt(count: int, gpus: int) -> Groups:
    return [list(range(first, count, gpus)) for first in range(gpus)]


def _blocks(count: int, size: int) -> Groups:
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def all_fit(oracle: Oracle, groups: Groups) -> bool:
    """Return whether no GPU starves; the heaviest ones are asked first."""
    loads = [float(oracle.parts.rate[group].sum()) for group in groups]
    return all(oracle.serve(groups[i]) is not None for i in np.argsort(loads)[::-1])
