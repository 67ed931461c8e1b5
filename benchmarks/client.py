"""Time the load client against a stub server: ``python -m benchmarks.client [--json FILE]``.

The stub, in a process of its own, answers each request with its first token after a constant time
and further tokens at a constant pace, and notes how long that took. What the client sees beyond it
is the client, the connection and the stub's own HTTP layer. The medians are compared: other
processes on the machine hold up some requests.
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

from adapter_twin.profiling.client import replay, settled_memory
from adapter_twin.workload import Trace

OVERHEAD_BAR = 0.02
TTFT_S, ITL_S = 0.05, 0.02
PROMPT_TOKENS, OUTPUT_TOKENS = 220, 20
TOKEN = b'data: {"id":"stub","choices":[{"index":0,"text":" x","finish_reason":null}]}\n\n'


async def answer(request: web.Request) -> web.StreamResponse:
    begun_s = time.monotonic()
    asked = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    clock_s = asyncio.get_running_loop().time
    due_s = clock_s() + TTFT_S
    for token in range(asked["max_tokens"]):
        await asyncio.sleep(due_s - clock_s())
        if token == 0:
            request.app["ttft_s"].append(time.monotonic() - begun_s)
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
        app["ttft_s"] = []
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        results.send("ready")
        while not results.poll():
            await asyncio.sleep(0.1)
        await runner.cleanup()
        results.send(app["ttft_s"])

    asyncio.run(main())


@dataclass(frozen=True)
class Timing:
    rate: float
    requests: int
    stub_ttft_ms: float
    client_ttft_ms: float
    overhead: float
    mean_overhead: float
    overhead_p99_ms: float
    itl_ms: float
    schedule_median_ms: float
    schedule_p99_ms: float
    schedule_max_ms: float
    client_cpu: float


def time_rate(rate: float, duration_s: float) -> Timing:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    ours, theirs = multiprocessing.Pipe()
    # Spawned: the stub must not share this process's memory or event loop.
    context = multiprocessing.get_context("spawn")
    stub = context.Process(target=serve, args=(listener, theirs), daemon=True)
    stub.start()
    ours.recv()
    rng = np.random.default_rng(0)
    count = round(rate * duration_s)
    lengths = (np.full(count, tokens, np.int32) for tokens in (PROMPT_TOKENS, OUTPUT_TOKENS))
    trace = Trace(np.sort(rng.random(count)) * duration_s, np.full(count, -1, np.int32), *lengths)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    cpu_s = -_cpu_s()
    with settled_memory():
        seen = asyncio.run(replay(url, ["stub"], trace, duration_s + 10.0, 32_000, seed=0))
    cpu_s += _cpu_s()
    ours.send("stop")
    stub_ms = 1e3 * np.array(ours.recv())
    stub.join()
    listener.close()
    requests = seen.requests
    assert requests["end_s"].notna().all(), requests["error"].dropna().unique()
    client_ms = 1e3 * (requests["first_token_s"] - requests["sent_s"])
    return Timing(
        rate=rate,
        requests=count,
        stub_ttft_ms=float(np.median(stub_ms)),
        client_ttft_ms=float(client_ms.median()),
        overhead=float(client_ms.median() / np.median(stub_ms) - 1),
        mean_overhead=float(client_ms.mean() / stub_ms.mean() - 1),
        overhead_p99_ms=float(np.percentile(client_ms, 99) - np.percentile(stub_ms, 99)),
        itl_ms=float(np.concatenate(requests["itl_ms"].to_list()).mean()),
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
        f"{'req/s':>6} {'requests':>9} {'stub TTFT':>10} {'client TTFT':>12} {'overhead':>9} "
        f"{'of mean':>8} {'at p99':>8} {'late p50':>9} {'p99':>6} {'max':>6} {'client CPU':>11}"
    )
    timings = []
    for rate in arguments.rates:
        t = time_rate(rate, arguments.duration)
        timings.append(t)
        verdict = "ok" if t.overhead <= OVERHEAD_BAR else "MISSED"
        print(
            f"{t.rate:6.0f} {t.requests:9,} {t.stub_ttft_ms:7.2f} ms {t.client_ttft_ms:9.2f} ms "
            f"{t.overhead:9.2%} {t.mean_overhead:8.2%} {t.overhead_p99_ms:5.2f} ms "
            f"{t.schedule_median_ms:6.2f} ms {t.schedule_p99_ms:6.2f} {t.schedule_max_ms:6.2f} "
            f"{t.client_cpu:10.0%}  {verdict}",
            flush=True,
        )
    print(f"bar: {OVERHEAD_BAR:.0%} of the TTFT at 50 requests/s; load {os.getloadavg()[0]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(t) for t in timings], indent=2) + "\n")


if __name__ == "__main__":
    main()
