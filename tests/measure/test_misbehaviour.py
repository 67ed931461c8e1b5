"""Servers that fail, lie, stall or talk nonsense: each costs a run, with its reason, and no more.

The servers are real ones on this machine, and so is all that asks them; they answer as vLLM does,
but for the one thing that their name tells.
"""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from aiohttp import web

from adapter_twin.measure import judge, scrape, serving, vllm_server
from adapter_twin.measure import run_campaign as runner
from adapter_twin.measure.client import Replay, ScheduleError
from adapter_twin.tables import datasets
from adapter_twin.workload.models import model_config

WINDOW_S, OUTPUT_TOKENS, WARM_UP_REQUESTS = 0.6, 8, 2
TOKEN_S = 0.005
DONE = b"data: [DONE]\n\n"


def event(content: object) -> bytes:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def token(asked: dict, text: str = "x") -> bytes:
    return event({"model": asked["model"], "choices": [{"index": 0, "text": text}]})


def usage(asked: dict, **counts: object) -> bytes:
    honest = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
    return event({"model": asked["model"], "choices": [], "usage": honest | counts})


Answer = Callable[["Rogue", web.Request, dict], Awaitable[web.StreamResponse]]
Page = Callable[["Rogue", str], "str | bytes | web.Response | Awaitable[web.Response]"]


class Rogue:
    """A server: `answer` takes the place of its completions once it is warm, `page` of its metrics.

    Pages are good until `good_pages` were read.
    """

    def __init__(
        self, answer: Answer | None = None, page: Page | None = None, good_pages: int = 0
    ) -> None:
        self.answer, self.page, self.good_pages = answer, page, good_pages
        self.asked = self.pages = self.running = self.prompted = self.generated = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.asked += 1
        self.running += 1
        self.prompted += len(asked["prompt"])
        try:
            if self.answer is not None and self.asked > WARM_UP_REQUESTS:
                return await self.answer(self, request, asked)
            return await self.send(request, self.honest(asked))
        finally:
            self.running -= 1

    async def honest(self, asked: dict) -> AsyncIterator[bytes]:
        for _ in range(asked["max_tokens"]):
            await asyncio.sleep(TOKEN_S)
            self.generated += 1
            yield token(asked)
        yield usage(asked) + DONE

    async def send(self, request: web.Request, content: AsyncIterator[bytes]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async for part in content:
            await response.write(part)
        return response

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        self.pages += 1
        counts = {
            "num_requests_running": self.running,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0.25,
            "num_preemptions_total": 0,
            "prompt_tokens_total": self.prompted,
            "generation_tokens_total": self.generated,
        }
        lines = [f'vllm:{name}{{engine="0"}} {float(value)}' for name, value in counts.items()]
        lines.append('vllm:cache_config_info{num_gpu_blocks="100",block_size="16"} 1.0')
        text = "\n".join(lines) + "\n"
        told = text if self.page is None or self.pages <= self.good_pages else self.page(self, text)
        if isinstance(told, Awaitable):
            told = await told
        if isinstance(told, web.Response):
            return told
        return web.Response(body=told if isinstance(told, bytes) else told.encode())

    @contextmanager
    def running_here(self) -> Iterator[str]:
        """Serve in a thread of its own, and give the address."""
        loop, ready, urls = asyncio.new_event_loop(), threading.Event(), []

        async def start() -> web.AppRunner:
            app = web.Application()
            app.router.add_post("/v1/completions", self.complete)
            app.router.add_get("/metrics/", self.metrics)
            served = web.AppRunner(app, shutdown_timeout=0.01)
            await served.setup()
            await web.TCPSite(served, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{served.addresses[0][1]}")
            ready.set()
            return served

        def serve() -> None:
            served = loop.run_until_complete(start())
            loop.run_forever()
            loop.run_until_complete(served.cleanup())
            loop.close()

        thread = threading.Thread(target=serve)
        thread.start()
        assert ready.wait(10)
        try:
            yield urls[0]
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)


def parts(make: Callable[[dict], list[bytes]], pause_s: float = 0.0) -> Answer:
    """Return an answer of these pieces."""

    async def answer(rogue: Rogue, request: web.Request, asked: dict) -> web.StreamResponse:
        async def content() -> AsyncIterator[bytes]:
            for part in make(asked):
                await asyncio.sleep(pause_s)
                yield part

        return await rogue.send(request, content())

    return answer


def tokens(asked: dict, more: int = 0) -> list[bytes]:
    return [token(asked)] * (asked["max_tokens"] + more)


def counted(**counts: object) -> Answer:
    return parts(lambda asked: [*tokens(asked), usage(asked, **counts), DONE])


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    async def answer(rogue: Rogue, request: web.Request, asked: dict) -> web.StreamResponse:
        return web.Response(status=code, body=body, headers=headers)

    return answer


def raw(content: bytes) -> Answer:
    """Return an answer of these bytes, whatever HTTP has to say to it, and a closed connection."""

    async def answer(rogue: Rogue, request: web.Request, asked: dict) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(content)
        request.transport.close()
        return web.Response()

    return answer


async def half_fail(rogue: Rogue, request: web.Request, asked: dict) -> web.StreamResponse:
    if rogue.asked % 2:
        return web.json_response({"error": {"message": "worker 1 is gone"}}, status=500)
    return await rogue.send(request, rogue.honest(asked))


async def abort(rogue: Rogue, request: web.Request, asked: dict) -> web.StreamResponse:
    response = await rogue.send(request, some(tokens(asked)[:3]))
    assert request.transport is not None
    request.transport.abort()
    return response


async def never(rogue: Rogue, request: web.Request, asked: dict) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def hang_after_a_token(rogue: Rogue, request: web.Request, asked: dict) -> web.Response:
    await rogue.send(request, some([token(asked)]))
    await asyncio.sleep(60)
    return web.Response()


async def stall(rogue: Rogue, request: web.Request, asked: dict) -> web.StreamResponse:
    """Answer some requests, and then none for the rest of the window."""
    if rogue.asked > WARM_UP_REQUESTS + 4:
        await asyncio.sleep(60)
    return await rogue.send(request, rogue.honest(asked))


async def endless(rogue: Rogue, request: web.Request, asked: dict) -> web.StreamResponse:
    async def content() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.001)
            yield token(asked)

    return await rogue.send(request, content())


