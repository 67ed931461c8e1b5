"""From measured tables to `StepObservations`: what each measured step time was a step time of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adapter_twin.calibrate.copying import Copying
from adapter_twin.laws.emitted_lengths import LengthLaw
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.scheduling import SchedulingLaw
from adapter_twin.laws.step_time import StepObservations, batch_features
from adapter_twin.workload.files import run_to_workload
from adapter_twin.workload.lengths import draw_lengths
from adapter_twin.workload.scenario import Lengths

Floats = NDArray[np.float64]

SAMPLES = 256
"""Batches drawn for each window: its prompts make the steps differ."""

MEAN_PROMPT_TOKENS = 223.0
BUDGET_TOKENS = 2048

WINDOWS_WEIGHT, HOURS_WEIGHT, STEPS_WEIGHT, BASE_WEIGHT = 1.0, 1.0, 0.3, 0.1
"""Share of the sources in the fit: whole runs decide, calibration steps keep the law physical."""

CALIBRATION_RANK = 8.0
"""Rank of the adapters in the calibration steps."""

SETTLED_S = 600.0
"""The spread of the running requests is taken from then on."""


def step_observations(
    tables: Mapping[str, pd.DataFrame],
    model: str,
    lengths: LengthLaw,
    scheduling: SchedulingLaw,
    memory: MemoryLaw,
    copying: Copying | None = None,
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
    copying : Copying, optional
        Copies of adapters to take out of the measured times.
    """
    names = ("runs", "windows", "steps", "base_steps")
    one_model = {name: tables[name][tables[name].model == model] for name in names}
    windows = clean_windows(one_model["windows"], one_model["runs"])
    hours = whole_hours(one_model["runs"], tables["series"], memory)
    return StepObservations.concatenate(
        [
            _of_windows(
                _without_copies(windows, copying),
                WINDOWS_WEIGHT,
                lengths,
                scheduling,
                decides=False,
            ),
            _of_windows(
                _without_copies(hours, copying), HOURS_WEIGHT, lengths, scheduling, decides=True
            ),
            _of_steps(one_model["steps"], scheduling),
            _of_base_steps(one_model["base_steps"], scheduling),
        ]
    )


def _without_copies(rows: pd.DataFrame, copying: Copying | None) -> pd.DataFrame:
    """Take the copies of adapters out of the step times of stretches of runs."""
    if copying is None:
        return rows
    from_s = rows.t_s.to_numpy(float)
    copied_ms = copying.per_step_ms(rows.run_id, from_s, from_s + rows.dt_s.to_numpy(float))
    return rows.assign(step_ms=rows.step_ms - copied_ms)


def clean_windows(windows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Keep settled windows of runs whose client did not collapse, with the run's workload.

    They are from the first minutes of a run: the token counters stop at a million.
    """
    columns = ["client_collapsed", "rates_per_adapter", "ranks"]
    joined = windows.join(runs.set_index("run_id")[columns], on="run_id")
    usable = ~joined.client_collapsed.astype(bool) & (joined.win >= 4) & joined.prompt_tps.notna()
    return joined[usable & _steady(joined)]


def whole_hours(runs: pd.DataFrame, series: pd.DataFrame, memory: MemoryLaw) -> pd.DataFrame:
    """Turn the averages of whole runs into rows like windows, by Little's law."""
    runs = runs[(runs.status == "ok") & ~runs.client_collapsed.astype(bool)]
    settled = series[series.t_s > SETTLED_S]
    spread = settled.groupby("run_id", observed=True).running.std()
    step_ms = 1e3 * runs.running_mean / runs.output_throughput
    capacity = memory.kv_cache_tokens(runs.adapter_slots, runs.max_lora_rank)
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


def _steady(rows: pd.DataFrame) -> pd.Series[bool]:
    return rows.running_sd < 0.3 * rows.running + 3


def _distinct_adapters(row: dict[Any, Any]) -> float:
    """Return the expected distinct adapters among the running requests, drawn by their rates."""
    _, workload = run_to_workload(row)
    rates = np.array([adapter.request_rate for adapter in workload.adapters])
    return float((1 - (1 - rates / rates.sum()) ** row["running_mean"]).sum())


def _of_windows(
    w: pd.DataFrame,
    weight: float,
    lengths: LengthLaw,
    scheduling: SchedulingLaw,
    *,
    decides: bool,
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
        waiting=w.waiting.to_numpy(float),
        batches=batch_features(np.round(prefill + decodes), decodes, column["kv_tokens"], adapters),
        slots=w.adapter_slots.to_numpy(float),
        rank=w.max_lora_rank.to_numpy(float),
        group=(w.rates_per_adapter.astype(str) + " " + w.ranks.astype(str)).to_numpy(str),
        decides=np.full(len(w), decides),
        weight=np.full(len(w), weight / len(w)),
    )


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
    columns = ["batched_tokens", "running", "kv_tokens", "distinct_adapters"]
    means = groups[columns].mean().assign(ms=groups.step_ms.median(), n=groups.size())
    means = means[means.n >= 10].reset_index()
    return _of_single_batches(
        means.ms, means.batched_tokens.round(), means.running, means.kv_tokens,
        means.distinct_adapters, means.adapter_slots, STEPS_WEIGHT, scheduling,
    )  # fmt: skip


def _of_base_steps(steps: pd.DataFrame, scheduling: SchedulingLaw) -> StepObservations:
    """Calibration runs without adapters."""
    steps = steps.dropna(subset=["kv_tokens"])
    steps = steps[(steps.kind == "default_output") & (steps.running >= 2)]
    none = 0 * steps.running
    return _of_single_batches(
        steps.step_ms, steps.running, steps.running, steps.kv_tokens, none, none,
        BASE_WEIGHT, scheduling,
    )  # fmt: skip


def _of_single_batches(
    step_ms: pd.Series,
    tokens: pd.Series,
    running: pd.Series,
    kv_tokens: pd.Series,
    adapters: pd.Series,
    slots: pd.Series,
    weight: float,
    scheduling: SchedulingLaw,
) -> StepObservations:
    n = len(step_ms)
    columns = [x.to_numpy(float) for x in (tokens, running, kv_tokens, adapters)]
    return StepObservations(
        step_ms=step_ms.to_numpy(float) - scheduling.predict_ms(columns[1], np.zeros(n)),
        waiting=np.zeros(n),
        batches=batch_features(*columns)[:, None, :],
        slots=slots.to_numpy(float),
        rank=np.where(slots > 0, CALIBRATION_RANK, 0.0),
        group=np.full(n, ""),
        decides=np.zeros(n, bool),
        weight=np.full(n, weight / n),
    )
