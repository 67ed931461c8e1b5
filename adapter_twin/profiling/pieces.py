"""The pieces of a campaign, and the order in which they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from adapter_twin.profiling.campaign import Campaign, ServingRun
from adapter_twin.profiling.engine_flags import EngineFlags


@dataclass(frozen=True, slots=True)
class MicroPiece:
    """One engine's micro-profile; `index` counts the engines of the campaign file."""

    piece_id: str
    flags: EngineFlags
    index: int


@dataclass(frozen=True, slots=True)
class ServingPiece:
    """One serving run; `index` counts the runs of the campaign file."""

    piece_id: str
    flags: EngineFlags
    run: ServingRun
    index: int
    repeat: int


def groups(campaign: Campaign) -> list[list[MicroPiece | ServingPiece]]:
    """Return the pieces that share one engine, in the random order in which engines start.

    The order follows from the campaign's seed, so that a drift of the machine meets all factors
    alike, and a resumed campaign goes on in the same order.
    """
    rng = np.random.default_rng(campaign.seed)
    engines: list[list[MicroPiece | ServingPiece]] = []
    if campaign.micro is not None:
        engines += [
            [MicroPiece(f"micro-{index:02d}", flags, index)]
            for index, flags in enumerate(campaign.micro.engines)
        ]
    serving = _serving_pieces(campaign)
    for _, shared in groupby(sorted(serving, key=_server_key), key=_server_key):
        runs = list(shared)
        engines.append([runs[place] for place in rng.permutation(len(runs))])
    return [engines[place] for place in rng.permutation(len(engines))]


def _serving_pieces(campaign: Campaign) -> list[ServingPiece]:
    runs = campaign.serving.runs if campaign.serving else ()
    return [
        ServingPiece(f"run-{index:03d}-{repeat}", run.flags(campaign.engine), run, index, repeat)
        for index, run in enumerate(runs)
        for repeat in range(run.repeats)
    ]


def _server_key(piece: ServingPiece) -> tuple[Any, ...]:
    """Return what decides a server: runs with the same key share one."""
    run = piece.run
    return (run.served_adapters, run.adapter_slots, run.max_lora_rank, run.ranks)
