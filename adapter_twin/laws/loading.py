"""Adapter loading: from host memory into a slot, and from disk before that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import require
from adapter_twin.laws.estimator import Estimator, Fitted, NotBelow0

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


class LoadingLaw(Estimator):
    """Median load times of one model's adapters.

    A copy from host memory writes a whole slot, so it does not depend on the adapter's rank, but is
    slower when the slot is wider than the adapter. Reading from disk grows with the adapter.

    Attributes
    ----------
    full_slot_ms_, padded_slot_ms_ : float
        Copy of an adapter of rank ``max_lora_rank``, and of a smaller one.
    read_ms_, read_ms_per_rank_ : float
        Reading from disk, less the copy that follows.
    interval_ : dict
        95 % intervals, by attribute.
    """

    model: str
    interval_: dict[str, tuple[float, float]]
    full_slot_ms_: NotBelow0
    padded_slot_ms_: NotBelow0
    read_ms_: Fitted
    read_ms_per_rank_: Fitted

    def __init__(self, model: str) -> None:
        self.model = model

    def fit(self, loads: pd.DataFrame) -> LoadingLaw:
        """Fit to measured loads (table ``adapter_loads``: one row per load)."""
        loads = loads[loads.model == self.model]
        memory, disk = (loads[loads.source == source] for source in ("memory", "disk"))
        both = len(memory) > 0 and len(disk) > 0
        require(both, f"adapter_loads: {self.model} needs some from memory and some from disk")
        self.interval_ = {}
        full = memory["rank"] == memory.max_lora_rank
        for name, rows in (("full_slot_ms_", full), ("padded_slot_ms_", ~full)):
            # Where only one kind was measured it stands for the other.
            load_ms = np.sort(memory.load_ms[rows | (not rows.any())])
            self.interval_[name] = _interval_of_median(load_ms)
            setattr(self, name, float(np.median(load_ms)))
        # Medians by rank: the first read of a file is an outlier of up to a second.
        by_rank = disk.groupby("rank").load_ms.median() - self.full_slot_ms_
        degree = min(1, len(by_rank) - 1)
        *slopes, intercept = np.polyfit(by_rank.index.to_numpy(float), by_rank.to_numpy(), degree)
        slope = slopes[0] if slopes else 0.0
        self.read_ms_, self.read_ms_per_rank_ = float(intercept), float(slope)
        return self

    def load_s(self, ranks: NDArray[np.int64], max_lora_rank: int | NDArray[np.int64]) -> Floats:
        """Return the copy times into a slot of `max_lora_rank` in s, one per rank given."""
        full = np.asarray(ranks) == max_lora_rank
        return np.where(full, self.full_slot_ms_, self.padded_slot_ms_) / 1e3

    def read_s(self, ranks: NDArray[np.int64]) -> Floats:
        """Return the reading times from disk in s, one per rank given."""
        read_ms = self.read_ms_ + self.read_ms_per_rank_ * np.asarray(ranks, float)
        return np.maximum(read_ms, 0) / 1e3


def _interval_of_median(ordered: Floats) -> tuple[float, float]:
    """Return the order-statistics interval of a median (binomial, normal approximation)."""
    half = 0.98 * np.sqrt(len(ordered))
    low = max(int(len(ordered) / 2 - half), 0)
    high = min(int(np.ceil(len(ordered) / 2 + half)), len(ordered) - 1)
    return float(ordered[low]), float(ordered[high])
