"""Measured tables as `StepObservations`: each step time with the batch that it was measured of.

The step times of whole runs are those of model, scheduling and copies of adapters together, and no
measurement tells the copies apart. The twin makes each copy from the configuration, so its own
copies are taken out of what the step-time law is fitted to, and the law is fitted again.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from joblib import delayed
from numpy.typing import NDArray

from adapter_twin.laws.calibration import Calibration
from adapter_twin.laws.emitted_lengths import LengthLaw
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.scheduling import SchedulingLaw
from adapter_twin.laws.step_time import StepObservations, batch_features
from adapter_twin.parallel import share_out
from adapter_twin.twin.simulate import simulate_run
from adapter_twin.workload.files import records, run_to_engine, run_to_workload
from adapter_twin.workload.lengths import Floats, draw_lengths
from adapter_twin.workload.traffic import Lengths

Copies = Mapping[str, tuple[Floats, Floats]]
"""By run: the end of each step, and the time spent on copies before it (one more), in s."""

SAMPLES = 256
"""This many batches are drawn for each window, because its prompts make the steps differ."""

MEAN_PROMPT_TOKENS, BUDGET_TOKENS = 223.0, 2048
"""The reference campaign's prompts had this mean length, and its steps this token budget."""

WINDOWS_WEIGHT, HOURS_WEIGHT, STEPS_WEIGHT, BASE_WEIGHT = 45.0, 45.0, 13.0, 5.0
"""The sources count for this many independent observations: those of a run are alike."""

CALIBRATION_RANK = 8.0
"""The adapters in the calibration steps have this rank."""

BATCH = ["batched_tokens", "running", "kv_tokens", "distinct_adapters"]
"""These columns tell a single batch, in the order of `batch_features`."""

SETTLED_S = 600.0
"""The spread of the running requests is taken from this time on."""


def step_observations(
    tables: Mapping[str, pd.DataFrame],
    model: str,
    lengths: LengthLaw,
    scheduling: SchedulingLaw,
    memory: MemoryLaw,
    copies: Copies | None = None,
) -> StepObservations:
    """Collect the step times of one model.

    Parameters
    ----------
    tables : dict of DataFrame
        ``runs``, ``series``, ``windows``, ``steps`` and ``base_steps``.
    model : str
    lengths : LengthLaw
    scheduling : SchedulingLaw
        Its share is taken out of the measured times.
    memory : MemoryLaw
    copies : mapping, optional
        See `simulate_copies`; taken out of the measured times.
    """
    names = ("runs", "windows", "steps", "base_steps")
    one_model = {name: tables[name][tables[name].model == model] for name in names}
    windows = clean_windows(one_model["windows"], one_model["runs"])
    hours = whole_hours(one_model["runs"], tables["series"], memory)
    windows, hours = (_without_copies(stretches, copies or {}) for stretches in (windows, hours))
    return StepObservations.concatenate(
        [
            _of_windows(windows, WINDOWS_WEIGHT, lengths, scheduling, decides=False),
            _of_windows(hours, HOURS_WEIGHT, lengths, scheduling, decides=True),
            _of_steps(one_model["steps"], scheduling),
            _of_base_steps(one_model["base_steps"], scheduling),
        ]
    )


def simulate_copies(calibration: Calibration, runs: pd.DataFrame, jobs: int) -> Copies:
    """Simulate the runs that exchange adapters; those with a slot for each load it once.

    Parameters
    ----------
    calibration : Calibration
    runs : DataFrame
        Table ``runs``.
    jobs : int
        Processes.
    """
    rows = runs[runs.adapter_slots < runs.served_adapters].to_dict("records")
    copies = share_out((delayed(_copies)(calibration, row) for row in rows), jobs)
    return dict(zip((row["run_id"] for row in rows), copies, strict=True))


def _copies(calibration: Calibration, row: dict[Any, Any]) -> tuple[Floats, Floats]:
    steps = simulate_run(row, calibration).steps
    return steps.end_s.copy(), np.concatenate(([0.0], np.cumsum(steps.load_s, dtype=float)))


