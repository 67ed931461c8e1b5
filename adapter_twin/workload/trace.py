"""Traffic: a workload's arrivals, adapters and lengths, drawn as a trace of requests.

Nothing here knows the engine: comparing engines at one seed, they serve the very same requests.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import require
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.arrivals import draw_arrivals
from adapter_twin.workload.contents import (
    Contents,
    behind_prefix,
    of_blocks,
    of_samples,
    of_turns,
    whole_prompts,
)
from adapter_twin.workload.lengths import Floats, LengthMarginals, draw_lengths
from adapter_twin.workload.request_log import BASE_MODEL, RequestLog, read_requests
from adapter_twin.workload.traffic import Sessions, Workload

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
        What requests share of their tokens; left out, it is nothing. Like all that follows it is
        no column of the table.
    after : int32, optional
        Index of the earlier request whose answer each one waits for, -1 for none. It arrives
        `think_s` after that, and not before its `arrival_s`; without that answer it never does.
    think_s : float64, optional
        Left out, none.
    max_concurrency : int, optional
        Most requests under way at once. Further ones wait at the client, first come first served:
        they arrive when they are sent.
    """

    arrival_s: Floats
    adapter: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    contents: Contents | None = None
    after: Ints | None = None
    think_s: Floats | None = None
    max_concurrency: int | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def waits(self) -> bool:
        """Whether requests wait for answers to others, so that arrivals depend on the engine."""
        return self.after is not None or self.max_concurrency is not None

    def take(self, requests: NDArray[np.int64]) -> Trace:
        """Return some of the requests, by their numbers, in any order and several times.

        One whose predecessor is not among those before it waits for no answer.
        """
        columns = {name: getattr(self, name)[requests] for name in COLUMNS}
        if self.contents is not None:
            columns["contents"] = self.contents.take(requests)
        if self.after is not None and self.think_s is not None:
            last = dict[int, int]()  # place of the request that was taken last
            after = np.full(len(requests), -1, np.int32)
            wanted = self.after[requests].tolist()
            for place, request in enumerate(requests.tolist()):
                after[place] = last.get(wanted[place], -1)
                last[request] = place
            columns |= {"after": after, "think_s": self.think_s[requests]}
        return replace(self, **columns)

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
        for turn, before in enumerate(() if log.after is None else log.after):
            if before >= 0:
                dealt[turn] = dealt[before]  # a conversation stays with its adapter
        adapter = dealt.astype(np.int32)
        warnings.warn(
            f"{path}: names no adapters; its requests are dealt over the workload's by their rates",
            stacklevel=3,
        )
    prompt, output, contents = log.prompt_tokens, log.output_tokens, None
    if log.blocks is not None:
        contents = of_blocks(log.blocks, log.block_tokens, prompt)
    elif log.after is not None:
        contents = of_turns(log.after, prompt, output)
    return Trace(log.arrival_s, adapter, prompt, output, contents, log.after, log.think_s)


def generators(seed: int) -> tuple[np.random.Generator, np.random.Generator, np.random.Generator]:
    """Return the random numbers of a run.

    They are of its traffic, of what ends requests early, and of the order in which steps touch
    adapters. A load generator that draws its traffic from the first one sends what the twin serves.
    """
    traffic, stops, order = np.random.default_rng(seed).spawn(3)
    return traffic, stops, order


def generate(
    workload: Workload,
    rng: np.random.Generator,
    marginals: LengthMarginals | None = None,
    emitted: Callable[[Ints], Ints] | None = None,
) -> Trace:
    """Draw one trace of a workload.

    Arrivals are drawn before lengths: workloads that differ only in lengths share their arrivals.

    Parameters
    ----------
    workload : Workload
    rng : numpy.random.Generator
    marginals : LengthMarginals, optional
        The measured histograms; needed for ``sharegpt`` lengths only.
    emitted : callable, optional
        Returns the output lengths that the model will give, of those requested; left out, it gives
        these. The later prompts of a session hold them. A log tells what was given.
    """
    if workload.arrivals.path is not None:
        trace = _replay(workload, workload.arrivals.path, rng)
        return replace(trace, max_concurrency=workload.arrivals.max_concurrency)
    adapter_rates = [adapter.request_rate for adapter in workload.adapters]
    rates = np.array([*adapter_rates, workload.base_model_request_rate])
    turns = 1.0 if workload.sessions is None else workload.sessions.mean_turns
    opened = workload.arrivals.num_prompts or float(rates.sum()) * workload.duration_s
    expected = opened * turns * workload.samples
    require(
        expected <= MOST_REQUESTS,
        f"duration_s: {rates.sum():g} requests/s for {workload.duration_s:g} s are {expected:.2g} "
        f"requests, some {expected * REQUEST_BYTES / 2**30:,.0f} GiB; ask for {MOST_REQUESTS:,}",
    )
    # one request in 1e9 windows is none, and divisions by the rates stay finite
    rates[rates * workload.duration_s < 1e-9] = 0
    arrival_s, source = draw_arrivals(workload.arrivals, rates, workload.duration_s, rng)
    source[source == len(adapter_rates)] = BASE_MODEL
    samples = workload.samples
    after = think_s = contents = None
    if workload.sessions is not None:
        arrival_s, source, after, think_s = _turns(
            workload, workload.sessions, arrival_s, source, rng
        )
    elif samples > 1:
        arrival_s, source = arrival_s.repeat(samples), source.repeat(samples)
    n, shared = len(source), workload.lengths.shared_prefix_tokens
    prompt, output = draw_lengths(workload.lengths, n, rng, marginals, samples)
    output = output if emitted is None else emitted(output)
    if shared:
        prompt = prompt + np.int32(shared) * (after is None or after < 0)
    if after is not None:
        prompt = whole_prompts(after, prompt, output)
        contents = of_turns(after, prompt, output)
    elif samples > 1:
        contents = of_samples(prompt, samples)
    if shared:
        contents = behind_prefix(contents, n, shared)
    places = workload.arrivals.max_concurrency
    return Trace(arrival_s, source, prompt, output, contents, after, think_s, places)


def _turns(
    workload: Workload, sessions: Sessions, opens_s: Floats, source: Ints, rng: np.random.Generator
) -> tuple[Floats, Ints, Ints, Floats]:
    """Return the turns of sessions: earliest times, adapters, predecessors and think times."""
    chain, mean = sessions.chain or (), sessions.mean_turns
    turns = np.full(len(source), int(mean))
    if sessions.distribution == "geometric":
        turns = rng.geometric(1 / mean, len(source))
    request = np.arange(turns.sum())
    turn, source = request - np.repeat(np.cumsum(turns) - turns, turns), np.repeat(source, turns)
    if chain:
        places = {adapter.name: index for index, adapter in enumerate(workload.adapters)}
        members = np.array([places[name] for name in chain], np.int32)
        source = np.where(source == members[0], members[turn % len(chain)], source)
    after = np.where(turn > 0, request - 1, -1).astype(np.int32)
    think_s = sessions.mean_think_s * rng.standard_exponential(len(request))
    return np.repeat(opens_s, turns), source, after, think_s


def _replay(workload: Workload, path: str, rng: np.random.Generator) -> Trace:
    trace = read_trace(path, workload.adapters, workload.base_model_request_rate, rng)
    return trace.take(np.arange(np.searchsorted(trace.arrival_s, workload.duration_s)))
