"""The pieces of a campaign, and the order in which they are measured."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from adapter_twin.measure.campaign import Campaign, draw_trace
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure.micro_plan import MicroPlan
from adapter_twin.measure.run_tables import serving_columns
from adapter_twin.workload.scenario import Workload
from adapter_twin.workload.trace import Trace


@dataclass(frozen=True, slots=True)
class MicroPiece:
    """One engine's micro-profile.

    Attributes
    ----------
    piece_id : str
    flags : EngineFlags
    plan : MicroPlan
    adapter_ranks : tuple of int
        Rank of every adapter that the plan needs.
    seed : int
    """

    piece_id: str
    flags: EngineFlags
    plan: MicroPlan
    adapter_ranks: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class ServingPiece:
    """One serving run.

    Attributes
    ----------
    piece_id : str
    flags : EngineFlags
        Of its server.
    workload : Workload
    seed : int
        Of its traffic.
    columns : dict
        What its row of the table ``runs`` says of it, whatever will be measured.
    """

    piece_id: str
    flags: EngineFlags
    workload: Workload
    seed: int
    columns: dict[str, Any]

    @property
    def adapter_ranks(self) -> tuple[int, ...]:
        """Rank of every adapter that is served."""
        return tuple(adapter.rank for adapter in self.workload.adapters)

    @property
    def server(self) -> Hashable:
        """What decides a server: runs with equal ones can share it."""
        return self.flags, self.adapter_ranks

    def trace(self) -> Trace:
        """Draw the requests: those that the twin draws from the same seed."""
        return draw_trace(self.workload, self.seed)


Piece = MicroPiece | ServingPiece


def groups(campaign: Campaign) -> list[list[Piece]]:
    """Return the pieces that share one engine, in the random order in which engines start.

    The order follows from the campaign's seed, so that a drift of the machine meets all factors
    alike, and a resumed campaign goes on in the same order.
    """
    rng = np.random.default_rng(campaign.seed)
    engines: list[list[Piece]] = [[piece] for piece in _micro_pieces(campaign)]
    for _, shared in groupby(_serving_pieces(campaign), key=lambda piece: piece.server):
        runs = list(shared)
        engines.append([runs[place] for place in rng.permutation(len(runs))])
    return [engines[place] for place in rng.permutation(len(engines))]


def _micro_pieces(campaign: Campaign) -> list[MicroPiece]:
    if campaign.micro is None:
        return []
    micro = campaign.micro
    return [
        MicroPiece(
            piece_id=f"micro-{index:02d}",
            flags=campaign.sized(flags),
            plan=micro.plan,
            adapter_ranks=micro.adapter_ranks(),
            seed=campaign.seed + index,
        )
        for index, flags in enumerate(micro.engines)
    ]


def _serving_pieces(campaign: Campaign) -> list[ServingPiece]:
    """Return the serving runs, those of equal servers next to each other."""
    runs = campaign.serving.runs if campaign.serving else ()
    in_order = sorted(
        range(len(runs)),
        key=lambda index: (
            runs[index].served_adapters,
            runs[index].adapter_slots,
            runs[index].max_lora_rank,
            runs[index].ranks,
        ),
    )
    return [
        ServingPiece(
            piece_id=f"run-{index:03d}-{repeat}",
            flags=campaign.flags(index),
            workload=campaign.workload(index),
            seed=campaign.run_seed(index),
            columns=_columns(campaign, index, repeat),
        )
        for index in in_order
        for repeat in range(runs[index].repeats)
    ]


def _columns(campaign: Campaign, index: int, repeat: int) -> dict[str, Any]:
    """Return what the table ``runs`` says of a serving run before it is measured."""
    assert campaign.serving is not None
    run, workload = campaign.serving.runs[index], campaign.workload(index)
    return {
        "run_id": f"{campaign.name}/run-{index:03d}-{repeat}",
        "campaign": campaign.name,
        "model": campaign.model_name,
        **serving_columns(campaign.flags(index), workload, run.rates, run.ranks),
        "held_out": run.held_out,
        "repeat": repeat,
        "seed": campaign.run_seed(index),
        "source_path": f"serving.runs[{index}]",
    }
