"""An analytic model of one replica: microseconds instead of a simulation.

It puts three classic results together:

- **Little's law with the step-time law.** A running request gets a token per step, so ``B`` running
  requests complete ``B / (output tokens x step time(B))`` requests per second. The number running
  is where that equals the arrival rate; its largest value, over what KV cache and ``max_num_seqs``
  hold, is the capacity.
- **The M/G/infinity queue** of each adapter: while it holds a slot all its requests run, so that
  without gating it is in the batch ``1 - exp(-B_a)`` of the time.
- **A polling queue for the slots**: see `adapter_twin.planning.slot_sharing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin.calibration import Calibration
from adapter_twin.calibration.step_time import batch_features
from adapter_twin.config import EngineConfig, Lengths, Workload
from adapter_twin.lengths import draw_lengths
from adapter_twin.metrics import STARVATION_THRESHOLD
from adapter_twin.planning.slot_sharing import Visits, share_slots
from adapter_twin.predict import load_calibrations
from adapter_twin.scenario import records, run_to_workload

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

NODES = 40
"""Numbers of running requests at which the step time is evaluated, evenly in their logarithm."""

PROMPTS = 6
"""So many prompts in one step are told apart; more are taken together."""

POINTS = 4
"""Equally likely points of their tokens."""

ROWS = 128
"""Worked on together: more would fill memory, not save time."""

TURNS = 4
"""Rounds in which waiting slows the steps down and slow steps let requests wait."""

OVERLAP = 0.2
"""Share of a burst that runs at the same time; chosen by the twin's latencies of half a sample."""

WIDEST_SWING = 0.9
"""Of the running requests around their mean, relatively."""

KNEE = (0.94, 1.2)
"""Between these utilisations a small error decides whether a queue builds up."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What the lengths of requests amount to.

    Attributes
    ----------
    input_tokens, output_tokens : float
        Means; outputs as the model emits them.
    kv_tokens : float
        Mean KV tokens of a running request: of a long one, more often than not.
    prompts : float64, shape (PROMPTS + 1, POINTS)
        Equally likely tokens of 0, 1, ... prompts together.
    """

    input_tokens: float
    output_tokens: float
    kv_tokens: float
    prompts: Floats


def moments(lengths: Lengths, calibration: Calibration, samples: int = 20_000) -> Moments:
    """Return the moments of a workload's lengths under a calibration's laws."""
    rng = np.random.default_rng(0)
    prompt, output = draw_lengths(lengths, samples, rng, calibration.lengths.marginals)
    output = calibration.early_stop.apply(output, rng)
    prompt, output = prompt.astype(float), output.astype(float)
    held = (prompt @ output + output @ output / 2) / output.sum()
    together = np.zeros((PROMPTS + 1, POINTS))
    total = np.zeros(samples)
    for count in range(1, PROMPTS + 1):
        total = total + rng.permutation(prompt)
        together[count] = np.sort(total).reshape(POINTS, -1).mean(axis=1)
    return Moments(prompt.mean(), output.mean(), float(held), together)


def predict_analytic(runs: pd.DataFrame, calibration: str | Calibration = "auto") -> pd.DataFrame:
    """Predict runs by the analytic model.

    Parameters
    ----------
    runs : pandas.DataFrame
        Columns of `adapter_twin.schemas.RUN_CONFIGURATION`.
    calibration : str or Calibration

    Returns
    -------
    pandas.DataFrame
        Indexed as `runs`; columns as `analyse` describes them.

    Raises
    ------
    AdapterTwinError
        Bad configuration, or no calibration for a model.
    """
    import pandas as pd

    calibrations = load_calibrations(calibration, runs["model"])
    # Rows that differ in slots only share their workload, which is slow to build.
    same = [name for name in runs.columns if name not in ("run_id", "adapter_slots")]
    pairs: dict[str, list[tuple[Workload, EngineConfig]]] = {model: [] for model in calibrations}
    index: dict[str, list[pd.Index[Any]]] = {model: [] for model in calibrations}
    for _, group in runs.groupby(same, sort=False, dropna=False, observed=True):
        engine, workload = run_to_workload(records(group)[0])
        slots = group["adapter_slots"]
        pairs[engine.model] += [(workload, replace(engine, max_loras=int(g))) for g in slots]
        index[engine.model].append(group.index)
    parts = []
    for model, fitted in calibrations.items():
        table = _analyse(pairs[model], fitted)
        parts.append(table.set_axis(index[model][0].append(index[model][1:])))
    return pd.concat(parts).loc[runs.index]


