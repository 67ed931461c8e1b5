"""Ranges of a GPU's load, what it can hold in each, and what part of that an adapter takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adapter_twin.capacity.slot_sharing import visits_s

Floats = NDArray[np.float64]

RANGE, RANGES = 0.96, 66
"""Ratio and number of the ranges of the adapters that are active, from the most that can be on."""

GRID = 1.015
"""Ratio of rates for which active shares are computed."""

FEW = 4
"""Below so many running requests, a share of the steps need not grow with their number."""


def ranges(finer: int) -> tuple[Floats, Floats]:
    """Return the upper and the lower ends of the ranges; the last one begins at zero."""
    upper = RANGE ** (np.arange(RANGES * finer) / finer)
    return upper, np.append(upper[1:], 0.0)


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
    residence_s, running : float64, shape (n, ranges)
        With more adapters active than a range's lower end: time for which a request runs at least;
        requests that run at least where the most complete.
    wait_s : float
        Longest wait of an adapter for a slot.
    thresholds : float64, shape (t,)
        Requests/s of an adapter.
    most : int64, shape (n, t)
        Adapters with at least that rate, at most; the same at all levels of a rank.
    finer : int
        All steps are so many times as fine.
    """

    rank: NDArray[np.int64]
    high: Floats
    most_active: Floats
    residence_s: Floats
    running: Floats
    wait_s: float
    thresholds: Floats
    most: NDArray[np.int64]
    finer: int = 1
    _known: dict[int, Floats] = field(default_factory=dict)

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
        place = np.floor(np.log(rates) / np.log(GRID) * self.finer).astype(np.int64)
        different, back = np.unique(place, return_inverse=True)
        self._learn([one for one in different.tolist() if one not in self._known])
        return np.stack([self._known[one] for one in different.tolist()], axis=1)[:, back]

    def _learn(self, new: list[int]) -> None:
        """Compute `active` at some places on the grid of rates."""
        rates = GRID ** (np.array(new, float) / self.finer)
        part = np.full((len(self.high), len(new)), np.inf)
        each = np.tile(rates, len(self.high))
        for i, upper in enumerate(ranges(self.finer)[0] if new else ()):
            runs_s = np.repeat(self.residence_s[:, i], len(new))
            holding = active_share(each, runs_s, self.wait_s).reshape(part.shape)
            share = batch_share(rates / self.high[:, None], self.running[:, i, None], holding)
            part = np.minimum(part, share / (upper * self.most_active[:, None]))
        self._known.update(zip(new, part.T, strict=True))


def active_share(rates: Floats, residence_s: Floats, wait_s: float) -> Floats:
    """Return the share of the time in which an adapter holds a slot, if it waits so long for one.

    Parameters
    ----------
    rates, residence_s : float64, shape (n,)
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
    weight = np.where(running > FEW, (1 + 1 / spread) / 2, 0)
    return np.asarray(lower + weight * (upper - lower))
