"""The fewest GPUs: place greedily, improve, prove a bound, and have the twin agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_twin.fleet.hold import NotServed, hold, learn_spread
from adapter_twin.fleet.local_search import improve
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups, best_greedy
from adapter_twin.fleet.placement import Placement
from adapter_twin.fleet.proof.bound import Floats, gpus_for, prices_of

if TYPE_CHECKING:
    import pandas as pd

ATTEMPTS = 6
"""Times that is learned from the twin what an SLO's percentile asks for."""


@dataclass(frozen=True, slots=True)
class Held:
    """A placement of which every GPU serves in the twin.

    Attributes
    ----------
    oracle : Oracle
        That it was placed by.
    bound : int
        With fewer GPUs no placement is accepted by that oracle, see
        `adapter_twin.fleet.proof.bound`.
    placement : Placement
    checked : pandas.DataFrame
        See `adapter_twin.fleet.check.check_placement`.
    repaired : int
        GPUs from which adapters were moved after the check.
    """

    oracle: Oracle
    bound: int
    placement: Placement
    checked: pd.DataFrame
    repaired: int


def fewest(oracle: Oracle) -> tuple[Groups, Floats]:
    """Return the placement on the fewest GPUs that is found in little time, and its parts' prices.

    The best greedy placement, improved by local search with the prices that prove the lower bound
    (`adapter_twin.fleet.proof.bound.gpus_for`).
    """
    prices = prices_of(oracle)
    return improve(oracle, best_greedy(oracle), prices, enough=gpus_for(prices)), prices


def place_and_hold(oracle: Oracle, *, jobs: int = -1) -> Held:
    """Place by an oracle and have the twin agree; where an SLO is missed, learn why and try again.

    Raises
    ------
    NotServed
        It is missed after `ATTEMPTS`, or starves without an SLO.
    AdapterTwinError
        No GPU serves one of the adapters by what has been learned.
    """
    left = ATTEMPTS
    while True:
        groups, prices = fewest(oracle)
        try:
            return Held(oracle, gpus_for(prices), *hold(oracle, groups, jobs=jobs))
        except NotServed as missed:
            left -= 1
            if oracle.demand.slo is None or left == 0:
                raise
            oracle = learn_spread(oracle, missed)