def analyse(
    workload: Workload, engines: Sequence[EngineConfig], calibration: Calibration
) -> pd.DataFrame:
    """Predict how engines serve one workload.

    Returns
    -------
    pandas.DataFrame
        One row per engine: ``feasible_start``, ``kv_cache_tokens``; ``offered_tokens_per_s`` and
        ``capacity_tokens_per_s``, the most that it can serve of this mix; ``utilisation``, their
        ratio; ``total_throughput`` in tokens/s; ``mean_itl_ms``; ``mean_ttft_ms``, which is a step
        and the wait for a slot, without the front end and waits for KV blocks; requests
        ``running`` and ``distinct_adapters`` in a mean batch; ``slot_wait_s`` of an adapter;
        ``binds`` (arrival, slots, kv, requests or compute); ``starved``; ``holds``, false near
        saturation and where slots starve requests: there the model claims a verdict, no accuracy.
        Where a start is refused there are no figures, and ``utilisation`` is infinite.
    """
    return _analyse([(workload, engine) for engine in engines], calibration)


def _analyse(
    pairs: Sequence[tuple[Workload, EngineConfig]], calibration: Calibration
) -> pd.DataFrame:
    import pandas as pd

    parts = [
        _analyse_few(pairs[first : first + ROWS], calibration)
        for first in range(0, len(pairs), ROWS)
    ]
    return pd.concat(parts, ignore_index=True)


