"""A client whose requests wait for answers: a session's next turn, or one of n places.

A request of `adapter_twin.workload.trace.Trace` that follows another one is ready some time after
that one's answer; where at most n requests may be under way, the first one that is ready gets the
place that is free first, as from the semaphore of ``vllm bench serve --max-concurrency``. An answer
is complete when its last token reaches the client, as `adapter_twin.twin.records` tells it. A
request that the server refuses gets none: nobody follows it, and it takes no place.

The engine's requests are in the order in which they are sent: each is laid out then, and before
that looks to the engine like one that never arrives. So the loop over the arrivals of
`adapter_twin.twin.clock` is the same for all clients; for one that waits for nothing, these
functions are called with None, and compiled away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.state import Blocks, Links, Requests

if TYPE_CHECKING:
    from adapter_twin.twin.clock import Run
    from adapter_twin.workload.trace import Trace

COUNTS = np.dtype(
    [
        ("sent", np.int64),
        ("ready", np.int64),  # requests whose turn it is, now or at a time that is known
        ("answered", np.int64),  # requests whose place is free again, now or then
        ("unused", np.int64),  # places that nobody has had
    ]
)
"""The one record of these is what a client counts."""


class ClosedLoop(NamedTuple):
    """What the client knows of the trace's requests, and when it has sent them."""

    count: Any  # one record of COUNTS
    sent: Links  # indices of the requests sent, in that order
    first_follower: NDArray[np.int64]  # of each request in `followers`, with one entry more
    followers: Links
    think_s: NDArray[np.float64]
    ready_s: NDArray[np.float64]  # when a request may be sent, if there is a place
    answered_s: NDArray[np.float64]
    ready: Links  # a heap by `ready_s`
    answered: Links  # a heap by `answered_s`
    overhead_s: NDArray[np.float64]  # time in the front end: constant, and per running request
    adapter: Links
    prompt_tokens: Links
    output_tokens: Links
    first_piece: NDArray[np.int64]
    last_piece: NDArray[np.int64]


def new_closed_loop(
    trace: Trace, requests: Requests, blocks: Blocks | None, overhead_s: NDArray[np.float64]
) -> ClosedLoop | None:
    """Take the requests of a trace away from the engine, to send them one by one.

    Parameters
    ----------
    trace : Trace
    requests : Requests
        Those of the trace; from now on none of them arrives by itself.
    blocks : Blocks, optional
    overhead_s : float64, shape (2,)
        Time of an answer in the front end: a constant, and seconds per running request.

    Returns
    -------
    ClosedLoop or None
        None where requests wait for nothing: they are left alone.
    """
    if not trace.waits:
        return None
    requests.arrival_s[:] = np.inf
    n = len(trace)
    after = np.full(n, -1) if trace.after is None else trace.after
    followers = np.argsort(after, kind="stable").astype(np.int32)  # first those of nobody
    first_follower = np.searchsorted(after[followers], np.arange(n + 1))
    count = np.zeros(1, COUNTS).view(np.recarray)[0]
    count.ready = first_follower[0]
    count.unused = n if trace.max_concurrency is None else trace.max_concurrency
    no_pieces = np.zeros(0, np.int64)
    return ClosedLoop(
        count=count,
        sent=np.zeros(n, np.int32),
        first_follower=first_follower,
        followers=followers,
        think_s=np.zeros(n) if trace.think_s is None else np.array(trace.think_s, np.float64),
        ready_s=np.array(trace.arrival_s, np.float64),
        answered_s=np.full(n, np.nan),
        ready=followers.copy(),  # of which the first ones are in order of arrival, and so a heap
        answered=np.zeros(n, np.int32),
        overhead_s=np.array(overhead_s, np.float64),
        adapter=requests.adapter.copy(),
        prompt_tokens=requests.prompt_tokens.copy(),
        output_tokens=requests.output_tokens.copy(),
        first_piece=no_pieces if blocks is None else blocks.pool.first_piece.copy(),
        last_piece=no_pieces if blocks is None else blocks.pool.last_piece.copy(),
    )


@helper
def _goes_before(key_s: NDArray[np.float64], one: int, other: int) -> bool:
    return bool(key_s[one] < key_s[other] or (key_s[one] == key_s[other] and one < other))


