"""Any replica that serves the adapter, by chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapter_twin.fleet.cluster_replica import Replica
from adapter_twin.fleet.routers import Route


class Random:
    """Power of no choice: what every other rule has to beat."""

    def route(self, adapter: int, candidates: Sequence[Replica], rng: np.random.Generator) -> Route:
        """Choose evenly."""
        return Route(candidates[int(rng.integers(len(candidates)))], adapter)
