"""Records of a simulated run, as the load-generating client would have seen it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin import __version__
from adapter_twin.twin.policy import VLLM, Policy
from adapter_twin.twin.session import Session
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.scenario import config_hash
from adapter_twin.workload.trace import BASE_MODEL
from adapter_twin.workload.traffic import Workload

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

OUTPUT_SLICE = 128
"""vLLM's ``VLLM_V1_OUTPUT_PROC_CHUNK_SIZE``: requests whose tokens are handed on at once."""


@dataclass(frozen=True, slots=True)
class Records:
    """One entry per request, in order of arrival; times in seconds from the window's start.

    Attributes
    ----------
    arrival_s, scheduled_s, first_token_s, end_s : float64
        NaN where it did not happen in the window. Tokens are timed at the client.
    adapter : int32
        Index into the workload's adapters; -1 is the base model.
    prompt_tokens, output_tokens : int32
        Output tokens are those that the engine emits in full.
    preemptions : int32
    load_wait_s : float64
        Time for which the request's own adapter was loaded.
    rejected : bool
        The client had too many requests in flight to send it, or it was refused.
    refused : bool
        It is longer than the engine's ``max_model_len``.
    cached_tokens : int32
        Prompt tokens found in the prefix cache as the request was first scheduled; -1 where it was
        not, or prefixes are not cached.
    """

    arrival_s: Floats
    adapter: NDArray[np.int32]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    scheduled_s: Floats
    first_token_s: Floats
    end_s: Floats
    preemptions: NDArray[np.int32]
    load_wait_s: Floats
    rejected: NDArray[np.bool_]
    refused: NDArray[np.bool_]
    cached_tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __getitem__(self, chosen: NDArray[np.bool_] | slice) -> Records:
        """Return some of the requests."""
        return Records(*(getattr(self, column.name)[chosen] for column in fields(self)))

    def to_frame(self) -> pd.DataFrame:
        """Return the records as a table."""
        import pandas as pd

        return pd.DataFrame({column.name: getattr(self, column.name) for column in fields(self)})


@dataclass(frozen=True, slots=True)
class Gaps:
    """Inter-token gaps of the completed requests: `count` gaps of `gap_s` that end at `end_s`."""

    gap_s: Floats
    count: NDArray[np.int64]
    end_s: Floats


def _leaves_front_end_s(session: Session, time_s: Floats) -> Floats:
    """Return when tokens of the engine leave the front end, which may be paused."""
    pauses = session.pauses[: session.clock.pauses]
    if len(pauses) == 0:
        return time_s
    last = np.searchsorted(pauses.start_s, time_s, side="right") - 1
    paused_until_s = np.where(last >= 0, pauses.end_s[last], -np.inf)
    return np.fmax(time_s, np.where(np.isnan(time_s), np.nan, paused_until_s))


def make_records(session: Session, overhead_s: Floats) -> Records:
    """Turn the engine's times into the client's; requests that never came are left out.

    Parameters
    ----------
    session : Session
        A finished run.
    overhead_s : float64, shape (2,)
        Time in the front end: a constant, and seconds per running request.
    """
    requests = session.requests
    emitted = np.flatnonzero(requests.first_step >= 0)
    running = session.steps.running[requests.first_step[emitted]]
    delay_s = overhead_s[0] + overhead_s[1] * running

    def at_client_s(engine_s: Floats) -> Floats:
        told_s = np.full(len(engine_s), np.nan)
        told_s[emitted] = _leaves_front_end_s(session, engine_s[emitted]) + delay_s
        return told_s

    told = {column.name for column in fields(Records)} - {"refused"}
    is_base_model = requests.adapter == session.limits.base_model
    columns = {name: getattr(requests, name) for name in told}
    columns |= {
        "adapter": np.where(is_base_model, BASE_MODEL, requests.adapter),
        "first_token_s": at_client_s(requests.first_token_s),
        "end_s": at_client_s(requests.end_s),
        "refused": requests.prompt_tokens + requests.output_tokens > session.limits.max_model_len,
    }
    records, loop = Records(**columns), session.closed_loop
    return records if loop is None else records[: loop.count.sent]


