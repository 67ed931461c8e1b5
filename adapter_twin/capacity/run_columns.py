"""Runs tables as the analytic model takes them, without a `Workload` per row.

A `Workload` of hundreds of adapters takes ten times as long to build as to analyse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from adapter_twin.capacity.traffic_mix import Traffic, group_rates
from adapter_twin.errors import AdapterTwinError
from adapter_twin.workload.files import (
    DEFAULT_BATCHED_TOKENS,
    DEFAULT_BLOCK_TOKENS,
    DEFAULT_DURATION_S,
    DEFAULT_MEAN_INPUT_TOKENS,
    DEFAULT_MEAN_OUTPUT_TOKENS,
    parse_ranks,
    parse_rates,
    records,
    run_to_workload,
)
from adapter_twin.workload.scenario import EngineConfig, Lengths
from adapter_twin.workload.strict import require

if TYPE_CHECKING:
    import pandas as pd

NEEDED = {
    "model",
    "rates_per_adapter",
    "ranks",
    "served_adapters",
    "adapter_slots",
    "max_lora_rank",
    "max_num_seqs",
    "duration_s",
    "mean_input_tokens",
    "mean_requested_output_tokens",
}

Pair = tuple[EngineConfig, Traffic]


def read_runs(runs: pd.DataFrame) -> list[Pair]:
    """Return what `adapter_twin.workload.files.run_to_workload` makes of each row.

    Rows of equal traffic get the same object.

    Raises
    ------
    AdapterTwinError
        As `adapter_twin.workload.files.run_to_workload`.
    """
    quick = NEEDED.issubset(runs.columns)
    pairs = _read_quickly(runs) if quick else iter([None] * len(runs))
    return [
        _read_strictly(runs.iloc[[row]]) if pair is None else pair for row, pair in enumerate(pairs)
    ]


def _read_strictly(run: pd.DataFrame) -> Pair:
    engine, workload = run_to_workload(records(run)[0])
    return engine, Traffic.of(workload)


def _read_quickly(runs: pd.DataFrame) -> Iterator[Pair | None]:
    """Yield rows whose cells are as they should be, and None for those that need a second look."""
    engine, traffic = lru_cache(maxsize=None)(_engine), lru_cache(maxsize=None)(_traffic)
    max_num_seqs = _numbers(runs, "max_num_seqs")
    whole = zip(
        _numbers(runs, "served_adapters"),
        _numbers(runs, "adapter_slots"),
        _numbers(runs, "max_lora_rank"),
        max_num_seqs,
        _numbers(runs, "max_num_batched_tokens", np.maximum(max_num_seqs, DEFAULT_BATCHED_TOKENS)),
        _numbers(runs, "block_size", DEFAULT_BLOCK_TOKENS),
        strict=True,
    )
    lengths = zip(
        runs["length_distribution"].tolist()
        if "length_distribution" in runs
        else ["sharegpt"] * len(runs),
        _numbers(runs, "mean_input_tokens", DEFAULT_MEAN_INPUT_TOKENS),
        _numbers(runs, "mean_requested_output_tokens", DEFAULT_MEAN_OUTPUT_TOKENS),
        _numbers(runs, "length_cv", 1.0),
        strict=True,
    )
    columns = zip(
        *(runs[name].astype(str).tolist() for name in ("model", "rates_per_adapter", "ranks")),
        whole,
        lengths,
        _numbers(runs, "zipf_exponent", 0.0),
        _numbers(runs, "arrival_cv", 1.0),
        _numbers(runs, "duration_s", DEFAULT_DURATION_S),
        strict=True,
    )
    for model, rates, ranks, numbers, sizes, exponent, arrival_cv, duration_s in columns:
        try:
            require(0 < arrival_cv < math.inf, "no process has it")
            yield (
                engine(model, ranks, *numbers),
                traffic(rates, int(numbers[0]), exponent, sizes, duration_s),
            )
        except AdapterTwinError:
            yield None


def _numbers(runs: pd.DataFrame, name: str, default: ArrayLike = math.nan) -> list[float]:
    """Return a column; empty cells, or all if it is missing, are the default, and texts NaN."""
    import pandas as pd

    if name not in runs:
        values = np.broadcast_to(default, len(runs))
    else:
        numbers = pd.to_numeric(runs[name], errors="coerce").to_numpy(float, na_value=math.nan)
        values = np.where(runs[name].isna(), default, numbers)
    return [float(value) for value in values]


def _engine(model: str, ranks: str, *numbers: float) -> EngineConfig:
    """Return the engine with these ``served_adapters``, ``adapter_slots``, ... if `ranks` fit."""
    require(all(map(float.is_integer, numbers)), "not whole")
    served, slots, max_lora_rank, max_num_seqs, max_num_batched_tokens, block_size = map(
        int, numbers
    )
    dealt = parse_ranks(ranks)[: max(served, 1)]
    require(min(dealt) > 0 and max(dealt) <= max_lora_rank, "ranks do not fit")
    return EngineConfig(
        model=model,
        max_loras=slots,
        max_cpu_loras=served,
        max_lora_rank=max_lora_rank,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
    )


@lru_cache(maxsize=1024)
def _lengths(distribution: Any, input_tokens: float, output_tokens: float, cv: float) -> Lengths:
    return Lengths(
        distribution=distribution,
        mean_input_tokens=input_tokens,
        mean_output_tokens=output_tokens,
        cv=cv,
    )


def _traffic(
    rates: str,
    served: int,
    zipf_exponent: float,
    lengths: tuple[Any, float, float, float],
    duration_s: float,
) -> Traffic:
    """Deal rates as `deal_adapters` or `zipf_adapters` do."""
    require(0 < duration_s < math.inf, "no such window")
    require(0 <= zipf_exponent < math.inf, "no such law")
    values = parse_rates(rates)
    require(min(values) >= 0, "a rate is below zero")
    if zipf_exponent > 0:
        require(len(values) == 1, "no mean")
        weights = np.arange(1.0, served + 1) ** -zipf_exponent
        groups = group_rates(served * values[0] / weights.sum() * weights, np.ones(served))
    else:
        everyone, more = divmod(served, len(values))
        adapters = dict.fromkeys(values, 0)
        for place, rate in enumerate(values):
            adapters[rate] += everyone + (place < more)
        groups = group_rates(list(adapters), list(adapters.values()))
    return Traffic(*groups, 0.0, _lengths(*lengths), duration_s)
