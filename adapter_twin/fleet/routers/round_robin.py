"""One after the other, whatever they have to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapter_twin.fleet.cluster_replica import Replica
from adapter_twin.fleet.routers import Route


class RoundRobin:
    """The default of most load balancers."""

    def __init__(self) -> None:
        self._last = -1

    def route(self, adapter: int, candidates: Sequence[Replica], rng: np.random.Generator) -> Route:
        """Choose the next candidate after the replica chosen last."""
        later = [replica for replica in candidates if replica.index > self._last]
        chosen = (later or candidates)[0]
        self._last = chosen.index
        return Route(chosen, adapter)
