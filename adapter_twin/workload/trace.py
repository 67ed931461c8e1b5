"""Traffic: a workload's arrivals, adapters and lengths, drawn as a trace of requests.

Nothing here knows the engine: comparing engines at one seed, they serve the very same requests.
"""

from __future__ import annotations

import heapq
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import require
from adapter_twin.workload.lengths import Floats, LengthMarginals, draw_lengths
from adapter_twin.workload.request_log import (
    BASE_MODEL,
    MOONCAKE_BLOCK_TOKENS,
    RequestLog,
    read_requests,
)
from adapter_twin.workload.scenario import Adapter, Workload

if TYPE_CHECKING:
    import pandas as pd

Ints = NDArray[np.int32]

__all__ = [
    "BASE_MODEL",
    "Contents",
    "LengthMarginals",
    "Trace",
    "generate",
    "generators",
    "read_trace",
]

MOST_REQUESTS = 10_000_000
REQUEST_BYTES = 1_600
"""A run takes about this memory for each request, with the steps that serve it."""

COLUMNS = ("arrival_s", "adapter", "prompt_tokens", "output_tokens")
"""A trace's table has these."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What the requests of a trace begin with, in pieces that other requests may share.

    The sequence of a request, its prompt and then its output, begins with its pieces; what comes
    after them is its own. Requests whose first pieces are equal have the same tokens there: such is
    a system prompt (one piece), a prompt given as hashes of its blocks (a piece each), or the turn
    of a conversation that repeats the turns before it (a piece for each prompt and each output).

    Attributes
    ----------
    first : int64, shape (requests + 1,)
        Index of each request's first piece; the last entry is the number of pieces.
    piece : int64, shape (pieces,)
        Equal numbers at equal ends, after equal pieces, are equal tokens.
    end : int32, shape (pieces,)
        Tokens of the sequence up to the end of the piece, increasing within a request.
    """

    first: NDArray[np.int64]
    piece: NDArray[np.int64]
    end: Ints

    def take(self, requests: NDArray[np.int64]) -> Contents:
        """Return the contents of some of the requests."""
        start, counts = self.first[requests], np.diff(self.first)[requests]
        first = np.concatenate(([0], np.cumsum(counts)))
        chosen = np.arange(first[-1]) + np.repeat(start - first[:-1], counts)
        return Contents(first, self.piece[chosen], self.end[chosen])


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival; all columns have shape (requests,).

    `adapter_twin.tables.datasets.write_table` writes `to_frame` as a file that `read_trace` reads.

    Attributes
    ----------
    arrival_s : float64
        Time since the start of the window.
    adapter : int32
        Index into the workload's adapters, or `BASE_MODEL`.
    prompt_tokens, output_tokens : int32
        Prompt length and requested output length (``max_tokens``), at least 1; a log's outputs are
        as long as they were.
    contents : Contents, optional
        What requests share of their tokens, no column; left out, it is nothing.
    """

    arrival_s: Floats
    adapter: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    contents: Contents | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    def take(self, requests: NDArray[np.int64]) -> Trace:
        """Return some of the requests, by their numbers."""
        contents = None if self.contents is None else self.contents.take(requests)
        columns = {name: getattr(self, name)[requests] for name in COLUMNS}
        return replace(self, contents=contents, **columns)

    def only(self, adapters: NDArray[np.int64], base_model_share: float = 1.0) -> Trace:
        """Return the requests of some adapters, which get the numbers of their places.

        Parameters
        ----------
        adapters : int64, shape (n,)
        base_model_share : float
            Share of the requests to the base model that are kept, evenly spread.
        """
        order = np.argsort(adapters)
        place = order[np.searchsorted(adapters[order], self.adapter) % len(order)]
        base = np.flatnonzero(self.adapter == BASE_MODEL)
        place[base] = BASE_MODEL
        kept = adapters[place] == self.adapter
        kept[base] = np.diff(np.floor(base_model_share * np.arange(len(base) + 1))) > 0
        chosen = np.flatnonzero(kept)
        return replace(self.take(chosen), adapter=place[chosen].astype(np.int32))

    def to_frame(self) -> pd.DataFrame:
        """Return the trace as a table, one row per request."""
        import pandas as pd

        return pd.DataFrame({name: getattr(self, name) for name in COLUMNS})


def read_trace(
    path: str | Path,
    adapters: Sequence[Adapter] = (),
    base_model_request_rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Trace:
    """Read a trace or a log of requests, see `adapter_twin.workload.request_log`.

    Parameters
    ----------
    path : path-like
    adapters : sequence of Adapter
        What the file names, or counts from 0; left out, it counts. Where it tells no adapters its
        requests are dealt over these by their rates, by chance.
    base_model_request_rate : float
        Requests are dealt to the base model as well.
    rng : numpy.random.Generator, optional
        Deals them.

    Raises
    ------
    AdapterTwinError
        The file cannot be read, is empty, lacks a column, or holds a value no request can have.
    """
    return trace_of(read_requests(path), path, adapters, base_model_request_rate, rng)


def trace_of(
    log: RequestLog,
    path: str | Path,
    adapters: Sequence[Adapter] = (),
    base_model_request_rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Trace:
    """Return a log's requests as `read_trace` does, to whose parameters `path` is for messages."""
    if log.left_out:
        warnings.warn(f"{path}: {log.left_out} rows without output are left out", stacklevel=3)
    names = [adapter.name for adapter in adapters]
    adapter = log.indices(names, path)
    if adapter is None:
        require(rng is not None and len(names) > 0, f"{path}: no adapters to deal it over")
        assert rng is not None
        rates = np.array([*(one.request_rate for one in adapters), base_model_request_rate])
        shares = rates if rates.sum() > 0 else np.append(np.ones(len(names)), 0.0)
        dealt = rng.choice(len(shares), len(log.arrival_s), p=shares / shares.sum())
        dealt[dealt == len(names)] = BASE_MODEL
        adapter = dealt.astype(np.int32)
        warnings.warn(
            f"{path}: names no adapters; its requests are dealt over the workload's by their rates",
            stacklevel=3,
        )
    prompt, output = log.prompt_tokens, log.output_tokens
    return Trace(log.arrival_s, adapter, prompt, output, _contents(log.blocks, prompt))