def make_gaps(session: Session) -> Gaps:
    """Collect the inter-token gaps of the completed requests.

    A decoding request gets a token from every step, so the gaps are the steps' intervals, weighted
    by the requests that decode. Tokens that pile up while the front end is paused leave it
    together. A preempted request adds the gap until its next token (the mean one, if it was
    preempted more than once), told as if it ended with the request.
    """
    requests, steps = session.requests, session.steps[: session.clock.steps]
    if len(steps) == 0:
        return Gaps(np.empty(0), np.empty(0, np.int64), np.empty(0))
    count = steps.decodes.astype(np.int64)
    unfinished = (requests.first_step >= 0) & np.isnan(requests.end_s)
    started = np.bincount(requests.first_step[unfinished] + 1, minlength=len(steps) + 1)
    count = np.maximum(count - np.cumsum(started)[: len(steps)], 0)

    delivered_s = _leaves_front_end_s(session, steps.end_s)
    first = np.concatenate(([0], np.flatnonzero(np.diff(delivered_s)) + 1))
    gap_s = np.diff(delivered_s[first], prepend=0.0)
    # The front end hands on the tokens of a step in slices and lets the streams run in between. A
    # step of one slice does not stop: what piled up is merged into one chunk. Tokens of larger
    # steps follow each other without delay.
    chunks = np.maximum.reduceat(count, first)
    unmerged = np.where(steps.running > OUTPUT_SLICE, count, 0)
    in_a_row = np.maximum(np.add.reduceat(unmerged, first) - chunks, 0)
    count = chunks

    stalled = (requests.stalls > 0) & np.isfinite(requests.end_s)
    stalls = requests.stalls[stalled].astype(np.int64)
    stall_s = requests.stalled_s[stalled] / stalls
    kept, piled = count > 0, in_a_row > 0
    left_s = delivered_s[first]
    return Gaps(
        np.concatenate((gap_s[kept], stall_s, np.zeros(piled.sum()))),
        np.concatenate((count[kept], stalls, in_a_row[piled])),
        np.concatenate((left_s[kept], requests.end_s[stalled], left_s[piled])),
    )


@dataclass(frozen=True, slots=True)
class Simulation:
    """A simulated run.

    Attributes
    ----------
    records : Records
    gaps : Gaps
    steps : recarray
        One row per engine step (`adapter_twin.twin.clock.STEPS`).
    pauses : recarray
        When the front end served nothing else (`adapter_twin.twin.clock.PAUSES`).
    workload : Workload
    engine : EngineConfig
    seed : int
    calibration : str
        Its name.
    policy : Policy
    unsent_requests : int, optional
        Requests of the trace that never came, because what they wait for did not; None where
        requests wait for nothing.
    """

    records: Records
    gaps: Gaps
    steps: Any
    pauses: Any
    workload: Workload
    engine: EngineConfig
    seed: int
    calibration: str
    policy: Policy = VLLM
    unsent_requests: int | None = None

    @property
    def duration_s(self) -> float:
        """Length of the run in s: the window, or up to the last answer to `num_prompts`."""
        window_s, end_s = self.workload.duration_s, self.records.end_s
        told = np.isfinite(end_s) | self.records.refused
        if self.workload.arrivals.num_prompts is None or self.unsent_requests or not told.all():
            return window_s
        return float(np.nanmax(end_s, initial=0.0)) or window_s

    def __repr__(self) -> str:
        done = int(np.isfinite(self.records.end_s).sum())
        return (
            f"Simulation of {self.duration_s:g} s: {len(self.workload.adapters)} adapters on "
            f"{self.engine.max_loras} slots, {len(self.records):,} requests, {done:,} completed "
            f"({self.calibration}, seed {self.seed})"
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """Config hashes, seed, package version, calibration name, and a policy beyond vLLM's."""
        own = {} if self.policy == VLLM else {"policy": repr(self.policy)}
        return {
            "config_hash": f"{config_hash(self.workload)}-{config_hash(self.engine)}",
            "seed": self.seed,
            "version": __version__,
            "calibration": self.calibration,
            **own,
        }
