"""An analytic model of one replica: some 30 us a row instead of a simulation.

That holds for a thousand rows at once on one core: 25 us where they differ in their engines only,
35 us where each has traffic of its own, 130 us where its adapters have hundreds of different rates.
A call takes 1 to 3 ms at least, and lengths met for the first time 11 ms.

It puts three classic results together:

- **Little's law with the step-time law.** A running request gets a token per step, so ``B`` running
  requests complete ``B / (output tokens x step time(B))`` requests per second. The number running
  is where that equals the arrival rate; its largest value, over what KV cache and ``max_num_seqs``
  hold, is the capacity. See `adapter_twin.capacity.batches` and
  `adapter_twin.capacity.fixed_point`.
- **The M/G/infinity queue** of each adapter: while it holds a slot all its requests run, so that
  without gating it is in the batch ``1 - exp(-B_a)`` of the time.
- **A polling queue for the slots**: see `adapter_twin.capacity.slot_sharing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from adapter_twin.capacity.batches import NODES, Batches
from adapter_twin.capacity.fixed_point import settle
from adapter_twin.capacity.traffic_mix import Mix, Traffic, read_runs
from adapter_twin.laws import Calibration
from adapter_twin.service.metrics import is_starved
from adapter_twin.service.predict import load_calibrations
from adapter_twin.workload.scenario import EngineConfig, Workload

if TYPE_CHECKING:
    import pandas as pd

CELLS = 1 << 16
"""This number of rows x groups of adapters is worked on together: more would only fill caches."""

KNEE = (0.94, 1.2)
"""Between these utilisations a small error decides whether a queue builds up."""


def predict_analytic(runs: pd.DataFrame, calibration: str | Calibration = "auto") -> pd.DataFrame:
    """Predict runs by the analytic model.

    Parameters
    ----------
    runs : pandas.DataFrame
        Columns of `adapter_twin.tables.schemas.RUN_CONFIGURATION`.
    calibration : str or Calibration

    Returns
    -------
    pandas.DataFrame
        Indexed as `runs`; columns as `analyse` describes them.

    Raises
    ------
    AdapterTwinError
        Bad configuration, or no calibration for a model.

    Examples
    --------
    >>> from adapter_twin.plan.grid import grid_runs
    >>> workload = {
    ...     "model": "llama-3.1-8b-instruct",
    ...     "rates_per_adapter": "0.1",
    ...     "ranks": "8-16",
    ...     "mean_input_tokens": 223,
    ...     "mean_requested_output_tokens": 198,
    ... }
    >>> runs = grid_runs(workload, served=[64, 192], slots=[4, 64], duration_s=3600)
    >>> runs[["run_id"]].assign(starved=predict_analytic(runs)["starved"])
           run_id  starved
    0    N=64 G=4    False
    1   N=64 G=64    False
    2   N=192 G=4     True
    3  N=192 G=64    False
    """
    import pandas as pd

    calibrations = load_calibrations(calibration, runs["model"])
    pairs = read_runs(runs)
    parts, rows = [], []
    for model, fitted in calibrations.items():
        of_model = [row for row, (engine, _) in enumerate(pairs) if engine.model == model]
        parts.append(analyse_each([pairs[row] for row in of_model], fitted))
        rows += of_model
    return pd.concat(parts).iloc[np.argsort(rows)].set_axis(runs.index)


def analyse(
    workload: Workload, engines: Sequence[EngineConfig], calibration: Calibration
) -> pd.DataFrame:
    """Predict how engines serve one workload.

    Parameters
    ----------
    workload : Workload
    engines : sequence of EngineConfig
    calibration : Calibration

    Returns
    -------
    pandas.DataFrame
        One row per engine: ``feasible_start``, ``kv_cache_tokens``; ``offered_tokens_per_s`` and
        ``capacity_tokens_per_s``, the most that it can serve of this mix; ``utilisation``, their
        ratio; ``total_throughput`` in tokens/s; ``mean_itl_ms``; ``mean_ttft_ms``, which is a step
        and the wait for a slot, without the front end and waits for KV blocks; requests
        ``running`` and ``distinct_adapters`` in a mean batch; ``slot_wait_s`` of an adapter;
        ``active_adapters``, those that hold a slot, ``active_variance`` if they do so
        independently, and their ``visits_per_s`` to slots; ``binds`` (arrival, slots, kv, requests
        or compute); ``starved``; ``holds``, false near saturation and where slots starve requests:
        there the model claims a verdict, no accuracy. Where a start is refused there are no
        figures, and ``utilisation`` is infinite.
    """
    traffic = Traffic.of(workload)
    return analyse_each([(engine, traffic) for engine in engines], calibration)


def analyse_each(
    pairs: Sequence[tuple[EngineConfig, Traffic]], calibration: Calibration
) -> pd.DataFrame:
    """Predict how engines serve traffic of their own, one row per pair.

    Rows that share a `Traffic` object are faster. See `analyse` for the columns.
    """
    import pandas as pd

    groups = max((len(traffic.rates) for _, traffic in pairs), default=0)
    size = max(CELLS // max(groups, NODES), 1)
    parts = [
        _analyse_few(pairs[first : first + size], calibration)
        for first in range(0, len(pairs), size)
    ]
    return pd.concat(parts, ignore_index=True)


def _analyse_few(
    pairs: Sequence[tuple[EngineConfig, Traffic]], calibration: Calibration
) -> pd.DataFrame:
    import pandas as pd

    mix = Mix.of([traffic for _, traffic in pairs], calibration)
    batches = Batches.of([engine for engine, _ in pairs], mix, calibration)
    state, delays = settle(mix, batches, calibration)
    visits = state.visits
    capacity = state.capacity_per_s * mix.tokens
    throughput = np.minimum(delays.served * mix.request_rate * mix.tokens, capacity)
    utilisation = mix.request_rate / state.capacity_per_s
    starved = is_starved(throughput, mix.request_rate * mix.offered_tokens)
    gated = starved & (throughput < capacity)
    starts = batches.kv_cache_tokens >= calibration.memory.least_kv_cache_tokens
    burst_s = batches.burst_s(state.running, visits.burst)
    figures = {
        "capacity_tokens_per_s": capacity,
        "total_throughput": throughput,
        "mean_itl_ms": 1e3 * (state.step_s + burst_s),
        "mean_ttft_ms": 1e3 * (state.step_s + (mix.load_share * visits.wait_s).sum(axis=1)),
        "running": state.running,
        "distinct_adapters": state.adapters,
        "slot_wait_s": visits.head_wait_s,
        "active_adapters": visits.active,
        "active_variance": visits.variance,
        "visits_per_s": visits.per_s,
    }
    return pd.DataFrame(
        {
            "feasible_start": starts,
            "kv_cache_tokens": np.maximum(batches.kv_cache_tokens, 0),
            "offered_tokens_per_s": mix.request_rate * mix.offered_tokens,
            "utilisation": np.where(starts, utilisation, np.inf),
            **{name: np.where(starts, values, np.nan) for name, values in figures.items()},
            "binds": np.where(gated, "slots", np.where(utilisation < 1, "arrival", batches.bound)),
            "starved": starved | ~starts,
            "holds": starts & ~gated & ((utilisation < KNEE[0]) | (utilisation > KNEE[1])),
        }
    )