def _without_copies(stretches: pd.DataFrame, copies: Copies) -> pd.DataFrame:
    """Take the mean copy time of the steps that end in a stretch of a run out of its step time."""
    copied_ms = np.zeros(len(stretches))
    places = zip(stretches.run_id, stretches.t_s, stretches.dt_s, strict=True)
    for i, (run_id, from_s, dt_s) in enumerate(places):
        if run_id in copies:
            end_s, total_s = copies[run_id]
            first, last = np.searchsorted(end_s, [from_s, from_s + dt_s])
            copied_ms[i] = 1e3 * ((total_s[last] - total_s[first]) / max(last - first, 1))
    return stretches.assign(step_ms=stretches.step_ms - copied_ms)


def clean_windows(windows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Keep settled windows of runs whose client did not collapse, with the run's workload.

    They are from the first minutes of a run: the token counters stop at a million.
    """
    columns = ["client_collapsed", "rates_per_adapter", "ranks", "offered_request_rate"]
    joined = windows.join(runs.set_index("run_id")[columns], on="run_id")
    usable = ~joined.client_collapsed.astype(bool) & (joined.win >= 4) & joined.prompt_tps.notna()
    return joined[usable & _steady(joined)]


def whole_hours(runs: pd.DataFrame, series: pd.DataFrame, memory: MemoryLaw) -> pd.DataFrame:
    """Turn the averages of whole runs into rows like windows, by Little's law.

    Parameters
    ----------
    runs, series : DataFrame
        Tables of these names.
    memory : MemoryLaw
    """
    runs = runs[(runs.status == "ok") & ~runs.client_collapsed.astype(bool)]
    settled = series[series.t_s > SETTLED_S]
    spread = settled.groupby("run_id", observed=True).running.std()
    step_ms = 1e3 * runs.running_mean / runs.output_throughput
    capacity = [memory.kv_cache_tokens(run_to_engine(row)) for row in records(runs)]
    hours = runs.assign(
        running=runs.running_mean,
        running_sd=runs.run_id.map(spread).astype(float),
        prefill_tok_per_step=runs.input_throughput * step_ms / 1e3,
        kv_tokens=runs.kv_usage_mean * capacity,
        kv_usage=runs.kv_usage_mean,
        waiting=runs.waiting_mean,
        step_ms=step_ms,
        t_s=0.0,
        dt_s=runs.duration_s,
        expected_distinct_adapters=[_distinct_adapters(row) for row in runs.to_dict("records")],
    )
    return hours[_steady(hours)]


def _steady(rows: pd.DataFrame) -> "pd.Series[bool]":
    return rows.running_sd < 0.3 * rows.running + 3


def _distinct_adapters(row: dict[Any, Any]) -> float:
    """Return the expected distinct adapters among the running requests, drawn by their rates."""
    _, workload = run_to_workload(row)
    rates = np.array([adapter.request_rate for adapter in workload.adapters])
    return float((1 - (1 - rates / rates.sum()) ** row["running_mean"]).sum())


def _of_windows(
    w: pd.DataFrame, weight: float, lengths: LengthLaw, scheduling: SchedulingLaw, *, decides: bool
) -> StepObservations:
    """Stretches of whole runs.

    A window tells the mean batch only; its steps differ by the prompts that happened to join. They
    are drawn: a Poisson number of prompts per step, as many tokens on average as measured.
    """
    rng = np.random.default_rng(0)
    shape = (len(w), SAMPLES)
    column = {
        name: w[name].to_numpy(float)[:, None]
        for name in ("running", "running_sd", "prefill_tok_per_step", "kv_tokens", "waiting")
    }
    mix = Lengths(mean_input_tokens=MEAN_PROMPT_TOKENS, mean_output_tokens=MEAN_PROMPT_TOKENS)
    pool = draw_lengths(mix, 1 << 18, rng, lengths.marginals)[0].astype(float)
    total = np.concatenate(([0.0], np.cumsum(pool)))
    prompts = rng.poisson(
        np.broadcast_to(column["prefill_tok_per_step"] / MEAN_PROMPT_TOKENS, shape)
    )
    first = rng.integers(0, len(pool) - prompts.max(), shape)
    decodes = np.maximum(column["running"] + column["running_sd"] * rng.standard_normal(shape), 1)
    prefill = np.minimum(total[first + prompts] - total[first], BUDGET_TOKENS - decodes)
    prefill *= column["prefill_tok_per_step"] / np.maximum(
        prefill.mean(axis=1, keepdims=True), 1e-9
    )
    expected = w.expected_distinct_adapters.to_numpy(float)
    adapters = np.minimum(expected, w.adapter_slots.to_numpy(float))[:, None]
    gated = (w.adapter_slots < w.served_adapters).to_numpy() & (w.kv_usage < 0.9).to_numpy()
    scheduling_ms = scheduling.predict_ms(
        w.running.to_numpy(float), np.where(gated, w.waiting.to_numpy(float), 0.0)
    )
    return StepObservations(
        step_ms=w.step_ms.to_numpy(float) - scheduling_ms,
        arrivals_per_s=w.offered_request_rate.to_numpy(float),
        batches=batch_features(np.round(prefill + decodes), decodes, column["kv_tokens"], adapters),
        slots=w.adapter_slots.to_numpy(float),
        rank=w.max_lora_rank.to_numpy(float),
        group=workload_names(w),
        decides=np.full(len(w), decides),
        weight=np.full(len(w), weight / len(w)),
    )


def workload_names(runs: pd.DataFrame) -> NDArray[np.str_]:
    """Return the workload of each run: the rates and ranks that are dealt over its adapters."""
    return (runs.rates_per_adapter.astype(str) + " " + runs.ranks.astype(str)).to_numpy(str)


def _of_steps(steps: pd.DataFrame, scheduling: SchedulingLaw) -> StepObservations:
    """Calibration runs with adapters, in medians of like decode-only steps."""
    like = (steps.new_requests == 0) & (steps.kv_tokens > 0) & (steps.batched_tokens <= 300)
    steps = steps[like]
    kinds = {
        "tokens_bin": (steps.batched_tokens / 8).round(),
        "adapters_bin": (steps.distinct_adapters / 4).round(),
        "kv_bin": (steps.kv_tokens / 1e4).round(),
    }
    groups = steps.assign(**kinds).groupby(["adapter_slots", *kinds])
    means = groups[BATCH].mean().assign(step_ms=groups.step_ms.median())
    means = means[groups.size() >= 10].reset_index()
    means["batched_tokens"] = means.batched_tokens.round()
    return _of_single_batches(means, STEPS_WEIGHT, scheduling)


def _of_base_steps(steps: pd.DataFrame, scheduling: SchedulingLaw) -> StepObservations:
    """Calibration runs without adapters."""
    steps = steps.dropna(subset=["kv_tokens"])
    steps = steps[(steps.kind == "default_output") & (steps.running >= 2)]
    batches = steps.assign(batched_tokens=steps.running, distinct_adapters=0, adapter_slots=0)
    return _of_single_batches(batches, BASE_WEIGHT, scheduling)


def _of_single_batches(
    batches: pd.DataFrame, weight: float, scheduling: SchedulingLaw
) -> StepObservations:
    n, slots = len(batches), batches.adapter_slots.to_numpy(float)
    scheduling_ms = scheduling.predict_ms(batches.running.to_numpy(float), np.zeros(n))
    return StepObservations(
        step_ms=batches.step_ms.to_numpy(float) - scheduling_ms,
        arrivals_per_s=np.zeros(n),
        batches=batch_features(*batches[BATCH].to_numpy(float).T)[:, None, :],
        slots=slots,
        rank=np.where(slots > 0, CALIBRATION_RANK, 0.0),
        group=np.full(n, ""),
        decides=np.zeros(n, bool),
        weight=np.full(n, weight / n),
    )
