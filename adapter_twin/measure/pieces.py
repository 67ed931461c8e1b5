"""The pieces of a campaign, and the order in which they are measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np

from adapter_twin.errors import require
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure.micro_plan import MicroPlan
from adapter_twin.tables.datasets import sharegpt_lengths
from adapter_twin.workload.scenario import Workload
from adapter_twin.workload.trace import Trace, generate, generators


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

    Raises
    ------
    AdapterTwinError
        It would send no request, or one that is too long for the engine.
    """

    campaign: str
    piece_id: str
    flags: EngineFlags
    workload: Workload
    rates: Sequence[float]
    ranks: Sequence[int]
    seed: int
    told: dict[str, Any]

    def __post_init__(self) -> None:
        trace, most = self.trace(), self.flags.max_model_len
        require(len(trace) > 0, "rates: not one request falls into the window; raise the rates")
        longest = int((trace.prompt_tokens + trace.output_tokens).max())
        require(
            longest <= most,
            f"rates: a request of {longest} tokens exceeds engine.max_model_len = {most}; "
            "raise it or lower the lengths",
        )

    @property
    def adapter_ranks(self) -> tuple[int, ...]:
        """Rank of every adapter that is served."""
        return tuple(adapter.rank for adapter in self.workload.adapters)

    @property
    def server(self) -> tuple[Any, ...]:
        """What decides a campaign's server: runs with equal ones share it."""
        flags = self.flags
        return flags.max_cpu_loras, flags.max_loras, flags.max_lora_rank, self.adapter_ranks

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
        """Draw the requests that a client sends: those that the twin draws from the same seed."""
        is_sharegpt = self.workload.lengths.distribution == "sharegpt"
        marginals = sharegpt_lengths() if is_sharegpt else None
        return generate(self.workload, generators(self.seed)[0], marginals)


Piece = MicroPiece | ServingPiece


def groups(pieces: Sequence[Piece], seed: int) -> list[list[Piece]]:
    """Return the pieces that share one engine, in the random order in which engines start.

    The order follows from the campaign's seed, so that a drift of the machine meets all factors
    alike, and a resumed campaign goes on in the same order.
    """
    rng = np.random.default_rng(seed)
    engines: list[list[Piece]] = [[piece] for piece in pieces if isinstance(piece, MicroPiece)]
    runs = [piece for piece in pieces if isinstance(piece, ServingPiece)]
    by_server = attrgetter("server")
    for _, shared in groupby(sorted(runs, key=by_server), by_server):
        own = list(shared)
        engines.append([own[place] for place in rng.permutation(len(own))])
    return [engines[place] for place in rng.permutation(len(engines))]


def _joined(values: Sequence[float]) -> str:
    """Join numbers without exponents, which the tables do not know."""
    return "-".join(np.format_float_positional(value, trim="-") for value in values)