def _analyse_few(
    pairs: Sequence[tuple[Workload, EngineConfig]], calibration: Calibration
) -> pd.DataFrame:
    import pandas as pd

    mix = _Mix.of([workload for workload, _ in pairs], calibration)
    batches = _Batches.of([engine for _, engine in pairs], mix, calibration)
    delays = _Delays(np.ones(len(pairs)), *np.zeros((3, len(pairs))))
    for _ in range(TURNS):
        state = batches.balance(mix, delays)
        delays = _delays(mix, batches, state, delays, calibration)
    served, visits = delays.served, state.visits
    capacity = state.capacity_per_s * mix.tokens
    throughput = np.minimum(served * mix.request_rate * mix.tokens, capacity)
    utilisation = mix.request_rate / state.capacity_per_s
    starved = throughput < STARVATION_THRESHOLD * mix.request_rate * mix.offered_tokens
    gated = starved & (throughput < capacity)
    starts = batches.kv_cache_tokens >= calibration.memory.max_model_len_
    figures = {
        "capacity_tokens_per_s": capacity,
        "total_throughput": throughput,
        "mean_itl_ms": 1e3 * (state.step_s + batches.burst_s(state)),
        "mean_ttft_ms": 1e3 * (state.step_s + (mix.load_share * visits.wait_s).sum(axis=1)),
        "running": state.running,
        "distinct_adapters": state.adapters,
        "slot_wait_s": visits.head_wait_s,
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
class _Mix:
    """Traffic of n rows; adapters with equal rates form one of g groups.

    Attributes
    ----------
    request_rate, offered_tokens, duration_s : float64, shape (n,)
        Requests/s in all, tokens that one asks for, and the window.
    rates, adapters, load_share : float64, shape (n, g)
        Requests/s of one adapter, adapters with that rate, and their part of the requests.
    input_tokens, output_tokens, kv_tokens : float64, shape (n,)
    prompts : float64, shape (n, PROMPTS + 1, POINTS)
        See `Moments`.
    """

    request_rate: Floats
    offered_tokens: Floats
    duration_s: Floats
    rates: Floats
    adapters: Floats
    load_share: Floats
    input_tokens: Floats
    output_tokens: Floats
    kv_tokens: Floats
    prompts: Floats

    @classmethod
    def of(cls, workloads: Sequence[Workload], calibration: Calibration) -> _Mix:
        """Lay out workloads; a row with fewer groups than others gets empty ones."""
        counts: dict[int, Counter[float]] = {}
        sizes: dict[Lengths, Moments] = {}
        for workload in workloads:
            if id(workload) not in counts:
                counts[id(workload)] = Counter(
                    adapter.request_rate for adapter in workload.adapters if adapter.request_rate
                )
            if workload.lengths not in sizes:
                sizes[workload.lengths] = moments(workload.lengths, calibration)
        groups = max(1, *map(len, counts.values()))
        rates, adapters = np.ones((len(workloads), groups)), np.zeros((len(workloads), groups))
        for row, workload in enumerate(workloads):
            counted = counts[id(workload)]
            rates[row, : len(counted)] = list(counted)
            adapters[row, : len(counted)] = list(counted.values())
        request_rate = np.array([workload.offered_request_rate for workload in workloads])
        own = [sizes[workload.lengths] for workload in workloads]
        return cls(
            request_rate=request_rate,
            offered_tokens=np.array(
                [w.lengths.mean_input_tokens + w.lengths.mean_output_tokens for w in workloads]
            ),
            duration_s=np.array([workload.duration_s for workload in workloads]),
            rates=rates,
            adapters=adapters,
            load_share=rates * adapters / request_rate[:, None],
            input_tokens=np.array([size.input_tokens for size in own]),
            output_tokens=np.array([size.output_tokens for size in own]),
            kv_tokens=np.array([size.kv_tokens for size in own]),
            prompts=np.array([size.prompts for size in own]),
        )

    @property
    def tokens(self) -> Floats:
        """Tokens of a request that completes."""
        return self.input_tokens + self.output_tokens

    def distinct_adapters(self, running: Floats, slots: Floats) -> Floats:
        """Return the adapters in batches of shape (n, m): in M/G/infinity, at most the slots."""
        each = running[..., None] * (self.load_share / np.maximum(self.adapters, 1))[:, None]
        active = (self.adapters[:, None] * -np.expm1(-each)).sum(axis=-1)
        return np.asarray(np.minimum(active, slots[:, None]))


@dataclass(frozen=True, slots=True)
class _State:
    """Where arrivals and completions balance, or else the fullest batch; arrays of shape (n,)."""

    running: Floats
    step_s: Floats
    adapters: Floats
    capacity_per_s: Floats  # requests
    visits: Visits


@dataclass(frozen=True, slots=True)
class _Delays:
    """What waiting does to the service; arrays of shape (n,).

    Attributes
    ----------
    served : float64
        Share of the requests that are served at all.
    loads_s, queue_s : float64
        Added to every step by loads, and to the window's last step by the queue.
    scanning : float64
        Share of the steps in which the scheduler scans the queue.
    """

    served: Floats
    loads_s: Floats
    queue_s: Floats
    scanning: Floats


@dataclass(frozen=True, slots=True)
class _Batches:
    """Step times of n engines over their ranges of running requests.

    Attributes
    ----------
    running, step_s, adapters : float64, shape (n, NODES)
        Step times are weighted by tokens, so they are mean inter-token latencies.
    slots, kv_cache_tokens : float64, shape (n,)
    bound : shape (n,)
        What limits the number of running requests.
    """

    running: Floats
    step_s: Floats
    adapters: Floats
    slots: Floats
    kv_cache_tokens: Floats
    bound: NDArray[np.str_]

    @classmethod
    def of(cls, engines: Sequence[EngineConfig], mix: _Mix, calibration: Calibration) -> _Batches:
        """Evaluate a calibration's laws."""
        slots = np.array([engine.max_loras for engine in engines], float)
        ranks = [engine.max_lora_rank for engine in engines]
        kv_cache_tokens = calibration.memory.kv_cache_tokens(slots, ranks)
        block_rest = np.array([engine.block_size / 2 for engine in engines])
        budget = np.array([engine.max_num_batched_tokens for engine in engines], float)
        limits = np.array(
            [
                np.maximum(kv_cache_tokens / (mix.kv_tokens + block_rest), 1),
                [engine.max_num_seqs for engine in engines],
                budget / (1 + mix.input_tokens / mix.output_tokens),
            ]
        )
        running = np.geomspace(np.full(len(engines), 0.01), limits.min(axis=0), NODES, axis=1)
        # The number running fluctuates as in M/G/infinity: two points have its mean and variance.
        around = np.maximum(running + np.sqrt(running) * np.array([-1, 1])[:, None, None], 0.01)
        steps = np.array([_step_s(engines, at, slots, mix, calibration) for at in around])
        return cls(
            running=running,
            step_s=(around * steps).sum(axis=0) / around.sum(axis=0),
            adapters=mix.distinct_adapters(running, slots),
            slots=slots,
            kv_cache_tokens=kv_cache_tokens,
            bound=np.array(["kv", "requests", "compute"])[limits.argmin(axis=0)],
        )

    def burst_s(self, state: _State) -> Floats:
        """Return what bursts add to the mean step: they swing the batch between two points."""
        swing = np.minimum(np.sqrt(OVERLAP * state.visits.burst / state.running), WIDEST_SWING)
        factors = np.stack([1 - swing, 1 + swing, np.ones_like(swing)], axis=-1)
        spacing = np.log(self.running[:, -1] / self.running[:, 0])[:, None] / (NODES - 1)
        place = np.log(factors * (state.running / self.running[:, 0])[:, None]) / spacing
        place = np.clip(place, 0, NODES - 1)
        low = np.minimum(place.astype(np.int64), NODES - 2)
        below, above = (np.take_along_axis(self.step_s, low + i, axis=1) for i in (0, 1))
        step_s = below + (place - low) * (above - below)
        return np.asarray((factors * step_s)[:, :2].mean(axis=1) - step_s[:, 2])

    def balance(self, mix: _Mix, delays: _Delays) -> _State:
        """Find the running requests at which as many complete as arrive, by Little's law."""
        step_s = self.step_s + delays.loads_s[:, None]
        # The queue's part grows evenly from nothing: steps/s average to those of this step.
        growth = np.maximum(delays.queue_s[:, None] / step_s, 1e-9)
        step_s = step_s * growth / np.log1p(growth)
        completed_per_s = self.running / (mix.output_tokens[:, None] * step_s)
        wanted = mix.request_rate * delays.served
        enough = completed_per_s >= wanted[:, None]
        high = np.where(enough.any(axis=1), enough.argmax(axis=1), NODES - 1)
        rows, low = np.arange(len(high)), np.maximum(high - 1, 0)
        below, above = completed_per_s[rows, low], completed_per_s[rows, high]
        share = np.clip((wanted - below) / np.maximum(above - below, 1e-12), 0, 1)

        def between(values: Floats) -> Floats:
            return np.asarray(values[rows, low] + share * (values[rows, high] - values[rows, low]))

        step_s = between(step_s)
        return _State(
            running=between(self.running),
            step_s=step_s,
            adapters=between(self.adapters),
            capacity_per_s=completed_per_s.max(axis=1),
            visits=share_slots(
                self.slots,
                mix.rates,
                mix.adapters,
                mix.output_tokens * step_s,
                mix.duration_s / 2,  # what is not served by then waits for most of the window
            ),
        )


def _delays(
    mix: _Mix, batches: _Batches, state: _State, before: _Delays, calibration: Calibration
) -> _Delays:
    """Return what waits and is lost in a state, and what that adds to a step."""
    visits, residence_s = state.visits, mix.output_tokens * state.step_s
    late = np.minimum((visits.wait_s + residence_s[:, None]) / mix.duration_s[:, None], 1)
    of_base_model = (1 - mix.load_share.sum(axis=1)) * (1 - residence_s / mix.duration_s)
    served = (mix.load_share * visits.admitted * (1 - late)).sum(axis=1) + of_base_model
    wanted = served * mix.request_rate
    unserved_per_s = mix.request_rate - np.minimum(wanted, state.capacity_per_s)
    # The scheduler scans past requests that wait for a slot, until KV blocks or tokens run out. A
    # scan slows steps, which fills the batch and so ends the scans: half a turn back settles it.
    scans = (visits.head_wait_s > 0) & (wanted < state.capacity_per_s)
    scanning = (before.scanning + scans) / 2
    scan_ms = calibration.scheduling.per_scanned_ms_ * scanning
    queue_ms = (scan_ms + calibration.step_time.waiting_ms_) * unserved_per_s * mix.duration_s
    loads_ms = calibration.loading.padded_slot_ms_ * visits.per_s * state.step_s
    has_to_load = batches.slots < mix.adapters.sum(axis=1)
    return _Delays(served, np.where(has_to_load, loads_ms, 0) / 1e3, queue_ms / 1e3, scanning)


def _step_s(
    engines: Sequence[EngineConfig],
    running: Floats,
    slots: Floats,
    mix: _Mix,
    calibration: Calibration,
) -> Floats:
    """Return mean step times in s, shape (n, m); prompts join as requests complete, at random."""
    law = calibration.step_time
    prompts = running / mix.output_tokens[:, None]
    probability = [np.exp(-prompts)]  # Poisson: of 0, 1, ... prompts in a step
    for count in range(1, PROMPTS):
        probability.append(probability[-1] * prompts / count)
    exact = np.stack(probability, axis=-1)
    more = np.maximum(1 - exact.sum(axis=-1), 0)
    many = (prompts - exact @ np.arange(PROMPTS)) / np.maximum(more, 1e-12)  # the mean of these
    share = np.concatenate([exact, more[..., None]], axis=-1)[..., None] / POINTS
    new_tokens = np.repeat(mix.prompts[:, None], running.shape[1], axis=1)
    new_tokens[..., -1, :] *= many[..., None] / PROMPTS

    decodes = running[..., None, None]
    batches = batch_features(
        decodes + new_tokens,
        decodes,
        decodes * mix.kv_tokens[:, None, None, None] + new_tokens,
        mix.distinct_adapters(running, slots)[..., None, None],
    )
    regime = np.searchsorted(law.token_breaks_, decodes + new_tokens)
    coefficients = np.stack([law.for_engine(e.max_loras, e.max_lora_rank) for e in engines])
    own = coefficients[np.arange(len(engines))[:, None, None, None], regime]
    model_ms = (share * np.einsum("...f,...f->...", batches, own)).sum(axis=(-1, -2))
    scheduling_ms = calibration.scheduling.predict_ms(running, np.zeros(1))
    return np.asarray((model_ms + scheduling_ms) / 1e3)
