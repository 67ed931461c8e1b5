"""The polling queue in which adapters take turns on the slots.

An adapter in a slot serves all its requests at once (M/M/infinity), and leaves when it has none.
While more adapters have requests than there are slots, the one whose head has waited longest comes
next, so all wait about the same time ``W`` for a slot. ``W`` is such that just as many adapters are
active as there are slots: the requests that gather meanwhile lengthen a visit by the logarithm of
their number only, so waiting is what makes room. Where even the longest wait does not make enough,
the adapters that came first keep their slots, and the others get none.
"""

from typing import NamedTuple

import numba
import numpy as np

from adapter_twin.workload.lengths import Floats

STATES = 64
"""The length of an adapter's visit is computed exactly up to this number of its requests."""

HEAVIEST = 30.0
"""An adapter with more requests than this in service does not leave its slot within any window."""

SHORTEST_WAIT_S = 1e-4
HALVINGS = 25

EARLIEST_S, LATEST_S = 1e-3, 1e6
"""Between these the last adapter that gets a slot has its first request."""

TOLERANCE = 1.001
"""Adapters that are active may exceed the slots by this ratio: the wait is rounded."""


class Visits(NamedTuple):
    """How adapters take turns; n configurations, g groups of adapters with equal rates.

    Attributes
    ----------
    head_wait_s : float64, shape (n,)
        What an adapter that has requests waits for a slot.
    admitted : float64, shape (n, g)
        Share of a group's adapters that get a slot at all; below 1 where more adapters than slots
        want one even after the longest wait.
    wait_s : float64, shape (n, g)
        Mean wait of a request; those that find their adapter in a slot do not wait.
    per_s : float64, shape (n,)
        Visits of all adapters per second.
    burst : float64, shape (n,)
        Requests that had gathered before the visit, as a mean request finds them.
    active, variance : float64, shape (n,)
        Adapters that hold a slot, and the variance of that if they did so independently.
    """

    head_wait_s: Floats
    admitted: Floats
    wait_s: Floats
    per_s: Floats
    burst: Floats
    active: Floats
    variance: Floats


@numba.njit(cache=True, error_model="numpy")
def visits_s(rates: Floats, residence_s: Floats, head_wait_s: float) -> Floats:
    """Return the mean lengths in s of adapters' visits to a slot that they have waited for.

    Parameters
    ----------
    rates, residence_s : float64, shape (n,)
        Requests/s of an adapter, and the mean time for which one of its requests runs.
    head_wait_s : float

    Returns
    -------
    float64, shape (n,)
    """
    lengths_s, emptying = np.empty(len(rates)), np.empty((STATES, 1))
    for i in range(len(rates)):
        load = min(residence_s[i] * rates[i], HEAVIEST)
        _fill_emptying(emptying, np.full(1, load))
        lengths_s[i] = _visit_s(head_wait_s, rates[i], residence_s[i], emptying[:, 0])
    return lengths_s


@numba.njit(cache=True, error_model="numpy")
def share_slots(
    slots: Floats, rates: Floats, adapters: Floats, residence_s: Floats, longest_wait_s: Floats
) -> Visits:
    """Solve for the wait at which just as many adapters are active as there are slots.

    Parameters
    ----------
    slots : float64, shape (n,)
    rates, adapters : float64, shape (n, g)
        Requests/s of one adapter of a group, and adapters in it; a group may be empty.
    residence_s : float64, shape (n,)
        Mean time for which a request runs.
    longest_wait_s : float64, shape (n,)
        Waits in a window that ends cannot be longer.
    """
    n, groups = rates.shape
    head_wait_s, per_s, burst, variance = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    all_active = np.zeros(n)
    admitted, wait_s = np.ones((n, groups)), np.zeros((n, groups))
    emptying, active = np.empty((STATES, groups)), np.zeros(groups)
    for i in range(n):
        _fill_emptying(emptying, np.minimum(residence_s[i] * rates[i], HEAVIEST))
        head_s = _head_wait_s(
            slots[i], rates[i], adapters[i], residence_s[i], longest_wait_s[i], emptying
        )
        requests_per_s = 0.0
        for group in range(groups):
            rate, count = rates[i, group], adapters[i, group]
            active[group] = 0.0
            if count == 0:
                continue
            visit_s = _visit_s(head_s, rate, residence_s[i], emptying[:, group])
            cycle_s = 1 / rate + head_s + visit_s
            active[group] = count * visit_s / cycle_s
            variance[i] += active[group] * (1 - visit_s / cycle_s)
            # Of the requests in a cycle the first waits all of W, those that join it half on
            # average.
            waits_s = head_s + rate * head_s**2 / 2
            wait_s[i, group] = waits_s / (1 + rate * (head_s + visit_s))
            per_s[i] += count / cycle_s
            burst[i] += count * (rate * head_s) ** 2 / cycle_s
            requests_per_s += count * rate
        head_wait_s[i] = head_s
        burst[i] /= max(requests_per_s, 1e-12)
        all_active[i] = active.sum()
        if active.sum() > TOLERANCE * slots[i]:
            last_s = _last_admission_s(slots[i], rates[i], active)
            admitted[i] = -np.expm1(-rates[i] * last_s)
    return Visits(head_wait_s, admitted, wait_s, per_s, burst, all_active, variance)


