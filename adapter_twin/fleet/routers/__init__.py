"""Which replica gets a request: one small file for each rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from adapter_twin.fleet.cluster_replica import Replica


class Route(NamedTuple):
    """Where a request goes, and for which adapter."""

    replica: Replica
    adapter: int


class Router(Protocol):
    """A rule for the requests of a cluster."""

    def route(self, adapter: int, candidates: Sequence[Replica], rng: np.random.Generator) -> Route:
        """Choose among the replicas that are up and serve the adapter; there is at least one."""
        ...


def least_loaded(replicas: Sequence[Replica]) -> Replica:
    """Return the replica with the fewest outstanding requests, the first one of several."""
    return min(replicas, key=lambda replica: replica.outstanding)
