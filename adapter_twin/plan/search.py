"""The search for the slots that serve a demand best, or for what of it can be served at all."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adapter_twin.capacity.analytic import analyse
from adapter_twin.laws.find import version_of
from adapter_twin.plan.candidates import (
    GROWTH_STEP,
    HOUR_S,
    MOST_GROWTH,
    MOST_UTILISATION,
    Candidates,
)
from adapter_twin.plan.criterion import RESERVE_LOAD, Criterion
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.steady_state import Window
from adapter_twin.workload.engine_config import EngineConfig

if TYPE_CHECKING:
    import pandas as pd

LOADS = (0.5, 0.75, 1.25, 1.5, 2.0)
"""The choice is simulated with all rates multiplied by each of these factors."""

CAPACITY_REACHED = 0.8
"""Waiting, not the capacity, ends a growth that falls short of this share of the capacity."""

MOST_LEFT_OUT = 0.2
"""At most this share of the adapters may be left out for the sake of the others."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The slots chosen for a demand, and what was simulated to tell how good they are.

    Attributes
    ----------
    demand : Demand
    criterion : Criterion
    table : pandas.DataFrame
        All numbers of slots, see `adapter_twin.plan.candidates.Candidates.table`.
    best : pandas.Series
        The chosen row of `table`.
    windows : list of Window
        Service of the chosen slots, window by window.
    loads : list of dict
        Their service at `LOADS`.
    growth : float
        Highest factor on all rates that they serve.
    binds_next : str
        What ends that growth.
    reserve : dict of int to dict
        Figures at `RESERVE_LOAD` by number of slots: of neighbours with a lower mean TTFT, and of
        the choice.
    """

    demand: Demand
    criterion: Criterion
    table: pd.DataFrame
    best: pd.Series[Any]
    windows: list[Window]
    loads: list[dict[str, Any]]
    growth: float
    binds_next: str
    reserve: dict[int, dict[str, float]]

    @property
    def engine(self) -> EngineConfig:
        """The engine with the chosen slots."""
        return self.demand.engine_with(int(self.best.adapter_slots))


@dataclass(frozen=True, slots=True)
class Refusal:
    """A demand that no number of slots serves, and what of it could be served.

    Attributes
    ----------
    demand : Demand
    table : pandas.DataFrame
        As in `Answer`.
    served : int
        Adapters, evenly chosen, that could be served; of a closed loop, places.
    narrow : Demand, optional
        The demand without its few widest adapters, where that can be served.
    """

    demand: Demand
    table: pd.DataFrame
    served: int = 0
    narrow: Demand | None = None


def search(demand: Demand) -> Answer | Refusal:
    """Simulate a demand on every promising number of slots, and more on the best one.

    Raises
    ------
    AdapterTwinError
        There is no calibration of that name, or of the model.
    """
    replica = Candidates.of(demand)
    table = replica.table()
    chosen = replica.choose(table)
    if chosen is None and not table.feasible_start.any():
        return Refusal(demand, table)
    if chosen is None:
        served = most_places(replica) if demand.is_closed_loop else largest_subset(demand)
        return Refusal(demand, table, served, _without_wide_adapters(demand))
    best, windows = chosen
    slots, utilisation = int(best.adapter_slots), float(best.utilisation)
    loads = replica.at_loads(slots, utilisation, LOADS)
    growth = replica.growth(slots, utilisation, loads)
    return Answer(
        demand=demand,
        criterion=replica.criterion,
        table=table,
        best=best,
        windows=windows,
        loads=loads,
        growth=growth,
        binds_next=_binds_next(replica, slots, utilisation, growth),
        reserve=_at_reserve(replica, table, best),
    )


def around(table: pd.DataFrame, best: pd.Series[Any], distance: int = 1) -> pd.DataFrame:
    """Return a row of a table and its neighbours, in the order of their slots.

    Parameters
    ----------
    table : pandas.DataFrame
    best : pandas.Series
        A row of `table`.
    distance : int
        Rows on either side.
    """
    here: Any = best.name
    return table.loc[max(here - distance, 0) : here + distance]


def largest_subset(demand: Demand) -> int:
    """Return the largest number of adapters, spread evenly over the mix, that can be served."""
    low, high = 0, len(demand.adapters)
    while high - low > 1:
        middle = (low + high) // 2
        serves = Candidates.of(demand.subset(middle)).can_serve()
        low, high = (middle, high) if serves else (low, middle)
    return low


def most_places(replica: Candidates) -> int:
    """Return the largest number of places at the client of a closed loop that can be served."""
    places = replica.demand.arrivals.max_concurrency or 0
    return bisect_left(
        range(1, places + 1), True, key=lambda count: not replica.can_serve(count / places)
    )


def _without_wide_adapters(demand: Demand) -> Demand | None:
    """Return the demand without the few adapters that force the rank, if that can be served."""
    sizes = version_of(demand.calibration, demand.model).max_lora_ranks
    for rank in reversed([rank for rank in sizes if rank < demand.max_lora_rank]):
        kept = np.flatnonzero([adapter.rank <= rank for adapter in demand.adapters])
        if len(kept) < (1 - MOST_LEFT_OUT) * len(demand.adapters):
            return None
        narrow = demand.only(kept)
        if Candidates.of(narrow).can_serve():
            return narrow
    return None


def _binds_next(replica: Candidates, slots: int, utilisation: float, growth: float) -> str:
    """Return what ends the growth of the load; well short of the capacity it is waiting."""
    if replica.demand.is_closed_loop:
        return "clients" if growth * GROWTH_STEP > MOST_GROWTH else "slo"
    if growth < min(CAPACITY_REACHED / utilisation, MOST_GROWTH / GROWTH_STEP):
        return "slots" if replica.demand.slo is None else "slo"
    workload = replica.demand.workload(HOUR_S, load=MOST_UTILISATION / utilisation)
    engine = replica.demand.engine_with(slots)
    return str(analyse(workload, [engine], replica.calibration).binds.iloc[0])


def _at_reserve(
    replica: Candidates, table: pd.DataFrame, best: pd.Series[Any]
) -> dict[int, dict[str, float]]:
    """Return what a higher load does to neighbours that seem faster, and to the choice."""
    near = around(table, best)
    faster = near.adapter_slots[near.serves & (near.mean_ttft_ms < best.mean_ttft_ms)]
    sizes = [*faster, best.adapter_slots] if len(faster) else []
    return {int(size): replica.figures(int(size), RESERVE_LOAD) for size in sizes}
