"""Traffic that does not stay as it is, and a cluster that is placed anew at intervals."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from adapter_twin.errors import require
from adapter_twin.fleet.cluster import Move, simulate_cluster
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.routers import Placed
from adapter_twin.fleet.strategies import spread
from adapter_twin.laws import Calibration
from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.plan.demand import Demand
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.lengths import draw_lengths
from adapter_twin.workload.strict import NotNegative, Positive, dataclass
from adapter_twin.workload.trace import Trace

Floats = NDArray[np.float64]

UNEVEN = 0.05
"""The fullest and the emptiest GPU may differ by this share of the mean load."""

LEAST_LEFT = 0.99
"""A move must leave less than this share of that difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How traffic changes.

    Attributes
    ----------
    epoch_s : float
        Popularity stays as it is for so long.
    churn : float
        Share of the adapters that trade their popularity with another one from epoch to epoch.
    swing : float
        The total rate goes up and down by that share of its mean (diurnal).
    period_s : float
        Of the swing.
    burst_cv : float
        Coefficient of variation of each adapter's rate from epoch to epoch, besides; 0 is none.
    """

    epoch_s: Positive = 300.0
    churn: Annotated[float, Field(ge=0, le=1)] = 0.1
    swing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    period_s: Positive = 3600.0
    burst_cv: NotNegative = 0.0


def drifting_rates(rates: Floats, drift: Drift, duration_s: float, seed: int) -> Floats:
    """Return each adapter's requests/s in every epoch, shape (epochs, adapters)."""
    rng = np.random.default_rng([seed, 2])
    epochs = int(np.ceil(duration_s / drift.epoch_s))
    table = np.empty((epochs, len(rates)))
    popularity = np.array(rates, float)
    for epoch in range(epochs):
        middle_s = (epoch + 0.5) * drift.epoch_s
        swing = 1 + drift.swing * np.sin(2 * np.pi * middle_s / drift.period_s)
        table[epoch] = swing * popularity
        if drift.burst_cv > 0:
            shape = drift.burst_cv**-2
            table[epoch] *= rng.gamma(shape, 1 / shape, len(rates))
        traded = rng.permutation(len(rates))[: round(drift.churn * len(rates))]
        popularity[traded] = popularity[np.roll(traded, 1)]
    return table


def drifting_trace(
    demand: Demand, table: Floats, drift: Drift, duration_s: float, laws: Calibration, seed: int
) -> Trace:
    """Draw requests at the rates of a table (`drifting_rates`), Poisson within each epoch."""
    rng = np.random.default_rng([seed, 3])
    lengths_s = np.minimum(drift.epoch_s, duration_s - drift.epoch_s * np.arange(len(table)))
    counts = rng.poisson(table * lengths_s[:, None])
    epoch, adapter = (
        np.repeat(index.ravel(), counts.ravel()) for index in np.indices(counts.shape)
    )
    arrival_s = drift.epoch_s * epoch + lengths_s[epoch] * rng.random(len(epoch))
    order = np.argsort(arrival_s, kind="stable")
    prompt, output = draw_lengths(demand.lengths, len(order), rng, laws.lengths.marginals)
    return Trace(
        arrival_s[order],
        adapter[order].astype(np.int32),
        prompt,
        laws.early_stop.apply(output, rng),
    )


def homes(rates: Floats, engine: EngineConfig, gpus: int) -> Placement:
    """Return adapters spread over equal GPUs by their rates, each adapter on one."""
    plans = []
    for group in spread(rates, gpus):
        require(bool(group), f"gpus: {gpus} are more than there are adapters")
        plans.append(ReplicaPlan(engine, tuple(sorted(group)), (1.0,) * len(group)))
    return Placement(tuple(plans))


def rebalance(loads: ArrayLike, home: NDArray[np.int_], gpus: int) -> int:
    """Move items from the fullest to the emptiest GPU until loads are even; return how many moved.

    As few as will do: each time the item that is closest to half the difference.

    Parameters
    ----------
    loads : array_like, shape (n,)
    home : int, shape (n,)
        Changed in place.
    gpus : int
    """
    loads, moved = np.asarray(loads, float), 0
    total = np.bincount(home, loads, minlength=gpus)
    while True:
        full, empty = int(total.argmax()), int(total.argmin())
        gap = total[full] - total[empty]
        if gap <= UNEVEN * total.mean():
            return moved
        own = np.flatnonzero(home == full)
        item = own[np.abs(loads[own] - gap / 2).argmin()]
        if abs(gap - 2 * loads[item]) > LEAST_LEFT * gap:
            return moved
        home[item] = empty
        total[full] -= loads[item]
        total[empty] += loads[item]
        moved += 1


def place_again(
    demand: Demand,
    engine: EngineConfig,
    gpus: int,
    laws: Calibration,
    drift: Drift,
    *,
    every_s: float | None,
    duration_s: float = HOUR_S,
    seed: int = 0,
) -> dict[str, float]:
    """Serve drifting traffic, with homes chosen anew every so often by what was just asked for.

    Parameters
    ----------
    demand : Demand
        Its rates are those of the first epoch, which the first placement knows.
    engine : EngineConfig
        Of every GPU.
    gpus : int
    laws : Calibration
    drift : Drift
    every_s : float, optional
        Left out, the first placement stays. At each time the last `every_s` seconds' requests of
        each adapter count; an adapter that moves is read from disk by its new home.
    duration_s : float
    seed : int
        Of the traffic, which does not depend on `every_s`.

    Returns
    -------
    dict
        ``moved`` adapters, in total, and `adapter_twin.fleet.cluster.ClusterRun.summary`.
    """
    rates = np.array([adapter.request_rate for adapter in demand.adapters])
    table = drifting_rates(rates, drift, duration_s, seed)
    trace = drifting_trace(demand, table, drift, duration_s, laws, seed)
    first = homes(rates, engine, gpus)
    moves, moved = _moves(trace, first, every_s, duration_s, len(rates))
    run = simulate_cluster(
        demand.workload(duration_s), first, laws, Placed(), seed=seed, moves=moves, trace=trace
    )
    return {"moved": float(moved)} | run.summary()


def _moves(
    trace: Trace, first: Placement, every_s: float | None, duration_s: float, adapters: int
) -> tuple[list[Move], int]:
    """Return the moves that what was asked for suggests, and how many adapters they move."""
    if every_s is None:
        return [], 0
    require(every_s > 0, f"every_s: must be above zero, got {every_s}")
    gpus = len(first.replicas)
    home = np.zeros(adapters, int)
    for gpu, plan in enumerate(first.replicas):
        home[list(plan.adapters)] = gpu
    moves, moved = [], 0
    for at_s in np.arange(every_s, duration_s, every_s).tolist():
        begin, end = np.searchsorted(trace.arrival_s, [at_s - every_s, at_s])
        asked = np.bincount(trace.adapter[begin:end], minlength=adapters).astype(float)
        moved += rebalance(asked, home, gpus)
        groups = [np.flatnonzero(home == gpu).tolist() for gpu in range(gpus)]
        moves.append(Move(at_s=at_s, adapters=tuple(map(frozenset, groups))))
    return moves, moved
