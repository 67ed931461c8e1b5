"""Rivals' placements with k copies of each adapter: rendezvous hashing, and minimum-cost flow.

Both keep each adapter on ``fleet.copies`` GPUs at least, and are blind to ranks. They get the
fewest GPUs of which none starves by the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.kinds import Kinds
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups
from adapter_twin.fleet.strategies import best
from adapter_twin.workload.gpu_fleet import GpuFleet
from study.baselines import all_fit, least_gpus
from study.placement_scenarios import PlacementScenario

Dealing = Callable[[Oracle, int], Groups]
Ints = NDArray[np.int64]

MOST_GPUS = 1000
"""No more are tried."""


def rendezvous(oracle: Oracle) -> Groups:
    """Place by hashing: each adapter on the GPUs with its highest scores (Thaler and Ravishankar).

    Loads do not count, but adding a GPU moves no more adapters than it gets.

    Returns
    -------
    list of list of int
        Indices into ``oracle.parts``, one list per GPU.
    """
    return _fewest(oracle, hashed)


def min_cost_flow(oracle: Oracle) -> Groups:
    """Place by a flow of least cost: loads are even, and adapters stay where hashing has them.

    Each GPU takes its fair number of parts. A part costs nothing on a GPU of its hashing, and
    elsewhere the more the lower that GPU's score.

    Returns
    -------
    list of list of int
        Indices into ``oracle.parts``, one list per GPU.
    """
    return _fewest(oracle, balanced)


def hashed(oracle: Oracle, gpus: int) -> Groups:
    """Deal parts to a number of GPUs by their scores, those of one adapter to different ones."""
    rank, groups = _ranks(oracle, gpus), [list[int]() for _ in range(gpus)]
    for part, copy in enumerate(_copies(oracle)):
        groups[int(np.flatnonzero(rank[oracle.parts.adapter[part]] == copy)[0])].append(part)
    return groups


def balanced(oracle: Oracle, gpus: int) -> Groups:
    """Deal parts to a number of GPUs, as many to each, with the least change from hashing.

    The linear program of a flow has whole numbers as its solution.
    """
    adapters, copies = np.unique(oracle.parts.adapter, return_counts=True)
    rank = _ranks(oracle, gpus)[adapters]
    cost = np.maximum(rank - copies[:, None] + 1, 0).ravel()
    adapter, gpu = np.divmod(np.arange(len(cost)), gpus)
    given, column = np.ones(len(cost)), np.arange(len(cost))
    room = np.full(gpus, -(-len(oracle.parts) // gpus))
    solution = linprog(
        cost,
        A_ub=coo_array((given, (gpu, column))),
        b_ub=room,
        A_eq=coo_array((given, (adapter, column))),
        b_eq=copies,
        bounds=(0, 1),
        method="highs-ds",
    )
    chosen = np.rint(solution.x).astype(bool).reshape(len(adapters), gpus)
    groups, parts = [list[int]() for _ in range(gpus)], oracle.parts.adapter
    for own, where in zip(adapters, chosen, strict=True):
        homes = np.flatnonzero(where).tolist()
        for home, part in zip(homes, np.flatnonzero(parts == own).tolist(), strict=True):
            groups[home].append(part)
    return groups


def compare_rivals(drawn: Iterable[PlacementScenario], copies: int) -> pd.DataFrame:
    """Return the GPUs that scenarios take by both rivals and by `place`, with the same copies.

    Parameters
    ----------
    drawn : iterable of PlacementScenario
    copies : int
        Of each adapter.

    Returns
    -------
    pandas.DataFrame
        A row per scenario: ``name``, ``bound``, and the GPUs by ``rendezvous``, ``min_cost_flow``
        and ``placed``, all by the oracle alone.
    """
    rows = []
    for scenario in drawn:
        kinds = Kinds.of(replace(scenario.demand, fleet=GpuFleet(copies=copies)))
        groups, bound = best(kinds)
        (oracle,) = kinds.oracles
        rivals = {method.__name__: len(method(oracle)) for method in (rendezvous, min_cost_flow)}
        rows.append({"name": scenario.name, "bound": bound.gpus} | rivals | {"placed": len(groups)})
    return pd.DataFrame(rows)


def _ranks(oracle: Oracle, gpus: int) -> Ints:
    """Return for each adapter the place of every GPU among its scores, the highest first."""
    scores = [
        [_score(f"{adapter.name}/{gpu}") for gpu in range(gpus)]
        for adapter in oracle.demand.adapters
    ]
    return np.argsort(np.argsort(-np.array(scores), axis=1), axis=1)


def _score(text: str) -> float:
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def _copies(oracle: Oracle) -> list[int]:
    """Return the number of each part among those of its adapter, from 0 on."""
    adapter = oracle.parts.adapter
    counted: list[int] = (np.arange(len(adapter)) - np.searchsorted(adapter, adapter)).tolist()
    return counted


def _fewest(oracle: Oracle, deal: Dealing) -> Groups:
    """Return the parts dealt to the fewest GPUs of which none starves."""
    copies = int(np.bincount(oracle.parts.adapter).max())
    for gpus in range(max(copies, least_gpus(oracle)), MOST_GPUS):
        groups = [group for group in deal(oracle, gpus) if group]
        if all_fit(oracle, groups):
            return groups
    raise AdapterTwinError(f"adapters: {MOST_GPUS} GPUs do not serve them; lower replicate_above")
