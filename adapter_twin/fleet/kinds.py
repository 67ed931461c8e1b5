"""The kinds of GPU that a demand may be placed on: an oracle of each, all of the same parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.placement import Placement
from adapter_twin.laws import Calibration
from adapter_twin.plan.criterion import MARGIN
from adapter_twin.plan.demand import Demand
from adapter_twin.workload.gpu_fleet import GpuFleet, GpuKind
from adapter_twin.workload.lengths import Floats


class Group(NamedTuple):
    """What one GPU holds.

    Attributes
    ----------
    kind : int
        Index into the fleet's kinds.
    parts : list of int
        Indices into the parts of the oracles.
    """

    kind: int
    parts: list[int]


@dataclass(frozen=True, slots=True)
class Kinds:
    """Oracles of the kinds of a demand's fleet, which have the same parts.

    An adapter is in as many parts as the kind needs on which its requests alone cost least. A part
    that a kind never serves is a set that its oracle refuses.

    Attributes
    ----------
    demand : Demand
    oracles : tuple of Oracle
        One for each kind, of the demand with that kind's calibration.

    Raises
    ------
    AdapterTwinError
        No kind serves one of the adapters.
    """

    demand: Demand
    oracles: tuple[Oracle, ...]

    def __post_init__(self) -> None:
        pieces = [self._pieces(i) for i in range(len(self.demand.adapters))]
        for oracle in self.oracles:
            oracle.split(pieces)

    @classmethod
    def of(cls, demand: Demand, *, margin: float = MARGIN, replicate_above: float = 1.0) -> Self:
        """Make the oracles of a demand; parameters are those of `Oracle`."""
        uncut = [0] * len(demand.adapters)
        return cls(
            demand,
            tuple(
                Oracle(own, margin=margin, replicate_above=replicate_above, pieces=uncut)
                for own in (on_kind(demand, kind) for kind in demand.fleet.kinds)
            ),
        )

    @property
    def offers(self) -> tuple[GpuKind, ...]:
        """The prices and numbers of the kinds."""
        return self.demand.fleet.kinds

    @property
    def are_told(self) -> bool:
        """Whether there is more than one kind of GPU, or a price."""
        return len(self.oracles) > 1 or self.demand.fleet.is_priced

    @property
    def by_price(self) -> bool:
        """Whether the price counts, and not the number of GPUs."""
        return self.demand.fleet.objective == "price"

    @property
    def costs(self) -> Floats:
        """What a GPU of each kind counts."""
        return self.prices if self.by_price else np.ones(len(self.oracles))

    @property
    def prices(self) -> Floats:
        """Price per hour of a GPU of each kind, 0 where none is told."""
        return np.array([kind.price_per_hour or 0.0 for kind in self.offers])

    @property
    def available(self) -> Floats:
        """GPUs of each kind that are to be had, infinite without a limit."""
        return np.array([kind.available or math.inf for kind in self.offers])

    def cheapest(self, kinds: Sequence[int] | None = None) -> list[int]:
        """Return kinds by rising cost, those of equal cost by price."""
        chosen = range(len(self.oracles)) if kinds is None else kinds
        return sorted(chosen, key=lambda kind: (self.costs[kind], self.prices[kind]))

    def with_room(self, groups: Sequence[Group]) -> list[int]:
        """Return the kinds of which there are more than the groups take, the cheapest first."""
        used = np.bincount([group.kind for group in groups], minlength=len(self.oracles))
        return self.cheapest(np.flatnonzero(used < self.available).tolist())

    def cost(self, groups: Sequence[Group]) -> float:
        """Return what GPUs count together, by the objective."""
        return math.fsum(self.costs[group.kind] for group in groups)

    def serves(self, group: Group) -> bool:
        """Return whether a GPU serves what it holds."""
        return self.oracles[group.kind].serve(group.parts) is not None

    def place(self, groups: Sequence[Group]) -> Placement:
        """Return groups as a checked placement, each with its best number of slots."""
        plans = (self.oracles[group.kind].plan(group.parts) for group in groups)
        placement = Placement(
            tuple(replace(plan, kind=group.kind) for plan, group in zip(plans, groups, strict=True))
        )
        placement.check(self.demand)
        return placement

    def laws(self, placement: Placement) -> list[Calibration]:
        """Return the calibration of each of a placement's GPUs."""
        return [self.oracles[plan.kind].calibration for plan in placement.replicas]

    def _pieces(self, adapter: int) -> int:
        """Return in how many parts an adapter is: those of the kind that serves it cheapest."""
        pieces, refused = list[tuple[float, int]](), list[AdapterTwinError]()
        for cost, oracle in zip(self.costs.tolist(), self.oracles, strict=True):
            own = oracle.demand.adapters[adapter]
            try:
                pieces.append((cost * oracle.alone(own), oracle.pieces_of(own)))
            except AdapterTwinError as error:
                refused.append(error)
        if not pieces:
            raise refused[0]
        return min(pieces)[1]


def on_kind(demand: Demand, kind: GpuKind) -> Demand:
    """Return a demand on GPUs of one kind, without price and limit."""
    calibration = demand.calibration if kind.calibration == "auto" else kind.calibration
    return replace(demand, calibration=calibration, fleet=GpuFleet(copies=demand.fleet.copies))


def require_available(kinds: Kinds, groups: Sequence[Group], bound: int) -> None:
    """Raise `AdapterTwinError` where a placement takes more GPUs than are to be had.

    Parameters
    ----------
    kinds : Kinds
    groups : sequence of Group
    bound : int
        GPUs that are needed at least.
    """
    used = np.bincount([group.kind for group in groups], minlength=len(kinds.oracles))
    for number in np.flatnonzero(used > kinds.available):
        raise AdapterTwinError(
            f"fleet.kinds[{number}].available: {kinds.available[number]:g} are too few; "
            f"{bound} are the least that can be, and {used[number]} the fewest that a placement "
            "was found for"
        )
