"""How adapters take turns on the slots: a polling queue.

An adapter in a slot serves all its requests at once (M/M/infinity), and leaves when it has none.
While more adapters have requests than there are slots, the one whose head has waited longest comes
next, so all wait about the same time ``W`` for a slot. ``W`` is such that just as many adapters are
active as there are slots: the requests that gather meanwhile lengthen a visit by the logarithm of
their number only, so waiting is what makes room. Where even the longest wait does not make enough,
the adapters that came first keep their slots, and the others get none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STATES = 64
"""Requests of one adapter up to which the length of its visits is computed exactly."""

HEAVIEST = 30.0
"""An adapter with more requests than that in service never leaves its slot within any window."""

SHORTEST_WAIT_S = 1e-4
HALVINGS = 25

EARLIEST_S, LATEST_S = 1e-3, 1e6
"""Between these the last adapter that gets a slot has its first request."""


@dataclass(frozen=True, slots=True)
class Visits:
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
    """

    head_wait_s: Floats
    admitted: Floats
    wait_s: Floats
    per_s: Floats
    burst: Floats


def share_slots(
    slots: Floats, rates: Floats, adapters: Floats, residence_s: Floats, longest_wait_s: Floats
) -> Visits:
    """Solve for the wait at which just as many adapters are active as there are slots.

    Parameters
    ----------
    slots : float64, shape (n,)
    rates, adapters : float64, shape (n, g)
        Requests/s of one adapter of a group, and adapters in it.
    residence_s : float64, shape (n,)
        Mean time for which a request runs.
    longest_wait_s : float64, shape (n,)
        Waits in a window that ends cannot be longer.
    """
    visits = _VisitLengths(rates, residence_s)

    def active(head_wait_s: Floats) -> Floats:
        visit_s = visits(head_wait_s)
        cycle_s = 1 / rates + head_wait_s[:, None] + visit_s
        return np.asarray((adapters * visit_s / cycle_s).sum(axis=1))

    head_wait_s = np.zeros_like(slots)
    crowded = active(head_wait_s) > slots
    if crowded.any():
        low_s, high_s = np.full_like(slots, SHORTEST_WAIT_S), longest_wait_s.astype(float)
        for _ in range(HALVINGS):
            middle_s = np.sqrt(low_s * high_s)
            above = active(middle_s) > slots
            low_s, high_s = np.where(above, middle_s, low_s), np.where(above, high_s, middle_s)
        head_wait_s = np.where(crowded, high_s, 0.0)
    visit_s, wait_s = visits(head_wait_s), head_wait_s[:, None]
    cycle_s = 1 / rates + wait_s + visit_s
    gathered = rates * wait_s
    requests_per_s = np.maximum((adapters * rates).sum(axis=1), 1e-12)
    return Visits(
        head_wait_s,
        _admitted(slots, rates, adapters * visit_s / cycle_s),
        # Of the requests in a cycle the first waits all of W, those that join it half on average.
        (wait_s + rates * wait_s**2 / 2) / (1 + rates * (wait_s + visit_s)),
        (adapters / cycle_s).sum(axis=1),
        (adapters * gathered**2 / cycle_s).sum(axis=1) / requests_per_s,
    )


def _admitted(slots: Floats, rates: Floats, active: Floats) -> Floats:
    """Return the share of each group's adapters that came early enough to get a slot.

    After ``t`` seconds ``1 - exp(-rate t)`` of a group have had a first request, so frequent
    adapters are ahead. `active`, of shape (n, g), are those that would hold a slot if all came.
    """
    crowded = active.sum(axis=1) > 1.001 * slots  # the wait is found to within a rounding error
    if not crowded.any():
        return np.ones_like(active)
    low_s, high_s = np.full_like(slots, EARLIEST_S), np.full_like(slots, LATEST_S)
    for _ in range(HALVINGS):
        middle_s = np.sqrt(low_s * high_s)
        above = (active * -np.expm1(-rates * middle_s[:, None])).sum(axis=1) > slots
        low_s, high_s = np.where(above, low_s, middle_s), np.where(above, middle_s, high_s)
    return np.where(crowded[:, None], -np.expm1(-rates * high_s[:, None]), 1.0)


class _VisitLengths:
    """Mean lengths of visits in s, given the wait before them."""

    def __init__(self, rates: Floats, residence_s: Floats) -> None:
        self.rates, self.residence_s = rates, residence_s[:, None]
        load = np.minimum(self.residence_s * rates, HEAVIEST)
        # Time in residences to fall from j requests to j - 1: (1 + load x that of j + 1) / j.
        fall = np.empty((STATES, *load.shape))
        fall[-1] = 1 / (STATES - load)
        for j in range(STATES - 1, 0, -1):
            fall[j - 1] = (1 + load * fall[j]) / j
        self.emptying = np.cumsum(fall, axis=0)

    def __call__(self, head_wait_s: Floats) -> Floats:
        gathered = 1 + self.rates * head_wait_s[:, None]
        place = np.minimum(gathered, STATES) - 1
        low = np.minimum(place.astype(np.int64), STATES - 2)[None]
        below = np.take_along_axis(self.emptying, low, axis=0)[0]
        above = np.take_along_axis(self.emptying, low + 1, axis=0)[0]
        residences = below + (place - low[0]) * (above - below)
        # Far above the load, requests only leave: the time falls with the logarithm.
        residences += np.log(np.maximum(gathered / STATES, 1))
        return np.asarray(residences * self.residence_s)
