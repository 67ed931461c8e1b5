"""An analytic model of one replica: some 30 us a row instead of a simulation.

That holds for a thousand rows at once on one core: 25 us where they differ in their engines only,
35 us where each has traffic of its own, 130 us where its adapters have hundreds of different rates.
A call takes 1 to 3 ms at least, and lengths met for the first time 11 ms.

It puts three classic results together:

- **Little's law with the step-time law.** A running request gets a token per step, so ``B`` running
  requests complete ``B / (output tokens x step time(B))`` requests per second. The number running
  is where that equals the arrival rate; its largest value, over what KV cache and ``max_num_seqs``
  hold, is the capacity. See `adapter_twin.capacity.batches`.
- **The M/G/infinity queue** of each adapter: while it holds a slot all its requests run, so that
  without gating it is in the batch ``1 - exp(-B_a)`` of the time.
- **A polling queue for the slots**: see `adapter_twin.capacity.slot_sharing`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtr

from adapter_twin.capacity.batches import NODES, Batches
from adapter_twin.capacity.slot_sharing import Visits, share_slots
from adapter_twin.capacity.traffic_mix import Mix, Traffic, read_runs
from adapter_twin.laws import Calibration
from adapter_twin.service.metrics import is_starved
from adapter_twin.service.predict import load_calibrations
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.lengths import Floats
from adapter_twin.workload.traffic import Workload

CELLS = 1 << 16
"""This number of rows x groups of adapters is worked on together: more would only fill caches."""

KNEE = (0.94, 1.2)
"""Between these utilisations a small error decides whether a queue builds up."""

ROUNDS = 4
"""In each of these rounds waiting slows the steps down, and slow steps let requests wait."""


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
    mix = Mix.of([traffic for _, traffic in pairs], calibration)
    batches = Batches.of([engine for engine, _ in pairs], mix, calibration)
    state, served = _settle(mix, batches, calibration)
    visits = state.visits
    capacity = state.capacity_per_s * mix.tokens
    throughput = np.minimum(served * mix.request_rate * mix.tokens, capacity)
    utilisation = mix.request_rate / state.capacity_per_s
    starved = is_starved(throughput, mix.request_rate * mix.offered_tokens)
    gated = starved & (throughput < capacity)
    least = [calibration.memory.least_kv_cache_tokens(engine) for engine, _ in pairs]
    starts = batches.kv_cache_tokens >= least
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


@dataclass(frozen=True, slots=True)
class Balance:
    """A state of balance, or else the fullest batch; arrays of shape (n,).

    Attributes
    ----------
    running, adapters : float64
        Requests, and distinct adapters, in a mean batch.
    step_s : float64
    capacity_per_s : float64
        Requests that complete per second at most.
    visits : Visits
    """

    running: Floats
    step_s: Floats
    adapters: Floats
    capacity_per_s: Floats
    visits: Visits


def _settle(mix: Mix, batches: Batches, calibration: Calibration) -> tuple[Balance, Floats]:
    """Alternate between a state and the delays in it; return it and the share that is served.

    Whole steps overshoot, for slow steps fill the batch, so they go halfway: a full batch, for one,
    ends the scans of the queue that slowed the steps down.
    """
    n = len(batches.slots)
    delays = np.stack([np.ones(n), np.zeros(n), np.zeros(n)])
    for one in range(ROUNDS):
        state = _balance(mix, batches, *delays)
        found = _delays(mix, batches, state, calibration)
        delays = found if one == 0 else (delays + found) / 2
    return state, delays[0]


def _balance(
    mix: Mix, batches: Batches, served: Floats, loads_s: Floats, queue_s: Floats
) -> Balance:
    """Find the running requests at which as many complete as arrive, by Little's law."""
    step_s = batches.step_s + loads_s[:, None]
    # The queue's part grows evenly from nothing: steps/s average to those of this step.
    growth = np.maximum(queue_s[:, None] / step_s, 1e-9)
    step_s = step_s * growth / np.log1p(growth)
    completed_per_s = batches.running / (mix.output_tokens[:, None] * step_s)
    wanted = mix.request_rate * served
    enough = completed_per_s >= wanted[:, None]
    high = np.where(enough.any(axis=1), enough.argmax(axis=1), NODES - 1)
    rows, low = np.arange(len(high)), np.maximum(high - 1, 0)
    below, above = completed_per_s[rows, low], completed_per_s[rows, high]
    share = np.clip((wanted - below) / np.maximum(above - below, 1e-12), 0, 1)

    def between(values: Floats) -> Floats:
        return np.asarray(values[rows, low] + share * (values[rows, high] - values[rows, low]))

    step_s = between(step_s)
    return Balance(
        running=between(batches.running),
        step_s=step_s,
        adapters=between(batches.adapters),
        capacity_per_s=completed_per_s.max(axis=1),
        visits=share_slots(
            batches.slots,
            mix.rates,
            mix.adapters,
            mix.output_tokens * step_s,
            mix.duration_s / 2,  # what is not served by then waits for most of the window
        ),
    )


def _delays(mix: Mix, batches: Batches, state: Balance, calibration: Calibration) -> Floats:
    """Return what waiting does to the service in a state, an array of shape (3, n).

    Share of the requests that are served at all, and the seconds added to every step by loads, and
    to the window's last step by the queue.
    """
    visits, residence_s = state.visits, mix.output_tokens * state.step_s
    late = np.minimum((visits.wait_s + residence_s[:, None]) / mix.duration_s[:, None], 1)
    of_base_model = (1 - mix.load_share.sum(axis=1)) * (1 - residence_s / mix.duration_s)
    served = (mix.load_share * visits.admitted * (1 - late)).sum(axis=1) + of_base_model
    wanted = served * mix.request_rate
    unserved_per_s = mix.request_rate - np.minimum(wanted, state.capacity_per_s)
    # The scheduler scans past requests that wait for a slot, until KV blocks or tokens run out.
    scanning = ((visits.head_wait_s > 0) & (wanted < state.capacity_per_s)).astype(float)
    scan_ms = calibration.scheduling.per_scanned_ms_ * scanning
    queue_ms = scan_ms * unserved_per_s * mix.duration_s
    copies = _copies_per_step(visits, visits.per_s * state.step_s, batches.slots)
    loads_ms = calibration.loading.padded_slot_ms_ * copies
    has_to_load = batches.slots < mix.adapters.sum(axis=1)
    return np.stack([served, np.where(has_to_load, loads_ms, 0) / 1e3, queue_ms / 1e3])


def _copies_per_step(visits: Visits, joining: Floats, slots: Floats) -> Floats:
    """Return the copies of adapters in a mean step: one for each that joins, and vLLM's chain.

    Where the batch takes all slots, as many adapters leave as join. The walk over the batch copies
    again what it meets while it has met more that join than places of those that left. That is a
    sixth of the slots where one joins (the mean excess of one uniform place over another), and half
    of them where many do.
    """
    spread = np.sqrt(np.maximum(visits.variance, 1e-9))
    full = np.where(visits.head_wait_s > 0, 1.0, ndtr((visits.active - slots) / spread))
    return np.asarray(joining + slots * full * (1 - 1 / np.sqrt(1 + 2 * joining / 3)) / 2)
