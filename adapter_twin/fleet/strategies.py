"""Placement strategies: the fewest GPUs, or the shortest waits on a given number of them."""

import math

import numpy as np
from numpy.typing import ArrayLike

from adapter_twin.errors import require
from adapter_twin.fleet.hold import Held, NotServed, check_placement, hold, learn_spread
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups, best_greedy, improve
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.proof.bound import gpus_for, prices_of
from adapter_twin.plan.candidates import Candidates
from adapter_twin.workload.lengths import Floats

ATTEMPTS = 6
"""An SLO is placed for this many times; after each miss its percentile is learned from the twin."""


def fewest(oracle: Oracle) -> tuple[Groups, Floats]:
    """Return the placement on the fewest GPUs that is found in little time, and its parts' prices.

    The best greedy placement, improved by local search with the prices that prove the lower bound
    (`adapter_twin.fleet.proof.bound.gpus_for`).
    """
    prices = prices_of(oracle)
    return improve(oracle, best_greedy(oracle), prices, enough=gpus_for(prices)), prices


def on_one_gpu(oracle: Oracle, *, jobs: int = -1) -> Held | None:
    """Return all adapters on one GPU, as `adapter_twin.plan.recommend` has it; None if it cannot.

    The twin decides, where the oracle's allowance for waits that it does not know may be too much.

    Parameters
    ----------
    oracle : Oracle
    jobs : int
        Processes; -1 is one per core.
    """
    demand, adapters = oracle.demand, tuple(range(len(oracle.demand.adapters)))
    if len(oracle.parts) > len(adapters):  # an adapter that is too much for one
        return None
    replica = Candidates.of(demand, oracle.criterion.margin)
    chosen = replica.choose(replica.table())
    # without an SLO, nothing else stops a queue that grows for as long as the load lasts
    most = oracle.most_utilisation if demand.slo is None else math.inf
    if chosen is None or chosen[0].utilisation > most:
        return None
    engine = demand.engine_with(int(chosen[0].adapter_slots))
    placement = Placement((ReplicaPlan(engine, adapters, (1.0,) * len(adapters)),))
    checked = check_placement(demand, placement, oracle.calibration, seed=demand.seed, jobs=jobs)
    if not checked.serves.all():
        return None
    return Held(oracle, 1, placement, checked, repaired=0)


def place_and_hold(oracle: Oracle, *, jobs: int = -1) -> Held:
    """Place by an oracle and have the twin agree; where an SLO is missed, learn why and try again.

    Raises
    ------
    NotServed
        It is missed after `ATTEMPTS`, or starves without an SLO.
    AdapterTwinError
        No GPU serves one of the adapters by what has been learned.
    """
    one = on_one_gpu(oracle, jobs=jobs)
    if one is not None:
        return one
    left = ATTEMPTS
    while True:
        groups, prices = fewest(oracle)
        try:
            return hold(oracle, groups, gpus_for(prices), jobs=jobs)
        except NotServed as missed:
            left -= 1
            if oracle.demand.slo is None or left == 0:
                raise
            oracle = learn_spread(oracle, missed)


def shortest_wait(oracle: Oracle, gpus: int, *, jobs: int = -1) -> Held:
    """Return the placement on `gpus` GPUs whose slowest GPU has the lowest p99 TTFT in the twin.

    Tried are: even loads; even prices (`adapter_twin.fleet.proof.bound`), which weigh a slot
    against the load; and the placement on the fewest GPUs, whose fullest ones are halved, so that
    ranks stay apart.

    Parameters
    ----------
    oracle : Oracle
    gpus : int
    jobs : int
        Processes; -1 is one per core.

    Raises
    ------
    AdapterTwinError
        With so few GPUs none of these serves, or there are more GPUs than adapters.
    """
    parts, demand = oracle.parts, oracle.demand
    require(
        1 <= gpus <= len(parts),
        f"gpus: got {gpus}; give 1 to {len(parts)}, each GPU gets an adapter at least",
    )
    groups, prices = fewest(oracle)
    bound, held = gpus_for(prices), list[Held]()
    for tried in (spread(parts.rate, gpus), spread(prices, gpus), _halved(groups, prices, gpus)):
        if len(tried) > gpus or any(oracle.serve(group) is None for group in tried):
            continue
        placement = oracle.place(tried)
        checked = check_placement(
            demand, placement, oracle.calibration, seed=demand.seed, jobs=jobs
        )
        if checked.serves.all():
            held.append(Held(oracle, bound, placement, checked, repaired=0))
    require(
        bool(held),
        f"gpus: {gpus} are too few to serve; {bound} are the least that can be, and "
        f"{len(groups)} the fewest that a placement was found for",
    )
    return min(held, key=lambda one: float(one.checked.p99_ttft_ms.max()))


def spread(loads: ArrayLike, gpus: int) -> Groups:
    """Return items dealt to GPUs, the heaviest first, each to the GPU with the least load so far.

    Longest processing time first (Graham 1969): no GPU has more than 4/3 of what it must have.

    Parameters
    ----------
    loads : array_like, shape (n,)
    gpus : int

    Returns
    -------
    list of list of int
        Indices, one list per GPU; empty ones where there are more GPUs than items.
    """
    require(gpus >= 1, f"gpus: must be at least 1, got {gpus}")
    loads, dealt = np.asarray(loads, float), np.zeros(gpus)
    groups: Groups = [[] for _ in range(gpus)]
    for item in np.argsort(-loads, kind="stable").tolist():
        gpu = int(dealt.argmin())
        groups[gpu].append(item)
        dealt[gpu] += loads[item]
    return groups


def _halved(groups: Groups, prices: Floats, gpus: int) -> Groups:
    """Return more groups: again and again the dearest one is dealt to two GPUs."""
    groups = list(groups)
    while len(groups) < gpus:
        groups.sort(key=lambda group: float(prices[group].sum()) if len(group) > 1 else 0.0)
        dearest = np.array(groups.pop())
        groups += [dearest[half].tolist() for half in spread(prices[dearest], 2)]
    return groups
