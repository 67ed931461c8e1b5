"""Traffic in the analytic model's terms: how many adapters have which rate, moments of lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapter_twin.laws import Calibration
from adapter_twin.laws.emitted_lengths import EarlyStopLaw
from adapter_twin.workload.lengths import LengthMarginals, draw_lengths
from adapter_twin.workload.scenario import Lengths, Workload

Floats = NDArray[np.float64]

PROMPTS = 6
"""So many prompts in one step are told apart; more are taken together."""

POINTS = 4
"""Equally likely points of their tokens."""

DISTINCT_RATES = 16
SIMILAR = 0.03
"""Of more rates than that, those that differ by less than 3 % are taken together: that moves
throughput and ITL by less than 0.1 %, and waits for slots by less than 0.3 %."""


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
    """Return the moments of a workload's lengths under a calibration's laws.

    They take milliseconds, so the last ones are kept. `samples` is a multiple of `POINTS`.
    """
    early_stop = calibration.early_stop
    stops = early_stop.probability_, early_stop.kept_
    return _moments(lengths, calibration.lengths.marginals, stops, samples)


@lru_cache(maxsize=1024)
def _moments(
    lengths: Lengths,
    marginals: LengthMarginals | None,
    early_stops: tuple[float, float],
    samples: int,
) -> Moments:
    rng = np.random.default_rng(0)
    prompt, output = draw_lengths(lengths, samples, rng, marginals)
    early_stop = EarlyStopLaw.from_dict(
        dict(zip(("probability_", "kept_"), early_stops, strict=True))
    )
    output = early_stop.apply(output, rng)
    prompt, output = prompt.astype(float), output.astype(float)
    held = (prompt * output + output**2 / 2).sum() / output.sum()
    together = np.zeros((PROMPTS + 1, POINTS))
    total = np.zeros(samples)
    quantiles = np.arange(1, POINTS) * samples // POINTS
    for count in range(1, PROMPTS + 1):
        total = total + rng.permutation(prompt)
        together[count] = np.partition(total, quantiles).reshape(POINTS, -1).mean(axis=1)
    together.flags.writeable = False  # it is shared by all who ask for these lengths
    return Moments(float(prompt.mean()), float(output.mean()), float(held), together)


class Traffic(NamedTuple):
    """A workload without its adapters' names and ranks, which the model does not need.

    Attributes
    ----------
    rates, adapters : float64, shape (g,)
        Requests/s of one adapter, and adapters with that rate; see `group_rates`.
    base_model_rate : float
        Requests/s without an adapter.
    lengths : Lengths
    duration_s : float
    """

    rates: Floats
    adapters: Floats
    base_model_rate: float
    lengths: Lengths
    duration_s: float

    @classmethod
    def of(cls, workload: Workload) -> Traffic:
        """Count a workload's adapters of each rate."""
        counted = Counter(adapter.request_rate for adapter in workload.adapters)
        return cls(
            *group_rates(list(counted), list(counted.values())),
            workload.base_model_request_rate,
            workload.lengths,
            workload.duration_s,
        )


def group_rates(rates: ArrayLike, adapters: ArrayLike) -> tuple[Floats, Floats]:
    """Leave out idle adapters; of many different rates, take similar ones together at their mean.

    Parameters
    ----------
    rates, adapters : array_like, shape (n,)
        Requests/s of one adapter, and adapters with that rate.

    Returns
    -------
    rates, adapters : float64, shape (g,)
    """
    each, count = np.asarray(rates, float), np.asarray(adapters, float)
    busy = (each > 0) & (count > 0)
    each, count = each[busy], count[busy]
    if len(each) <= DISTINCT_RATES:
        return each, count
    group = np.floor(np.log(each / each.min()) / SIMILAR).astype(np.int64)
    members: Floats = np.bincount(group, count).astype(float)
    request_rate = np.bincount(group, count * each)
    some = members > 0
    return request_rate[some] / members[some], members[some]


@dataclass(frozen=True, slots=True)
class Mix:
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
    def of(cls, traffic: Sequence[Traffic], calibration: Calibration) -> Mix:
        """Lay out traffic; a row with fewer groups than others gets empty ones."""
        # Rows that share their traffic have the same object.
        different = {id(one): one for one in traffic}
        place = {key: i for i, key in enumerate(different)}
        row = [place[id(one)] for one in traffic]
        mixes = list(different.values())

        shape = len(mixes), max(1, *(len(mix.rates) for mix in mixes))
        rates, adapters = np.ones(shape), np.zeros(shape)
        for i, mix in enumerate(mixes):
            rates[i, : len(mix.rates)] = mix.rates
            adapters[i, : len(mix.rates)] = mix.adapters
        request_rate = (rates * adapters).sum(axis=1) + [mix.base_model_rate for mix in mixes]
        sizes = {lengths: moments(lengths, calibration) for lengths in {m.lengths for m in mixes}}
        own = [sizes[mix.lengths] for mix in mixes]
        offered_tokens = [m.lengths.mean_input_tokens + m.lengths.mean_output_tokens for m in mixes]
        return cls(
            request_rate=request_rate[row],
            offered_tokens=np.array(offered_tokens)[row],
            duration_s=np.array([mix.duration_s for mix in mixes])[row],
            rates=rates[row],
            adapters=adapters[row],
            load_share=(rates * adapters / request_rate[:, None])[row],
            input_tokens=np.array([size.input_tokens for size in own])[row],
            output_tokens=np.array([size.output_tokens for size in own])[row],
            kv_tokens=np.array([size.kv_tokens for size in own])[row],
            prompts=np.array([size.prompts for size in own])[row],
        )

    @property
    def tokens(self) -> Floats:
        """Tokens of a request that completes."""
        return self.input_tokens + self.output_tokens
