"""The fewest GPUs of all, for small demands: a mixed-integer program over what one GPU can hold.

Adapters with equal rates and ranks are one kind; a *pattern* says how many of each kind share a
GPU. All patterns that the oracle accepts are enumerated, but for those to which another adapter of
the last kind could be added; the program (HiGHS) picks the fewest that cover all adapters. Its
solution is optimal, and its bound holds, if a set that the oracle accepts is still accepted with
adapters taken away. Where there are too many patterns, those found and the greedy ones give a
placement, and `adapter_twin.fleet.proof.bound` the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from adapter_twin.errors import require
from adapter_twin.fleet.kinds import Kinds
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups, best_greedy
from adapter_twin.fleet.proof.bound import gpus_for, lower_bound

Counts = tuple[int, ...]

LIMIT_S = 30.0
MOST_PATTERNS = 5000


@dataclass(frozen=True, slots=True)
class Exact:
    """The best placement found.

    Attributes
    ----------
    groups : list of list of int
        Indices into ``oracle.parts``, one list per GPU; the oracle accepts each.
    bound : int
        No placement has fewer GPUs.
    complete : bool
        All patterns were there, so `bound` is the program's own.
    """

    groups: Groups
    bound: int
    complete: bool

    @property
    def optimal(self) -> bool:
        """True where no placement has fewer GPUs."""
        return len(self.groups) == self.bound


def fewest_gpus(
    oracle: Oracle, *, limit_s: float = LIMIT_S, most_patterns: int = MOST_PATTERNS
) -> Exact:
    """Place on as few GPUs as the program finds within its limits.

    Parameters
    ----------
    oracle : Oracle
    limit_s : float
        Of the program; enumeration is limited by patterns.
    most_patterns : int

    Raises
    ------
    AdapterTwinError
        Adapters are on several GPUs that need not be: their parts are alike, but not exchangeable.
    """
    require(
        oracle.replicate_above == 1,
        f"replicate_above: the exact program needs 1, got {oracle.replicate_above}",
    )
    kinds = _kinds(oracle)
    found = list(islice(_patterns(oracle, kinds), most_patterns + 1))
    complete = len(found) <= most_patterns
    greedy = best_greedy(oracle)
    kind_of = {part: k for k, members in enumerate(kinds) for part in members}
    known = [
        tuple(np.bincount([kind_of[part] for part in group], minlength=len(kinds)).tolist())
        for group in greedy
    ]
    patterns = list(dict.fromkeys([*found[:most_patterns], *known]))
    holds = np.array(patterns, float).T
    wanted = np.array([len(members) for members in kinds])
    solution = milp(
        np.ones(len(patterns)),
        constraints=LinearConstraint(holds, lb=wanted),
        integrality=np.ones(len(patterns)),
        bounds=Bounds(0, np.inf),
        options={"time_limit": limit_s},
    )
    groups = greedy
    if solution.x is not None:
        times = np.rint(solution.x).astype(int)
        dealt = _deal(kinds, [p for p, n in zip(patterns, times, strict=True) for _ in range(n)])
        if len(dealt) < len(greedy) and all(oracle.serve(group) for group in dealt):
            groups = dealt
    own = solution.mip_dual_bound if complete else None
    bound = lower_bound(oracle) if own is None else gpus_for(np.array(own))
    return Exact(groups, bound, complete and own is not None)


def lowest_cost(kinds: Kinds) -> float:
    """Return the lowest cost of GPUs of several kinds, by all patterns that their oracles accept.

    Parameters
    ----------
    kinds : Kinds
        With few parts: there are patterns by the power of their number.

    Raises
    ------
    AdapterTwinError
        Those that are available do not serve.
    """
    alike = _kinds(kinds.oracles[0])
    by_kind = [list(_patterns(oracle, alike)) for oracle in kinds.oracles]
    kind = np.repeat(np.arange(len(by_kind)), [len(found) for found in by_kind])
    holds = np.array([pattern for found in by_kind for pattern in found], float).T
    of_kind = (kind == np.arange(len(by_kind))[:, None]).astype(float)
    solution = milp(
        kinds.costs[kind],
        constraints=[
            LinearConstraint(holds, lb=[len(members) for members in alike]),
            LinearConstraint(of_kind, ub=kinds.available),
        ],
        integrality=np.ones(len(kind)),
        options={"mip_rel_gap": 0.0},
    )
    require(solution.success, f"fleet.kinds: {solution.message}")
    return float(solution.fun)


def _kinds(oracle: Oracle) -> list[list[int]]:
    """Return the parts that are alike, the heaviest kind first."""
    parts = oracle.parts
    alike: dict[tuple[float, int], list[int]] = {}
    for part in np.argsort(-parts.rate, kind="stable").tolist():
        alike.setdefault((float(parts.rate[part]), int(parts.rank[part])), []).append(part)
    return list(alike.values())


def _patterns(oracle: Oracle, kinds: list[list[int]]) -> Iterator[Counts]:
    """Yield how many of each kind a GPU holds, with as many as possible of the last one."""

    def extend(counts: Counts, members: list[int]) -> Iterator[Counts]:
        kind = len(counts)
        if kind == len(kinds):
            if members:
                yield counts
            return
        most = _most(oracle, members, kinds[kind])
        last = kind == len(kinds) - 1
        for count in range(most, most - 1 if last else -1, -1):
            yield from extend((*counts, count), members + kinds[kind][:count])

    yield from extend((), [])


def _most(oracle: Oracle, members: list[int], kind: list[int]) -> int:
    """Return how many of a kind fit to what a GPU holds."""
    low, high = 0, len(kind) + 1
    if oracle.serve([*members, *kind]) is not None:
        return len(kind)
    high -= 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = oracle.serve([*members, *kind[:middle]]) is not None
        low, high = (middle, high) if fits else (low, middle)
    return low


def _deal(kinds: list[list[int]], chosen: list[Counts]) -> Groups:
    """Return the chosen patterns with parts in them, those that are covered twice only once."""
    left = [list(members) for members in kinds]
    groups: Groups = []
    for pattern in chosen:
        group = []
        for members, count in zip(left, pattern, strict=True):
            group += members[:count]
            del members[:count]
        if group:
            groups.append(group)
    return groups
