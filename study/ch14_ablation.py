"""The published twin's assumptions, put back into this one, one at a time.

Each is put where it belongs and touches nothing else: lengths into the trace, the cost of slots and
ranks into the step-time law, the cost of prompts into a loop over the engine's turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.laws.roofline import RooflineLaw
from adapter_twin.laws.step_time import Number
from adapter_twin.service.metrics import summarize
from adapter_twin.service.validate import error_measures, pair_runs
from adapter_twin.twin.clock import Run, StepLaw, step_seconds, turn
from adapter_twin.twin.compiled import entry, helper
from adapter_twin.twin.policy import Policy
from adapter_twin.twin.records import make_gaps, make_records
from adapter_twin.twin.simulate import draw_requests
from adapter_twin.twin.state import Batch
from adapter_twin.twin.wiring import begin
from adapter_twin.workload.files import records, run_to_workload
from adapter_twin.workload.trace import Trace, generators

PROFILED_SLOTS, PROFILED_RANK = 300, 8
"""The reference study measured the overhead of adapters (``steps``) on an engine of these."""

MEASURES = {
    "total_throughput": "mape",
    "mean_itl_ms": "mape",
    "median_ttft_ms": "median_error",
}
"""Ablations are judged by these; a relative error in TTFT has no mean near saturation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What is taken over from the published twin.

    Attributes
    ----------
    normal_lengths : bool
        Lengths are normal, with the traffic's means and deviations, and cut off below.
    free_prompts : bool
        A step costs what its running requests would cost if all of them decoded.
    one_slot_count : bool
        Slots and ranks cost what they do on the profiled engine, whatever the engine has.
    """

    normal_lengths: bool = False
    free_prompts: bool = False
    one_slot_count: bool = False


ABLATIONS: Mapping[str, Assumptions] = {
    "this twin": Assumptions(),
    "normal lengths": Assumptions(normal_lengths=True),
    "free prompts": Assumptions(free_prompts=True),
    "one slot count": Assumptions(one_slot_count=True),
    "all three": Assumptions(normal_lengths=True, free_prompts=True, one_slot_count=True),
}


def with_normal_lengths(trace: Trace, rng: np.random.Generator) -> Trace:
    """Return a trace whose lengths are drawn anew as the published twin draws them.

    Normal, with the mean and the standard deviation of the trace, independent of each other; a
    prompt has one token at least, an output two.
    """

    def drawn(tokens: NDArray[np.int32], least: int) -> NDArray[np.int32]:
        lengths = np.rint(rng.normal(tokens.mean(), tokens.std(), len(tokens)))
        return np.maximum(lengths, least).astype(np.int32)

    return replace(
        trace,
        prompt_tokens=drawn(trace.prompt_tokens, 1),
        output_tokens=drawn(trace.output_tokens, 2),
    )


class OneSlotCount(RooflineLaw):
    """A step-time law that knows the profiled engine only."""

    def for_engine(self, max_loras: Number, max_lora_rank: Number) -> NDArray[np.float64]:
        """Return the coefficients in ms of the profiled engine, whatever is asked for."""
        return super().for_engine(PROFILED_SLOTS, PROFILED_RANK)


@helper
def _batch_seconds(law: StepLaw, step: Any, tokens: int, decodes: int) -> float:
    """Return what the model takes for a step's batch, were it of these tokens and decodes."""
    batch = Batch(tokens, decodes, step.context_tokens, step.adapters, 0, 0.0, 0, False)
    return step_seconds(law, batch, step.running, 0)[0]


@entry
def run_with_free_prompts(run: Run, policy: Policy) -> bool:
    """Turn the engine loop as `adapter_twin.twin.clock.run_to_end`, but take prompts' time back."""
    clock = run.clock
    while clock.steps + 1 < len(run.steps):
        event_s = turn(run, policy)
        if run.state.count.running > 0:  # a step has begun
            row = run.steps[clock.steps]
            cost_s = _batch_seconds(run.law, row, row.tokens, row.decodes)
            event_s -= cost_s - _batch_seconds(run.law, row, row.running, row.running)
        if event_s > run.front_end.duration_s:
            return True
        clock.now_s = event_s
    return False


def simulate_with(
    row: Mapping[str, Any], calibration: Calibration, assumptions: Assumptions
) -> dict[str, Any]:
    """Predict a measured run from its configuration, under some of the published assumptions.

    Returns
    -------
    dict
        ``run_id``; `adapter_twin.service.metrics.summarize`'s figures; ``tokens_per_request``, the
        mean of what arrived.
    """
    engine, workload = run_to_workload(row)
    trace = draw_requests(workload, calibration, observer=True)
    if assumptions.normal_lengths:
        trace = with_normal_lengths(trace, np.random.default_rng(0))
    if assumptions.one_slot_count:
        law = OneSlotCount.from_dict(vars(calibration.step_time))
        calibration = replace(calibration, step_time=law)
    *_, order = generators(0)
    session = begin(
        trace,
        engine,
        calibration,
        workload.adapters,
        order,
        duration_s=workload.duration_s,
        observer=True,
    )
    if assumptions.free_prompts:
        session.loop = run_with_free_prompts
    session.run()
    done = make_records(session, calibration.front_end.overhead_s)
    service = summarize(done, make_gaps(session), workload.duration_s)
    return {
        "run_id": row["run_id"],
        "tokens_per_request": float((trace.prompt_tokens + trace.output_tokens).mean()),
        **service,
    }


def predict_with(runs: pd.DataFrame, assumptions: Assumptions, *, jobs: int = -1) -> pd.DataFrame:
    """Predict measured runs, see `simulate_with`, a row each."""
    calibrations = {model: load_calibration("auto", model) for model in runs["model"].unique()}
    tasks = (
        joblib.delayed(simulate_with)(row, calibrations[row["model"]], assumptions)
        for row in records(runs)
    )
    return pd.DataFrame(joblib.Parallel(jobs)(tasks))


def error_table(runs: pd.DataFrame, predictions: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Score sets of predictions of measured runs, over all regimes together and apart.

    Parameters
    ----------
    runs : pandas.DataFrame
        Table ``runs``, completed runs whose client did not collapse.
    predictions : mapping
        Name to `predict_with`, or to another table with some of its columns and runs.

    Returns
    -------
    pandas.DataFrame
        ``ablation``, ``regime`` (or ``all``), ``figure``, ``measure`` (`MEASURES`); ``value``,
        ``low`` and ``high`` (95 % interval over whole workloads) and ``bias`` (median signed
        error), in percent; ``n_runs``.
    """
    rows = []
    for name, predicted in predictions.items():
        pairs = pair_runs(runs, predicted)
        pairs = pairs[pairs["figure"].isin(MEASURES)]
        both = pd.concat([pairs.assign(regime="all"), pairs])
        for (figure, regime), part in both.groupby(["figure", "regime"], sort=False):
            keys = {"ablation": name, "regime": regime, "figure": figure}
            about = {"bias": float(part["error"].median()), "n_runs": len(part)}
            rows += [
                keys | scored | about
                for scored in error_measures(part)
                if scored["measure"] == MEASURES[str(figure)]
            ]
    return pd.DataFrame(rows)