async def endless_refusal(rogue: Rogue, request: web.Request, asked: dict) -> web.StreamResponse:
    response = web.StreamResponse(status=500)
    await response.prepare(request)
    while True:
        await response.write(b"no " * 20_000)
        await asyncio.sleep(0)


async def some(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS: dict[str, tuple[Answer, str]] = {
    "500": (status(500, b'{"error": {"message": "out of memory"}}'), "500: out of memory"),
    "500 in binary": (status(500, bytes(range(128, 256))), "requests failed .*HTTP 500"),
    "500 in escapes": (status(500, b'{"error": {"message": "a\\u001b[2J\\n\\ud800"}}'), r"a\\x1b"),
    "500 for half of them": (half_fail, "requests failed .*worker 1 is gone"),
    "500 without an end": (endless_refusal, "an answer of more than 262144 bytes"),
    "429": (status(429, b"slow down"), "HTTP 429: slow down"),
    "a redirect": (status(307, Location="http://192.0.2.1/"), "HTTP 307"),
    "closes": (raw(b""), "requests failed"),
    "closes after its headers": (raw(CHUNKED), "requests failed"),
    "bad chunks": (raw(CHUNKED + b"zz\r\nnonsense\r\n"), "requests failed"),
    "no HTTP": (raw(b"220 mail.example ESMTP\r\n"), "requests failed"),
    "closes half way": (abort, "requests failed"),
    "ends half way": (parts(lambda asked: tokens(asked)[:3]), "the stream ended early"),
    "an empty body": (status(200), "the stream ended early"),
    "no tokens": (parts(lambda asked: [usage(asked), DONE]), "the stream ended early"),
    "no counts": (parts(lambda asked: [*tokens(asked), DONE]), "the stream ended early"),
    "no stream": (status(200, b'{"choices": [{"text": "all"}]}'), "the stream ended early"),
    "a web page": (status(200, b"<html>\n\n</html>\n\n"), "no event of a completion: b'<html>'"),
    "malformed events": (parts(lambda asked: [b"data: {'choices'\n\n"]), "no event of a comp"),
    "junk events": (parts(lambda asked: [b"retry: 5\n\n", *tokens(asked)]), "no event of a comp"),
    "bad UTF-8": (
        parts(lambda asked: [one.replace(b"x", b"\xff") for one in tokens(asked)]),
        "requests failed .*'utf-8' codec can't decode",
    ),
    "deep events": (parts(lambda asked: [b"data: " + b"[" * 100_000 + b"\n\n"]), "no event of a"),
    "20 MB in an event": (parts(lambda asked: [b"data: " + b"x" * 20_000_000]), "an event of more"),
    "an error in the stream": (
        parts(lambda asked: [*tokens(asked)[:2], event({"error": {"message": "it died"}})]),
        "requests failed .*it died",
    ),
    "counts double": (counted(completion_tokens=2 * OUTPUT_TOKENS), r"\[4, 16\] prompt and output"),
    "counts other prompts": (counted(prompt_tokens=3), r"\[3, 8\] prompt and output tokens"),
    "counts below 0": (counted(completion_tokens=-5), r"\[4, -5\] prompt and output tokens"),
    "counts in words": (counted(completion_tokens="8"), r"\[4, '8'\] prompt and output tokens"),
    "counts in lists": (counted(completion_tokens=[8]), r"\[4, \[8\]\] prompt and output tokens"),
    "counts nothing": (counted(completion_tokens=None), r"\[4, None\] prompt and output tokens"),
    "counts beyond floats": (counted(completion_tokens=10**400), r"\[4, 1000+"),
    "counts beyond digits": (
        parts(lambda asked: [*tokens(asked), b'data: {"usage": 1' + b"0" * 5000 + b"}\n\n"]),
        "no event of a completion",
    ),
    "a number for counts": (
        parts(lambda asked: [*tokens(asked), event({"usage": 12})]),
        "False prompt and output tokens counted",
    ),
    "fewer tokens than asked": (
        parts(lambda asked: [*tokens(asked, -3), usage(asked, completion_tokens=5), DONE]),
        r"\[4, 5\] prompt and output tokens counted, \[4, 8\] asked",
    ),
    "more tokens than asked": (
        parts(lambda asked: [*tokens(asked, 3), usage(asked, completion_tokens=11), DONE]),
        "more chunks than the 8 tokens asked for",
    ),
    "more tokens than it counts": (
        parts(lambda asked: [*tokens(asked, 1), usage(asked), DONE]),
        "more chunks than the 8 tokens asked for",
    ),
    "tokens without an end": (endless, "more chunks than the 8 tokens asked for"),
    "all tokens at once": (
        parts(lambda asked: [token(asked), usage(asked), DONE]),
        r"tokens came in \d+ chunks",
    ),
    "another model": (
        parts(lambda asked: [token({"model": "gpt"}), usage(asked), DONE]),
        "answered by 'gpt', 'adapter-[01]' was asked",
    ),
    "never answers": (never, "none of .* requests was completed; no token for"),
    "hangs after a token": (hang_after_a_token, "none of .* requests was completed"),
    "drips tokens": (parts(tokens, pause_s=0.3), "none of .* requests was completed"),
    "drips bytes": (
        parts(lambda asked: [bytes([one]) for one in tokens(asked)[0]], pause_s=0.05),
        "none of .* requests was completed",
    ),
    "stalls": (stall, r"no token for 0\.\d s of 0\.6 s \(at most 20%\)"),
}


def replaced(metric: str, value: str) -> Page:
    """Return a page on which a metric has another value."""

    def page(rogue: Rogue, text: str) -> str:
        lines = text.splitlines(keepends=True)
        return "".join(
            f"{line.split()[0]} {value}\n" if line.startswith(f"vllm:{metric}") else line
            for line in lines
        )

    return page


def refused(code: int, **headers: str) -> Page:
    return lambda rogue, text: web.Response(status=code, headers=headers)


async def no_page(rogue: Rogue, text: str) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


def long_page(rogue: Rogue, text: str) -> str:
    return text + "".join(f'other{{line="{number}"}} 1.0\n' for number in range(100_000))


def double(rogue: Rogue, text: str) -> str:
    return replaced("generation_tokens_total", str(2.0 * rogue.generated))(rogue, text)


KV_CACHE_READ, BASELINE_READ = 1, 2
"""Pages are read for the size of the KV cache, once the server is idle, and then in the window."""

GENERATED = "generation_tokens_total"
PAGES: dict[str, tuple[Page, int, str]] = {
    "404": (refused(404), 0, "failed:metrics: HTTP 404"),
    "500 from the window on": (refused(500), BASELINE_READ, "of 6 samples .*HTTP 500"),
    "a redirect": (refused(307, Location="http://192.0.2.1/"), 0, "failed:metrics: HTTP 307"),
    "hangs": (no_page, 0, "failed:.*no answer within 1 s"),
    "hangs when idle": (no_page, KV_CACHE_READ, "failed:.*still busy after 1 s"),
    "hangs in the window": (no_page, BASELINE_READ, r"doubtful:.*\d of 6 samples"),
    "an empty page": (lambda rogue, text: "", 0, "cache_config_info is missing"),
    "no size of the KV cache": (
        lambda rogue, text: text.replace('"100"', '"None"'),
        0,
        "cache_config_info is missing",
    ),
    "a size beyond floats": (
        lambda rogue, text: text.replace('"100"', f'"{10**400}"'),
        0,
        "cache_config_info is missing",
    ),
    "a size in superscript": (
        lambda rogue, text: text.replace('"100"', '"²"'),
        0,
        "cache_config_info is missing",
    ),
    "garbage": (lambda rogue, text: "{{{ no page }}}\n", 0, "failed:metrics: no page of metrics"),
    "binary": (lambda rogue, text: bytes(range(256)), 0, "failed:metrics: "),
    "garbage in the window": (lambda rogue, text: "vllm:{ x\n", BASELINE_READ, "of 6 samples"),
    "binary in the window": (lambda rogue, text: b"\xff" * 9, BASELINE_READ, "of 6 samples"),
    "cut off": (
        lambda rogue, text: text[: text.index("vllm:kv_cache") + 20],
        BASELINE_READ,
        "of 6 samples",
    ),
    "a metric is missing": (
        lambda rogue, text: text.replace("vllm:num_requests_waiting", "waiting"),
        BASELINE_READ,
        "of 6 samples .*num_requests_waiting is missing",
    ),
    "too long": (long_page, BASELINE_READ, "of 6 samples .*more than 262144 bytes"),
    "NaN": (replaced("kv_cache_usage", "NaN"), BASELINE_READ, "usage_perc is nan"),
    "infinite": (replaced(GENERATED, "+Inf"), BASELINE_READ, "tokens_total is inf"),
    "huge": (replaced(GENERATED, "1e300"), BASELINE_READ, r"tokens_total is 1e\+300"),
    "below 0": (replaced("num_requests_running", "-1"), BASELINE_READ, "running is -1"),
    "more than all of the cache": (replaced("kv_cache_usage", "5"), BASELINE_READ, "perc is 5"),
    "a counter that falls": (replaced(GENERATED, "0.0"), BASELINE_READ, "tokens_total fell"),
    "a counter that stands still": (
        replaced(GENERATED, str(float(WARM_UP_REQUESTS * 8))),
        BASELINE_READ,
        "metrics count 0 output tokens, the client",
    ),
    "a counter of twice as many": (double, BASELINE_READ, r"metrics count \d+ output tokens"),
    "always busy": (replaced("num_requests_waiting", "7"), 0, "failed:.*still busy after 1 s"),
}


def write_campaign(folder: Path, runs: int = 1, **behaviour: object) -> Path:
    """Write a campaign with a model and adapters of one's own."""
    model = folder / "model"
    model.mkdir()
    config = model_config("tiny") | {"vocab_size": 100} | behaviour
    (model / "config.json").write_text(json.dumps(config))
    for index in range(2):
        adapter = folder / "adapters" / f"adapter-{index}"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
        (adapter / "adapter_model.safetensors").touch()
    run = {"served_adapters": 2, "adapter_slots": 2, "rates": [25], "ranks": [8]}
    lengths = {"distribution": "fixed", "mean_input_tokens": 4, "mean_output_tokens": 8}
    content = {
        "name": "rogue",
        "model": "model",
        "adapters": "adapters",
        "budget_s": 1000,
        "serving": {
            "duration_s": WINDOW_S,
            "lengths": lengths,
            "runs": [{**run, "max_lora_rank": 8, "repeats": runs}],
        },
    }
    file = folder / "campaign.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for servers not as long as for real ones."""
    monkeypatch.setattr(runner, "measure_run", partial(serving.measure_run, period_s=0.1))
    monkeypatch.setattr(serving, "_LEAD_S", 0.1)
    monkeypatch.setattr(serving, "_WARM_UP_WITHIN_S", 2.0)
    for name, within_s in (("ANSWER", 1.0), ("IDLE", 1.0), ("SAMPLE", 0.3)):
        monkeypatch.setattr(scrape, f"{name}_WITHIN_S", within_s)


def measure(rogue: Rogue, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Measure a campaign of one run on a server, twice, and return the status of its run."""
    file, out = write_campaign(folder), folder / "out"
    with rogue.running_here() as url:

        class Server:
            base_url, model_name, model_folder = url, "model", folder / "model"

            def __init__(self, model, adapters, flags, port, log) -> None:
                self.adapters = adapters

            def __enter__(self):
                return self

            def __exit__(self, *_) -> None:
                pass

            def failure(self) -> str | None:
                return None

        monkeypatch.setattr(runner, "Server", Server)
        monkeypatch.setattr(runner, "require_engine", lambda: None)
        summary = runner.run_campaign(file, out)
    assert (summary.complete, summary.stopped) == (1, None)
    again = runner.run_campaign(file, out)  # the tables are sound: nobody is stuck
    assert again == summary
    (run,) = datasets.read_campaign(out)["runs"].to_dict("records")
    told = {"ok": {}, "failed": summary.failed, "doubtful": summary.doubtful}
    kind, _, reason = run["status"].partition(":")
    assert told[kind] == ({"run-000-0": reason} if reason else {})
    return str(run["status"])


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_run_with_bad_answers_is_doubtful(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer, reason = ANSWERS[kind]
    with caplog.at_level(logging.INFO):
        told = measure(Rogue(answer), tmp_path, monkeypatch)
    assert told.isprintable()
    assert told.startswith("doubtful:")
    assert re.search(reason, told), told
    assert any(f"doubtful ({told.removeprefix('doubtful:')})" in one for one in caplog.messages)


@pytest.mark.parametrize("kind", PAGES)
def test_a_run_with_bad_metrics_is_doubtful_or_failed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, good_pages, reason = PAGES[kind]
    told = measure(Rogue(page=page, good_pages=good_pages), tmp_path, monkeypatch)
    assert re.search(reason, told), told


def statuses(out: Path) -> list[str]:
    return datasets.read_campaign(out)["runs"]["status"].tolist()


def left_running(folder: Path, within_s: float = 0.0) -> list[int]:
    """Return the processes that were started with this folder and do not end in time."""
    limit_s = time.monotonic() + within_s
    while (found := started_with(folder)) and time.monotonic() < limit_s:
        time.sleep(0.1)
    return found


def started_with(folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if os.fsencode(folder) in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a run for good although this machine is busy with other tests."""
    for name, limit in (("LATE_MS", 500.0), ("SILENT_SHARE", 1.0), ("UNREAD_SHARE", 0.9)):
        monkeypatch.setattr(judge, name, limit)


@pytest.mark.usefixtures("patient")
def test_an_honest_server_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(Rogue(), tmp_path, monkeypatch) == "ok"


@pytest.mark.usefixtures("fake_vllm", "patient")
def test_ones_own_model_and_adapters_are_served_past_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    summary = runner.run_campaign(write_campaign(tmp_path, runs=2), tmp_path / "out")
    assert (summary.failed, summary.doubtful) == ({}, {})
    assert statuses(tmp_path / "out") == ["ok", "ok"]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"dies": "ValueError: no memory"}, "failed:server: died .*ValueError: no memory"),
        ({"dies_after": 9}, "failed:server: died .*CUDA out of memory"),
        ({"hangs_after": 9}, "doubtful:.*no token for"),
        ({"hangs_after": 9, "stubborn": True, "child": True}, "doubtful:.*no token for"),
        ({"hangs_after": 1}, "failed:model: the server did not answer"),
    ],
)
@pytest.mark.usefixtures("fake_vllm", "patient")
def test_a_server_that_dies_or_stops_costs_its_run_and_is_gone(
    behaviour: dict[str, object], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "STOP_WITHIN_S", 0.3)
    monkeypatch.setattr(judge, "SILENT_SHARE", 0.2)
    runner.run_campaign(write_campaign(tmp_path, runs=2, **behaviour), tmp_path / "out")
    told = statuses(tmp_path / "out")
    assert len(told) == 2
    assert all(re.match(reason, one) for one in told), told
    assert left_running(tmp_path) == []


