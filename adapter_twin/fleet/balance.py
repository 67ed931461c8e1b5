"""A given number of GPUs: spread the load, so that requests wait as little as possible."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapter_twin.fleet.packing import Groups
from adapter_twin.workload.strict import require

UNEVEN = 0.05
"""Difference between the fullest and the emptiest GPU, by the mean load, that is left as it is."""

WORTH = 0.99
"""A move must leave less than that of the difference."""


def spread(loads: ArrayLike, gpus: int) -> Groups:
    """Return items dealt to GPUs, the heaviest first, each to the GPU with the least load so far.

    Longest processing time first (Graham 1969): no GPU has more than 4/3 of what it must have.

    Parameters
    ----------
    loads : array_like, shape (n,)
    gpus : int

    Returns
    -------
    list of list of int
        Indices, one list per GPU; empty ones where there are more GPUs than items.
    """
    require(gpus >= 1, f"gpus: must be at least 1, got {gpus}")
    loads = np.asarray(loads, float)
    groups: Groups = [[] for _ in range(gpus)]
    heap = [(0.0, gpu) for gpu in range(gpus)]
    for item in np.argsort(-loads, kind="stable").tolist():
        load, gpu = heapq.heappop(heap)
        groups[gpu].append(item)
        heapq.heappush(heap, (load + float(loads[item]), gpu))
    return groups


def rebalance(loads: ArrayLike, home: NDArray[np.int_], gpus: int) -> int:
    """Move items from the fullest to the emptiest GPU until loads are even; return how many moved.

    As few as will do: each time the item that is closest to half the difference.

    Parameters
    ----------
    loads : array_like, shape (n,)
    home : int, shape (n,)
        Changed in place.
    gpus : int
    """
    loads, moved = np.asarray(loads, float), 0
    total = np.bincount(home, loads, minlength=gpus)
    while True:
        full, empty = int(total.argmax()), int(total.argmin())
        gap = total[full] - total[empty]
        if gap <= UNEVEN * total.mean():
            return moved
        own = np.flatnonzero(home == full)
        item = own[np.abs(loads[own] - gap / 2).argmin()]
        if abs(gap - 2 * loads[item]) > WORTH * gap:  # it would hardly become more even
            return moved
        home[item] = empty
        total[full] -= loads[item]
        total[empty] += loads[item]
        moved += 1
