"""An open-loop load client, which sends a trace's requests when they are due and times every token.

Times mean what they mean in ``vllm bench serve``: a request starts when it is sent, and a token
arrives with the chunk that carries it. Tokens that the server merges into one chunk give one gap.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adapter_twin.errors import AdapterTwinError, one_line
from adapter_twin.measure.ask import read_text
from adapter_twin.measure.stream import Asked, read_stream
from adapter_twin.measure.vllm_server import error_message
from adapter_twin.workload.trace import Trace

if TYPE_CHECKING:
    import aiohttp

MAX_CONNECTIONS = 20_000
"""Requests in flight at once: below the 28,000 ports that Linux lends to clients."""

_SPARE_FILES = 256
# The server closes a connection that idles for 5 s; a request sent just then would be lost.
_KEEP_ALIVE_S = 4.0
_FAILING_S = 1.0
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class ScheduleError:
    """How late requests were sent, in ms after they were due."""

    median_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class Replay:
    """Requests as the client saw them.

    Attributes
    ----------
    requests : pandas.DataFrame
        One row per request of the trace that was due in the window: ``request``, ``adapter``,
        ``prompt_tokens`` and ``output_tokens`` as asked, ``reported_prompt_tokens`` and
        ``reported_output_tokens`` as the server counted them (other counts than asked are an
        error), ``scheduled_s`` (when it was due),
        ``sent_s``, ``first_token_s`` and ``end_s`` in s from the window's start, ``itl_ms`` (the
        gaps between its chunks) and ``error``. NaN and None where it did not happen in the window.
    schedule : ScheduleError
    ended_s : float
        The window's end, or when the server was found dead.
    failure : str or None
        Why it ended early.
    """

    requests: pd.DataFrame
    schedule: ScheduleError
    ended_s: float
    failure: str | None


async def replay(
    base_url: str,
    model_names: Sequence[str],
    trace: Trace,
    duration_s: float,
    vocabulary: int,
    seed: int,
    start_s: float | None = None,
    max_connections: int = MAX_CONNECTIONS,
) -> Replay:
    """Send a trace to a server, and drop what is unfinished at the end of the window.

    Parameters
    ----------
    base_url : str
    model_names : sequence of str
        Names of the adapters by index, and last that of the base model.
    trace : Trace
    duration_s : float
    vocabulary : int
        Prompts are random token ids below it.
    seed : int
    start_s : float, optional
        The event loop's time at which the window opens; now if left out.
    max_connections : int
        More requests than this in flight wait in the client, which shows as schedule error; fewer
        where the system allows fewer open files.
    """
    import aiohttp

    now_s = asyncio.get_running_loop().time
    start_s = now_s() if start_s is None else start_s
    due = int(np.searchsorted(trace.arrival_s, duration_s))
    client = _Client(
        f"{base_url}/v1/completions",
        due,
        lambda: now_s() - start_s,
        _allowed_connections(max_connections),
        start_s + duration_s,
    )
    asked = zip(range(due), _asked(trace, model_names), strict=False)
    rng = np.random.default_rng(seed)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
    )
    try:
        async with session, client.window, asyncio.TaskGroup() as tasks:
            for index, request in asked:
                body = request.body(rng, vocabulary)  # made while its predecessor is awaited
                await asyncio.sleep(start_s + trace.arrival_s[index] - now_s())
                tasks.create_task(client.request(session, index, request, body))
    except TimeoutError:
        pass  # the end of the window; the requests in flight have been cancelled
    ended_s = duration_s if client.failure is None else client.failed_s
    arrival_s = trace.arrival_s[:due]
    late_s = (np.fmin(client.sent_s, ended_s) - arrival_s)[arrival_s <= ended_s]
    late_ms = 1e3 * late_s if len(late_s) else np.array([np.nan])
    schedule = ScheduleError(*np.percentile(late_ms, [50, 99, 100]).tolist())
    return Replay(client.table(trace), schedule, ended_s, client.failure)


@contextmanager
def settled_memory() -> Iterator[None]:
    """Take what exists now out of the garbage collector's sight: a full pass stops the client."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _asked(trace: Trace, model_names: Sequence[str]) -> Iterator[Asked]:
    columns = (trace.adapter, trace.prompt_tokens, trace.output_tokens)
    for adapter, prompt, output in zip(*(column.tolist() for column in columns), strict=True):
        yield Asked(model_names[adapter], prompt, output)  # the base model, -1, has the last name


class _Client:
    """The requests of one window: each is sent, and what becomes of it is kept."""

    def __init__(
        self, url: str, requests: int, now_s: Callable[[], float], connections: int, end_s: float
    ) -> None:
        self.url, self.now_s = url, now_s
        self.free, self.window = asyncio.Semaphore(connections), asyncio.timeout_at(end_s)
        self.sent_s, self.first_token_s, self.end_s = np.full((3, requests), np.nan)
        self.reported_tokens = np.full((requests, 2), np.nan)
        self.itl_ms: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * requests
        self.error: list[str | None] = [None] * requests
        self.failure: str | None = None
        self.failed_s = float("nan")

    async def request(
        self, session: aiohttp.ClientSession, index: int, asked: Asked, body: bytes
    ) -> None:
        chunk_s: list[float] = []
        async with self.free:
            self.sent_s[index] = self.now_s()
            try:
                async with session.post(
                    self.url, data=body, headers=_JSON, allow_redirects=False
                ) as response:
                    if response.status != 200:
                        reason = error_message(await read_text(response))
                        raise AdapterTwinError(f"HTTP {response.status}: {reason}")
                    stream = response.content.iter_any()
                    usage = await read_stream(stream, self.now_s, chunk_s, asked)
                self.reported_tokens[index] = usage
                self.end_s[index] = chunk_s[-1]
            except Exception as error:  # whatever a server answers costs it this request
                self._note(index, error)
            finally:  # also when the window ends
                if chunk_s:
                    self.first_token_s[index] = chunk_s[0]
                    self.itl_ms[index] = (1e3 * np.diff(chunk_s)).astype(np.float32)

    def _note(self, index: int, error: Exception) -> None:
        self.error[index] = one_line(error)
        refused = isinstance(error, OSError) and error.errno == errno.ECONNREFUSED
        if refused and self.failure is None:
            self.failed_s = self.now_s()
            self.failure = f"server: stopped answering {self.failed_s:.1f} s into the window"
            # The requests in flight fail by themselves in this time.
            self.window.reschedule(asyncio.get_running_loop().time() + _FAILING_S)

    def table(self, trace: Trace) -> pd.DataFrame:
        due = len(self.sent_s)
        asked = trace.to_frame().head(due).rename(columns={"arrival_s": "scheduled_s"})
        return asked.assign(
            request=np.arange(due),
            reported_prompt_tokens=self.reported_tokens[:, 0],
            reported_output_tokens=self.reported_tokens[:, 1],
            sent_s=self.sent_s,
            first_token_s=self.first_token_s,
            end_s=self.end_s,
            itl_ms=pd.Series(self.itl_ms, dtype=object),
            error=pd.Series(self.error, dtype=object),
        )


def _allowed_connections(wanted: int) -> int:
    """Raise this process's limit of open files as far as it may go; return what fits in it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    needed = wanted + _SPARE_FILES
    if soft != unlimited and soft < needed:
        soft = needed if hard == unlimited else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == unlimited else max(1, min(wanted, soft - _SPARE_FILES))
