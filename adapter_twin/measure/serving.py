"""Serving runs: a trace sent to a running server, timed by the client, sampled on the server."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.measure.client import Replay, replay, settled_memory
from adapter_twin.measure.judge import doubt
from adapter_twin.measure.model_folder import check_model
from adapter_twin.measure.scrape import record_series, wait_until_idle
from adapter_twin.measure.vllm_server import Server
from adapter_twin.service.client_records import to_gaps, to_records
from adapter_twin.service.metrics import summarize
from adapter_twin.tables.run_folder import summarize_series
from adapter_twin.workload.trace import BASE_MODEL, Trace

_LEAD_S = 0.5
_WARM_UP_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class ServedRun(Replay):
    """Measurements of a serving run: what the client saw, and besides.

    Of a `failure`, `adapter_twin.measure.vllm_server.Server.failure` may tell more.

    Attributes
    ----------
    row : dict
        The measured columns of the table ``runs``. Where the server died, ``duration_s`` is the
        time until then.
    series : pandas.DataFrame
        As `adapter_twin.measure.scrape.record_series`; counters start at 0 with the window.
    doubt : str or None
        Why the figures are not to be trusted; see `adapter_twin.measure.judge`.
    """

    row: dict[str, Any]
    series: pd.DataFrame
    doubt: str | None = None


def measure_run(
    server: Server, trace: Trace, duration_s: float, seed: int, period_s: float = 1.0
) -> ServedRun:
    """Send a trace to a running server and measure what becomes of it.

    The server must be idle. It is warmed up by one request to the base model and one to the first
    adapter, as ``vllm bench serve`` sends a test request first.

    Parameters
    ----------
    server : Server
    trace : Trace
        The server's adapters are counted from 0.
    duration_s : float
        Requests unfinished by then are dropped.
    seed : int
        Of the prompts, which are random token ids of the model's vocabulary.
    period_s : float
        Time between samples of the server's metrics.

    Raises
    ------
    AdapterTwinError
        The server does not answer, is in use, or refuses the warm-up.
    """
    highest = int(trace.adapter.max(initial=BASE_MODEL))
    require(
        highest < len(server.adapters),
        f"trace: asks for adapter {highest}, but {len(server.adapters)} are served; count from 0",
    )
    base_url, names = server.base_url, [*server.adapters, server.model_name]
    vocabulary = check_model(server.model_folder)["vocab_size"]

    async def measure() -> tuple[Replay, tuple[pd.DataFrame, list[str]]]:
        await _warm_up(base_url, names, vocabulary)
        baseline = await wait_until_idle(base_url)
        clock_s = asyncio.get_running_loop().time
        start_s = clock_s() + _LEAD_S
        return await asyncio.gather(
            replay(base_url, names, trace, duration_s, vocabulary, seed, start_s),
            record_series(base_url, baseline, lambda: clock_s() - start_s, period_s, duration_s),
        )

    with settled_memory():
        seen, (series, unread) = asyncio.run(measure())
    own = seen.requests, seen.schedule, seen.ended_s, seen.failure
    reasons = doubt(seen, series, unread, period_s)
    return ServedRun(*own, _summary(seen, series, trace), series, reasons)


async def _warm_up(base_url: str, names: Sequence[str], vocabulary: int) -> None:
    used = [BASE_MODEL, 0] if len(names) > 1 else [BASE_MODEL]
    length = np.full(len(used), 8, np.int32)
    trace = Trace(np.zeros(len(used)), np.array(used, np.int32), length, length)
    seen = await replay(base_url, names, trace, _WARM_UP_WITHIN_S, vocabulary, seed=0)
    done = np.isfinite(seen.requests["end_s"])
    if not done.all():
        first = seen.requests[~done].iloc[0]
        reason = first["error"] or f"no answer within {_WARM_UP_WITHIN_S:.0f} s"
        raise AdapterTwinError(f"{names[first['adapter']]}: the server did not answer ({reason})")


def _summary(replayed: Replay, series: pd.DataFrame, trace: Trace) -> dict[str, Any]:
    records = to_records(replayed.requests)
    done = np.isfinite(records.end_s)
    return {
        "duration_s": replayed.ended_s,
        "mean_input_tokens": trace.prompt_tokens.mean(),
        "mean_requested_output_tokens": trace.output_tokens.mean(),
        "sent_requests": int(replayed.requests["sent_s"].notna().sum()),
        "input_tokens": int(records.prompt_tokens[done].sum()),
        "output_tokens": int(records.output_tokens[done].sum()),
        **summarize(records, to_gaps(replayed.requests), replayed.ended_s),
        **summarize_series(series),
        "failed_requests": int(replayed.requests["error"].notna().sum()),
        "schedule_error_p99_ms": replayed.schedule.p99_ms,
    }
