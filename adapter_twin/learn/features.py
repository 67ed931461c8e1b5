"""The features of a traffic mix, and of a configuration, that the interpretable models see."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from adapter_twin.laws.slots import slots_gib
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.engine_versions import engine_version
from adapter_twin.workload.files import parse_ranks, parse_rates
from adapter_twin.workload.models import model_shape

PAPER = [
    *(f"{statistic}_rate" for statistic in ("max", "min", "mean", "std")),
    *(f"{statistic}_rank" for statistic in ("max", "min", "mean", "std")),
]
"""The reference study's features: of rates in requests/s and of ranks, over the adapters."""

TRAFFIC = [
    *("adapter_load", "top_share", "rank_load", "slot_mib"),
    *("output_share", "request_tokens", "zipf_exponent", "arrival_cv"),
]
"""These features of ours decide the capacity, see `traffic_features`."""

CONFIGURATION = ["served_adapters", "adapter_slots", "slots_per_adapter", "offered", "slots_gib"]
"""A configuration has these features besides `TRAFFIC`, see `configuration_features`."""

MIB_PER_GIB = 1024

ENGINE_VERSION = "0.8.5"
"""The slots' memory is told for this version, the reference study's."""

MANY_SLOTS = 64
"""Memory comes in segments, so this number of slots tells what one takes."""


def paper_features(workloads: pd.DataFrame) -> pd.DataFrame:
    """Return `PAPER` for workloads whose rates and ranks are dealt, one row each."""
    pairs = zip(workloads.rates_per_adapter, workloads.ranks, strict=True)
    rows = [
        _statistics(parse_rates(rates)) + _statistics(parse_ranks(ranks)) for rates, ranks in pairs
    ]
    return pd.DataFrame(np.array(rows), columns=PAPER, index=workloads.index)


def _statistics(values: Sequence[float]) -> tuple[float, ...]:
    return max(values), min(values), float(np.mean(values)), float(np.std(values))


def traffic_features(workloads: pd.DataFrame) -> pd.DataFrame:
    """Return `TRAFFIC` for workloads, one row each.

    Returns
    -------
    pandas.DataFrame
        ``adapter_load``: offered tokens/s of the mean adapter; ``top_share``: part of the load that
        comes at the highest rate; ``rank_load``: mean rank, weighted by load; ``slot_mib``: what a
        slot takes, which follows from the model and the largest rank; ``output_share``: part of the
        tokens that are output; ``request_tokens``: mean tokens of a request; ``zipf_exponent``;
        ``arrival_cv``.
    """
    rows = np.array([_traffic(row) for row in workloads.itertuples()])
    return pd.DataFrame(rows, columns=TRAFFIC, index=workloads.index)


@cache
def _slots_gib(model: str, max_lora_rank: int) -> float:
    engine = EngineConfig(model=model, max_loras=MANY_SLOTS, max_lora_rank=max_lora_rank)
    return slots_gib(engine, model_shape(model), engine_version(ENGINE_VERSION))


def _traffic(row: Any) -> tuple[float, ...]:
    """Return `TRAFFIC` of one workload."""
    rates, ranks = np.array(parse_rates(row.rates_per_adapter)), np.array(parse_ranks(row.ranks))
    period = np.lcm(len(rates), len(ranks))
    load = np.resize(rates, period)
    tokens = row.mean_input_tokens + row.mean_requested_output_tokens
    return (
        rates.mean() * tokens,
        rates[rates == rates.max()].sum() / rates.sum(),
        np.resize(ranks, period) @ load / load.sum(),
        MIB_PER_GIB * _slots_gib(row.model, row.max_lora_rank) / MANY_SLOTS,
        row.mean_requested_output_tokens / tokens,
        tokens,
        row.zipf_exponent,
        row.arrival_cv,
    )


def configuration_features(runs: pd.DataFrame) -> pd.DataFrame:
    """Return `TRAFFIC` and `CONFIGURATION` for runs, one row each.

    ``offered``: load in tokens/s; ``slots_gib``: memory that the slots take.
    """
    mixes = runs.drop_duplicates("workload_id")
    traffic = traffic_features(mixes).assign(workload_id=mixes.workload_id)
    joined = runs[["workload_id"]].merge(traffic, on="workload_id", how="left")
    joined.index = runs.index
    slots = runs.adapter_slots
    return joined[TRAFFIC].assign(
        served_adapters=runs.served_adapters,
        adapter_slots=slots,
        slots_per_adapter=slots / runs.served_adapters,
        offered=runs.offered_tokens_per_s,
        slots_gib=joined.slot_mib * slots / MIB_PER_GIB,
    )[TRAFFIC + CONFIGURATION]
