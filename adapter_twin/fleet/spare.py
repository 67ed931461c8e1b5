"""What it costs to bear the loss of any one GPU.

The loss of a GPU is borne by the others where each of its adapters has copies there and these GPUs,
as they are, still serve with its requests on top: they go to the copies by their shares. Where that
is not so, a spare GPU has to start in its place, with all its adapters, and nothing else moves. One
GPU is lost at a time, so that one spare serves for several, if its kind serves what each of these
held. What fits into gaps of the others is not counted on: adapters would have to move.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

from adapter_twin.fleet.hold import Held
from adapter_twin.fleet.kinds import Group
from adapter_twin.fleet.placement import ReplicaPlan


def spare(held: Held) -> dict[str, Any] | None:
    """Return the cheapest GPUs to keep ready for the loss of any one.

    Returns
    -------
    dict or None
        ``gpus``, the ``kinds`` of these and their ``price_per_hour``, 0 without prices; ``borne``,
        of how many GPUs the others bear the loss. None where no such GPUs are available.
    """
    kinds, plans = held.kinds, held.placement.replicas
    needed = [_replacing(held, lost) for lost in range(len(plans)) if not _is_borne(held, lost)]
    room = kinds.with_room([Group(plan.kind, []) for plan in plans])
    sets = chain.from_iterable(combinations(room, size) for size in range(len(room) + 1))
    enough = [chosen for chosen in sets if all(own.intersection(chosen) for own in needed)]
    if not enough:
        return None
    cheapest = min(enough, key=lambda chosen: kinds.costs[list(chosen)].sum())
    return {
        "gpus": len(cheapest),
        "kinds": [kinds.oracles[kind].calibration.gpu for kind in cheapest],
        "price_per_hour": float(kinds.prices[list(cheapest)].sum()),
        "borne": len(plans) - len(needed),
    }


def _replacing(held: Held, lost: int) -> set[int]:
    """Return the kinds that serve all that a GPU does; its own is known to."""
    plan = held.placement.replicas[lost]
    oracles = enumerate(held.kinds.oracles)
    return {plan.kind} | {kind for kind, oracle in oracles if oracle.serves_all_of(plan)}


def _is_borne(held: Held, lost: int) -> bool:
    """Return whether the others serve what a GPU does, as they are."""
    gone = held.placement.replicas[lost]
    lost_share = dict(zip(gone.adapters, gone.shares, strict=True))
    if any(share >= 1 for share in lost_share.values()):
        return False
    others = (plan for k, plan in enumerate(held.placement.replicas) if k != lost)
    return all(
        held.kinds.oracles[plan.kind].serve_plan(plan) is not None
        for plan in _with_more(others, lost_share)
    )


def _with_more(plans: Iterator[ReplicaPlan], lost: dict[int, float]) -> Iterator[ReplicaPlan]:
    """Yield the GPUs that get requests of a lost one, with these."""
    for plan in plans:
        if not lost.keys().isdisjoint(plan.adapters):
            shares = tuple(
                min(share / (1 - lost.get(adapter, 0.0)), 1.0)
                for adapter, share in zip(plan.adapters, plan.shares, strict=True)
            )
            yield replace(plan, shares=shares)
