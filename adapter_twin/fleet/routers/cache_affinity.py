"""Among adapters that would do, one that is loaded (EdgeLoRA, arXiv 2507.01438).

There a classifier names the adapters that suit a prompt, the best one first; a cached one among the
first few is used, else the best one is loaded. Which adapters suit is a parameter here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from adapter_twin.fleet.cluster_replica import Replica
from adapter_twin.fleet.routers import Route, least_loaded


class CacheAffinity:
    """The most suitable adapter that is in a slot somewhere.

    Parameters
    ----------
    alternatives : mapping of int to sequence of int
        Adapters that would do for a request that asks for one, the most suitable first. What is not
        there has no alternative.
    """

    def __init__(self, alternatives: Mapping[int, Sequence[int]]) -> None:
        self.alternatives = alternatives

    def route(self, adapter: int, candidates: Sequence[Replica], rng: np.random.Generator) -> Route:
        """Choose adapter and replica; a substitute must be served by a candidate, too."""
        for suitable in (adapter, *self.alternatives.get(adapter, ())):
            resident = [r for r in candidates if r.serves(suitable) and r.holds(suitable)]
            if resident:
                return Route(least_loaded(resident), suitable)
        return Route(least_loaded(candidates), adapter)
