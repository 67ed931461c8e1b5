"""What is dealt to GPUs: busy adapters, and equal parts of those that shall have several GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import slot_rank
from adapter_twin.workload.strict import require


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts of adapters; an idle adapter has none.

    Attributes
    ----------
    adapter : int64, shape (n,)
        Index into the demand's adapters.
    share, rate : float64, shape (n,)
        Share of the adapter's requests, and those in requests/s.
    rank : int64, shape (n,)
        Smallest ``max_lora_rank`` of vLLM that takes the adapter.
    """

    adapter: NDArray[np.int64]
    share: NDArray[np.float64]
    rate: NDArray[np.float64]
    rank: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.adapter)


def split_adapters(
    demand: Demand,
    most_slots: Callable[[int], int],
    most_alone: Callable[[int], float],
    *,
    allowed: bool,
    replicate_above: float,
) -> Parts:
    """Return the busy adapters, the big ones in the fewest equal parts.

    Parameters
    ----------
    demand : Demand
    most_slots, most_alone : callable
        Most slots of a rank with which vLLM starts, and the most requests/s of one adapter of a
        rank that a GPU serves.
    allowed : bool
        Whether there may be several parts.
    replicate_above : float
        Share of what a GPU serves of one adapter alone above which there are several.

    Raises
    ------
    AdapterTwinError
        No GPU can serve one of the adapters.
    """
    adapters = demand.adapters
    busy = [i for i, adapter in enumerate(adapters) if adapter.request_rate > 0]
    index: list[int] = []
    ranks: list[int] = []
    shares: list[float] = []
    for i in busy:
        name, rate, rank = adapters[i].name, adapters[i].request_rate, slot_rank([adapters[i].rank])
        require(
            most_slots(rank) > 0,
            f"adapters: no GPU serves {name}: one slot of rank {rank} leaves too little KV cache "
            "to start; lower its rank or leave it out",
        )
        most = most_alone(rank)
        require(
            most > 0,
            f"adapters: no GPU serves {name}, however few its requests, with these slots within "
            "the slo; widen its limits",
        )
        pieces = max(math.ceil(rate / (replicate_above * most) - 1e-9), 1)
        require(
            pieces == 1 or allowed,
            f"adapters: no GPU serves {name} alone: it has {rate:g} requests/s, and at most "
            f"{most:.3g} can be served; allow it to be split over {pieces} GPUs",
        )
        index += [i] * pieces
        ranks += [rank] * pieces
        shares += [1 / pieces] * pieces
    where, share = np.array(index, np.int64), np.array(shares)
    rates = np.array([adapter.request_rate for adapter in adapters])
    return Parts(where, share, share * rates[where], np.array(ranks, np.int64))
