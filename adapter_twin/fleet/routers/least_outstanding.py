"""The replica with the fewest requests that are not complete (join the shortest queue)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapter_twin.fleet.cluster_replica import Replica
from adapter_twin.fleet.routers import Route, least_loaded


class LeastOutstanding:
    """Blind to adapters: it spreads each over all replicas, and each then needs a slot on all."""

    def route(self, adapter: int, candidates: Sequence[Replica], rng: np.random.Generator) -> Route:
        """Choose the least loaded."""
        return Route(least_loaded(candidates), adapter)