def _contents(blocks: list[list[int]] | None, prompt_tokens: Ints) -> Contents | None:
    """Return the pieces that hashes of a prompt's blocks stand for; the last may be cut short."""
    if blocks is None:
        return None
    counts = np.array([len(hashes) for hashes in blocks])
    first = np.concatenate(([0], np.cumsum(counts)))
    place = np.arange(first[-1]) - np.repeat(first[:-1], counts)
    end = np.minimum(MOONCAKE_BLOCK_TOKENS * (place + 1), np.repeat(prompt_tokens, counts))
    rising = np.concatenate(([True], (np.diff(end) > 0) | (place[1:] == 0)))[: len(end)]
    kept = np.concatenate(([0], np.cumsum(rising)))
    pieces = np.concatenate([*map(np.asarray, blocks), np.empty(0)]).astype(np.int64)
    return Contents(kept[first], pieces[rising], end[rising].astype(np.int32))


def generators(seed: int) -> tuple[np.random.Generator, np.random.Generator, np.random.Generator]:
    """Return the random numbers of a run.

    They are of its traffic, of what ends requests early, and of the order in which steps touch
    adapters. A load generator that draws its traffic from the first one sends what the twin serves.
    """
    traffic, stops, order = np.random.default_rng(seed).spawn(3)
    return traffic, stops, order


def generate(
    workload: Workload, rng: np.random.Generator, marginals: LengthMarginals | None = None
) -> Trace:
    """Draw one trace of a workload.

    Arrivals are drawn before lengths: workloads that differ only in lengths share their arrivals.

    Parameters
    ----------
    workload : Workload
    rng : numpy.random.Generator
    marginals : LengthMarginals, optional
        The measured histograms; needed for ``sharegpt`` lengths only.
    """
    if workload.arrivals.path is not None:
        return _replay(workload, workload.arrivals.path, rng)
    adapter_rates = [adapter.request_rate for adapter in workload.adapters]
    rates = np.array([*adapter_rates, workload.base_model_request_rate])
    expected = float(rates.sum()) * workload.duration_s
    require(
        expected <= MOST_REQUESTS,
        f"duration_s: {rates.sum():g} requests/s for {workload.duration_s:g} s are {expected:.2g} "
        f"requests, some {expected * REQUEST_BYTES / 2**30:,.0f} GiB; ask for {MOST_REQUESTS:,}",
    )
    # one request in 1e9 windows is none, and divisions by the rates stay finite
    rates[rates * workload.duration_s < 1e-9] = 0
    if workload.arrivals.process == "agullo2025":
        arrival_s, source = reference_arrivals(rates, workload.duration_s)
    elif workload.arrivals.process == "gamma":
        arrival_s, source = _gamma_arrivals(rates, workload.duration_s, workload.arrivals.cv, rng)
    else:
        arrival_s, source = _poisson_arrivals(rates, workload.duration_s, rng)
    source[source == len(adapter_rates)] = BASE_MODEL
    n, shared = len(arrival_s), workload.lengths.shared_prefix_tokens
    prompt, output = draw_lengths(workload.lengths, n, rng, marginals)
    if shared == 0:
        return Trace(arrival_s, source, prompt, output)
    # one piece each: what is computed with one adapter is of no use to another one
    contents = Contents(np.arange(n + 1), np.zeros(n, np.int64), np.full(n, shared, np.int32))
    return Trace(arrival_s, source, prompt + np.int32(shared), output, contents)


