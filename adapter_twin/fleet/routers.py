"""Routers of a cluster: rules that choose the replica of a request."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.random import Generator
from pydantic import Field

from adapter_twin.fleet.cluster_replica import Replica
from adapter_twin.fleet.placement import Placement
from adapter_twin.workload.strict import dataclass
from adapter_twin.workload.trace import BASE_MODEL
from adapter_twin.workload.traffic import Workload

Replicas = Sequence[Replica]
Tolerance = Annotated[float, Field(ge=1)]


@dataclass()
class Router:
    """A rule for the requests of a cluster."""

    def start(self, workload: Workload, placement: Placement) -> None:
        """Take note of what a run is about, before its first request."""
        self._workload = workload

    def route(self, adapter: int, candidates: Replicas, rng: Generator) -> Replica:
        """Choose among the replicas that are up and serve the adapter; there is at least one."""
        raise NotImplementedError


def least_loaded(replicas: Replicas) -> Replica:
    """Return the replica with the fewest outstanding requests, the first one of several."""
    return min(replicas, key=lambda replica: replica.outstanding)


@dataclass()
class Random(Router):
    """Pure chance: what every other rule has to beat."""

    def route(self, adapter: int, candidates: Replicas, rng: Generator) -> Replica:
        """Choose evenly."""
        return candidates[int(rng.integers(len(candidates)))]


@dataclass()
class RoundRobin(Router):
    """One after the other, whatever they have to do: the default of most load balancers."""

    def start(self, workload: Workload, placement: Placement) -> None:
        """Begin with the first replica."""
        self._last = -1

    def route(self, adapter: int, candidates: Replicas, rng: Generator) -> Replica:
        """Choose the next candidate after the replica chosen last."""
        later = [replica for replica in candidates if replica.index > self._last]
        chosen = (later or candidates)[0]
        self._last = chosen.index
        return chosen


@dataclass()
class LeastOutstanding(Router):
    """The replica with the fewest requests that are not complete (join the shortest queue).

    Blind to adapters: it spreads each over all replicas, and each then needs a slot on all.
    """

    def route(self, adapter: int, candidates: Replicas, rng: Generator) -> Replica:
        """Choose the least loaded."""
        return least_loaded(candidates)


@dataclass()
class AdapterAffinity(Router):
    """A replica that has the adapter in a slot, unless it is much busier than another.

    vLLM's production stack and the Gateway API inference extension route LoRA requests so.

    Parameters
    ----------
    tolerance : float
        A resident replica may have this many times the outstanding requests of the least loaded.
    """

    tolerance: Tolerance = 1.5

    def route(self, adapter: int, candidates: Replicas, rng: Generator) -> Replica:
        """Choose the least loaded resident replica, or the least loaded of all."""
        resident = [replica for replica in candidates if replica.holds(adapter)]
        return _unless_busy(resident, candidates, self.tolerance)


@dataclass()
class RankAware(Router):
    """Adapters of one rank together: the narrowest replicas that fit, the least loaded of them.

    After LoRAServe (arXiv 2511.22880), which keeps ranks apart because kernels run at the largest
    rank of a batch. vLLM reserves slots, and runs its kernels, at ``max_lora_rank``: that is the
    class here. A wide adapter makes every slot of its replica wide.

    Parameters
    ----------
    tolerance : float
        Wider replicas are used once the narrow ones have this many times their requests.
    """

    tolerance: Tolerance = 2.0

    def route(self, adapter: int, candidates: Replicas, rng: Generator) -> Replica:
        """Choose by slot width, then by load."""
        rank = 0 if adapter == BASE_MODEL else self._workload.adapters[adapter].rank
        fitting = [r for r in candidates if r.engine.max_lora_rank >= rank]
        width = min(replica.engine.max_lora_rank for replica in fitting)
        narrow = [r for r in fitting if r.engine.max_lora_rank == width]
        return _unless_busy(narrow, fitting, self.tolerance)


@dataclass()
class Placed(Router):
    """Where the placement says, by the shares of an adapter that is on several replicas.

    The base model's requests are spread evenly, as are those of an adapter that was moved since.
    """

    def start(self, workload: Workload, placement: Placement) -> None:
        """Note the shares."""
        self._shares = [
            dict(zip(plan.adapters, plan.shares, strict=True)) for plan in placement.replicas
        ]

    def route(self, adapter: int, candidates: Replicas, rng: Generator) -> Replica:
        """Choose by chance, each candidate by its share; those that are down leave theirs."""
        if len(candidates) == 1:
            return candidates[0]
        shares = np.array([self._shares[r.index].get(adapter, 0.0) for r in candidates])
        total = shares.sum()
        if total == 0:
            return candidates[int(rng.integers(len(candidates)))]
        return candidates[int(rng.choice(len(candidates), p=shares / total))]


def _unless_busy(preferred: Replicas, others: Replicas, tolerance: float) -> Replica:
    """Return the least loaded of the preferred replicas, or of all where that one is too busy."""
    best, least = least_loaded(preferred or others), least_loaded(others)
    return best if best.outstanding <= tolerance * least.outstanding + 1 else least


ROUTERS: dict[str, type[Router]] = {
    "random": Random,
    "round_robin": RoundRobin,
    "least_outstanding": LeastOutstanding,
    "adapter_affinity": AdapterAffinity,
    "rank_aware": RankAware,
    "placed": Placed,
}
"""Routers by the names that configurations use."""
