"""The pieces of a campaign, and the order in which they are measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np

from adapter_twin.errors import require
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure.micro_plan import MicroPlan
from adapter_twin.plan.logged import lengths_of
from adapter_twin.tables.datasets import sharegpt_lengths
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.request_log import BASE_MODEL, read_requests
from adapter_twin.workload.trace import Trace, generate, generators, trace_of
from adapter_twin.workload.traffic import Arrivals, Lengths, Workload


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
        source = "rates" if self.workload.arrivals.path is None else "request_log"
        longest = int((trace.prompt_tokens + trace.output_tokens).max())
        require(
            longest <= most,
            f"{source}: a request of {longest} tokens exceeds engine.max_model_len = {most}; "
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
        flags, lengths, log = self.flags, self.workload.lengths, self.workload.arrivals.path
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
            **({} if log is None else {"request_log": log}),
            **self.told,
        }

    def trace(self) -> Trace:
        """Draw the requests that a client sends: those that the twin draws from the same seed."""
        is_sharegpt = self.workload.lengths.distribution == "sharegpt"
        marginals = sharegpt_lengths() if is_sharegpt else None
        return generate(self.workload, generators(self.seed)[0], marginals)


def as_logged(path: str, adapters: Sequence[Adapter], duration_s: float, seed: int) -> Workload:
    """Return the traffic of a log's begin, with the mean rates and lengths that it has there.

    Parameters
    ----------
    path : str
    adapters : sequence of Adapter
        Their rates deal out a log that names none.
    duration_s : float
        Requests later than this after the log's zero are left out.
    seed : int

    Raises
    ------
    AdapterTwinError
        The log cannot be read, or holds what the client cannot send as it was.
    """
    told = read_requests(path)
    rated = told.adapter is None or not any(adapter.request_rate for adapter in adapters)
    require(rated, "rates: the request_log tells; leave them out")
    trace = trace_of(told, path, adapters, rng=generators(seed)[0])
    require(not trace.waits, "request_log: the client waits for no answers; leave sessions out")
    require(
        trace.contents is None, "request_log: the client's prompts share nothing; leave hashes out"
    )
    trace = trace.take(np.arange(np.searchsorted(trace.arrival_s, duration_s)))
    require(len(trace) > 0, "request_log: not one request falls into the window; raise duration_s")
    counts = np.bincount(trace.adapter[trace.adapter != BASE_MODEL], minlength=len(adapters))
    rates = counts / duration_s
    if told.adapter is None:  # as they deal it again
        shares = np.array([adapter.request_rate for adapter in adapters])
        shares = shares if shares.sum() > 0 else np.ones(len(adapters))
        rates = len(trace) / duration_s * shares / shares.sum()
    return Workload(
        adapters=tuple(
            replace(adapter, request_rate=rate)
            for adapter, rate in zip(adapters, rates.tolist(), strict=True)
        ),
        duration_s=duration_s,
        lengths=Lengths(**lengths_of(trace)),
        arrivals=Arrivals(process="trace", path=path),
        base_model_request_rate=float((trace.adapter == BASE_MODEL).sum() / duration_s),
    )


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
