"""The arrivals of the reference study's load generator, number by number.

Apart from `adapter_twin.workload.trace` because it is compiled: importing numba takes its time.
"""

from __future__ import annotations

import heapq
import random

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


def reference_arrivals(rates: Floats, duration_s: float) -> tuple[Floats, Ints]:
    """Draw what the load generator of Agullo et al. (2025) drew; each of its runs had seed 0.

    It shuffled the adapters with Python's generator, then drew every gap between requests from one
    NumPy stream: a first gap per adapter in that order, and the next one as each request was sent.

    Parameters
    ----------
    rates : float64, shape (sources,)
        Requests/s.
    duration_s : float

    Returns
    -------
    arrival_s : float64, shape (requests,)
    source : int32, shape (requests,)
    """
    order = np.flatnonzero(rates > 0).tolist()
    random.Random(0).shuffle(order)
    stream = np.random.RandomState(0)
    expected = rates.sum() * duration_s
    gaps = stream.standard_exponential(int(expected + 6 * np.sqrt(expected)) + len(order) + 10)
    arrival_s, source, sent = _send_in_order(np.array(order, np.int32), rates, gaps, duration_s)
    return arrival_s[:sent], source[:sent]


@numba.njit(cache=True)
def _send_in_order(
    order: Ints, rates: Floats, gaps: Floats, duration_s: float
) -> tuple[Floats, Ints, int]:
    due = [(gaps[i] / rates[order[i]], order[i]) for i in range(len(order))]
    heapq.heapify(due)
    left = gaps[len(order) :]
    arrival_s, sources = np.empty(len(left)), np.empty(len(left), np.int32)
    sent = 0
    while sent < len(left) and len(due) > 0 and due[0][0] < duration_s:
        now_s, source = due[0]
        arrival_s[sent], sources[sent] = now_s, source
        heapq.heapreplace(due, (now_s + left[sent] / rates[source], source))
        sent += 1
    return arrival_s, sources, sent
