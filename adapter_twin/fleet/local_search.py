"""Fewer GPUs from a placement: empty the one that holds least, by repacking others at random.

What the least loaded GPU holds is first spread over the gaps of the others. While some of it is
left, two other GPUs are emptied too and filled again in a different order; where that leaves less,
it is kept. "Less" is by the prices that prove the lower bound (`adapter_twin.fleet.proof.bound`):
they weigh the load of an adapter against the slot time that it takes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups, fill

Floats = NDArray[np.float64]

NOISE = 0.5
"""Of the logarithm of loads, by which adapters are sorted differently."""

REPACKED = 2
TRIES = 40
"""Times that GPUs are repacked without success before the search ends."""


def improve(
    oracle: Oracle,
    groups: Groups,
    prices: Floats,
    *,
    enough: int = 1,
    tries: int = TRIES,
    seed: int = 0,
) -> Groups:
    """Return a placement on as many GPUs or fewer.

    Parameters
    ----------
    oracle : Oracle
    groups : list of list of int
        Indices into ``oracle.parts``; the oracle accepts each.
    prices : float64, shape (parts,)
        What an adapter takes of a GPU, roughly.
    enough : int
        No fewer GPUs can do.
    tries : int
        For each GPU that is to be emptied.
    seed : int

    Returns
    -------
    list of list of int
    """
    rng = np.random.default_rng(seed)
    while len(groups) > enough:
        fewer = _empty_one(oracle, groups, prices, tries, rng)
        if fewer is None:
            return groups
        groups = fewer
    return groups


def _empty_one(
    oracle: Oracle, groups: Groups, prices: Floats, tries: int, rng: np.random.Generator
) -> Groups | None:
    """Return the groups without the least loaded one, whose parts are in the others, or None."""
    ordered = sorted(groups, key=lambda group: -float(prices[group].sum()))
    rest, left = [list(group) for group in ordered[:-1]], list(ordered[-1])
    if not rest:
        return None
    left = _spread(oracle, rest, left)
    for _ in range(tries):
        if not left:
            return rest
        chosen = rng.choice(len(rest), min(REPACKED, len(rest)), replace=False)
        pool = np.array(left + [part for i in chosen for part in rest[i]])
        order = _shuffled(oracle, pool, rng)
        repacked: Groups = []
        for i in chosen:
            taken = fill(oracle, [], order, len(rest[i]))
            repacked.append(order[taken].tolist())
            order = order[~taken]
        if prices[order].sum() < prices[left].sum() and all(repacked):
            for i, group in zip(chosen, repacked, strict=True):
                rest[i] = group
            left = _spread(oracle, rest, order.tolist())
    return None if left else rest


def _spread(oracle: Oracle, rest: Groups, left: list[int]) -> list[int]:
    """Put parts into gaps of the other GPUs, in place; return those that found none."""
    order = np.array(left, np.int64)
    order = order[np.argsort(-oracle.parts.rate[order], kind="stable")]
    for i in range(len(rest) - 1, -1, -1):  # the least loaded first
        if not len(order):
            break
        taken = fill(oracle, rest[i], order, guess=1)
        rest[i] = rest[i] + order[taken].tolist()
        order = order[~taken]
    return [int(part) for part in order]


def _shuffled(
    oracle: Oracle, pool: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return parts by falling load, more or less; half the times the widest ranks first."""
    parts = oracle.parts
    load = parts.rate[pool] * np.exp(NOISE * rng.standard_normal(len(pool)))
    rank = parts.rank[pool] if rng.random() < 0.5 else np.zeros(len(pool))
    return pool[np.lexsort((-load, -rank))]
