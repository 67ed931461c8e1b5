"""A calibration in compiled form, for one engine."""

from __future__ import annotations

import numpy as np

from adapter_twin.laws import Calibration
from adapter_twin.laws.front_end import UNLIMITED
from adapter_twin.laws.step_time import TILE
from adapter_twin.twin.clock import FrontEnd
from adapter_twin.twin.step_law import StepLaw
from adapter_twin.workload.scenario import EngineConfig


def step_law(calibration: Calibration, engine: EngineConfig, *, merging: bool = False) -> StepLaw:
    """Return the step-time and scheduling laws for an engine, in s.

    With `merging`, also for the steps of a merged adapter.
    """
    ms = 1e-3
    scheduling, step_time = calibration.scheduling, calibration.step_time
    coefficients = step_time.for_engine(engine.max_loras, engine.max_lora_rank)
    if merging:
        coefficients = np.vstack((coefficients, step_time.without_adapters()))
    return StepLaw(
        token_breaks=np.array(step_time.token_breaks_, float),
        coefficients=ms * coefficients,
        tile=TILE,
        per_waiting=ms * step_time.waiting_ms_,
        scheduling=ms
        * np.array([scheduling.base_ms_, scheduling.per_running_ms_, scheduling.per_scanned_ms_]),
    )


def front_end_law(calibration: Calibration, duration_s: float, observer: bool) -> FrontEnd:
    """Return the front end's pauses, with or without those of the measurement."""
    ms = 1e-3
    measured = calibration.measurement
    return FrontEnd(
        duration_s=float(duration_s),
        in_flight_cap=measured.in_flight_cap if observer else UNLIMITED,
        first_use_s=ms * calibration.front_end.first_use_ms_,
        scrape_period_s=measured.scrape_period_s if observer else np.inf,
        scrape_s=ms * measured.scrape_ms_,
        scrape_s_per_label=ms * measured.scrape_ms_per_label_,
        scrape_s_per_name=ms * measured.scrape_ms_per_name_,
    )
