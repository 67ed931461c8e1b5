"""Traffic in the analytic model's terms: the adapters of each rate, and moments of lengths."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws import Calibration
from adapter_twin.laws.emitted_lengths import EarlyStopLaw
from adapter_twin.workload.engine_config import EngineConfig, ServeFlags
from adapter_twin.workload.files import parse_ranks, parse_rates, records, run_to_workload
from adapter_twin.workload.lengths import Floats, LengthMarginals, draw_lengths
from adapter_twin.workload.traffic import Lengths, Workload

PROMPTS = 6
"""Up to this number of prompts in one step are told apart; more are taken together."""

POINTS = 4
"""The tokens of these prompts are represented by this number of equally likely points."""

SAMPLES = 20_000
"""Moments are those of this number of requests, a multiple of `POINTS`."""

DISTINCT_RATES = 16
MERGED_RATIO = 0.03
"""Of more rates than these, those that differ by less than 3 % are taken together: that moves
throughput and ITL by less than 0.1 %, and waits for slots by less than 0.3 %."""

SHAPING = (
    *("model", "ranks", "served_adapters", "adapter_slots", "max_lora_rank"),
    *(flag.name for flag in fields(ServeFlags)),
    *("duration_s", "arrival_cv", "length_distribution", "length_cv"),
    *("mean_input_tokens", "mean_requested_output_tokens"),
)
"""These columns of a runs table tell all but the adapters' rates."""


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


def moments(lengths: Lengths, calibration: Calibration) -> Moments:
    """Return the moments of a workload's lengths under a calibration's laws.

    They take milliseconds, so the last ones are kept.
    """
    early_stop = calibration.early_stop
    stops = early_stop.probability_, early_stop.kept_
    return _moments(lengths, calibration.lengths.marginals, stops)


@lru_cache(maxsize=1024)
def _moments(
    lengths: Lengths, marginals: LengthMarginals | None, early_stops: tuple[float, float]
) -> Moments:
    rng = np.random.default_rng(0)
    prompt, output = draw_lengths(lengths, SAMPLES, rng, marginals)  # without what all share
    early_stop = EarlyStopLaw.from_dict(
        dict(zip(("probability_", "kept_"), early_stops, strict=True))
    )
    output = early_stop.apply(output, rng)
    prompt, output = prompt.astype(float), output.astype(float)
    held = (prompt * output + output**2 / 2).sum() / output.sum()
    together = np.zeros((PROMPTS + 1, POINTS))
    total = np.zeros(SAMPLES)
    quantiles = np.arange(1, POINTS) * SAMPLES // POINTS
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
    def of(cls, workload: Workload) -> Self:
        """Count a workload's adapters of each rate."""
        steady = workload.arrivals.is_steady and workload.sessions is None and workload.samples == 1
        require(steady, "workload: its requests do not come one by one at a rate; use `simulate`")
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
    group = np.floor(np.log(each / each.min()) / MERGED_RATIO).astype(np.int64)
    members: Floats = np.bincount(group, count).astype(float)
    request_rate = np.bincount(group, count * each)
    some = members > 0
    return request_rate[some] / members[some], members[some]


def read_runs(runs: pd.DataFrame) -> list[tuple[EngineConfig, Traffic]]:
    """Return what `adapter_twin.workload.files.run_to_workload` makes of each row.

    Hundreds of adapters take ten times as long to build as to analyse, so rows are read without
    them, once for those that differ in rates only. Rows of equal traffic get the same object.

    Raises
    ------
    AdapterTwinError
        As `adapter_twin.workload.files.run_to_workload`.
    """
    names = [name for name in SHAPING if name in runs]
    shapes = zip(*(runs[name].tolist() for name in names), strict=True)
    rates, exponents = (
        runs[name].tolist() if name in runs else [default] * len(runs)
        for name, default in {"rates_per_adapter": "", "zipf_exponent": 0.0}.items()
    )
    without_adapters = lru_cache(maxsize=None)(partial(_without_adapters, names))
    traffic, pairs = lru_cache(maxsize=None)(_dealt), []
    for place, (shape, text, exponent) in enumerate(zip(shapes, rates, exponents, strict=True)):
        try:
            engine, *rest = without_adapters(shape)
            dealt = traffic(str(text), exponent, engine.max_cpu_loras, *rest)
        except (AdapterTwinError, TypeError):
            engine, workload = run_to_workload(records(runs.iloc[[place]])[0])
            dealt = Traffic.of(workload)
        pairs.append((engine, dealt))
    return pairs


def _without_adapters(
    names: Sequence[str], cells: tuple[Any, ...]
) -> tuple[EngineConfig, Lengths, float]:
    row = dict(zip(names, cells, strict=True))
    engine, workload = run_to_workload(row, adapters=())
    dealt = parse_ranks(row.get("ranks"))[: engine.max_cpu_loras]
    require(min(dealt) > 0 and max(dealt) <= engine.max_lora_rank, "ranks do not fit")
    return engine, workload.lengths, workload.duration_s


def _dealt(
    rates: str, zipf_exponent: float, served: int, lengths: Lengths, duration_s: float
) -> Traffic:
    """Deal rates as `deal_adapters` or `zipf_adapters` do."""
    values, is_even = parse_rates(rates), math.isnan(zipf_exponent) or zipf_exponent == 0
    require(min(values) >= 0 and (is_even or 0 < zipf_exponent < math.inf), "out of range")
    if not is_even:
        require(len(values) == 1, "no mean")
        weights = np.arange(1.0, served + 1) ** -zipf_exponent
        groups = group_rates(served * values[0] / weights.sum() * weights, np.ones(served))
    else:
        everyone, more = divmod(served, len(values))
        adapters = dict.fromkeys(values, 0)
        for place, rate in enumerate(values):
            adapters[rate] += everyone + (place < more)
        groups = group_rates(list(adapters), list(adapters.values()))
    return Traffic(*groups, 0.0, lengths, duration_s)


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
        See `Moments`; without the tokens that all prompts of an adapter begin with.
    prefix_tokens : float64, shape (n,)
        Those.
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
    prefix_tokens: Floats

    @classmethod
    def of(cls, traffic: Sequence[Traffic], calibration: Calibration) -> Self:
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
        asked = [mix.lengths for mix in mixes]
        offered_tokens = [one.mean_prompt_tokens + one.mean_output_tokens for one in asked]
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
            prefix_tokens=np.array([float(one.shared_prefix_tokens) for one in asked])[row],
        )

    @property
    def tokens(self) -> Floats:
        """Tokens of a request that completes."""
        return self.prefix_tokens + self.input_tokens + self.output_tokens
