"""Where the placement says, by the shares of an adapter that is on several replicas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapter_twin.fleet.cluster_replica import Replica
from adapter_twin.fleet.placement import Placement
from adapter_twin.fleet.routers import Route
from adapter_twin.workload.trace import BASE_MODEL


class Placed:
    """Follow a placement; the base model's requests are spread evenly.

    Parameters
    ----------
    placement : Placement
    """

    def __init__(self, placement: Placement) -> None:
        self._shares = [
            dict(zip(plan.adapters, plan.shares, strict=True)) for plan in placement.replicas
        ]

    def route(self, adapter: int, candidates: Sequence[Replica], rng: np.random.Generator) -> Route:
        """Choose by chance, each candidate by its share; those that are down leave theirs."""
        if len(candidates) == 1:
            return Route(candidates[0], adapter)
        if adapter == BASE_MODEL:
            return Route(candidates[int(rng.integers(len(candidates)))], adapter)
        shares = np.array([self._shares[r.index].get(adapter, 0.0) for r in candidates])
        total = shares.sum()
        if total == 0:  # moved here since
            return Route(candidates[int(rng.integers(len(candidates)))], adapter)
        return Route(candidates[int(rng.choice(len(candidates), p=shares / total))], adapter)
