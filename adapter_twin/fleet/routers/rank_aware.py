"""Adapters of one rank together: a wide adapter makes every slot of its replica wide.

After LoRAServe (arXiv 2511.22880), which keeps ranks apart because kernels run at the largest rank
of a batch. vLLM reserves slots, and runs its kernels, at ``max_lora_rank``: that is the class here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapter_twin.fleet.cluster_replica import Replica
from adapter_twin.fleet.routers import Route, least_loaded
from adapter_twin.workload.scenario import Adapter
from adapter_twin.workload.strict import require
from adapter_twin.workload.trace import BASE_MODEL


class RankAware:
    """The narrowest replicas that fit the adapter, the least loaded of them.

    Parameters
    ----------
    adapters : sequence of Adapter
    tolerance : float
        Wider replicas are used once the narrow ones have so many times their requests outstanding.
    """

    def __init__(self, adapters: Sequence[Adapter], tolerance: float = 2.0) -> None:
        require(tolerance >= 1, f"tolerance: must be at least 1, got {tolerance}")
        self.adapters = adapters
        self.tolerance = tolerance

    def route(self, adapter: int, candidates: Sequence[Replica], rng: np.random.Generator) -> Route:
        """Choose by slot width, then by load."""
        rank = 0 if adapter == BASE_MODEL else self.adapters[adapter].rank
        fitting = [r for r in candidates if r.engine.max_lora_rank >= rank]
        width = min(replica.engine.max_lora_rank for replica in fitting)
        best = least_loaded([r for r in fitting if r.engine.max_lora_rank == width])
        least = least_loaded(fitting)
        if best.outstanding > self.tolerance * least.outstanding + 1:
            best = least
        return Route(best, adapter)
