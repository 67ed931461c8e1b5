"""The pieces of a campaign, and the order in which they are measured."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from adapter_twin.measure.campaign import Campaign, draw_trace
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure.micro_plan import MicroPlan
from adapter_twin.workload.scenario import Workload
from adapter_twin.workload.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPiece:
    """One serving run.

    Attributes
    ----------
    campaign, piece_id : str
    flags : EngineFlags
        Of its server.
    workload : Workload
    rates, ranks : sequence of float and of int
        Dealt over the adapters.
    seed : int
        Of its traffic.
    told : dict
        Further columns of its row in the table ``runs``.
    """

    campaign: str
    piece_id: str
    flags: EngineFlags
    workload: Workload
    rates: Sequence[float]
    ranks: Sequence[int]
    seed: int
    told: dict[str, Any]

    @property
    def adapter_ranks(self) -> tuple[int, ...]:
        """Rank of every adapter that is served."""
        return tuple(adapter.rank for adapter in self.workload.adapters)

    @property
    def server(self) -> Hashable:
        """What decides a server: runs with equal ones can share it."""
        return self.flags, self.adapter_ranks

    @property
    def run_id(self) -> str:
        """Name of the run in all tables."""
        return f"{self.campaign}/{self.piece_id}"

    def columns(self) -> dict[str, Any]:
        """Return what its row of the table ``runs`` says, whatever will be measured.

        Means of lengths are the distribution's: a prediction must not need the traffic drawn.
        """
        flags, lengths = self.flags, self.workload.lengths
        return {
            "run_id": self.run_id,
            "campaign": self.campaign,
            "rates_per_adapter": _joined(self.rates),
            "ranks": _joined(self.ranks),
            "served_adapters": flags.max_cpu_loras,
            "adapter_slots": flags.max_loras,
            "max_lora_rank": flags.max_lora_rank,
            "max_num_seqs": flags.max_num_seqs,
            "max_num_batched_tokens": flags.max_num_batched_tokens,
            "max_model_len": flags.max_model_len,
            "mean_input_tokens": lengths.mean_input_tokens,
            "mean_requested_output_tokens": lengths.mean_output_tokens,
            "length_distribution": lengths.distribution,
            "length_cv": lengths.cv,
            "offered_request_rate": self.workload.offered_request_rate,
            "seed": self.seed,
            **self.told,
        }

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
    micro = campaign.micro
    if micro is None:
        return []
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
    runs = enumerate(campaign.serving.runs if campaign.serving else ())
    pieces = [
        ServingPiece(
            campaign=campaign.name,
            piece_id=f"run-{index:03d}-{repeat}",
            flags=campaign.flags(index),
            workload=campaign.workload(index),
            rates=run.rates,
            ranks=run.ranks,
            seed=campaign.run_seed(index),
            told={
                "model": campaign.model_name,
                "held_out": run.held_out,
                "repeat": repeat,
                "source_path": f"serving.runs[{index}]",
            },
        )
        for index, run in runs
        for repeat in range(run.repeats)
    ]
    return sorted(pieces, key=_place)


def _place(piece: ServingPiece) -> tuple[Any, ...]:
    flags = piece.flags
    return flags.max_cpu_loras, flags.max_loras, flags.max_lora_rank, piece.ranks


def _joined(values: Sequence[float]) -> str:
    """Join numbers without exponents, which the tables do not know."""
    return "-".join(np.format_float_positional(value, trim="-") for value in values)
