"""The time that measured steps spent on copying adapters, as the twin makes the copies.

No measurement tells it for whole runs: a step time there is that of model, scheduling and copies
together. The twin makes each copy from the configuration, so its own copies are taken out of what
the step-time law is fitted to, and the law is fitted again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from numpy.typing import NDArray

from adapter_twin.laws.calibration import Calibration
from adapter_twin.twin.simulate import simulate_run

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Copying:
    """Copies of simulated runs, summed over their steps.

    Attributes
    ----------
    end_s : dict of str to float64, shape (steps,)
        End of each step, by run.
    total_s : dict of str to float64, shape (steps + 1,)
        Time spent on copies before each step, by run.
    """

    end_s: dict[str, Floats]
    total_s: dict[str, Floats]

    def per_step_ms(self, run_ids: pd.Series[str], from_s: Floats, to_s: Floats) -> Floats:
        """Return the mean copy time of the steps that end in each stretch of a run, in ms.

        A run that was not simulated, or has no step there, copies nothing.
        """
        mean_s = np.zeros(len(run_ids))
        for i, (run_id, low_s, high_s) in enumerate(zip(run_ids, from_s, to_s, strict=True)):
            if run_id in self.end_s:
                first, last = np.searchsorted(self.end_s[run_id], [low_s, high_s])
                total_s = self.total_s[run_id]
                mean_s[i] = (total_s[last] - total_s[first]) / max(last - first, 1)
        return 1e3 * mean_s


def simulate_copying(calibration: Calibration, runs: pd.DataFrame, jobs: int) -> Copying:
    """Simulate the runs that exchange adapters: those with fewer slots than served adapters.

    The others load each adapter once.
    """
    exchanging = runs[runs.adapter_slots < runs.served_adapters]
    rows = exchanging.to_dict("records")
    steps = Parallel(n_jobs=jobs)(delayed(_steps)(calibration, row) for row in rows)
    end_s, total_s = zip(*steps, strict=True) if steps else ((), ())
    ids = exchanging.run_id.tolist()
    return Copying(dict(zip(ids, end_s, strict=True)), dict(zip(ids, total_s, strict=True)))


def _steps(calibration: Calibration, row: dict[Any, Any]) -> tuple[Floats, Floats]:
    steps = simulate_run(row, calibration).steps
    return steps.end_s.copy(), np.concatenate(([0.0], np.cumsum(steps.load_s, dtype=float)))
