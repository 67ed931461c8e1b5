"""The fit of a calibration to a campaign of `adapter-twin profile`.

The engine's laws come from the micro-profiles, where the batch of every step is known; only the
front end's overhead needs serving runs, and takes those that were not held out.
"""

from typing import Any

import numpy as np
import pandas as pd

from adapter_twin.calibrate.client_side import fit_overhead, observe
from adapter_twin.calibrate.published_fit import assemble
from adapter_twin.errors import require
from adapter_twin.laws.calibration import Calibration
from adapter_twin.laws.emitted_lengths import EarlyStopLaw, LengthLaw
from adapter_twin.laws.front_end import UNLIMITED, FrontEndLaw, MeasurementLaw
from adapter_twin.laws.linear_steps import LinearStepLaw
from adapter_twin.laws.loading import LoadingLaw
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.prior import known_constants
from adapter_twin.laws.roofline import RooflineLaw
from adapter_twin.laws.scheduling import SchedulingLaw
from adapter_twin.laws.step_time import StepObservations, StepTimeLaw, batch_features
from adapter_twin.workload.models import ModelShape

TABLES = ("runs", "micro_steps", "adapter_loads", "engine_starts")
"""A calibration is fitted to these tables."""

BATCH = ["engine_id", "point", "batched_tokens", "decodes", "prompts", "distinct_adapters"]
"""Steps that agree in these ran the same batch but for the length of its contexts."""


def calibrate_campaign(
    tables: dict[str, pd.DataFrame],
    model: str,
    shape: ModelShape,
    *,
    gpu: str,
    engine_version: str,
    memory_gib: float,
    source: dict[str, Any],
    jobs: int = 1,
) -> Calibration:
    """Fit all laws of the model of a campaign.

    Parameters
    ----------
    tables : dict of DataFrame
        `TABLES`, by name, as `adapter_twin.tables.campaign_schemas` has them.
    model : str
    shape : ModelShape
    gpu : str
        ``cpu`` has a step-time law of its own (`LinearStepLaw`); any other, that of GPUs.
    engine_version : str
    memory_gib : float
        Of the GPU; of a CPU the starts tell it.
    source : dict
        Where the tables come from, kept in the provenance.
    jobs : int
        Processes for the simulations.

    Raises
    ------
    AdapterTwinError
        Fewer than two engines were profiled, or too few serving runs without a queue are left to
        fit the front end to.
    """
    engines = tables["micro_steps"].engine_id.nunique()
    require(
        engines >= 2,
        f"micro_steps: of {engines} engine; at least 2 with different slots or ranks are needed to "
        "choose the form of the step-time law: add one to the campaign",
    )
    runs = tables["runs"]
    fitted = runs[(runs.status == "ok") & ~runs.held_out]
    batches = median_steps(tables["micro_steps"])
    if gpu == "cpu":
        step_time: StepTimeLaw = LinearStepLaw().fit(observations(batches))
    else:
        known = known_constants(gpu, engine_version)
        step_time = RooflineLaw(shape).fit(observations(batches), known)
    starts = tables["engine_starts"].rename(columns={"capture_s": "graph_capture_s"})
    calibration = assemble(
        *(model, gpu, source, runs),
        rows={"runs": len(fitted), "step_times": len(batches)},
        memory=MemoryLaw(shape, engine_version, memory_gib).fit(starts),
        step_time=step_time,
        loading=LoadingLaw(model).fit(tables["adapter_loads"]),
        scheduling=SchedulingLaw().fit(scheduling_times(batches)),
        front_end=FrontEndLaw(),
        early_stop=EarlyStopLaw.never(),
        lengths=LengthLaw(),  # the runs tell their own distribution
        measurement=MeasurementLaw(arrivals="poisson", in_flight_cap=int(UNLIMITED)),
    )
    light = fitted[fitted.waiting_mean < 1]
    require(
        len(light) >= 3,
        f"runs: {len(light)} of the runs to fit to were served without a queue; at least 3 are "
        "needed for the front end's overhead: add lightly loaded runs to the campaign",
    )
    fit_overhead(calibration, light, observe(calibration, light, jobs))
    return calibration


def median_steps(steps: pd.DataFrame) -> pd.DataFrame:
    """Return the medians of equal batches over steps and repeats (table ``micro_steps``).

    Steps that load an adapter are left out: the load is a law of its own.
    """
    steps = steps[steps.loads == 0]
    values = ["context_tokens", "running", "waiting", "step_ms", "schedule_ms"]
    same = [*BATCH, "adapter_slots", "max_lora_rank"]
    medians = steps.groupby(same, observed=True)[values].median()
    spread = steps.groupby(same, observed=True).step_ms.agg(
        lambda ms: np.subtract(*np.percentile(ms, [75, 25])) / np.median(ms)
    )
    return medians.assign(spread=spread).reset_index()


def scheduling_times(batches: pd.DataFrame) -> pd.DataFrame:
    """Return single batches (`median_steps`) as what `SchedulingLaw` fits.

    Beside a prompt the token budget is spent, and the scheduler looks at no waiting request.
    """
    scanned = batches.waiting.where(batches.prompts == 0, 0)
    return batches.assign(scanned=scanned, group=batches.engine_id)


def observations(batches: pd.DataFrame) -> StepObservations:
    """Return single batches (`median_steps`) as what a step-time law fits."""
    columns = ("batched_tokens", "decodes", "context_tokens", "distinct_adapters")
    n = len(batches)
    return StepObservations(
        step_ms=(batches.step_ms - batches.schedule_ms).to_numpy(float),
        arrivals_per_s=np.zeros(n),
        batches=batch_features(*(batches[name].to_numpy(float) for name in columns))[:, None, :],
        slots=batches.adapter_slots.to_numpy(float),
        rank=batches.max_lora_rank.to_numpy(float),
        group=batches.engine_id.to_numpy(str),
        decides=np.ones(n, bool),
        weight=np.ones(n),
    )
