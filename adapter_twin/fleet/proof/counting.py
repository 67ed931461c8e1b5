"""The most adapters of at least some rate that a GPU can hold, for the lower bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapter_twin.fleet.oracle import Oracle

Floats = NDArray[np.float64]

THRESHOLDS = 14
"""Rates from which on adapters are counted: few that only the busiest have, many that all have."""

ROUNDING = 1e-9
"""Relatively, below the adapters' own rates."""


def thresholds_of(rates: Floats) -> Floats:
    """Return rates in requests/s from which on adapters are counted, the lowest one included."""
    different = np.unique(rates)
    if len(different) > THRESHOLDS:
        from_top = np.geomspace(1 / len(rates), 1, THRESHOLDS)
        different = np.unique(np.quantile(rates, 1 - from_top, method="inverted_cdf"))
    return np.asarray((1 - ROUNDING) * different)


def most_adapters(
    oracle: Oracle, rank: int, thresholds: Floats, patience: float
) -> NDArray[np.int64]:
    """Return the most adapters with at least a rate that one GPU serves.

    Parameters
    ----------
    oracle : Oracle
    rank : int
        Of the slots.
    thresholds : float64, shape (t,)
        Rates in requests/s.
    patience : float
        Times by which the SLO's limit on ITL may be exceeded.

    Returns
    -------
    int64, shape (t,)
        At most as many as the oracle has parts.
    """
    fit = np.zeros(len(thresholds), np.int64)
    too_many = np.full(len(thresholds), len(oracle.parts) + 1)
    while (open_ := np.flatnonzero(too_many - fit > 1)).size:
        # geometric at first: of a long list, few fit
        middle = np.where(fit > 0, (fit + too_many) // 2, np.sqrt(too_many).astype(np.int64))[open_]
        good = oracle.may_serve(thresholds[open_], middle, rank, patience)
        fit[open_] = np.where(good, middle, fit[open_])
        too_many[open_] = np.where(good, too_many[open_], middle)
    return fit
