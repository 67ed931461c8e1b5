"""A request log as traffic: what a demand says of it, and the stretches of it that are replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from adapter_twin.errors import require
from adapter_twin.laws import Calibration
from adapter_twin.twin.simulate import draw_requests
from adapter_twin.workload.adapters import Adapter, dealt
from adapter_twin.workload.lengths import Floats
from adapter_twin.workload.request_log import BASE_MODEL, RequestLog, read_requests
from adapter_twin.workload.strict import read
from adapter_twin.workload.trace import Trace, trace_of
from adapter_twin.workload.traffic import Arrivals, Workload

MINUTE_S, DAY_S = 60.0, 86400.0

LONGEST_REPLAY_S = DAY_S
"""A log up to this length is replayed whole; of a longer one its busiest hours are."""

BUSY_S = 3600.0
"""A stretch of a longer log has this length."""

BLOCKS = 12
"""Other logs that might have come are put together from this number of pieces of the one that did:
long enough to keep bursts and sessions whole, and enough of them to differ."""

ANSWERED_S = 30.0
"""After the end of a log the server has this time to answer what came last."""

LEAST_CV = 0.01
"""Lengths that vary less than this are as good as constant."""


def read_log(adapters: object, path: Path) -> tuple[dict[str, Any], Trace]:
    """Return the keys of a demand that follow from a request log, and its requests.

    Parameters
    ----------
    adapters : object
        As the file tells them. Where the log names none, their rates say how its requests are dealt
        over them; else they have none.
    path : pathlib.Path

    Returns
    -------
    keys : dict
        ``adapters`` with their rates, 0 for those without a request; ``base_model_request_rate``;
        ``lengths``: log-normal with the log's means, the mean of its two coefficients of variation,
        and its rank correlation.
    trace : Trace
        From the first request on.

    Raises
    ------
    AdapterTwinError
        The log cannot be read, or does not fit the adapters.
    """
    return _as_told(read_requests(path), _adapters(adapters), path)


def read_busiest(path: Path, ranks: Sequence[int]) -> tuple[dict[str, Any], Trace]:
    """Return what `read_log` does, of the adapters that a log names, the busiest one first.

    Parameters
    ----------
    path : pathlib.Path
    ranks : sequence of int
        Dealt round-robin over them.
    """
    log = read_requests(path)
    named = () if log.adapter is None else log.adapter[~np.isin(log.adapter, ("", "-1"))]
    names, counts = np.unique(named, return_counts=True)
    require(
        len(names) > 0,
        f"{path}: names no adapters, of which the busiest could be served; ask by rates",
    )
    dealt_ranks = zip(names[np.argsort(-counts, kind="stable")].tolist(), cycle(ranks))
    told = [
        read(Adapter, {"name": str(name), "rank": rank, "request_rate": 0.0}, f"{path}: adapter")
        for name, rank in dealt_ranks
    ]
    return _as_told(log, told, path)


def _as_told(log: RequestLog, told: Sequence[Adapter], path: Path) -> tuple[dict[str, Any], Trace]:
    for i, adapter in enumerate(told):
        fits = log.adapter is None or adapter.request_rate == 0
        require(fits, f"adapters[{i}].request_rate: the request_log tells; leave it out")
    trace = trace_of(log, path, told, rng=np.random.default_rng(0))
    require(span_s(trace) > 0, "request_log: give requests at two different times")
    return _measured(told, replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[0]))


def draw_log(demand: Mapping[str, Any], calibration: Calibration) -> tuple[dict[str, Any], Trace]:
    """Return what `read_log` does for traffic that is drawn once: an hour, or a period of it.

    Parameters
    ----------
    demand : mapping
        Keys of a demand, and ``sessions`` and ``samples`` of a
        `adapter_twin.workload.traffic.Workload`.
    calibration : Calibration
        Ends some of the requests early.
    """
    arrivals = read(Arrivals, demand.get("arrivals", {}), "arrivals")
    names = {field.name for field in fields(Workload)}
    told = {name: value for name, value in demand.items() if name in names}
    duration_s = max(BUSY_S, arrivals.period_s or 0.0)
    workload = read(Workload, {**told, "duration_s": duration_s})
    require(
        arrivals.num_prompts is None,
        "arrivals.num_prompts: with sessions and samples for `simulate` only; leave it out",
    )
    trace = draw_requests(workload, calibration, seed=demand.get("seed", 0))
    require(span_s(trace) > 0, "adapters: they have no two requests in an hour; raise their rates")
    return _measured(workload.adapters, trace)


def _measured(adapters: Sequence[Adapter], trace: Trace) -> tuple[dict[str, Any], Trace]:
    """Return the keys that requests amount to, and the requests."""
    counts = np.bincount(trace.adapter[trace.adapter >= 0], minlength=len(adapters))
    rates = (counts / span_s(trace)).tolist()
    keys = {
        "adapters": [asdict(a) | {"request_rate": r} for a, r in zip(adapters, rates, strict=True)],
        "base_model_request_rate": float((trace.adapter == BASE_MODEL).sum() / span_s(trace)),
        "arrivals": asdict(Arrivals(max_concurrency=trace.max_concurrency)),
        "lengths": lengths_of(trace),
    }
    return keys, trace


def _adapters(told: object) -> list[Adapter]:
    """Return adapters that need not tell rates."""
    if isinstance(told, dict):
        is_dealt = "total_request_rate" not in told
        told = list(dealt({"request_rates": [0.0]} | told if is_dealt else told))
    return [
        one if isinstance(one, Adapter) else read(Adapter, _idle(one), f"adapters[{i}]")
        for i, one in enumerate(told if isinstance(told, list) else [])
    ]


def _idle(told: object) -> object:
    return {"request_rate": 0.0, **told} if isinstance(told, dict) else told


def lengths_of(trace: Trace) -> dict[str, Any]:
    """Return the keys of `adapter_twin.workload.traffic.Lengths` as a log has them."""
    columns = trace.to_frame()[["prompt_tokens", "output_tokens"]].astype(float)
    mean, deviation = columns.mean(), columns.std(ddof=0)
    constant = bool((deviation == 0).any())
    correlation = 0.0 if constant else columns.corr("spearman").to_numpy()[0, 1]
    return {
        "distribution": "lognormal",
        "mean_input_tokens": float(mean.prompt_tokens),
        "mean_output_tokens": float(mean.output_tokens),
        "cv": max(float((deviation / mean).mean()), LEAST_CV),
        "rank_correlation": float(correlation),
    }


def span_s(trace: Trace) -> float:
    """Return how long a log is, in s: n arrivals span n - 1 gaps."""
    n = len(trace)
    return float(np.ptp(trace.arrival_s)) * n / max(n - 1, 1)


def stretch(trace: Trace, number: int, lead_in_s: float) -> tuple[Trace, float, float]:
    """Return one of the stretches of a log that are replayed.

    The first one, number 0, is the whole log, or of a long one its busiest hour. Others are logs
    that might have come instead: pieces of the whole one drawn by chance (a circular block
    bootstrap), or the next busiest hours, of days of their own where there are days enough.

    Parameters
    ----------
    trace : Trace
        From `read_log`.
    number : int
    lead_in_s : float
        A part of a log begins earlier by this, so that the server has its batches.

    Returns
    -------
    trace : Trace
        Arrivals count from its begin.
    duration_s, warm_up_s : float
    """
    whole_s = span_s(trace)
    if whole_s > LONGEST_REPLAY_S:
        busy_s = busiest_hours(trace)
        from_s = busy_s[number % len(busy_s)]
        warm_up_s = min(lead_in_s, from_s)
        first, end = np.searchsorted(trace.arrival_s, [from_s - warm_up_s, from_s + BUSY_S])
        part = trace.take(np.arange(first, end))
        part = replace(part, arrival_s=part.arrival_s - (from_s - warm_up_s))
        return part, warm_up_s + BUSY_S, warm_up_s
    if number == 0:
        return trace, whole_s, 0.0
    opens_s = _opens_s(trace)
    block_s = whole_s / BLOCKS
    requests, arrivals = [], []
    for place, from_s in enumerate(np.random.default_rng(number).uniform(0, whole_s, BLOCKS)):
        since_s = (opens_s - from_s) % whole_s
        own = np.flatnonzero(since_s < block_s)
        requests.append(own)
        arrivals.append(place * block_s + since_s[own] + trace.arrival_s[own] - opens_s[own])
    arrival_s = np.concatenate(arrivals)
    order = np.argsort(arrival_s, kind="stable")
    drawn = trace.take(np.concatenate(requests)[order])
    return replace(drawn, arrival_s=arrival_s[order]), whole_s, 0.0


def _opens_s(trace: Trace) -> Floats:
    """Return when the conversations of requests begin: turns stay together."""
    opens_s, after = trace.arrival_s.copy(), trace.after
    if after is not None:
        for turn in np.flatnonzero(after >= 0):
            opens_s[turn] = opens_s[after[turn]]
    return opens_s


def described(trace: Trace | None, arrivals: Arrivals) -> str:
    """Return in words what a plan simulates: a log, or what is drawn where there is none."""
    if arrivals.max_concurrency is not None:
        told = described(trace, Arrivals())
        return f"{told}, at most {arrivals.max_concurrency} requests under way"
    if trace is None:
        return "drawn by the rates"
    whole_s = span_s(trace)
    if whole_s <= LONGEST_REPLAY_S:
        return f"a log of {whole_s:,.0f} s, replayed"
    starts = ", ".join(f"{start_s:,.0f} s" for start_s in busiest_hours(trace))
    return f"the busiest hours of the log's {whole_s / DAY_S:.1f} days, from {starts}, replayed"


def busiest_hours(trace: Trace, count: int = 5) -> list[float]:
    """Return when the busiest hours of a log begin, to the minute in s, the busiest one first.

    None overlap.

    Parameters
    ----------
    trace : Trace
    count : int
        Where the log has as many days, each is of a day of its own.
    """
    whole_s = span_s(trace)
    begins_s = np.arange(0.0, max(whole_s - BUSY_S, MINUTE_S), MINUTE_S)
    first, end = (np.searchsorted(trace.arrival_s, begins_s + by_s) for by_s in (0.0, BUSY_S))
    apart_s = DAY_S if whole_s >= count * DAY_S else BUSY_S
    starts: list[float] = []
    for at_s in begins_s[np.argsort(first - end, kind="stable")].tolist():
        if all(abs(at_s - other) >= apart_s for other in starts):
            starts.append(at_s)
            if len(starts) == count:
                break
    return starts
