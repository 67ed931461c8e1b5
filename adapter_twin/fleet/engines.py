"""The engines that a GPU may run: numbers of slots at a rank with which vLLM starts."""

from __future__ import annotations

from dataclasses import replace

from adapter_twin.laws import Calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.workload.scenario import EngineConfig

MOST_SLOTS = 1024
"""More have no room on any GPU that vLLM runs on."""


class Engines:
    """Engines of a demand's model on the GPU of a calibration; made once, then looked up."""

    def __init__(self, demand: Demand, calibration: Calibration) -> None:
        self._given = demand.slots
        self._memory = calibration.memory
        self._flags = demand.engine(1)
        self._most: dict[int, int] = {}
        self._made: dict[tuple[int, int, int], EngineConfig] = {}

    def make(self, slots: int, rank: int, count: int) -> EngineConfig:
        """Return the engine of a GPU with so many adapters."""
        key = slots, rank, count
        if key not in self._made:
            self._made[key] = replace(
                self._flags, max_loras=slots, max_cpu_loras=max(count, slots), max_lora_rank=rank
            )
        return self._made[key]

    def candidates(self, count: int, rank: int) -> list[EngineConfig]:
        """Return the engines that are tried for so many adapters.

        Slots for all of them, powers of two, and three between each; or those of the demand.
        """
        most = min(count, self.most_slots(rank))
        powers = [2**k for k in range(most.bit_length())]
        sizes = {power * quarters // 4 for power in powers for quarters in range(4, 8)} | {count}
        if self._given is not None:
            sizes, most = set(self._given), self.most_slots(rank)
        return [self.make(size, rank, count) for size in sorted(sizes) if size <= most]

    def all(self, count: int, rank: int) -> list[EngineConfig]:
        """Return the engines of all numbers of slots that so many adapters may be given."""
        most = self.most_slots(rank)
        sizes = range(1, min(most, count) + 1) if self._given is None else sorted(self._given)
        return [self.make(size, rank, size) for size in sizes if size <= most]

    def most_slots(self, rank: int) -> int:
        """Return the most slots of a rank with which vLLM starts; 0 where it never does."""
        if rank not in self._most:
            low, high = 0, MOST_SLOTS + 1
            while high - low > 1:
                middle = (low + high) // 2
                starts = bool(self._memory.starts(middle, rank))
                low, high = (middle, high) if starts else (low, middle)
            self._most[rank] = low
        return self._most[rank]