def test_a_broken_table_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = serving._summary
    monkeypatch.setattr(serving, "_summary", lambda *told: summary(*told) | {"input_tokens": -235})
    told = measure(Rogue(), tmp_path, monkeypatch)
    assert told.startswith("failed:runs: input_tokens in row 0 is -235: must be at least 0")


def test_what_no_one_foresaw_is_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_run(*_: object, **__: object) -> None:
        raise KeyError("nobody knows")

    monkeypatch.setattr(runner, "measure_run", measure_run)
    assert measure(Rogue(), tmp_path, monkeypatch) == "failed:KeyError: 'nobody knows'"


COMMAND = """\
import signal, sys
# Where the tests run in the background, the shell has told them to ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from adapter_twin import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "after_s", "behaviour"),
    [
        ("starting a server", 0.0, {}),
        ("starting a server", 0.4, {}),
        ("requests/s in all", 0.0, {}),
        ("requests/s in all", 1.0, {}),
        ("requests/s in all", 0.3, {"hangs_after": 1}),
        ("run-000-.: measured|doubtful", 0.0, {"child": True}),
    ],
)
@pytest.mark.usefixtures("fake_vllm")
def test_ctrl_c_leaves_whole_files_and_no_server(
    line: str, after_s: float, behaviour: dict[str, object], tmp_path: Path
) -> None:
    file, out = write_campaign(tmp_path, runs=9, **behaviour), tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, "profile", str(file), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as profiling:
        assert profiling.stderr is not None
        assert any(re.search(line, told) for told in profiling.stderr)
        time.sleep(after_s)
        profiling.send_signal(signal.SIGINT)
        told = profiling.stderr.read()
        assert profiling.wait(60) == 130
    assert told.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in told
    # One that started just then sees within half a second that nobody waits for it.
    assert left_running(tmp_path, within_s=10.0) == []
    assert list(out.rglob("*.tmp")) == []
    complete = [path.parent for path in out.glob("pieces/*/facts.json")]
    assert sorted(complete) == sorted(out.glob("pieces/*"))
    assert len(complete) == (len(statuses(out)) if (out / "runs.parquet").exists() else 0)


def test_the_recorded_runs_are_within_the_limits() -> None:
    tables = datasets.read_campaign(datasets.REPOSITORY / "data" / "campaigns" / "cpu-small")
    requests, series = (dict(list(tables[name].groupby("run_id", observed=True))) for name in SEEN)
    for run in tables["runs"].itertuples():
        schedule = ScheduleError(np.nan, run.schedule_error_p99_ms, np.nan)
        seen = Replay(requests[run.run_id], schedule, run.duration_s, None)
        assert judge.doubt(seen, series[run.run_id], [], 1.0) is None


SEEN = ("requests", "series")


def requests(**changes: object) -> pd.DataFrame:
    """Return 200 requests of 10 tokens, one every 0.1 s, of which the first has these changes."""
    one = {"output_tokens": 10, "itl_ms": np.full(9, 10.0), "error": None}
    rows = [
        one | {"sent_s": at_s, "first_token_s": at_s + 0.01, "end_s": at_s + 0.1}
        for at_s in np.arange(200) / 10
    ]
    return pd.DataFrame([rows[0] | changes, *rows[1:]])


def test_limits_are_where_they_are_said_to_be() -> None:
    def judged(seen: pd.DataFrame, late_ms: float = 49.0, counted: float = 2000.0) -> str | None:
        schedule = ScheduleError(0.0, late_ms, 0.0)
        samples = pd.DataFrame({"t_s": np.arange(21.0), "generated_tokens_total": counted})
        return judge.doubt(Replay(seen, schedule, 20.0, None), samples, [], 1.0)

    lost = {"end_s": np.nan, "error": "no"}
    assert judged(requests()) is None
    assert judged(requests(), late_ms=51.0)
    assert judged(requests(), counted=2190.0) is None
    assert "2210 output tokens, the client 2000" in (judged(requests(), counted=2210.0) or "")
    assert "1790 output tokens, the client 2000" in (judged(requests(), counted=1790.0) or "")
    assert judged(requests(**lost)) is None
    few = requests(**lost).head(99)
    assert "1 of 99 requests failed" in (judged(few, counted=990.0) or "")
    idle = requests().head(100)  # for half of the window, with nothing under way
    assert judged(idle, counted=1000.0) is None
    for begun_s, silent in ((16.1, False), (15.9, True)):
        last = idle.tail(1).assign(sent_s=begun_s, first_token_s=np.nan, end_s=np.nan)
        told = judged(pd.concat([idle, last]), counted=1000.0)
        assert ("no token for 4.1 s of 20 s" in (told or "")) == silent
