"""An oracle that tells whether one GPU serves a set of adapters, and with how many slots.

It asks the analytic model (`adapter_twin.capacity.analytic.analyse_each`) about all numbers of
slots at once. A number of slots serves a set when

- vLLM starts, and the throughput is at least the share of the offered load at which starvation
  begins, plus the safety margin of `adapter_twin.plan.criterion`;
- the load is below the capacity by that margin, or a queue would grow for as long as it lasts: the
  starvation criterion alone accepts that within an hour;
- no adapter waits for a slot for more than what may be lost of the window, so that a rare adapter
  does not starve where the sum over all hides it. The share that is left of an adapter's requests
  is thus above the threshold for each of them;
- with an SLO on ITL, `itl_spread` times the mean ITL is within the limit;
- with an SLO on TTFT, a step and the wait for a slot are within the limit, also while more adapters
  than the mean have requests: the SLO's percentile of their number, as if normally distributed with
  `active_spread` times its deviation. Those without a slot wait for as many visits to end. The
  model knows neither waits for KV blocks and prompts ahead, nor the front end's time;
- with any SLO, the load is at most `SLO_UTILISATION` of the capacity, to keep these waits short.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from adapter_twin.capacity.analytic import analyse_each
from adapter_twin.capacity.traffic_mix import Traffic, group_rates
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.fleet.placement import Engines, Parts, Placement, ReplicaPlan
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.plan.criterion import MARGIN, TIE, Criterion
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import slot_rank
from adapter_twin.plan.steady_state import planned_on
from adapter_twin.service.metrics import STARVATION_THRESHOLD
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.lengths import Floats

SLO_UTILISATION = 0.9
"""Above this utilisation, with an SLO, waits that the model does not know are no longer short."""

TRACE = 1e-6
"""An adapter with this rate in requests/s has next to no load."""

RESOLUTION = 1.005
"""The most requests/s of one adapter alone are found to within this ratio."""

MIXED_GAIN = 1.02
"""No mix of adapters can have more than this many times the load of one adapter alone."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The service of a set of adapters by the best engine, as the analytic model knows it.

    Attributes
    ----------
    engine : EngineConfig
    utilisation : float
        Offered load by capacity.
    mean_itl_ms, slot_wait_s : float
    """

    engine: EngineConfig
    utilisation: float
    mean_itl_ms: float
    slot_wait_s: float


class Oracle:
    """Verdicts on sets of adapters on one GPU.

    Parameters
    ----------
    demand : Demand
    calibration : Calibration, optional
        Left out, the demand's, of a server on which every adapter has been used.
    margin : float
        See `adapter_twin.plan.criterion.Criterion`.
    itl_spread, active_spread : float
        An SLO's percentile of the requests' mean ITL by its mean over all, and the deviation of the
        number of adapters with requests by that of independent ones. They count with an SLO only;
        the twin tells them, see `adapter_twin.fleet.hold.learn_spread`.
    replicate_above : float
        An adapter that takes more than this share of a GPU is on several, by default one that is
        too much for one. Its parts are on GPUs of their own.
    pieces : sequence of int, optional
        In how many parts each adapter is; left out, see `pieces_of`.

    Attributes
    ----------
    parts : Parts
        What there is to place; members of a set are indices into it.
    engines : Engines
    calls : int
        Sets that the model was asked about.
    most_utilisation : float
        Highest load that a GPU may have, by its capacity.
    longest_wait_s : float
        Longest wait for a slot that any adapter may have.
    itl_limit_ms : float
        Longest mean ITL; infinite without a limit.

    Raises
    ------
    AdapterTwinError
        No GPU can serve one of the adapters, or the demand asks for the base model.
    """

    def __init__(
        self,
        demand: Demand,
        calibration: Calibration | None = None,
        *,
        margin: float = MARGIN,
        itl_spread: float = 1.0,
        active_spread: float = 1.0,
        replicate_above: float = 1.0,
        pieces: Sequence[int] | None = None,
    ) -> None:
        require(
            0 < replicate_above <= 1,
            f"replicate_above: got {replicate_above}; give a share of a GPU, above 0 and at most 1",
        )
        require(
            demand.base_model_request_rate == 0,
            "base_model_request_rate: only adapters are placed; serve the base model on GPUs of "
            "its own and leave it out",
        )
        self.demand, self.replicate_above = demand, replicate_above
        self.itl_spread, self.active_spread = itl_spread, active_spread
        self.calibration = calibration or planned_on(
            load_calibration(demand.calibration, demand.model)
        )
        self.criterion = Criterion(margin=margin)
        self.threshold = STARVATION_THRESHOLD + margin
        slo, lost_s = demand.slo, (1 - self.threshold) * HOUR_S
        itl_ms, ttft_ms = (None, None) if slo is None else (slo.itl_ms, slo.ttft_ms)
        self.most_utilisation = 1 - margin if slo is None else SLO_UTILISATION
        self.longest_wait_s = lost_s if ttft_ms is None else min(lost_s, ttft_ms / 1e3)
        self.itl_limit_ms = math.inf if itl_ms is None else itl_ms / itl_spread
        self.calls = 0
        self._known: dict[tuple[int, bytes], Verdict | None] = {}
        self._most_alone: dict[int, float] = {}
        self.engines = Engines(demand, self.calibration)
        adapters = demand.adapters
        self.split([self.pieces_of(one) for one in adapters] if pieces is None else pieces)

    def alone(self, adapter: Adapter) -> float:
        """Return how many GPUs the requests of an adapter fill, without any others."""
        most = self.most_alone(self._slot_rank(adapter))
        return adapter.request_rate / most if most > 0 else math.inf

    def pieces_of(self, adapter: Adapter) -> int:
        """Return in how many equal parts an adapter is: the fewest that a GPU each serves.

        Raises
        ------
        AdapterTwinError
            No GPU serves it.
        """
        name, rate = adapter.name, adapter.request_rate
        if rate == 0:
            return 0
        rank = self._slot_rank(adapter)
        require(
            self.engines.most_slots(rank) > 0,
            f"adapters: no GPU serves {name}: one slot of rank {rank} leaves too little KV "
            "cache to start; lower its rank or leave it out",
        )
        most = self.most_alone(rank)
        require(
            most > 0,
            f"adapters: no GPU serves {name}, however few its requests, with these slots "
            "within the slo; widen its limits",
        )
        fewest = math.ceil(rate / (self.replicate_above * most) - 1e-9)
        return max(fewest, self.demand.fleet.copies)

    def split(self, pieces: Sequence[int]) -> None:
        """Cut each adapter into a number of equal parts; those of 0 are idle."""
        adapters = self.demand.adapters
        adapter = np.repeat(np.arange(len(adapters)), pieces)
        share = np.repeat(1 / np.maximum(pieces, 1), pieces)
        rates = np.array([adapter.request_rate for adapter in adapters])
        ranks = np.array([self._slot_rank(adapter) for adapter in adapters], np.int64)
        self.parts = Parts(adapter, share, share * rates[adapter], ranks[adapter])

    def _slot_rank(self, adapter: Adapter) -> int:
        return slot_rank([adapter.rank], self.calibration.version)

    def takes(self) -> NDArray[np.bool_]:
        """Return of each part whether a GPU may serve it: none does where it is false."""
        most = {rank: MIXED_GAIN * self.most_alone(rank) for rank in self.parts.rank.tolist()}
        return self.parts.rate <= [most[rank] for rank in self.parts.rank.tolist()]

    def serve(self, members: Sequence[int] | NDArray[np.int64]) -> Verdict | None:
        """Return how one GPU serves some of the parts, or None where it cannot."""
        chosen = np.asarray(members, np.int64)
        rates, rank = self.parts.rate[chosen], int(self.parts.rank[chosen].max())
        twice = len(np.unique(self.parts.adapter[chosen])) < len(chosen)
        if twice or rates.sum() > MIXED_GAIN * self.most_alone(rank):
            return None
        return self._serve(rates, rank)

    def serve_alike(self, count: int, rate: float, rank: int) -> Verdict | None:
        """Return how one GPU serves `count` adapters of one rate in requests/s, and one rank."""
        return self._serve(np.full(count, rate), rank)

    def serve_plan(self, plan: ReplicaPlan) -> Verdict | None:
        """Return how a planned GPU serves, with the slots of its plan; None where it does not."""
        rates = [self.demand.adapters[i].request_rate for i in plan.adapters]
        return self._best(np.array(rates) * np.array(plan.shares), [plan.engine])

    def serves_all_of(self, plan: ReplicaPlan) -> bool:
        """Return whether this kind of GPU serves what another one does, with slots of its own."""
        own = [self.demand.adapters[i] for i in plan.adapters]
        rates = np.array([adapter.request_rate for adapter in own]) * np.array(plan.shares)
        rank = slot_rank([adapter.rank for adapter in own], self.calibration.version)
        return self._serve(rates[rates > 0], rank) is not None

    def place(self, groups: Iterable[Sequence[int]]) -> Placement:
        """Return groups of parts as a checked placement, each with its best number of slots."""
        placement = Placement(tuple(self.plan(group) for group in groups))
        placement.check(self.demand)
        return placement

    def may_serve(
        self, rates: Floats, counts: NDArray[np.int64], rank: int, patience: float
    ) -> NDArray[np.bool_]:
        """Return for each rate whether its count of adapters may be among those that a GPU serves.

        Parameters
        ----------
        rates : float64, shape (n,)
            Requests/s of one adapter.
        counts : int64, shape (n,)
        rank : int
            Of the slots.
        patience : float
            Times by which the SLO's limit on ITL may be exceeded.
        """
        tried = [
            (i, engine, self._traffic([rate], [count]))
            for i, (rate, count) in enumerate(zip(rates.tolist(), counts.tolist(), strict=True))
            for engine in self.engines.candidates(count, rank)
        ]
        accepted = np.zeros(len(rates), bool)
        if tried:
            table = analyse_each([(engine, of) for _, engine, of in tried], self.calibration)
            np.logical_or.at(accepted, [i for i, *_ in tried], self._may_be_good(table, patience))
        return accepted

    def alike(self, loads: ArrayLike, counts: ArrayLike, rank: int) -> pd.DataFrame:
        """Return what the analytic model says of equal adapters that have a slot each.

        Parameters
        ----------
        loads : array_like of float
            Requests/s of all adapters together.
        counts : array_like of int
        rank : int
            Of the slots.
        """
        pairs = [
            (self.engines.make(count, rank, count), self._traffic([load / count], [count]))
            for load, count in zip(np.ravel(loads).tolist(), np.ravel(counts).tolist(), strict=True)
        ]
        return analyse_each(pairs, self.calibration)

    def table(self, rates: ArrayLike, engines: Sequence[EngineConfig]) -> pd.DataFrame:
        """Return what the analytic model says of adapters with these requests/s."""
        traffic = self._traffic(rates)
        return analyse_each([(engine, traffic) for engine in engines], self.calibration)

    def _traffic(self, rates: ArrayLike, counts: ArrayLike | None = None) -> Traffic:
        if counts is None:
            rates, counts = np.unique(np.asarray(rates), return_counts=True)
        return Traffic(*group_rates(rates, counts), 0.0, self.demand.lengths, HOUR_S)

    def _serve(self, rates: Floats, rank: int) -> Verdict | None:
        rates = np.sort(rates)
        key = rank, blake2b(rates.tobytes()).digest()  # not the rates: there may be 100,000
        if key not in self._known:
            self._known[key] = self._best(rates, self.engines.candidates(len(rates), rank))
        return self._known[key]

    def _best(self, rates: Floats, engines: Sequence[EngineConfig]) -> Verdict | None:
        if not engines:
            return None
        self.calls += 1
        table = self.table(rates, engines)
        good = np.flatnonzero(self._good(table, len(rates), engines))
        if not len(good):
            return None
        throughput, ttft_ms = table.total_throughput.to_numpy(), table.mean_ttft_ms.to_numpy()
        # as `Criterion.ranked`, without what sorting a table costs
        tied = good[throughput[good] >= (1 - TIE) * throughput[good].max()]
        best = tied[ttft_ms[tied].argmin()]
        told = (table.utilisation, table.mean_itl_ms, table.slot_wait_s)
        return Verdict(engines[best], *(float(figure[best]) for figure in told))

    def _may_be_good(self, table: pd.DataFrame, patience: float = 1.0) -> "pd.Series[bool]":
        return (
            self.criterion.feasible(table)
            & (table.utilisation <= self.most_utilisation)
            & (table.slot_wait_s <= self.longest_wait_s)
            & (table.mean_itl_ms <= patience * self.itl_limit_ms)
        )

    def _good(
        self, table: pd.DataFrame, adapters: int, engines: Sequence[EngineConfig]
    ) -> "pd.Series[bool]":
        good, slo = self._may_be_good(table), self.demand.slo
        if slo is None or slo.ttft_ms is None:
            return good
        deviations = self.active_spread * norm.ppf(slo.percentile / 100)
        wanted = table.active_adapters + deviations * np.sqrt(table.active_variance)
        lacking = np.minimum(wanted, adapters) - [engine.max_loras for engine in engines]
        wait_s = table.slot_wait_s + np.maximum(lacking, 0) / table.visits_per_s
        in_time: pd.Series[bool] = table.mean_itl_ms + 1e3 * wait_s <= slo.ttft_ms
        return good & in_time

    def plan(self, group: Sequence[int]) -> ReplicaPlan:
        """Return a GPU that serves some of the parts, with its best number of slots."""
        parts, chosen = self.parts, np.array(group)
        chosen = chosen[np.argsort(parts.adapter[chosen])]
        verdict = self.serve(chosen)
        if verdict is None:
            raise AdapterTwinError("placement: one GPU would starve adapters; move some away")
        adapters, shares = parts.adapter[chosen].tolist(), parts.share[chosen].tolist()
        return ReplicaPlan(verdict.engine, tuple(adapters), tuple(shares))

    def most_alone(self, rank: int) -> float:
        """Return the most requests/s of one adapter that a GPU serves, 0 where it serves none."""

        def fits(rate: float) -> bool:
            return self.serve_alike(1, rate, rank) is not None

        if rank not in self._most_alone:
            self._most_alone[rank] = _highest(fits) if fits(TRACE) else 0.0
        return self._most_alone[rank]


def _highest(fits: Callable[[float], bool]) -> float:
    """Return the highest rate in requests/s that fits, to within `RESOLUTION`."""
    low, high = TRACE, 1.0
    while fits(high):
        low, high = high, 2 * high
    while high > RESOLUTION * low:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
