"""A step-time law fitted through the twin: to what runs served, not to what their steps took.

Near saturation slower steps make larger batches and these slower steps, so that an error of the law
counts several times, more in one run than in another. The error of a step cannot see that, the
twin can: how its figures move with each constant of the law, at the constants of a first fit.
"""

from copy import copy
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from joblib import delayed
from numpy.typing import NDArray

from adapter_twin.calibrate.step_observations import workload_names
from adapter_twin.laws.calibration import Calibration
from adapter_twin.laws.roofline import CONSTANTS, MoreErrors
from adapter_twin.laws.step_time import Floats
from adapter_twin.parallel import share_out
from adapter_twin.service.predict import predict_run

FIGURES = ("mean_itl_ms", "total_throughput", "p99_itl_ms")
TOLERANCES = np.array([0.03, 0.015, 0.1])
"""Figures that the twin is to meet, and the relative errors that they are taken to have."""

CHANGE = 0.08
"""Each constant is changed by this in its logarithm."""

STEEPEST = 3.0
"""Where a figure moves by more than this power of a constant, the run lies on an edge."""

ROBUST = 2.0
"""Errors of more than this many tolerances count less than their squares."""


class Response(NamedTuple):
    """How the twin's figures of some runs move with the constants of its step-time law.

    Attributes
    ----------
    run_id, group : shape (runs,)
        Of runs, and the workload of each.
    missed : float64, shape (figures, runs)
        Logarithm of a figure in the twin by the measured one.
    slopes : float64, shape (figures, runs, constants)
        Its derivatives by the logarithms of the constants.
    at : float64, shape (constants,)
        These logarithms.
    """

    run_id: NDArray[np.str_]
    group: NDArray[np.str_]
    missed: Floats
    slopes: Floats
    at: Floats

    @classmethod
    def of(cls, calibration: Calibration, runs: pd.DataFrame, jobs: int) -> Self:
        """Simulate runs by the laws as they are, and with each constant changed in turn.

        Parameters
        ----------
        calibration : Calibration
            Its step-time law is a `RooflineLaw`.
        runs : DataFrame
            Table ``runs``.
        jobs : int
            Processes.
        """
        rows = runs.to_dict("records")
        changed = [calibration, *(_changed(calibration, name) for name in CONSTANTS)]
        figures = share_out((delayed(_figures)(*pair) for pair in product(changed, rows)), jobs)
        table = np.log(figures).reshape(len(changed), len(rows), len(FIGURES)).transpose(2, 1, 0)
        measured = np.log(runs[list(FIGURES)].to_numpy(float)).T
        slopes = (table[:, :, 1:] - table[:, :, :1]) / CHANGE
        law: Any = calibration.step_time
        return cls(
            run_id=runs.run_id.to_numpy(str),
            group=workload_names(runs),
            missed=table[:, :, 0] - measured,
            slopes=np.clip(slopes, -STEEPEST, STEEPEST),
            at=np.log([law.constants_[name] for name in CONSTANTS]),
        )

    def of_runs(self, run_id: "pd.Series[str]") -> Self:
        """Return the response of some of the runs only."""
        kept = np.isin(self.run_id, run_id)
        return type(self)(
            *(self.run_id[kept], self.group[kept]),
            *(self.missed[:, kept], self.slopes[:, kept], self.at),
        )

    @property
    def errors(self) -> MoreErrors:
        """The errors in tolerances, as `RooflineLaw.fit` takes them."""
        return MoreErrors(self._errors, np.tile(self.group, len(FIGURES)))

    def _errors(self, logarithms: Floats) -> Floats:
        missed = self.missed + self.slopes @ (logarithms - self.at)
        scaled = missed / (TOLERANCES[:, None] * ROBUST)
        # soft absolute values: their squares grow like the error far away
        return np.asarray(ROBUST * np.sign(scaled) * np.sqrt(2 * (np.hypot(1, scaled) - 1))).ravel()


def _changed(calibration: Calibration, name: str) -> Calibration:
    law: Any = copy(calibration.step_time)
    law.constants_ = {**law.constants_, name: law.constants_[name] * np.exp(CHANGE)}
    return replace(calibration, step_time=law)


def _figures(calibration: Calibration, row: dict[str, Any]) -> list[float]:
    prediction = predict_run(row, calibration, seed=0, observer=True)[0]
    return [prediction[figure] for figure in FIGURES]
