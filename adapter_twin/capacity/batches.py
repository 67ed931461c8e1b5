"""Step times of a replica against its number of running requests.

A running request gets a token per step, so among ``B`` of them prompts join at random, ``B / output
tokens`` per step. The mean of the step-time law over what joins is evaluated on a few numbers
running, evenly spaced in their logarithm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numba
import numpy as np
from numpy.typing import NDArray

from adapter_twin.capacity.traffic_mix import Mix
from adapter_twin.laws import Calibration
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.lengths import Floats

NODES = 40
"""The step time is evaluated at this number of numbers of running requests."""

FEWEST_RUNNING = 0.01

NEGLIGIBLE = 1e-15
"""A number of prompts that is less likely than this is left out."""

OVERLAP = 0.2
"""This share of a burst runs at the same time; half a sample of the twin's latencies chose it."""

WIDEST_SWING = 0.9
"""Running requests swing around their mean by at most this share of it."""


@dataclass(frozen=True, slots=True)
class Batches:
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
    def of(cls, engines: Sequence[EngineConfig], mix: Mix, calibration: Calibration) -> Self:
        """Evaluate a calibration's laws; raises where they cannot tell an engine's steps."""
        for engine in engines:
            calibration.require_known(engine)
        slots = np.array([engine.max_loras for engine in engines], float)
        ranks = np.array([engine.max_lora_rank for engine in engines], float)
        kv_cache_tokens = np.array(list(map(calibration.memory.kv_cache_tokens, engines)), float)
        block_rest = np.array([engine.block_size / 2 for engine in engines])
        budget = np.array([engine.max_num_batched_tokens for engine in engines], float)
        # cached, what prompts share is computed and held once for each adapter, not by each request
        cached = np.array([engine.enable_prefix_caching is not False for engine in engines])
        held = cached * mix.prefix_tokens * np.minimum(slots, mix.adapters.sum(axis=1))
        own_prefix = np.where(cached, 0.0, mix.prefix_tokens)
        limits = np.array(
            [
                np.maximum((kv_cache_tokens - held) / (own_prefix + mix.kv_tokens + block_rest), 1),
                [engine.max_num_seqs for engine in engines],
                budget / (1 + (own_prefix + mix.input_tokens) / mix.output_tokens),
            ]
        )
        fewest = np.full(len(engines), FEWEST_RUNNING)
        running = np.ascontiguousarray(np.geomspace(fewest, limits.min(axis=0), NODES, axis=1))
        scheduling, step_time = calibration.scheduling, calibration.step_time
        step_ms, adapters = _token_weighted_step_ms(
            running,
            slots,
            mix.rates / mix.request_rate[:, None],
            mix.adapters,
            mix.output_tokens,
            mix.prefix_tokens + mix.kv_tokens,
            mix.prompts + own_prefix[:, None, None] * np.arange(len(mix.prompts[0]))[:, None],
            np.array(step_time.token_breaks_, float),
            step_time.for_engine(slots, ranks),
            step_time.arrival_ms,
            float(scheduling.base_ms_),
            float(scheduling.per_running_ms_),
        )
        return cls(
            running=running,
            step_s=step_ms / 1e3,
            adapters=adapters,
            slots=slots,
            kv_cache_tokens=kv_cache_tokens,
            bound=np.array(["kv", "requests", "compute"])[limits.argmin(axis=0)],
        )

    def burst_s(self, running: Floats, burst: Floats) -> Floats:
        """Return what bursts add to the mean step: they swing the batch between two points.

        Parameters
        ----------
        running : float64, shape (n,)
            Mean number of running requests.
        burst : float64, shape (n,)
            See `adapter_twin.capacity.slot_sharing.Visits`.
        """
        swing = np.minimum(np.sqrt(OVERLAP * burst / running), WIDEST_SWING)
        factors = np.stack([1 - swing, 1 + swing, np.ones_like(swing)], axis=-1)
        spacing = np.log(self.running[:, -1] / self.running[:, 0])[:, None] / (NODES - 1)
        place = np.log(factors * (running / self.running[:, 0])[:, None]) / spacing
        place = np.clip(place, 0, NODES - 1)
        low = np.minimum(place.astype(np.int64), NODES - 2)
        below, above = (np.take_along_axis(self.step_s, low + i, axis=1) for i in (0, 1))
        step_s = below + (place - low) * (above - below)
        return np.asarray((factors * step_s)[:, :2].mean(axis=1) - step_s[:, 2])