@helper
def _push(heap: Links, n: int, key_s: NDArray[np.float64], item: int) -> None:
    """Add to a binary heap of n: first is the item of the lowest key, of equals the lowest one."""
    place = n
    while place > 0 and _goes_before(key_s, item, heap[(place - 1) // 2]):
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    heap[place] = item


@helper
def _drop_first(heap: Links, n: int, key_s: NDArray[np.float64]) -> None:
    """Take the first item out of a heap of n."""
    last, place, child = heap[n - 1], 0, 1
    while child < n - 1:
        if child + 1 < n - 1 and _goes_before(key_s, heap[child + 1], heap[child]):
            child += 1
        if not _goes_before(key_s, heap[child], last):
            break
        heap[place] = heap[child]
        place, child = child, 2 * child + 1
    heap[place] = last


@helper
def next_sent_s(loop: ClosedLoop | None) -> float:
    """Return when the next request will be sent, if no answer comes; infinity for never."""
    if loop is None:
        return np.inf
    count = loop.count
    if count.ready == 0 or (count.unused == 0 and count.answered == 0):
        return np.inf
    ready_s = loop.ready_s[loop.ready[0]]
    if count.unused > 0:
        return float(ready_s)
    return float(max(ready_s, loop.answered_s[loop.answered[0]]))


@helper
def send_due(run: Run, loop: ClosedLoop | None, until_s: float) -> None:
    """Send the requests that are due."""
    if loop is None:
        return
    while next_sent_s(loop) <= until_s:
        _send(run, loop, next_sent_s(loop))


@helper
def _send(run: Run, loop: ClosedLoop, time_s: float) -> None:
    count, requests = loop.count, run.requests
    request, place = loop.ready[0], count.sent
    loop.sent[place] = request
    count.sent += 1
    _drop_first(loop.ready, count.ready, loop.ready_s)
    count.ready -= 1
    requests.arrival_s[place] = time_s
    requests.adapter[place] = loop.adapter[request]
    requests.prompt_tokens[place] = loop.prompt_tokens[request]
    requests.output_tokens[place] = loop.output_tokens[request]
    _lay_out_pieces(run.state.blocks, loop, request, place)
    if requests.prompt_tokens[place] + requests.output_tokens[place] > run.limits.max_model_len:
        return
    if count.unused > 0:
        count.unused -= 1
    else:
        _drop_first(loop.answered, count.answered, loop.answered_s)
        count.answered -= 1


@helper
def _lay_out_pieces(blocks: Blocks | None, loop: ClosedLoop, request: int, place: int) -> None:
    if blocks is not None:
        blocks.pool.first_piece[place] = loop.first_piece[request]
        blocks.pool.last_piece[place] = loop.last_piece[request]


@helper
def note_answers(run: Run, loop: ClosedLoop | None, completed: int) -> None:
    """Note the answers to the requests that completed last, by which others are ready."""
    if loop is None:
        return
    count = loop.count
    for i in range(completed):
        place = run.state.completed[i]
        request, told_s = loop.sent[place], _told_s(run, loop, place)
        loop.answered_s[request] = told_s
        _push(loop.answered, count.answered, loop.answered_s, request)
        count.answered += 1
        for k in range(loop.first_follower[request], loop.first_follower[request + 1]):
            follower = loop.followers[k]
            ready_s = told_s + loop.think_s[follower]
            loop.ready_s[follower] = max(loop.ready_s[follower], ready_s)
            _push(loop.ready, count.ready, loop.ready_s, follower)
            count.ready += 1


@helper
def _told_s(run: Run, loop: ClosedLoop, place: int) -> float:
    """Return the `end_s` that `adapter_twin.twin.records.make_records` will tell of a request."""
    time_s, last = run.requests.end_s[place], run.clock.pauses - 1
    while last >= 0 and run.pauses[last].start_s > time_s:
        last -= 1
    if last >= 0:
        time_s = max(time_s, run.pauses[last].end_s)
    running = run.steps[run.requests.first_step[place]].running
    return float(time_s + (loop.overhead_s[0] + loop.overhead_s[1] * running))