@numba.njit(cache=True, error_model="numpy")
def _fill_emptying(emptying: Floats, load: Floats) -> None:
    """Write the mean times in residences in which 1, 2, ... requests, and all that join, end.

    To fall from j requests to j - 1 takes (1 + load x that of j + 1) / j residences.
    """
    groups = range(len(load))  # inner loops: they do not wait for each other's divisions
    for group in groups:
        emptying[STATES - 1, group] = 1 / (STATES - load[group])
    for j in range(STATES - 1, 0, -1):
        for group in groups:
            emptying[j - 1, group] = (1 + load[group] * emptying[j, group]) / j
    for j in range(1, STATES):
        for group in groups:
            emptying[j, group] += emptying[j - 1, group]


@numba.njit(cache=True, error_model="numpy")
def _visit_s(head_wait_s: float, rate: float, residence_s: float, emptying: Floats) -> float:
    """Return the mean length in s of an adapter's visit, given the wait before it."""
    gathered = 1 + rate * head_wait_s
    place = min(gathered, float(STATES)) - 1
    low = min(int(place), STATES - 2)
    residences = emptying[low] + (place - low) * (emptying[low + 1] - emptying[low])
    if gathered > STATES:  # far above the load, requests only leave: it grows with the logarithm
        residences += np.log(gathered / STATES)
    return float(residences * residence_s)


@numba.njit(cache=True, error_model="numpy")
def _head_wait_s(
    slots: float,
    rates: Floats,
    adapters: Floats,
    residence_s: float,
    longest_wait_s: float,
    emptying: Floats,
) -> float:
    """Return the wait for a slot in s, none where all active adapters have one."""

    def active(head_wait_s: float) -> float:
        total = 0.0
        for group in range(len(rates)):
            if adapters[group] > 0:
                visit_s = _visit_s(head_wait_s, rates[group], residence_s, emptying[:, group])
                total += adapters[group] * visit_s / (1 / rates[group] + head_wait_s + visit_s)
        return total

    if active(0.0) <= slots:
        return 0.0
    low_s, high_s = SHORTEST_WAIT_S, longest_wait_s
    for _ in range(HALVINGS):
        middle_s = np.sqrt(low_s * high_s)
        if active(middle_s) > slots:
            low_s = middle_s
        else:
            high_s = middle_s
    return high_s


@numba.njit(cache=True, error_model="numpy")
def _last_admission_s(slots: float, rates: Floats, active: Floats) -> float:
    """Return the time in s by which as many adapters have had a request as there are slots.

    After ``t`` seconds ``1 - exp(-rate t)`` of a group have had a first request, so frequent
    adapters are ahead. `active`, of shape (g,), are those that would hold a slot if all came.
    """
    low_s, high_s = EARLIEST_S, LATEST_S
    for _ in range(HALVINGS):
        middle_s = np.sqrt(low_s * high_s)
        if (active * -np.expm1(-rates * middle_s)).sum() > slots:
            high_s = middle_s
        else:
            low_s = middle_s
    return high_s
