"""Samples of a vLLM server's metrics, as rows of the table ``series``."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pandas as pd

from adapter_twin.errors import AdapterTwinError, one_line, require
from adapter_twin.measure.ask import ask, read_text
from adapter_twin.measure.metrics_page import CACHE, MetricsPage

if TYPE_CHECKING:
    import aiohttp

METRICS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
    "preempted_total": "vllm:num_preemptions_total",
    "prompt_tokens_total": "vllm:prompt_tokens_total",
    "generated_tokens_total": "vllm:generation_tokens_total",
}
"""Each column of ``series`` is one of vLLM's metrics."""

COUNTERS = [column for column, metric in METRICS.items() if metric.endswith("_total")]
IDLE_WITHIN_S = 60.0
ANSWER_WITHIN_S = 30.0
SAMPLE_WITHIN_S = 10.0

MOST_COUNTED = 2.0**53
"""A metric above this is no count: whole numbers end there."""

# Only these: the whole page takes the server's event loop, which also hands out the tokens, twenty
# times longer, and grows with every new combination of adapters in a batch. The slash matters:
# without it another handler answers, which knows no name[].
_QUERY = [("name[]", metric) for metric in METRICS.values()]
_PATH = "/metrics/"


def parse_metrics(text: str) -> dict[str, float]:
    """Return a sample by column of ``series``; several engines of one server are added up.

    Raises
    ------
    AdapterTwinError
        A metric is missing, or no count.
    """
    values = MetricsPage.parse(text).values
    for metric in METRICS.values():
        require(metric in values, f"metrics: {metric} is missing; profiling needs vLLM 0.32's")
        most = 1.0 if metric == METRICS["kv_usage"] else MOST_COUNTED
        require(0 <= values[metric] <= most, f"metrics: {metric} is {values[metric]:g}")
    return {column: values[metric] for column, metric in METRICS.items()}


def kv_cache(base_url: str) -> dict[str, float]:
    """Ask a running server for the size of its KV cache and of a block, in tokens.

    Raises
    ------
    AdapterTwinError
        It does not tell.
    """
    query = urlencode({"name[]": CACHE})
    status, page = ask(f"{base_url}{_PATH}?{query}", ANSWER_WITHIN_S)
    require(status == 200, f"metrics: HTTP {status}; is it vLLM 0.32?")
    told = MetricsPage.parse(page).kv_cache()
    sizes = told.values()
    require(all(0 < size <= MOST_COUNTED for size in sizes), f"metrics: {CACHE} is missing")
    return told


async def sample(session: aiohttp.ClientSession, base_url: str) -> dict[str, float]:
    """Read the metrics once; raise `AdapterTwinError` where they tell nothing."""
    url = base_url + _PATH
    async with session.get(url, params=_QUERY, allow_redirects=False) as response:
        require(response.status == 200, f"metrics: HTTP {response.status}; is it vLLM 0.32?")
        return parse_metrics(await read_text(response))


async def wait_until_idle(base_url: str) -> dict[str, float]:
    """Wait until the server holds no request, and return that sample.

    Raises
    ------
    AdapterTwinError
        Somebody else uses the server, or it does not tell.
    """
    import aiohttp

    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(IDLE_WITHIN_S):
            while True:
                seen = await sample(session, base_url)
                if seen["running"] + seen["waiting"] == 0:
                    return seen
                await asyncio.sleep(0.5)
    except TimeoutError:
        reason = f"still busy after {IDLE_WITHIN_S:.0f} s; let nobody else use it"
    except aiohttp.ClientError as error:
        reason = f"no metrics ({one_line(error)}); is it vLLM 0.32?"
    raise AdapterTwinError(f"{base_url}: {reason}")


async def record_series(
    base_url: str,
    baseline: dict[str, float],
    now_s: Callable[[], float],
    period_s: float,
    duration_s: float,
) -> tuple[pd.DataFrame, list[str]]:
    """Sample the metrics every `period_s` until the end of the window.

    Parameters
    ----------
    base_url : str
    baseline : dict
        A sample from before the window: counters are counted from there.
    now_s : callable
        Time since the window's start, in s.
    period_s, duration_s : float

    Returns
    -------
    series : pandas.DataFrame
        The columns of ``series`` but for the ``run_id``. Samples that could not be read are left
        out, and there are none after the server died.
    unread : list of str
        Why they could not be read.
    """
    import aiohttp

    rows, unread, before = list[dict[str, float]](), list[str](), baseline
    timeout = aiohttp.ClientTimeout(total=SAMPLE_WITHIN_S)
    # A session of its own: a full connection pool of the load must not silence the samples.
    async with aiohttp.ClientSession(timeout=timeout) as session:
        due_s = 0.0
        while due_s <= duration_s:
            await asyncio.sleep(due_s - now_s())
            try:
                seen = await sample(session, base_url)
                for name in COUNTERS:
                    require(seen[name] >= before[name], f"metrics: {METRICS[name]} fell")
                rows.append({"t_s": now_s()} | seen)
                before = seen
            except aiohttp.ClientConnectorError as error:
                unread.append(one_line(error))
                break  # the server is gone
            except (aiohttp.ClientError, TimeoutError, AdapterTwinError) as error:
                unread.append(one_line(error))
            due_s = period_s * max(round(due_s / period_s) + 1, math.ceil(now_s() / period_s))
    series = pd.DataFrame(rows, columns=["t_s", *METRICS])
    series[COUNTERS] -= [baseline[column] for column in COUNTERS]
    return series, unread
