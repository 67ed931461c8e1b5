"""A simulated run as a trace for https://ui.perfetto.dev (Trace Event Format, JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin.tables.datasets import replacing
from adapter_twin.twin.records import Records, Simulation

ENGINE, FRONT_END, REQUESTS = 1, 2, 3
"""These are the numbers of the trace's tracks."""


def write_trace(run: Simulation, path: str | Path) -> None:
    """Write engine steps, queue lengths, front-end pauses and requests; the whole file or nothing.

    A request is a span from arrival to last token, or to where it was cut off, with its first
    token in its arguments. An hour of steps makes tens of megabytes: choose a short window.
    """
    events = chain(_names(), _steps(run), _pauses(run), _requests(run.records, run.duration_s))
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "otherData": ')
        file.write(json.dumps(run.provenance) + ', "traceEvents": [\n')
        for count, event in enumerate(events):
            file.write((",\n" if count else "") + json.dumps({"pid": 1, **event}))
        file.write("\n]}\n")


def _names() -> Iterator[dict[str, Any]]:
    tracks = {ENGINE: "engine", FRONT_END: "front end", REQUESTS: "requests"}
    for track, name in tracks.items():
        yield {"ph": "M", "tid": track, "name": "thread_name", "args": {"name": name}}


def step_starts_s(run: Simulation) -> NDArray[np.float64]:
    """Return when each step began: when the last one ended, or the first request came after it."""
    end_s = run.steps.end_s
    previous_s = np.concatenate(([0.0], end_s[:-1]))
    scheduled_s = np.sort(run.records.scheduled_s)  # NaN last
    first_s = np.append(scheduled_s, np.inf)[np.searchsorted(scheduled_s, previous_s)]
    return np.where(first_s < end_s, first_s, previous_s)


def _steps(run: Simulation) -> Iterator[dict[str, Any]]:
    if len(run.steps) == 0:
        return
    start_us = np.rint(1e6 * step_starts_s(run)).astype(np.int64)
    shown = ("tokens", "decodes", "adapters", "loads")
    for ts, step in zip(start_us.tolist(), run.steps, strict=True):
        duration_us = max(round(1e6 * step.end_s) - ts, 0)
        args = {name: int(step[name]) for name in shown}
        yield {"ph": "X", "tid": ENGINE, "name": "step", "ts": ts, "dur": duration_us, "args": args}
        queue = {"running": int(step.running), "waiting": int(step.waiting)}
        yield {"ph": "C", "name": "requests", "ts": ts, "args": queue}
        yield {"ph": "C", "name": "free KV blocks", "ts": ts, "args": {"": int(step.free_blocks)}}


def _pauses(run: Simulation) -> Iterator[dict[str, Any]]:
    for pause in run.pauses:
        ts, end = round(1e6 * pause.start_s), round(1e6 * pause.end_s)
        yield {"ph": "X", "tid": FRONT_END, "name": "pause", "ts": ts, "dur": end - ts}


def _requests(records: Records, duration_s: float) -> Iterator[dict[str, Any]]:
    end_s = np.where(np.isfinite(records.end_s), records.end_s, duration_s)
    for i in np.flatnonzero(~records.rejected).tolist():
        ttft_ms = 1e3 * float(records.first_token_s[i] - records.arrival_s[i])
        args = {
            "prompt_tokens": int(records.prompt_tokens[i]),
            "output_tokens": int(records.output_tokens[i]),
            "preemptions": int(records.preemptions[i]),
            "ttft_ms": ttft_ms if np.isfinite(ttft_ms) else None,
            "completed": bool(np.isfinite(records.end_s[i])),
        }
        span = {"tid": REQUESTS, "cat": "request", "id": i, "name": f"adapter {records.adapter[i]}"}
        yield {**span, "ph": "b", "ts": round(1e6 * records.arrival_s[i]), "args": args}
        yield {**span, "ph": "e", "ts": round(1e6 * end_s[i])}
