"""Ranges of a GPU's load, what it can hold in each, and what part of that an adapter takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adapter_twin.planning.slot_sharing import share_slots

Floats = NDArray[np.float64]

UPPER = np.array([1, 0.98, 0.96, 0.94, 0.91, 0.88, 0.84, 0.79, 0.74, 0.68, 0.61, 0.54, 0.46, 0.38])
UPPER = np.append(UPPER, [0.3, 0.22, 0.14, 0.07])
LOWER = np.array([*UPPER[1:], 0.0])
"""Ranges of the adapters that are active, by the most that can be."""

GRID = 1.015
"""Ratio of rates for which active shares are computed."""

FINER = 300
"""Grid steps below the lowest rate, to a hundredth of it, that parts of adapters are looked at."""

BLOCK = 32
"""Grid steps for which shares are computed at once, and kept."""

NO_SLOTS = 1e-9


@dataclass(frozen=True, slots=True)
class Levels:
    """Ranges of a GPU's load, and what it can hold there.

    Attributes
    ----------
    rank : int64, shape (n,)
        ``max_lora_rank``.
    high : float64, shape (n,)
        Load in requests/s.
    most_active : float64, shape (n,)
        Sum of the adapters' active shares.
    residence_s : float64, shape (n, ranges)
        Time for which a request runs at least, with more than `LOWER` of the most active adapters.
    served : float64, shape (n,)
        Share of the load that is served at least.
    wait_s : float
        Longest wait of an adapter for a slot.
    """

    rank: NDArray[np.int64]
    high: Floats
    most_active: Floats
    residence_s: Floats
    served: Floats
    wait_s: float
    _known: dict[int, Floats] = field(default_factory=dict)

    def active(self, rates: Floats, *, whole: bool) -> Floats:
        """Return the least part that adapters have in what can be active.

        Parameters
        ----------
        rates : float64, shape (m,)
            Requests/s of one adapter; computed for those of a grid, rounded down.
        whole : bool
            Otherwise the adapter may come in any number of parts.

        Returns
        -------
        float64, shape (n, m)
        """
        place = np.floor(np.log(rates) / np.log(GRID)).astype(np.int64)
        first = (place.min() - (0 if whole else FINER)) // BLOCK * BLOCK
        blocks = [self._block(start) for start in range(first, int(place.max()) + 1, BLOCK)]
        part = np.concatenate(blocks, axis=1)
        if not whole:  # parts of a rate below may be the least active by rate
            grid = GRID ** np.arange(first, first + part.shape[1], dtype=float)
            part = grid * np.minimum.accumulate(part / (GRID * grid), axis=1)
        return np.asarray(part[:, place - first])

    def _block(self, start: int) -> Floats:
        """Return `active` of one adapter for a block of the grid of rates."""
        if start not in self._known:
            grid = GRID ** np.arange(start, start + BLOCK, dtype=float)
            part = np.full((len(self.high), BLOCK), np.inf)
            for upper, residence_s in zip(UPPER, self.residence_s.T, strict=True):
                each, all_s = np.tile(grid, len(residence_s)), np.repeat(residence_s, BLOCK)
                in_batch = -np.expm1(-each * all_s * np.repeat(self.served, BLOCK))
                share = np.minimum(active_share(each, all_s, self.wait_s), in_batch)
                most = upper * self.most_active[:, None]
                part = np.minimum(part, share.reshape(part.shape) / most)
            self._known[start] = part
        return self._known[start]


def active_share(rates: Floats, residence_s: Floats, wait_s: float) -> Floats:
    """Return the share of the time in which an adapter holds a slot, if it waits so long for one.

    Parameters
    ----------
    rates, residence_s : float64, shape (n,)
    wait_s : float
    """
    one = np.ones((len(rates), 1))
    # with next to no slots, every adapter waits as long as can be
    visits = share_slots(
        np.full(len(rates), NO_SLOTS), rates[:, None], one, residence_s, np.full(len(rates), wait_s)
    )
    return np.asarray(1 - (1 / rates + wait_s) * visits.per_s)
