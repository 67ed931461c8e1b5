"""A given number of GPUs: of several ways to spread the load the one with the shortest waits."""

from __future__ import annotations

import numpy as np

from adapter_twin.fleet.balance import spread
from adapter_twin.fleet.check import check_placement
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups
from adapter_twin.fleet.proof.bound import Floats, gpus_for
from adapter_twin.fleet.strategies import Held, fewest
from adapter_twin.workload.strict import require


def shortest_wait(oracle: Oracle, gpus: int, *, jobs: int = -1) -> Held:
    """Return the placement on so many GPUs whose slowest GPU has the lowest p99 TTFT in the twin.

    Tried are: even loads; even prices (`adapter_twin.fleet.proof.bound`), which weigh a slot
    against the load; and the placement on the fewest GPUs, whose fullest ones are halved, so that
    ranks stay
    apart.

    Raises
    ------
    AdapterTwinError
        With so few GPUs none of these serves, or there are more GPUs than adapters.
    """
    parts = oracle.parts
    require(
        1 <= gpus <= len(parts),
        f"gpus: got {gpus}; give 1 to {len(parts)}, each GPU gets an adapter at least",
    )
    groups, prices = fewest(oracle)
    bound = gpus_for(prices)
    tried = [spread(parts.rate, gpus), spread(prices, gpus)]
    if len(groups) <= gpus:
        tried.append(_halved(groups, prices, gpus))
    held = []
    for candidate in tried:
        if all(oracle.serve(group) is not None for group in candidate):
            placement = oracle.place(candidate)
            checked = check_placement(
                oracle.demand, placement, oracle.calibration, seed=oracle.demand.seed, jobs=jobs
            )
            if checked.serves.all():
                held.append(Held(oracle, bound, placement, checked, repaired=0))
    require(
        bool(held),
        f"gpus: {gpus} are too few to serve; {bound} are the least that can be, and "
        f"{len(groups)} the fewest that a placement was found for",
    )
    return min(held, key=lambda one: float(one.checked.p99_ttft_ms.max()))


def _halved(groups: Groups, prices: Floats, gpus: int) -> Groups:
    """Return more groups: again and again the dearest one is dealt to two GPUs."""
    groups = [list(group) for group in groups]
    while len(groups) < gpus:
        groups.sort(key=lambda group: float(prices[group].sum()) if len(group) > 1 else 0.0)
        dearest = np.array(groups.pop())
        groups += [dearest[half].tolist() for half in spread(prices[dearest], 2)]
    return groups
