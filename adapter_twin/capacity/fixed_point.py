"""The fixed point of arrivals and completions, and of what waiting does to both."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from adapter_twin.capacity.batches import NODES, Batches
from adapter_twin.capacity.slot_sharing import Visits, share_slots
from adapter_twin.capacity.traffic_mix import Mix
from adapter_twin.laws import Calibration

Floats = NDArray[np.float64]

ROUNDS = 4
"""In each of these rounds waiting slows the steps down, and slow steps let requests wait."""


@dataclass(frozen=True, slots=True)
class Balance:
    """A state of balance, or else the fullest batch; arrays of shape (n,).

    Attributes
    ----------
    running, adapters : float64
        Requests, and distinct adapters, in a mean batch.
    step_s : float64
    capacity_per_s : float64
        Requests that complete per second at most.
    visits : Visits
    """

    running: Floats
    step_s: Floats
    adapters: Floats
    capacity_per_s: Floats
    visits: Visits


@dataclass(frozen=True, slots=True)
class Delays:
    """What waiting does to the service; arrays of shape (n,).

    Attributes
    ----------
    served : float64
        Share of the requests that are served at all.
    loads_s, queue_s : float64
        Added to every step by loads, and to the window's last step by the queue.
    scanning : float64
        Share of the steps in which the scheduler scans the queue.
    """

    served: Floats
    loads_s: Floats
    queue_s: Floats
    scanning: Floats

    def halfway_to(self, other: Delays) -> Delays:
        """Return the means of both: whole steps overshoot, for slow steps fill the batch.

        A full batch, for one, ends the scans of the queue that slowed the steps down.
        """
        pairs = ((getattr(self, one.name), getattr(other, one.name)) for one in fields(self))
        return Delays(*((mine + theirs) / 2 for mine, theirs in pairs))


def settle(mix: Mix, batches: Batches, calibration: Calibration) -> tuple[Balance, Delays]:
    """Alternate between a state and the delays in it."""
    n = len(batches.slots)
    delays = Delays(np.ones(n), *np.zeros((3, n)))
    for one in range(ROUNDS):
        state = _balance(mix, batches, delays)
        found = _delays(mix, batches, state, calibration)
        delays = found if one == 0 else delays.halfway_to(found)
    return state, delays


def _balance(mix: Mix, batches: Batches, delays: Delays) -> Balance:
    """Find the running requests at which as many complete as arrive, by Little's law."""
    step_s = batches.step_s + delays.loads_s[:, None]
    # The queue's part grows evenly from nothing: steps/s average to those of this step.
    growth = np.maximum(delays.queue_s[:, None] / step_s, 1e-9)
    step_s = step_s * growth / np.log1p(growth)
    completed_per_s = batches.running / (mix.output_tokens[:, None] * step_s)
    wanted = mix.request_rate * delays.served
    enough = completed_per_s >= wanted[:, None]
    high = np.where(enough.any(axis=1), enough.argmax(axis=1), NODES - 1)
    rows, low = np.arange(len(high)), np.maximum(high - 1, 0)
    below, above = completed_per_s[rows, low], completed_per_s[rows, high]
    share = np.clip((wanted - below) / np.maximum(above - below, 1e-12), 0, 1)

    def between(values: Floats) -> Floats:
        return np.asarray(values[rows, low] + share * (values[rows, high] - values[rows, low]))

    step_s = between(step_s)
    return Balance(
        running=between(batches.running),
        step_s=step_s,
        adapters=between(batches.adapters),
        capacity_per_s=completed_per_s.max(axis=1),
        visits=share_slots(
            batches.slots,
            mix.rates,
            mix.adapters,
            mix.output_tokens * step_s,
            mix.duration_s / 2,  # what is not served by then waits for most of the window
        ),
    )


def _delays(mix: Mix, batches: Batches, state: Balance, calibration: Calibration) -> Delays:
    """Return what waits and is lost in a state, and what that adds to a step."""
    visits, residence_s = state.visits, mix.output_tokens * state.step_s
    late = np.minimum((visits.wait_s + residence_s[:, None]) / mix.duration_s[:, None], 1)
    of_base_model = (1 - mix.load_share.sum(axis=1)) * (1 - residence_s / mix.duration_s)
    served = (mix.load_share * visits.admitted * (1 - late)).sum(axis=1) + of_base_model
    wanted = served * mix.request_rate
    unserved_per_s = mix.request_rate - np.minimum(wanted, state.capacity_per_s)
    # The scheduler scans past requests that wait for a slot, until KV blocks or tokens run out.
    scanning = ((visits.head_wait_s > 0) & (wanted < state.capacity_per_s)).astype(float)
    scan_ms = calibration.scheduling.per_scanned_ms_ * scanning
    queue_ms = (scan_ms + calibration.step_time.waiting_ms_) * unserved_per_s * mix.duration_s
    copies = _copies_per_step(visits, visits.per_s * state.step_s, batches.slots)
    loads_ms = calibration.loading.padded_slot_ms_ * copies
    has_to_load = batches.slots < mix.adapters.sum(axis=1)
    return Delays(served, np.where(has_to_load, loads_ms, 0) / 1e3, queue_ms / 1e3, scanning)


def _copies_per_step(visits: Visits, joining: Floats, slots: Floats) -> Floats:
    """Return the copies of adapters in a mean step: one for each that joins, and vLLM's chain.

    Where the batch takes all slots, as many adapters leave as join. The walk over the batch copies
    again what it meets while it has met more that join than places of those that left. That is a
    sixth of the slots where one joins (the mean excess of one uniform place over another), and half
    of them where many do.
    """
    spread = np.sqrt(np.maximum(visits.variance, 1e-9))
    full = np.where(visits.head_wait_s > 0, 1.0, ndtr((visits.active - slots) / spread))
    return np.asarray(joining + slots * full * (1 - 1 / np.sqrt(1 + 2 * joining / 3)) / 2)
