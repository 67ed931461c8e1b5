"""Placements of a demand, and what they are made of: engines, and parts of adapters."""

import math
from bisect import bisect_left
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from adapter_twin.errors import require
from adapter_twin.laws import Calibration
from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.plan.demand import Demand
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.strict import Some, Whole, dataclass
from adapter_twin.workload.traffic import Workload

TOLERANCE = 1e-6
"""The sum of an adapter's shares may be off by this: they are fractions such as a third."""

MOST_SLOTS = 1024
"""More slots have no room on any GPU that vLLM runs on."""


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """One GPU: the flags of its engine, and what it serves.

    Attributes
    ----------
    engine : EngineConfig
    adapters : tuple of int
        Indices into the demand's adapters, each once.
    shares : tuple of float
        Share of that adapter's requests that comes to this GPU: 1 unless several replicate it.
    kind : int
        Index into the kinds of the demand's fleet.
    """

    engine: EngineConfig
    adapters: Some[Whole]
    shares: Some[Annotated[float, Field(gt=0, le=1)]]
    kind: Whole = 0

    def __post_init__(self) -> None:
        require(
            len(self.adapters) == len(self.shares),
            f"shares: {len(self.shares)} for {len(self.adapters)} adapters; give one for each",
        )
        twice = len(set(self.adapters)) < len(self.adapters)
        require(not twice, "adapters: one is there twice; add its shares")


@dataclass(frozen=True, slots=True)
class Placement:
    """Replicas that serve a demand together.

    Attributes
    ----------
    replicas : tuple of ReplicaPlan
    """

    replicas: Some[ReplicaPlan]

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
                known = adapter < count
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

    Parameters
    ----------
    demand : Demand
    plan : ReplicaPlan
    duration_s : float
    """
    own = zip((demand.adapters[i] for i in plan.adapters), plan.shares, strict=True)
    return Workload(
        adapters=tuple(
            replace(adapter, request_rate=share * adapter.request_rate) for adapter, share in own
        ),
        duration_s=duration_s,
        lengths=demand.lengths,
        arrivals=demand.arrivals,
    )


@plain_dataclass(frozen=True, slots=True)
class Parts:
    """Busy adapters to be dealt to GPUs, some in equal parts that each get a GPU of their own.

    Attributes
    ----------
    adapter : int64, shape (n,)
        Index into the demand's adapters; an idle one has no part.
    share, rate : float64, shape (n,)
        Share of the adapter's requests, and those in requests/s.
    rank : int64, shape (n,)
        Smallest ``max_lora_rank`` of vLLM that takes the adapter.
    """

    adapter: NDArray[np.int64]
    share: NDArray[np.float64]
    rate: NDArray[np.float64]
    rank: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.adapter)


class Engines:
    """Engines of a demand's model on the GPU of a calibration; made once, then looked up."""

    def __init__(self, demand: Demand, calibration: Calibration) -> None:
        self._given = demand.slots
        self._memory = calibration.memory
        self._flags = demand.engine_with(1)
        self._most: dict[int, int] = {}
        self._made: dict[tuple[int, int, int], EngineConfig] = {}

    def make(self, slots: int, rank: int, count: int) -> EngineConfig:
        """Return the engine of a GPU with `count` adapters.

        Parameters
        ----------
        slots, rank : int
            Number of slots, and the rank at which each is reserved.
        count : int
        """
        key = slots, rank, count
        if key not in self._made:
            self._made[key] = replace(
                self._flags, max_loras=slots, max_cpu_loras=max(count, slots), max_lora_rank=rank
            )
        return self._made[key]

    def candidates(self, count: int, rank: int) -> list[EngineConfig]:
        """Return the engines that are tried for `count` adapters.

        Slots for all of them, powers of two, and three between each; or those of the demand.
        """
        most = min(count, self.most_slots(rank))
        powers = [2**k for k in range(most.bit_length())]
        sizes = {power * quarters // 4 for power in powers for quarters in range(4, 8)} | {count}
        if self._given is not None:
            sizes, most = set(self._given), self.most_slots(rank)
        return [self.make(size, rank, count) for size in sorted(sizes) if size <= most]

    def all(self, count: int, rank: int) -> list[EngineConfig]:
        """Return the engines of all numbers of slots that `count` adapters may be given."""
        most = self.most_slots(rank)
        sizes = range(1, min(most, count) + 1) if self._given is None else sorted(self._given)
        return [self.make(size, rank, size) for size in sizes if size <= most]

    def most_slots(self, rank: int) -> int:
        """Return the most slots of a rank with which vLLM starts; 0 where it never does."""
        if rank not in self._most:
            self._most[rank] = bisect_left(
                range(1, MOST_SLOTS + 1),
                True,
                key=lambda slots: not self._memory.starts(self.make(slots, rank, slots)),
            )
        return self._most[rank]
