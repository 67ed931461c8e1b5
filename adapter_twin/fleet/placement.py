"""Which GPU serves which adapters: the result of placing a demand, and what makes one valid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.plan.demand import Demand
from adapter_twin.workload.scenario import Adapter, EngineConfig, Workload
from adapter_twin.workload.strict import require

TOLERANCE = 1e-6
"""Of the sum of an adapter's shares: they are fractions such as a third."""


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """One GPU: the flags of its engine, and what it serves.

    Attributes
    ----------
    engine : EngineConfig
    adapters : tuple of int
        Indices into the demand's adapters.
    shares : tuple of float
        Share of that adapter's requests that comes to this GPU: 1 unless several replicate it.
    """

    engine: EngineConfig
    adapters: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        require(bool(self.adapters), "adapters: a GPU serves at least one")
        require(
            len(self.adapters) == len(self.shares),
            f"shares: {len(self.shares)} for {len(self.adapters)} adapters; give one for each",
        )
        twice = len(set(self.adapters)) < len(self.adapters)
        require(not twice, "adapters: one is there twice; add its shares")
        for adapter, share in zip(self.adapters, self.shares, strict=True):
            right = 0 < share <= 1
            require(right, f"shares: adapter {adapter} has {share}; give above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Placement:
    """Replicas that serve a demand together.

    Attributes
    ----------
    replicas : tuple of ReplicaPlan
    """

    replicas: tuple[ReplicaPlan, ...]

    def __post_init__(self) -> None:
        require(bool(self.replicas), "replicas: a fleet has at least one GPU")

    def check(self, demand: Demand) -> None:
        """Raise `AdapterTwinError` unless it serves a demand wholly.

        Every adapter with requests is placed and its shares sum to one; adapters fit into the slots
        of their GPUs; engines are of the demand's model.
        """
        count = len(demand.adapters)
        placed = np.zeros(count)
        for number, replica in enumerate(self.replicas):
            engine, where = replica.engine, f"replicas[{number}]"
            fits = engine.model == demand.model
            require(fits, f"{where}.engine.model: {engine.model}, but asked is {demand.model}")
            for adapter, share in zip(replica.adapters, replica.shares, strict=True):
                known = 0 <= adapter < count
                require(known, f"{where}.adapters: {adapter} is not one of the {count} adapters")
                own = demand.adapters[adapter]
                require(
                    own.rank <= engine.max_lora_rank,
                    f"{where}.engine.max_lora_rank: {own.name} has rank {own.rank}, above "
                    f"{engine.max_lora_rank}; move it to a GPU with wider slots",
                )
                placed[adapter] += share
        for own, total in zip(demand.adapters, placed.tolist(), strict=True):
            served = total > 0 or own.request_rate == 0
            require(served, f"{own.name}: has requests, but no GPU serves it; place it")
            whole = total == 0 or math.isclose(total, 1, abs_tol=TOLERANCE)
            require(whole, f"{own.name}: shares sum to {total:g}; make them sum to 1")


def replica_workload(demand: Demand, plan: ReplicaPlan, duration_s: float = HOUR_S) -> Workload:
    """Return the traffic of one GPU.

    An adapter that several GPUs replicate keeps its name and brings its share of the rate: requests
    are split at random, so those of a Poisson process stay Poisson.
    """
    parts = zip(plan.adapters, plan.shares, strict=True)
    return Workload(
        adapters=tuple(part_of(demand.adapters[i], share) for i, share in parts),
        duration_s=duration_s,
        lengths=demand.lengths,
        arrivals=demand.arrivals,
    )


def part_of(adapter: Adapter, share: float) -> Adapter:
    """Return an adapter with a share of its requests."""
    if share == 1:
        return adapter
    rate = share * adapter.request_rate
    return Adapter(name=adapter.name, rank=adapter.rank, request_rate=rate)
