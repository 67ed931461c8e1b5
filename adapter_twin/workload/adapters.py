"""Adapters and their shares of the traffic, one by one or dealt."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import cycle
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from adapter_twin.errors import require
from adapter_twin.workload.strict import (
    Count,
    Integer,
    Many,
    Name,
    NotNegative,
    Several,
    Some,
    Text,
    dataclass,
    function,
)

Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=1e6)]
Adapted = Annotated[Count, Field(le=1_000_000)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One LoRA adapter and its traffic.

    Attributes
    ----------
    name : str
    rank : int
    request_rate : float
        Mean arrivals in requests/s; 0 is an idle adapter.
    pinned : bool
        Never evicted from its slot, which it has from the start (vLLM's ``pin_lora``).
    priority: int
        Of its requests, where the engine's `scheduling_policy` is ``priority``: the lowest goes
        first, and the highest is preempted first. That of the base model is 0.
    target_modules : tuple of str, optional
        Modules that it changes; left out, all of a layer. Fewer are read and copied faster.
    layers : int, optional
        Number of the model's layers that it changes; left out, all. Fewer are read and copied
        faster; a slot of vLLM has room for all, and its kernels pass over all of them.
    path : str, optional
        Its folder, for the printed ``--lora-modules``; a file need not tell what the folder does,
        see `adapter_twin.workload.adapter_folders`.
    """

    name: Name
    rank: Count
    request_rate: Rate
    pinned: bool = False
    priority: Integer = 0
    target_modules: Some[Text] | None = None
    layers: Count | None = None
    path: Text | None = None


@function
def deal_adapters(
    count: Adapted, request_rates: Several[Rate], ranks: Several[Count]
) -> tuple[Adapter, ...]:
    """Deal rates and ranks round-robin, as the reference study did.

    Parameters
    ----------
    count : int
    request_rates : sequence of float
        Requests/s of an adapter.
    ranks : sequence of int
    """
    dealt = zip(range(count), cycle(ranks), cycle(request_rates), strict=False)
    return tuple(
        Adapter(name=f"adapter-{i}", rank=rank, request_rate=rate) for i, rank, rate in dealt
    )


@function
def zipf_adapters(
    count: Adapted, total_request_rate: Rate, zipf_exponent: NotNegative, ranks: Several[Count]
) -> tuple[Adapter, ...]:
    """Share out requests by Zipf's law: the share of adapter k goes as k^-exponent.

    Parameters
    ----------
    count : int
    total_request_rate : float
        Requests/s of all adapters.
    zipf_exponent : float
    ranks : sequence of int
        Dealt round-robin.
    """
    weights = [k**-zipf_exponent for k in range(1, count + 1)]
    scale = total_request_rate / math.fsum(weights)
    return deal_adapters(count, [scale * weight for weight in weights], ranks)


@function
def split_adapters(
    traffic_split: dict[Name, Share], total_request_rate: Rate, ranks: Several[Count]
) -> tuple[Adapter, ...]:
    """Share out requests by name, as inference-perf's ``lora_traffic_split`` does.

    Parameters
    ----------
    traffic_split : dict
        Share of the requests by adapter; together 1.
    total_request_rate : float
        Requests/s of all adapters.
    ranks : sequence of int
        Dealt round-robin.
    """
    total = math.fsum(traffic_split.values())
    require(abs(total - 1) < 1e-6, f"traffic_split: shares add up to {total:g}; make that 1")
    rates = [total_request_rate * share for share in traffic_split.values()]
    named = zip(traffic_split, deal_adapters(len(rates), rates, ranks), strict=True)
    return tuple(replace(adapter, name=name) for name, adapter in named)


def dealt(adapters: Any) -> Any:
    """Return the adapters that a short form stands for: the arguments of one of these three."""
    if not isinstance(adapters, dict):
        return adapters
    if "traffic_split" in adapters:
        return split_adapters(**adapters)
    is_zipf = "zipf_exponent" in adapters or "total_request_rate" in adapters
    return (zipf_adapters if is_zipf else deal_adapters)(**adapters)


_TOLD = (
    "A list, or dealt: {count, request_rates, ranks}, {count, total_request_rate, zipf_exponent, "
    "ranks} or {traffic_split: {name: share}, total_request_rate, ranks}; or folders of PEFT "
    "adapters, {folders: DIR}, or a .csv."
)
Adapters = Annotated[Many[Adapter], BeforeValidator(dealt), Field(description=_TOLD)]
