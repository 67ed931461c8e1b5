"""Placement on several kinds of GPU: each is filled with what it serves cheaply, then repacked.

A part is worth what it costs on the kind where that is least, by the prices that prove the lower
bound (`adapter_twin.fleet.proof.bound.prices_on`). GPUs are filled one after the other: each kind
is offered all that is left, first what is nowhere cheaper, and the one that takes the highest worth
for its cost is bought. The search then takes some GPUs out, most often those with the least worth
for their cost, and buys others for what was on them; what costs less is kept.
"""

from collections.abc import Sequence

import numpy as np

from adapter_twin.fleet.kinds import Group, Kinds
from adapter_twin.fleet.packing import NOISE, Order, best_greedy, fill, improve
from adapter_twin.workload.lengths import Floats

TRIES = 40
"""The search ends when GPUs were bought anew this many times without success."""

MOST_REPACKED = 3
"""As many GPUs are taken out at a time, or fewer."""

GAPS = 6
"""As many of the other GPUs are looked at for gaps."""

LEAST = 1e-3
"""A part is worth as much of a GPU at least; what proves the bound may leave some out."""

DEARER = 0.05
"""Parts whose cost on a kind exceeds the least one by less than this share are sorted alike."""


def few(kinds: Kinds, prices: Floats, least_cost: float) -> list[Group] | None:
    """Return a placement on few GPUs, or cheap ones; None where none is found.

    Parameters
    ----------
    kinds : Kinds
    prices : float64, shape (kinds, parts)
        See `adapter_twin.fleet.proof.bound.prices_on`.
    least_cost : float
        No placement costs less.
    """
    shop = _Shop(kinds, prices)
    starts = [shop.buy(range(prices.shape[1]), []), *shop.of_one_kind()]
    found = [groups for groups in starts if groups is not None]
    if not found:
        return None
    best = min(found, key=shop.merit)
    rng = np.random.default_rng(0)
    tries = 0
    while tries < TRIES and kinds.cost(best) > least_cost * (1 + 1e-9):
        tries += 1
        other = shop.bought_anew(best, rng)
        if other is not None and shop.merit(other) < shop.merit(best):
            tries = 0 if kinds.cost(other) < kinds.cost(best) else tries
            best = other
    return best


class _Shop:
    """Buys GPUs for parts."""

    def __init__(self, kinds: Kinds, prices: Floats) -> None:
        self.kinds = kinds
        costs = kinds.costs[:, None] * np.maximum(prices, LEAST)
        self.prices, self.worth = prices, costs.min(axis=0)
        self.dearer = np.floor(np.log(costs / self.worth) / DEARER)

    def merit(self, groups: Sequence[Group]) -> tuple[float, float, float]:
        """Return what to make small: the cost, then the price, then how even the GPUs are."""
        worths = [float(self.worth[group.parts].sum()) for group in groups]
        price = sum(self.kinds.prices[group.kind] for group in groups)
        return self.kinds.cost(groups), price, -float(np.square(worths).sum())

    def of_one_kind(self) -> list[list[Group] | None]:
        """Return placements on GPUs of each kind alone."""
        found = list[list[Group] | None]()
        for kind, oracle in enumerate(self.kinds.oracles):
            if not oracle.takes().all():
                continue
            fewest = best_greedy(oracle)
            if any(oracle.serve(parts) is None for parts in fewest):
                continue
            fewest = improve(oracle, fewest, self.prices[kind])
            if len(fewest) <= self.kinds.available[kind]:
                found.append([Group(kind, parts) for parts in fewest])
        return found

    def buy(
        self,
        parts: Sequence[int] | Order,
        groups: Sequence[Group],
        rng: np.random.Generator | None = None,
    ) -> list[Group] | None:
        """Return GPUs for some parts; None where too few are to be had.

        Parameters
        ----------
        parts : sequence of int
        groups : sequence of Group
            GPUs that are bought already.
        rng : numpy.random.Generator, optional
            Shuffles the order.
        """
        left, bought = np.array(parts, np.int64), list[Group]()
        while len(left):
            offers = list[Group]()
            for kind in self.kinds.with_room([*groups, *bought]):
                order = self._order(kind, left, rng)
                if not len(order):
                    continue
                taken = order[fill(self.kinds.oracles[kind], [], order, guess=8)]
                if len(taken):
                    offers.append(Group(kind, taken.tolist()))
            if not offers:
                return None
            bought.append(max(offers, key=self._worth_for_cost))
            left = left[~np.isin(left, bought[-1].parts)]
        return bought

    def bought_anew(self, groups: list[Group], rng: np.random.Generator) -> list[Group] | None:
        """Return the groups with some of them bought anew, after others have filled their gaps."""
        poorest = np.argsort([self._worth_for_cost(group) for group in groups])
        count = int(rng.integers(1, min(MOST_REPACKED, len(groups)) + 1))
        weights = 1.0 / np.arange(1, len(groups) + 1)
        out = poorest[rng.choice(len(groups), count, replace=False, p=weights / weights.sum())]
        rest = [group for k, group in enumerate(groups) if k not in out]
        left = np.concatenate([np.array(groups[k].parts) for k in out])
        if rng.random() < 0.5:
            for k in rng.permutation(len(rest))[:GAPS].tolist():
                rest[k], left = self._gap_filled(rest[k], left)
        bought = self.buy(left, rest, rng)
        return None if bought is None else rest + bought

    def _gap_filled(self, group: Group, left: Order) -> tuple[Group, Order]:
        """Return a GPU with what it takes of some parts, and the others."""
        order = self._order(group.kind, left)
        if not len(order):
            return group, left
        taken = order[fill(self.kinds.oracles[group.kind], group.parts, order, guess=1)]
        more = Group(group.kind, group.parts + taken.tolist())
        return more, left[~np.isin(left, taken)]

    def _worth_for_cost(self, group: Group) -> float:
        return float(self.worth[group.parts].sum() / self.kinds.costs[group.kind])

    def _order(self, kind: int, parts: Order, rng: np.random.Generator | None = None) -> Order:
        """Return parts that a kind takes: those nowhere cheaper, the widest, the heaviest first."""
        parts = parts[np.isfinite(self.prices[kind, parts])]
        own = self.kinds.oracles[kind].parts
        load, rank, dearer = own.rate[parts], own.rank[parts], self.dearer[kind, parts]
        if rng is not None:
            load = load * np.exp(NOISE * rng.standard_normal(len(parts)))
            rank = rank if rng.random() < 0.5 else np.zeros_like(rank)
            dearer = dearer if rng.random() < 0.5 else np.zeros_like(dearer)
        return parts[np.lexsort((-load, -rank, dearer))]
