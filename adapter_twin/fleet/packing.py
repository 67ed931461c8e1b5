"""Placement on few GPUs: filled one after the other, then emptied by repacking others.

Filling GPUs in turn gives what first-fit decreasing gives, which asks every GPU about every
adapter; but how many of a sorted list fit is found by bisection, so the oracle is asked ``GPUs x
log(adapters)`` times and can place tens of thousands. Bisection takes for granted that a set which
fits still does so with an adapter less; a GPU is only ever given a set that the oracle accepted.

The search then empties the least loaded GPU. What it holds is first spread over the gaps of the
others. While some of it is left, two other GPUs are emptied too and filled again in a different
order; where that leaves less, it is kept. "Less" is by the prices that prove the lower bound
(`adapter_twin.fleet.proof.bound`): they weigh the load of an adapter against the slot time that it
takes.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adapter_twin.fleet.oracle import Oracle
from adapter_twin.workload.lengths import Floats

Order = NDArray[np.int64]
Groups = list[list[int]]
"""Indices into an oracle's parts, one list per GPU."""

TOP_UPS = 6
"""A gap is searched this many times for lighter adapters: each time finds a run of them."""

NOISE = 0.5
"""Loads are multiplied by log-normal noise of this deviation to sort adapters differently."""

REPACKED = 2
"""This many GPUs are repacked at a time."""

TRIES = 40
"""The search ends when GPUs were repacked this many times without success."""


def first_fit_decreasing(oracle: Oracle) -> Groups:
    """Place by load alone, as the pipeline of arXiv 2602.24044: heaviest adapters first."""
    return _fill_in_turn(oracle, np.zeros(len(oracle.parts)), fill_gaps=True)


def grouped_by_rank(oracle: Oracle, *, fill_gaps: bool) -> Groups:
    """Place the widest ranks first, heaviest adapters first: every slot is as wide as the widest.

    Parameters
    ----------
    oracle : Oracle
    fill_gaps : bool
        Whether lower ranks may fill what is left of every GPU with wide slots; otherwise only of
        the last one of each rank.
    """
    return _fill_in_turn(oracle, oracle.parts.rank, fill_gaps=fill_gaps)


def best_greedy(oracle: Oracle) -> Groups:
    """Return the placement with fewest GPUs of all greedy ones."""
    tried = (
        grouped_by_rank(oracle, fill_gaps=False),
        grouped_by_rank(oracle, fill_gaps=True),
        first_fit_decreasing(oracle),
    )
    return min(tried, key=len)


def _fill_in_turn(oracle: Oracle, rank: NDArray[np.number], *, fill_gaps: bool) -> Groups:
    """Fill GPUs by falling rank, then load; the others of a rank may be as many as the last."""
    left = np.lexsort((-oracle.parts.rate, -rank))
    groups: Groups = []
    while len(left):
        same = rank[left] == rank[left[0]]
        taken = np.zeros(len(left), bool)
        guess = len(groups[-1]) if groups else 8
        taken[same] = fill(oracle, [], left[same], guess)
        if fill_gaps or taken.sum() == same.sum():
            taken[~same] = fill(oracle, left[taken].tolist(), left[~same], guess=1)
        groups.append(left[taken].tolist())
        left = left[~taken]
    return groups


def fill(oracle: Oracle, inside: Sequence[int], order: Order, guess: int) -> NDArray[np.bool_]:
    """Return which of `order` a GPU with some parts inside takes, first come, first served.

    Parameters
    ----------
    oracle : Oracle
    inside : sequence of int
        Parts that the GPU holds.
    order : int64, shape (n,)
        Parts that want to go there.
    guess : int
        How many will fit, roughly.

    Returns
    -------
    bool, shape (n,)
    """
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
    """Return how many parts at the head of `order` fit in; steps double around the guess."""
    low, high = 0, len(order) + 1
    place, step = min(max(guess, 1), len(order)), 1
    while high - low > 1:
        fits = oracle.serve([*members, *order[:place].tolist()]) is not None
        low, high = (place, high) if fits else (low, place)
        place, step = place + (step if fits else -step), 2 * step
        if not low < place < high:
            place = (low + high) // 2
    return low


def _next_fitting(oracle: Oracle, members: list[int], order: Order, first: int) -> int:
    """Return where the first part from `first` on is that fits in, or the end.

    The lightest one is last; should not even that fit, none does.
    """

    def fits(place: int) -> bool:
        return oracle.serve([*members, int(order[place])]) is not None

    last = len(order) - 1
    if first > last or not fits(last):
        return len(order)
    return bisect_left(range(last), True, lo=first, key=fits)


def improve(oracle: Oracle, groups: Groups, prices: Floats, *, enough: int = 1) -> Groups:
    """Return a placement on as many GPUs or fewer.

    Parameters
    ----------
    oracle : Oracle
    groups : list of list of int
        The oracle accepts each.
    prices : float64, shape (parts,)
        What an adapter takes of a GPU, roughly.
    enough : int
        No fewer GPUs can do.
    """
    rng = np.random.default_rng(0)
    while len(groups) > enough:
        fewer = _empty_one(oracle, groups, prices, rng)
        if fewer is None:
            break
        groups = fewer
    return groups


def _empty_one(
    oracle: Oracle, groups: Groups, prices: Floats, rng: np.random.Generator
) -> Groups | None:
    """Return the groups without the least loaded one, whose parts are in the others, or None."""
    *rest, least = sorted(groups, key=lambda group: -float(prices[group].sum()))
    if not rest:
        return None
    left = _fill_gaps(oracle, rest, np.array(least))
    for _ in range(TRIES):
        if not len(left):
            break
        chosen = rng.choice(len(rest), min(REPACKED, len(rest)), replace=False)
        order = _shuffled(oracle, np.concatenate([left, *(rest[i] for i in chosen)]), rng)
        repacked: Groups = []
        for i in chosen:
            taken = fill(oracle, [], order, len(rest[i]))
            repacked.append(order[taken].tolist())
            order = order[~taken]
        if prices[order].sum() < prices[left].sum() and all(repacked):
            for i, group in zip(chosen, repacked, strict=True):
                rest[i] = group
            left = _fill_gaps(oracle, rest, order)
    return None if len(left) else rest


def _fill_gaps(oracle: Oracle, rest: Groups, left: Order) -> Order:
    """Put parts into gaps of the GPUs, the least loaded first, in place; return those left over."""
    order = left[np.argsort(-oracle.parts.rate[left], kind="stable")]
    for i in reversed(range(len(rest))):
        if len(order):
            taken = fill(oracle, rest[i], order, guess=1)
            rest[i] = rest[i] + order[taken].tolist()
            order = order[~taken]
    return order


def _shuffled(oracle: Oracle, pool: Order, rng: np.random.Generator) -> Order:
    """Return parts by falling load, more or less; half the times the widest ranks first."""
    parts = oracle.parts
    load = parts.rate[pool] * np.exp(NOISE * rng.standard_normal(len(pool)))
    rank = parts.rank[pool] if rng.random() < 0.5 else np.zeros(len(pool))
    return pool[np.lexsort((-load, -rank))]