@numba.njit(cache=True, error_model="numpy")
def _token_weighted_step_ms(
    running: Floats,
    slots: Floats,
    shares: Floats,
    adapters: Floats,
    output_tokens: Floats,
    kv_tokens: Floats,
    prompts: Floats,
    token_breaks: Floats,
    coefficients: Floats,
    arrival_ms: float,
    base_ms: float,
    per_running_ms: float,
) -> tuple[Floats, Floats]:
    """Return step times in ms and distinct adapters in a batch, both of shape (n, nodes).

    Parameters
    ----------
    running : float64, shape (n, nodes)
    shares, adapters : float64, shape (n, g)
        Share of the requests that go to one adapter of a group, and adapters in it.
    coefficients : float64, shape (n, regimes, features)
    arrival_ms : float
        A step costs it for each request that joins: as many come.
    base_ms, per_running_ms : float
        Scheduling.
    """
    n, nodes = running.shape
    step_ms, distinct = np.empty((n, nodes)), np.empty((n, nodes))
    for i in range(n):
        for node in range(nodes):
            mean = running[i, node]
            distinct[i, node] = _distinct_adapters(mean, slots[i], shares[i], adapters[i])
            # The number running fluctuates as in M/G/infinity: two points have its mean and
            # variance.
            tokens = tokens_ms = 0.0
            for side in (-1.0, 1.0):
                around = max(mean + side * np.sqrt(mean), FEWEST_RUNNING)
                model_ms = _mean_model_ms(
                    around,
                    around / output_tokens[i],
                    around * kv_tokens[i],
                    _distinct_adapters(around, slots[i], shares[i], adapters[i]),
                    prompts[i],
                    token_breaks,
                    coefficients[i],
                )
                tokens += around
                model_ms += arrival_ms * around / output_tokens[i]
                tokens_ms += around * (model_ms + base_ms + per_running_ms * around)
            step_ms[i, node] = tokens_ms / tokens
    return step_ms, distinct


@numba.njit(cache=True, error_model="numpy")
def _distinct_adapters(running: float, slots: float, shares: Floats, adapters: Floats) -> float:
    """Return the adapters in a batch: as in M/G/infinity, at most the slots."""
    distinct = 0.0
    for group in range(len(shares)):
        if adapters[group] > 0:
            distinct -= adapters[group] * np.expm1(-running * shares[group])
    return min(distinct, slots)


@numba.njit(cache=True, error_model="numpy")
def _mean_model_ms(
    decodes: float,
    joining: float,
    kv_tokens: float,
    adapters: float,
    prompts: Floats,
    token_breaks: Floats,
    coefficients: Floats,
) -> float:
    """Return the model's mean time in ms for a step that a Poisson number of prompts joins.

    `joining` is their mean, `kv_tokens` those of the decodes; `prompts` as in
    `adapter_twin.capacity.traffic_mix.Moments`.
    """
    most, points = len(prompts) - 1, prompts.shape[1]
    probability = np.exp(-joining)
    left, joining_left = 1.0, joining
    total_ms = 0.0
    for count in range(most + 1):
        scale = 1.0
        if count == most:  # these and more: together they bring the rest of the mean
            probability = max(left, 0.0)
            scale = joining_left / max(probability, 1e-12) / most
        for point in range(points if probability > NEGLIGIBLE else 0):
            prompt_tokens = prompts[count, point] * scale
            tokens = decodes + prompt_tokens
            regime = 0
            while regime < len(token_breaks) and tokens > token_breaks[regime]:
                regime += 1
            c = coefficients[regime]  # in the order of `step_time.FEATURES`
            model_ms = (
                c[0]
                + c[1] * tokens
                + c[2] * decodes
                + c[3] * (kv_tokens + prompt_tokens)
                + (c[4] + c[5] * tokens) * adapters
            )
            if adapters > 0:
                model_ms += c[6] + c[7] * tokens
            total_ms += probability * model_ms
        left -= probability
        joining_left -= count * probability
        probability *= joining / (count + 1)
    return float(total_ms / points)
