"""Time the load client against a stub server: ``python -m benchmarks.client [--json FILE]``.

The stub, in a process of its own, answers each request with its first token after a constant time
and further tokens at a constant pace. Meanwhile another process sends single requests over a bare
socket: what it sees is the stub, the connection and a machine that others may use, and what the
client sees beyond that is the client. Medians are compared, since any process may be held up.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import socket
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from aiohttp import web

from adapter_twin.measure.client import replay, settled_memory
from adapter_twin.workload.trace import Trace

OVERHEAD_BAR = 0.02
TTFT_S, ITL_S = 0.05, 0.02
PROMPT_TOKENS, OUTPUT_TOKENS = 220, 20
TOKEN = b'data: {"id":"stub","choices":[{"index":0,"text":" x","finish_reason":null}]}\n\n'


async def answer(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    clock_s = asyncio.get_running_loop().time
    due_s = clock_s() + TTFT_S
    for _ in range(asked["max_tokens"]):
        await asyncio.sleep(due_s - clock_s())
        await response.write(TOKEN)
        due_s += ITL_S
    usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
    await response.write(
        b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
    )
    return response


def serve(listener: socket.socket, results: Connection) -> None:
    async def main() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        results.send("ready")
        while not results.poll():
            await asyncio.sleep(0.1)
        await runner.cleanup()

    asyncio.run(main())


def probe(port: int, results: Connection) -> None:
    """Send one request after the other over a bare socket, and note each time to first token."""
    body = json.dumps({"prompt": [1] * PROMPT_TOKENS, "max_tokens": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: stub\r\nContent-Length: {len(body)}\r\n\r\n"
    ttft_s = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while not results.poll():
            sent_s = time.monotonic()
            connection.sendall(head.encode() + body)
            received = b""
            while b"data:" not in received:
                received += connection.recv(65536)
            ttft_s.append(time.monotonic() - sent_s)
            while not received.endswith(b"0\r\n\r\n"):
                received += connection.recv(65536)
            time.sleep(0.02)
    results.send(ttft_s)


@dataclass(frozen=True)
class Timing:
    rate: float
    requests: int
    bare_ttft_ms: float
    client_ttft_ms: float
    overhead: float
    bare_p99_ms: float
    client_p99_ms: float
    schedule_median_ms: float
    schedule_p99_ms: float
    schedule_max_ms: float
    client_cpu: float


def time_rate(rate: float, duration_s: float) -> Timing:
    # Spawned: they must not share this process's memory or event loop.
    context = multiprocessing.get_context("spawn")
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    ends = [context.Pipe(), context.Pipe()]
    stub = context.Process(target=serve, args=(listener, ends[0][1]), daemon=True)
    prober = context.Process(target=probe, args=(port, ends[1][1]), daemon=True)
    stub.start()
    ends[0][0].recv()
    prober.start()
    count = round(rate * duration_s)
    arrival_s = np.sort(np.random.default_rng(0).random(count)) * duration_s
    lengths = (np.full(count, tokens, np.int32) for tokens in (PROMPT_TOKENS, OUTPUT_TOKENS))
    trace = Trace(arrival_s, np.full(count, -1, np.int32), *lengths)
    cpu_s = -_cpu_s()
    with settled_memory():
        seen = asyncio.run(
            replay(f"http://127.0.0.1:{port}", ["stub"], trace, duration_s + 10, 32_000, seed=0)
        )
    cpu_s += _cpu_s()
    ends[1][0].send("stop")
    bare_ms = 1e3 * np.array(ends[1][0].recv())
    ends[0][0].send("stop")
    for process in (prober, stub):
        process.join()
    listener.close()
    requests = seen.requests
    assert requests["end_s"].notna().all(), requests["error"].dropna().unique()
    client_ms = 1e3 * (requests["first_token_s"] - requests["sent_s"])
    return Timing(
        rate=rate,
        requests=count,
        bare_ttft_ms=float(np.median(bare_ms)),
        client_ttft_ms=float(client_ms.median()),
        overhead=float(client_ms.median() / np.median(bare_ms) - 1),
        bare_p99_ms=float(np.percentile(bare_ms, 99)),
        client_p99_ms=float(np.percentile(client_ms, 99)),
        schedule_median_ms=seen.schedule.median_ms,
        schedule_p99_ms=seen.schedule.p99_ms,
        schedule_max_ms=seen.schedule.max_ms,
        client_cpu=cpu_s / duration_s,
    )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 50, 200], metavar="R")
    parser.add_argument("--duration", type=float, default=20.0, metavar="S")
    arguments = parser.parse_args()

    print(
        f"Stub: first token after {1e3 * TTFT_S:.0f} ms, then one every {1e3 * ITL_S:.0f} ms; "
        f"{PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} output tokens"
    )
    print(
        f"{'req/s':>6} {'requests':>9} {'bare TTFT':>10} {'client':>9} {'overhead':>9} "
        f"{'bare p99':>9} {'client':>9} {'late p50':>9} {'p99':>6} {'max':>6} {'client CPU':>11}"
    )
    timings = []
    for rate in arguments.rates:
        t = time_rate(rate, arguments.duration)
        timings.append(t)
        verdict = "ok" if t.overhead <= OVERHEAD_BAR else "MISSED"
        print(
            f"{t.rate:6.0f} {t.requests:9,} {t.bare_ttft_ms:7.2f} ms {t.client_ttft_ms:6.2f} ms "
            f"{t.overhead:9.2%} {t.bare_p99_ms:6.2f} ms {t.client_p99_ms:6.2f} ms "
            f"{t.schedule_median_ms:6.2f} ms {t.schedule_p99_ms:6.2f} {t.schedule_max_ms:6.2f} "
            f"{t.client_cpu:10.0%}  {verdict}",
            flush=True,
        )
    print(f"bar: {OVERHEAD_BAR:.0%} of the TTFT at 50 requests/s; load {os.getloadavg()[0]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(t) for t in timings], indent=2) + "\n")


if __name__ == "__main__":
    main()
