"""Scheduling time: the engine's loop over running requests, and its scan past gated ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adapter_twin.laws.estimator import Estimator, NotBelow0

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

GATED_SLOTS = 64
"""Up to this many slots, they and not KV blocks gated the measured runs: scans are full ones."""


def of_scheduler_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Bring the table ``scheduler_runs``, one row per run, into what `SchedulingLaw` fits."""
    gated = (runs.gpu_loras < runs.cpu_loras) & (runs.gpu_loras <= GATED_SLOTS)
    runs = runs[gated | (runs.avg_waiting_queue < 1)]
    names = {
        "sched_ms_per_step": "schedule_ms",
        "avg_batch_size": "running",
        "avg_waiting_queue": "scanned",
        "gpu_loras": "group",
    }
    return runs[list(names)].rename(columns=names)


class SchedulingLaw(Estimator):
    """``time = base + per_running * running + per_scanned * waiting requests scanned``.

    Attributes
    ----------
    base_ms_, per_running_ms_, per_scanned_ms_ : float
    interval_ : dict
        95 % intervals, by attribute.
    cv_error_percent_ : float
        MAPE with whole engine configurations left out.
    """

    base_ms_: NotBelow0
    per_running_ms_: NotBelow0
    per_scanned_ms_: NotBelow0
    interval_: dict[str, list[float]]
    cv_error_percent_: float

    def fit(self, measured: pd.DataFrame) -> SchedulingLaw:
        """Fit to measured scheduling times.

        Parameters
        ----------
        measured : DataFrame
            ``schedule_ms, running, scanned``, and ``group``: what is left out as a whole.
        """
        import statsmodels.api as sm
        from scipy.optimize import nnls

        design = np.column_stack([np.ones(len(measured)), measured.running, measured.scanned])
        schedule_ms = measured.schedule_ms.to_numpy(float)
        weight = 1 / schedule_ms

        def solve(rows: NDArray[np.bool_]) -> Floats:
            return np.asarray(nnls(design[rows] * weight[rows, None], np.ones(rows.sum()))[0])

        names = ("base_ms_", "per_running_ms_", "per_scanned_ms_")
        for name, value in zip(names, solve(np.ones(len(measured), bool)), strict=True):
            setattr(self, name, float(value))
        fit = sm.WLS(schedule_ms, design, weights=weight**2).fit()
        self.interval_ = dict(zip(names, fit.conf_int().tolist(), strict=True))
        error = np.empty(len(design))
        for group in measured.group.unique():
            left_out = (measured.group == group).to_numpy()
            error[left_out] = design[left_out] @ solve(~left_out) / schedule_ms[left_out] - 1
        self.cv_error_percent_ = float(100 * np.abs(error).mean())
        return self

    def predict_ms(self, running: Floats, scanned: Floats) -> Floats:
        """Return the scheduling time of a step in ms."""
        return np.asarray(
            self.base_ms_ + self.per_running_ms_ * running + self.per_scanned_ms_ * scanned
        )
