"""The load client: sends on time, counts what the server says, and loses nothing silently."""

import asyncio
import gc
import json
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
from aiohttp import web

from adapter_twin.errors import AdapterTwinError
from adapter_twin.measure import client
from adapter_twin.measure.client import Replay, replay
from adapter_twin.measure.stream import Asked, read_stream
from adapter_twin.workload.trace import Trace

NAMES = ["first", "second", "base"]
STOP = web.AppKey("stop", asyncio.Event)
"""Set by a handler: the server is to die."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_trace(arrival_s: list[float], adapter: int = -1, output_tokens: int = 3) -> Trace:
    def column(value: int) -> np.ndarray:
        return np.full(len(arrival_s), value, np.int32)

    return Trace(np.array(arrival_s), column(adapter), column(5), column(output_tokens))


def event(content: dict) -> bytes:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


TOKEN = event({"choices": [{"index": 0, "text": 'a "choices":[{ b'}]})
DONE = b"data: [DONE]\n\n"


def usage(prompt: int, output: int) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output}
    return event({"choices": [], "usage": counts})


async def answer(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(asked["max_tokens"]):
        await asyncio.sleep(0.01)
        await response.write(TOKEN)
    await response.write(usage(len(asked["prompt"]), asked["max_tokens"]) + DONE)
    return response


async def run(handler: Handler, trace: Trace, duration_s: float, **options: int) -> Replay:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    stop = asyncio.Event()
    app[STOP] = stop
    # A handler that still sleeps when the server stops is cut off, as by a crash.
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def die() -> None:
        await stop.wait()
        await runner.cleanup()

    death = asyncio.create_task(die())
    try:
        return await replay(url, NAMES, trace, duration_s, vocabulary=50, seed=1, **options)
    finally:
        stop.set()
        await death


def test_requests_are_sent_when_due_and_timed_by_token() -> None:
    arrival_s = [0.0, 0.05, 0.05, 0.2, 0.31]
    seen = asyncio.run(run(answer, make_trace(arrival_s), 1.0))
    requests = seen.requests
    assert seen.failure is None
    assert seen.ended_s == 1.0
    assert requests["error"].isna().all()
    assert requests["scheduled_s"].tolist() == arrival_s
    late_ms = 1e3 * (requests["sent_s"] - arrival_s)
    assert late_ms.between(0, 50).all()
    assert seen.schedule.max_ms == pytest.approx(late_ms.max())
    assert seen.schedule.median_ms == pytest.approx(late_ms.median())
    assert (requests["first_token_s"] - requests["sent_s"] >= 0.01).all()
    for row in requests.itertuples():
        assert len(row.itl_ms) == 2
        gaps_s = float(row.itl_ms.sum()) / 1e3
        assert row.end_s - row.first_token_s == pytest.approx(gaps_s, abs=1e-5)


def test_each_request_asks_for_its_adapter_and_lengths_with_reproducible_prompts() -> None:
    asked: list[dict] = []

    async def note(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        return await answer(request)

    trace = Trace(
        np.array([0.0, 0.02, 0.04]),
        np.array([1, -1, 0], np.int32),
        np.array([4, 40, 7], np.int32),
        np.array([2, 1, 5], np.int32),
    )
    seen = asyncio.run(run(note, trace, 1.0)).requests
    assert [request["model"] for request in asked] == ["second", "base", "first"]
    assert [request["max_tokens"] for request in asked] == [2, 1, 5]
    assert [len(request["prompt"]) for request in asked] == [4, 40, 7]
    assert all(0 <= token < 50 for request in asked for token in request["prompt"])
    assert all(request["ignore_eos"] and request["temperature"] == 0 for request in asked)
    assert seen["reported_prompt_tokens"].tolist() == [4, 40, 7]
    assert seen["reported_output_tokens"].tolist() == [2, 1, 5]
    again, asked = asked, []
    asyncio.run(run(note, trace, 1.0))
    assert [request["prompt"] for request in asked] == [request["prompt"] for request in again]


def test_what_is_unfinished_at_the_end_of_the_window_is_dropped() -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(TOKEN + TOKEN)
        await asyncio.sleep(60)
        return response

    seen = asyncio.run(run(slow, make_trace([0.0, 0.1, 0.5]), 0.3))
    assert seen.requests["request"].tolist() == [0, 1]  # the third one is due after the window
    assert seen.requests["first_token_s"].notna().all()
    assert seen.requests["end_s"].isna().all()
    assert seen.requests["error"].isna().all()
    assert [len(gaps) for gaps in seen.requests["itl_ms"]] == [1, 1]
    assert seen.failure is None


def test_refusals_and_broken_streams_are_rows_with_their_reason() -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        content = {"error": {"message": "The model `first`\ndoes not exist.", "code": 404}}
        return web.json_response(content, status=404)

    async def refuse_in_stream(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b'data: {"error": {"message": "too long"}}\n\n' + DONE)

    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(TOKEN)
        assert request.transport is not None
        request.transport.abort()
        return response

    async def end_early(request: web.Request) -> web.StreamResponse:
        return web.Response(body=TOKEN + DONE)

    answers = [refuse, refuse_in_stream, break_off, end_early, answer]

    async def in_turn(request: web.Request) -> web.StreamResponse:
        return await answers[(await request.json())["max_tokens"] - 1](request)

    trace = replace(make_trace([0.0] * 5), output_tokens=np.arange(1, 6, dtype=np.int32))
    seen = asyncio.run(run(in_turn, trace, 1.0))
    first, second, third, fourth, fifth = seen.requests["error"]
    assert first == "HTTP 404: The model `first` does not exist"
    assert second == "too long"
    assert third
    assert fourth == "the stream ended early"
    assert fifth is None
    assert seen.requests["end_s"].notna().tolist() == [False] * 4 + [True]
    assert seen.failure is None


def test_a_server_that_dies_half_way_leaves_partial_results_and_says_so() -> None:
    count = 0

    async def die(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        if count == 3:
            request.app[STOP].set()
        return await answer(request)

    arrival_s = [0.0, 0.1, 0.3, 0.8, 20.0]
    seen = asyncio.run(run(die, make_trace(arrival_s), 30.0))
    assert seen.failure is not None
    assert "stopped answering" in seen.failure
    assert 0.8 <= seen.ended_s < 25
    assert seen.requests["end_s"].notna().tolist()[:2] == [True, True]
    assert seen.requests["end_s"].isna().tolist()[3:] == [True, True]
    assert seen.requests["error"][3]
    assert seen.schedule.max_ms < 1000  # what was never due is not late


def test_more_requests_than_connections_wait_in_the_client_and_show_as_late() -> None:
    trace = make_trace([0.0, 0.0, 0.0], output_tokens=10)
    seen = asyncio.run(run(answer, trace, 5.0, max_connections=1))
    assert seen.requests["end_s"].notna().all()
    assert seen.schedule.max_ms > 150
    sent_s, end_s = seen.requests["sent_s"], seen.requests["end_s"]
    assert (sent_s[1:].to_numpy() >= end_s[:-1].to_numpy()).all()


def test_requests_that_never_get_a_connection_are_late_too() -> None:
    trace = make_trace([0.0, 0.0], output_tokens=1000)
    seen = asyncio.run(run(answer, trace, 0.5, max_connections=1))
    assert seen.requests["sent_s"].notna().tolist() == [True, False]
    assert seen.schedule.max_ms == pytest.approx(500)


def test_an_empty_trace_is_an_empty_table() -> None:
    seen = asyncio.run(run(answer, make_trace([]), 0.05))
    assert len(seen.requests) == 0
    assert np.isnan(seen.schedule.p99_ms)


def read(*received: bytes, output_tokens: int = 3) -> tuple[tuple[int, int], list[float]]:
    """Read a body that arrives in these pieces, one a second."""
    asked = Asked("base", 7, output_tokens)

    async def pieces() -> AsyncIterator[bytes]:
        for piece in received:
            yield piece

    times = iter(range(len(received)))
    chunk_s: list[float] = []
    counts = asyncio.run(read_stream(pieces(), lambda: float(next(times)), chunk_s, asked))
    return counts, chunk_s


def test_an_event_counts_when_it_is_complete() -> None:
    body = b": ping\n\n" + TOKEN + TOKEN + usage(7, 3) + DONE
    assert read(body) == ((7, 3), [0.0, 0.0])
    assert read(TOKEN[:20], TOKEN[20:] + TOKEN[:-1], b"\n" + usage(7, 3)) == ((7, 3), [1.0, 2.0])


def test_spaced_json_is_read_as_well() -> None:
    spaced = b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'
    seen = read(spaced, spaced, usage(7, 2), output_tokens=2)
    assert seen == ((7, 2), [0.0, 1.0])


def test_a_stream_without_counts_is_an_error() -> None:
    with pytest.raises(AdapterTwinError, match="ended early"):
        read(TOKEN, DONE)


def test_no_more_connections_than_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: limits.append(both))
    assert client._allowed_connections(100) == 100
    assert limits == []
    assert client._allowed_connections(2000) == 2000
    assert limits == [(2256, 4096)]
    assert client._allowed_connections(20_000) == 4096 - 256


def test_memory_is_collected_again_after_a_run() -> None:
    with client.settled_memory():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
