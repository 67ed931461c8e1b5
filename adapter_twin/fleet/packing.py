"""Placement one GPU after the other: each takes the heaviest adapters that still fit.

Filling GPUs in turn gives what first-fit decreasing gives, which asks every GPU about every
adapter; but how many of a sorted list fit is found by bisection, so the oracle is asked ``GPUs x
log(adapters)`` times and can place tens of thousands. Bisection takes for granted that a set which
fits still does so with an adapter less; a GPU is only ever given a set that the oracle accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adapter_twin.fleet.oracle import Oracle

Order = NDArray[np.int64]
Groups = list[list[int]]

TOP_UPS = 6
"""Times that a gap is looked for a lighter adapter: each finds a run of them."""


def first_fit_decreasing(oracle: Oracle) -> Groups:
    """Place by load alone, as the pipeline of arXiv 2602.24044: heaviest adapters first.

    Returns
    -------
    list of list of int
        Indices into ``oracle.parts``, one list per GPU.
    """
    heaviest = np.argsort(-oracle.parts.rate, kind="stable")
    groups: Groups = []
    left = heaviest
    while len(left):
        taken = fill(oracle, [], left, _guess(groups))
        groups.append(left[taken].tolist())
        left = left[~taken]
    return groups


def grouped_by_rank(oracle: Oracle, *, fill_gaps: bool) -> Groups:
    """Place the widest ranks first, heaviest adapters first: every slot is as wide as the widest.

    Parameters
    ----------
    oracle : Oracle
    fill_gaps : bool
        Whether lower ranks may fill what is left of every GPU with wide slots; otherwise only of
        the last one of each rank.

    Returns
    -------
    list of list of int
        Indices into ``oracle.parts``, one list per GPU.
    """
    parts = oracle.parts
    left = np.lexsort((-parts.rate, -parts.rank))
    groups: Groups = []
    while len(left):
        same = parts.rank[left] == parts.rank[left[0]]
        taken = np.zeros(len(left), bool)
        taken[same] = fill(oracle, [], left[same], _guess(groups))
        if fill_gaps or taken.sum() == same.sum():
            taken[~same] = fill(oracle, left[taken].tolist(), left[~same], guess=1)
        groups.append(left[taken].tolist())
        left = left[~taken]
    return groups


def best_greedy(oracle: Oracle) -> Groups:
    """Return the placement with fewest GPUs of all greedy ones."""
    tried = (
        grouped_by_rank(oracle, fill_gaps=False),
        grouped_by_rank(oracle, fill_gaps=True),
        first_fit_decreasing(oracle),
    )
    return min(tried, key=len)


def _guess(groups: Groups) -> int:
    return len(groups[-1]) if groups else 8


def fill(oracle: Oracle, inside: Sequence[int], order: Order, guess: int) -> NDArray[np.bool_]:
    """Return which of `order` a GPU with some parts inside takes, first come, first served."""
    taken = np.zeros(len(order), bool)
    members, first = list(inside), 0
    for _ in range(TOP_UPS):
        run = _longest_run(oracle, members, order[first:], guess)
        taken[first : first + run] = True
        members += order[first : first + run].tolist()
        first = _next_fitting(oracle, members, order, first + run)
        if first == len(order):
            break
        guess = 1
    return taken


def _longest_run(oracle: Oracle, members: list[int], order: Order, guess: int) -> int:
    """Return how many parts at the head of `order` fit in."""

    def fits(count: int) -> bool:
        return oracle.serve([*members, *order[:count].tolist()]) is not None

    low, high = 0, len(order) + 1
    place, step = min(max(guess, 1), len(order)), 1
    while high - low > 1:
        fit = fits(place)
        low, high = (place, high) if fit else (low, place)
        place, step = place + (step if fit else -step), 2 * step
        if not low < place < high:
            place = (low + high) // 2
    return low


def _next_fitting(oracle: Oracle, members: list[int], order: Order, first: int) -> int:
    """Return where the first part from `first` on is that fits in, or the end.

    The lightest one is last; should not even that fit, none does.
    """

    def fits(place: int) -> bool:
        return oracle.serve([*members, int(order[place])]) is not None

    if first == len(order) or not fits(len(order) - 1):
        return len(order)
    low, high = first, len(order) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high
