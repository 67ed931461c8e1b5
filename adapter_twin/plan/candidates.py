"""One replica's service as slots and load vary: the analytic model proposes, the twin decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from adapter_twin.capacity.analytic import analyse
from adapter_twin.laws import load_calibration
from adapter_twin.laws.calibration import Calibration
from adapter_twin.plan.criterion import MARGIN, RESERVE_LOAD, SIMILAR_TTFT, Criterion
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import STARVING_UTILISATION
from adapter_twin.plan.steady_state import (
    FIGURES,
    Window,
    WindowTraffic,
    draw_traffic,
    planned_on,
    serve,
    typical_figures,
    warmed_up,
)
from adapter_twin.service.intervals import representatives
from adapter_twin.workload.traffic import Arrivals

if TYPE_CHECKING:
    import pandas as pd

REPLICATIONS = 5
"""A choice is confirmed and predicted by this number of windows, each with its own traffic."""

PROMISING_SHARE = 0.75
"""The twin is not asked where the analytic throughput is below this share of the load."""

LONGEST_TTFT_RATIO = 20.0
"""Nor is it where adapters wait so long for a slot that the mean TTFT is this many times the best
one's, no more is served, and no SLO asks for a low ITL rather than that."""

MOST_UTILISATION = 1.2
"""No load beyond this multiple of the analytic capacity is served."""

GROWTH_STEP = 1.1
"""The highest load that is served is found to within this ratio."""

MOST_GROWTH = 10.0
"""The search for the highest load ends at this factor on all rates."""

HOUR_S = 3600.0


