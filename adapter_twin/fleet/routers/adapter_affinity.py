"""A replica that has the adapter in a slot, unless it is much busier than another.

vLLM's production stack and the Gateway API inference extension route LoRA requests so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapter_twin.fleet.cluster_replica import Replica
from adapter_twin.fleet.routers import Route, least_loaded
from adapter_twin.workload.strict import require


class AdapterAffinity:
    """Resident first.

    Parameters
    ----------
    tolerance : float
        A resident replica may have so many times the outstanding requests of the least loaded one.
    """

    def __init__(self, tolerance: float = 1.5) -> None:
        require(tolerance >= 1, f"tolerance: must be at least 1, got {tolerance}")
        self.tolerance = tolerance

    def route(self, adapter: int, candidates: Sequence[Replica], rng: np.random.Generator) -> Route:
        """Choose the least loaded resident replica, or the least loaded of all."""
        least = least_loaded(candidates)
        resident = [replica for replica in candidates if replica.holds(adapter)]
        if resident:
            best = least_loaded(resident)
            if best.outstanding <= self.tolerance * least.outstanding + 1:
                return Route(best, adapter)
        return Route(least, adapter)