def _replay(workload: Workload, path: str, rng: np.random.Generator) -> Trace:
    trace = read_trace(path, workload.adapters, workload.base_model_request_rate, rng)
    return trace.take(np.arange(np.searchsorted(trace.arrival_s, workload.duration_s)))


def _poisson_arrivals(
    rates: Floats, duration_s: float, rng: np.random.Generator
) -> tuple[Floats, Ints]:
    """Superpose one Poisson process per source."""
    counts = rng.poisson(rates * duration_s)
    total = int(counts.sum())
    # given their number, arrivals are uniform in time, whatever their source; sums of exponential
    # gaps, scaled to the window, are uniform times already sorted
    gaps = np.cumsum(rng.standard_exponential(total + 1))
    arrival_s = gaps[:-1] * (duration_s / gaps[-1])
    source = np.repeat(np.arange(len(rates), dtype=np.int32), counts)
    rng.shuffle(source)
    return arrival_s, source


def _gamma_arrivals(
    rates: Floats, duration_s: float, cv: float, rng: np.random.Generator
) -> tuple[Floats, Ints]:
    """Superpose one stationary Gamma renewal process per source.

    Stationary: the window opens at a random time between two requests, so the first wait is a
    uniform part of a length-biased gap (Gamma of shape + 1). Started at a request instead, bursty
    sources would all burst together at 0.
    """
    shape = cv**-2
    source = np.flatnonzero(rates > 0).astype(np.int32)
    length_biased = rng.standard_gamma(shape + 1, len(source)) / (shape * rates[source])
    last_s = rng.random(len(source)) * length_biased
    times, sources = [last_s], [source]
    while len(source):
        expected = rates[source] * np.maximum(duration_s - last_s, 0)
        batch = np.ceil(1.1 * expected).astype(np.int64) + 8  # seldom too few; then once more
        gap_source = np.repeat(source, batch)
        gap_s = rng.standard_gamma(shape, len(gap_source)) / (shape * rates[gap_source])
        ends = np.cumsum(batch)
        elapsed_s = np.cumsum(gap_s)
        before_s = np.concatenate(([0.0], elapsed_s[ends[:-1] - 1]))
        time_s = elapsed_s + np.repeat(last_s - before_s, batch)
        times.append(time_s)
        sources.append(gap_source)
        last_s = time_s[ends - 1]
        unfinished = last_s < duration_s
        source, last_s = source[unfinished], last_s[unfinished]
    arrival_s, source = np.concatenate(times), np.concatenate(sources)
    inside = arrival_s < duration_s
    arrival_s, source = arrival_s[inside], source[inside]
    order = np.argsort(arrival_s, kind="stable")
    return arrival_s[order], source[order]


def reference_arrivals(rates: Floats, duration_s: float) -> tuple[Floats, Ints]:
    """Draw what the load generator of Agullo et al. (2025) drew; each of its runs had seed 0.

    It shuffled the adapters with Python's generator, then drew every gap between requests from one
    NumPy stream: a first gap per adapter in that order, and the next one as each request was sent.

    Parameters
    ----------
    rates : float64, shape (sources,)
        Requests/s.
    duration_s : float

    Returns
    -------
    arrival_s : float64, shape (requests,)
    source : int32, shape (requests,)
    """
    order = np.flatnonzero(rates > 0).tolist()
    random.Random(0).shuffle(order)
    stream = np.random.RandomState(0)
    expected = rates.sum() * duration_s
    gaps = stream.standard_exponential(int(expected + 6 * np.sqrt(expected)) + len(order) + 10)
    arrival_s, source, sent = _compiled()(np.array(order, np.int32), rates, gaps, duration_s)
    return arrival_s[:sent], source[:sent]


@cache
def _compiled() -> Any:
    import numba  # late: it takes its time

    return numba.njit(cache=True)(_send_in_order)


def _send_in_order(
    order: Ints, rates: Floats, gaps: Floats, duration_s: float
) -> tuple[Floats, Ints, int]:
    due = [(gaps[i] / rates[order[i]], order[i]) for i in range(len(order))]
    heapq.heapify(due)
    left = gaps[len(order) :]
    arrival_s, sources = np.empty(len(left)), np.empty(len(left), np.int32)
    sent = 0
    while sent < len(left) and len(due) > 0 and due[0][0] < duration_s:
        now_s, source = due[0]
        arrival_s[sent], sources[sent] = now_s, source
        heapq.heapreplace(due, (now_s + left[sent] / rates[source], source))
        sent += 1
    return arrival_s, sources, sent