def candidate_slots(demand: Demand) -> list[int]:
    """Return the numbers of slots to try: all adapters, powers of two, and midway between them."""
    count = len(demand.adapters)
    if demand.slots is not None:
        return sorted(slots for slots in demand.slots if slots <= count)
    powers = [2**k for k in range(count.bit_length())]
    return sorted({n for power in powers for n in (power, 3 * power // 2) if n <= count} | {count})


@dataclass(frozen=True, slots=True)
class Candidates:
    """One GPU with a demand on it.

    Attributes
    ----------
    demand : Demand
    calibration : Calibration
        Of a server on which every adapter has been used.
    criterion : Criterion
        When a configuration serves well enough, and which one is best.
    known : Calibration
        As it was loaded. Of a prior the choice is made on cautious laws, and the service to expect
        is told of all that it allows.
    """

    demand: Demand
    calibration: Calibration
    criterion: Criterion
    known: Calibration
    _known: dict[tuple[int, float], dict[str, float]] = field(default_factory=dict)
    _drawn: dict[int, WindowTraffic] = field(default_factory=dict)

    @classmethod
    def of(cls, demand: Demand, margin: float = MARGIN) -> Self:
        """Load the demand's calibration; raises where there is none."""
        known = load_calibration(demand.calibration, demand.model)
        return cls(demand, planned_on(known), Criterion(margin=margin, slo=demand.slo), known)

    def bounds(self) -> pd.DataFrame:
        """Return what the analytic model says of all candidates.

        Returns
        -------
        pandas.DataFrame
            ``adapter_slots``; the columns of `adapter_twin.capacity.analytic.analyse`, with the
            prefix ``analytic_`` where the twin has the figure, too; ``promising``: worth
            simulating, at least one where a start is possible and the load not hopeless.
        """
        slots = candidate_slots(self.demand)
        engines = [self.demand.engine_with(size) for size in slots]
        workload = self.demand.workload(HOUR_S)
        if self.demand.is_closed_loop:  # memory and capacity do not depend on who waits
            workload = replace(workload, arrivals=Arrivals())
        table = analyse(workload, engines, self.calibration)
        names = {name: f"analytic_{name}" for name in FIGURES}
        if self.demand.is_closed_loop:  # the rates do not tell how much the client will send
            table = table.assign(binds="clients", holds=True, promising=table.feasible_start)
            return table.rename(columns=names).assign(adapter_slots=slots)
        possible = table.feasible_start & (table.utilisation < STARVING_UTILISATION)
        share = table.total_throughput / table.offered_tokens_per_s
        promising = possible & (share >= min(PROMISING_SHARE, share[possible].max()))
        sure, slo = table[promising & table.holds], self.demand.slo
        for best in sure.sort_values("mean_ttft_ms").head(1).itertuples():
            longest_ms = LONGEST_TTFT_RATIO * best.mean_ttft_ms
            if slo is not None and slo.itl_ms is not None:  # those who wait may have the lower ITL
                longest_ms = max(longest_ms, slo.ttft_ms or math.inf)
            behind = table.holds & (table.mean_ttft_ms > longest_ms)
            promising &= ~behind | (table.total_throughput > best.total_throughput)
        return table.rename(columns=names).assign(adapter_slots=slots, promising=promising)

    def table(self) -> pd.DataFrame:
        """Return `bounds` with the twin's figures for promising candidates, and ``serves``.

        Of a closed loop the load is what is sent, and so is ``utilisation``.
        """
        import pandas as pd

        bounds = self.bounds()
        promising = bounds.index[bounds.promising]
        figures = [self.figures(int(slots)) for slots in bounds.adapter_slots[promising]]
        names = [*FIGURES, *([] if self.demand.slo is None else ["slo_attainment"])]
        served = pd.DataFrame(figures, index=promising, columns=names, dtype=float)
        table = bounds.join(served)
        if self.demand.is_closed_loop:
            table["utilisation"] = table.total_throughput / table.capacity_tokens_per_s
        return table.assign(serves=self.criterion.feasible(table))

    def figures(self, slots: int, load: float = 1.0) -> dict[str, float]:
        """Simulate one number of slots, all rates multiplied by `load`, unless it is known."""
        if (slots, load) not in self._known:
            traffic = self._traffic(self.demand.seed, load)
            window = serve(traffic, self.demand.engine_with(slots), self.calibration)
            self._known[slots, load] = window.figures
        return self._known[slots, load]

    def _traffic(self, seed: int, load: float = 1.0) -> WindowTraffic:
        """Return the requests that configurations are compared on."""
        if load != 1:
            return draw_traffic(self.demand, self.calibration, seed=seed, load=load)
        if seed not in self._drawn:
            self._drawn[seed] = draw_traffic(self.demand, self.calibration, seed=seed)
        return self._drawn[seed]

    def is_served(self, figures: Mapping[str, float]) -> bool:
        """Return whether figures satisfy the criterion."""
        import pandas as pd

        row = pd.DataFrame([{"feasible_start": True, **figures}])
        return bool(self.criterion.feasible(row).iloc[0])

    def can_serve(self, load: float = 1.0) -> bool:
        """Return whether some number of slots serves the demand, without comparing them.

        Parameters
        ----------
        load : float
            Factor on the clients of a closed loop.
        """
        bounds = self.bounds()
        # many slots, while they leave enough memory, are the likeliest to do
        likely = ["starved", "adapter_slots"]
        rows = bounds[bounds.promising].sort_values(likely, ascending=[True, False])
        return any(self.is_served(self.figures(int(slots), load)) for slots in rows.adapter_slots)

    def choose(self, table: pd.DataFrame) -> tuple[pd.Series[Any], list[Window]] | None:
        """Return the best row of `table` that serves further windows too, and all its windows."""
        ranked = self._ranked(table)
        for _, row in ranked.iterrows():
            slots = int(row.adapter_slots)
            windows = self._windows(slots, [self.calibration] * REPLICATIONS)
            if self.is_served(typical_figures(windows, self.demand)):
                allowed = [warmed_up(one) for one in representatives(self.known, REPLICATIONS)]
                return row, self._windows(slots, allowed) or windows
        return None

    def _windows(self, slots: int, laws: Sequence[Calibration]) -> list[Window]:
        """Simulate one number of slots on a window for each of the laws."""
        engine = self.demand.engine_with(slots)
        return [
            serve(self._traffic(self.demand.seed + number), engine, its)
            for number, its in enumerate(laws)
        ]

    def _ranked(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return what the criterion ranks; of those similar at the top, the sturdiest first."""
        import pandas as pd

        ranked: pd.DataFrame = self.criterion.ranked(table)
        fast = ranked.mean_ttft_ms <= SIMILAR_TTFT * ranked.mean_ttft_ms.min()
        similar = ranked.adapter_slots[ranked.tied & fast].to_list()
        if len(similar) <= 1:
            return ranked
        # too few slots show in TTFT as soon as the load grows
        sturdiest = min(similar, key=lambda size: self.figures(size, RESERVE_LOAD)["mean_ttft_ms"])
        first = ranked.adapter_slots.isin([sturdiest])
        return pd.concat([ranked[first], ranked[~first]])

    def at_loads(
        self, slots: int, utilisation: float, loads: Sequence[float]
    ) -> list[dict[str, Any]]:
        """Return one row per load that is not hopeless: ``load``, figures, and ``serves``.

        Parameters
        ----------
        slots : int
        utilisation : float
            Of the analytic capacity, at the demand's own load.
        loads : sequence of float
            Factors on all rates.
        """
        rows = []
        for load in loads:
            if self.demand.is_closed_loop or load * utilisation < STARVING_UTILISATION:
                figures = self.figures(slots, load)
                rows.append({"load": load, **figures, "serves": self.is_served(figures)})
        return rows

    def growth(self, slots: int, utilisation: float, rows: Sequence[Mapping[str, Any]]) -> float:
        """Return the highest factor on all rates that is served, to `GROWTH_STEP`, if not more.

        Parameters
        ----------
        slots : int
        utilisation : float
            Offered load by analytic capacity, which bounds the search.
        rows : sequence of mapping
            What `at_loads` returned, which narrows it.
        """
        low, high = 1.0, min(max(MOST_UTILISATION / utilisation, GROWTH_STEP), MOST_GROWTH)
        if self.demand.is_closed_loop:  # no number of clients is more than can be answered
            high = MOST_GROWTH
        for row in rows:
            if row["load"] > 1 and not row["serves"]:
                high = min(high, row["load"])
        served = [row["load"] for row in rows if row["serves"] and low < row["load"] < high]
        low = max([low, *served])
        while high > GROWTH_STEP * low:
            middle = math.sqrt(low * high)
            fits = self.is_served(self.figures(slots, middle))
            low, high = (middle, high) if fits else (low, middle)
        return low
