"""Placement strategies: the fewest or cheapest GPUs, or the shortest waits on a given number."""

import math
from dataclasses import replace

import joblib
import numpy as np
from numpy.typing import ArrayLike

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.fleet.hold import Bound, Held, NotServed, check_placement, hold, learn_spread
from adapter_twin.fleet.kinds import Group, Kinds, require_available
from adapter_twin.fleet.mixed import few
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups, best_greedy, improve
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.proof.bound import ROUNDING, gpus_for, least_cost, prices_of, prices_on
from adapter_twin.fleet.proof.envelope import levels_of
from adapter_twin.parallel import share_out
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


def best(kinds: Kinds, *, jobs: int = -1) -> tuple[list[Group], Bound]:
    """Return the placement that is found in little time: on the fewest GPUs, or the cheapest ones.

    Raises
    ------
    AdapterTwinError
        Too few GPUs are to be had.
    """
    if len(kinds.oracles) > 1:
        return _best_of_several(kinds, jobs)
    alone, prices = fewest(kinds.oracles[0])
    bound = one_kind_bound(kinds, max(gpus_for(prices), _most_pieces(kinds)))
    groups = [Group(0, parts) for parts in alone]
    require_available(kinds, groups, bound.gpus)
    return groups, bound


def _best_of_several(kinds: Kinds, jobs: int) -> tuple[list[Group], Bound]:
    serving = [k for k, oracle in enumerate(kinds.oracles) if oracle.takes().any()]
    oracles, available = [kinds.oracles[k] for k in serving], kinds.available
    levels = share_out((joblib.delayed(levels_of)(oracle) for oracle in oracles), jobs)

    def proven(costs: Floats) -> tuple[Floats, float]:
        prices = np.full((len(available), len(oracles[0].parts)), np.inf)
        prices[serving] = prices_on(oracles, levels, costs[serving], available[serving])
        return prices, least_cost(prices, costs, available, _most_pieces(kinds))

    prices, gpus = proven(np.ones(len(available)))
    in_gpus, price = prices, 0.0
    if kinds.demand.fleet.is_priced:
        prices, price = proven(kinds.prices)
    groups = few(kinds, prices, price) if kinds.by_price else few(kinds, in_gpus, gpus)
    if groups is None:
        raise AdapterTwinError(
            "fleet.kinds: no placement is found on those that are available; raise available"
        )
    return groups, Bound(max(math.ceil(gpus - ROUNDING), 1), price)


def _most_pieces(kinds: Kinds) -> int:
    """Return in how many parts any adapter is: each has a GPU of its own."""
    return int(np.bincount(kinds.oracles[0].parts.adapter).max())


def one_kind_bound(kinds: Kinds, gpus: int) -> Bound:
    """Return the bound of GPUs of one kind."""
    return Bound(gpus, gpus * float(kinds.prices[0]))


def on_one_gpu(kinds: Kinds, *, jobs: int = -1) -> Held | None:
    """Return all adapters on one GPU, as `adapter_twin.plan.recommend` has it; None if it cannot.

    The twin decides, where an oracle's allowance for waits that it does not know may be too much.

    Parameters
    ----------
    kinds : Kinds
        The cheapest that can is taken.
    jobs : int
        Processes; -1 is one per core.
    """
    demand, adapters = kinds.demand, tuple(range(len(kinds.demand.adapters)))
    if (kinds.oracles[0].parts.share < 1).any():  # an adapter that is on several
        return None
    for kind in kinds.cheapest():
        oracle = kinds.oracles[kind]
        replica = Candidates.of(oracle.demand, oracle.criterion.margin)
        chosen = replica.choose(replica.table())
        # without an SLO, nothing else stops a queue that grows for as long as the load lasts
        most = oracle.most_utilisation if demand.slo is None else math.inf
        if chosen is None or chosen[0].utilisation > most:
            continue
        engine = oracle.demand.engine_with(int(chosen[0].adapter_slots))
        plan = ReplicaPlan(engine, adapters, (1.0,) * len(adapters), kind)
        placement = Placement((plan,))
        laws = kinds.laws(placement)
        checked = check_placement(demand, placement, laws, seed=demand.seed, jobs=jobs)
        if checked.serves.all():
            bound = Bound(1, float(kinds.prices.min()))
            return Held(kinds, bound, placement, checked, repaired=0)
    return None


def place_and_hold(kinds: Kinds, *, jobs: int = -1) -> Held:
    """Place by oracles and have the twin agree; where an SLO is missed, learn why and try again.

    Raises
    ------
    NotServed
        It is missed after `ATTEMPTS`, or starves without an SLO.
    AdapterTwinError
        No GPU serves one of the adapters by what has been learned, or there are too few.
    """
    one = on_one_gpu(kinds, jobs=jobs)
    if one is not None and one.cost <= one.least_cost:
        return one
    try:
        several = _place_and_hold(kinds, jobs=jobs)
    except AdapterTwinError:
        if one is None:
            raise
        return one
    if one is None or several.cost < one.cost:
        return several
    prices = one.price_per_hour, several.bound.price_per_hour
    return replace(one, bound=Bound(1, min(prices)))  # the twin may accept what oracles do not


def _place_and_hold(kinds: Kinds, *, jobs: int) -> Held:
    left = ATTEMPTS
    while True:
        groups, bound = best(kinds, jobs=jobs)
        try:
            return hold(kinds, groups, bound, jobs=jobs)
        except NotServed as missed:
            left -= 1
            if kinds.demand.slo is None or left == 0:
                raise
            kinds = learn_spread(kinds, missed)


def shortest_wait(kinds: Kinds, gpus: int, *, jobs: int = -1) -> Held:
    """Return the placement on `gpus` GPUs whose slowest GPU has the lowest p99 TTFT in the twin.

    Tried are: even loads; even prices (`adapter_twin.fleet.proof.bound`), which weigh a slot
    against the load; and the placement on the fewest GPUs, whose fullest ones are halved, so that
    ranks stay apart.

    Parameters
    ----------
    kinds : Kinds
        Of one kind.
    gpus : int
    jobs : int
        Processes; -1 is one per core.

    Raises
    ------
    AdapterTwinError
        With so few GPUs none of these serves, there are more GPUs than adapters, or several kinds.
    """
    alone = len(kinds.oracles) == 1
    require(alone, "gpus: goes with one kind of GPU; leave it out, or the others of fleet.kinds")
    (oracle,) = kinds.oracles
    parts, demand = oracle.parts, oracle.demand
    require(
        1 <= gpus <= len(parts),
        f"gpus: got {gpus}; give 1 to {len(parts)}, each GPU gets an adapter at least",
    )
    require_available(kinds, [Group(0, [])] * gpus, gpus)
    groups, prices = fewest(oracle)
    least, held = gpus_for(prices), list[Held]()
    bound = one_kind_bound(kinds, least)
    for tried in (spread(parts.rate, gpus), spread(prices, gpus), _halved(groups, prices, gpus)):
        if len(tried) > gpus or any(oracle.serve(group) is None for group in tried):
            continue
        placement = oracle.place(tried)
        checked = check_placement(
            demand, placement, oracle.calibration, seed=demand.seed, jobs=jobs
        )
        if checked.serves.all():
            held.append(Held(kinds, bound, placement, checked, repaired=0))
    require(
        bool(held),
        f"gpus: {gpus} are too few to serve; {least} are the least that can be, and "
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
