"""Samples of vLLM's metrics: what is read, and what counts as a damaged page."""

import asyncio

import pytest
from aiohttp import web

from adapter_twin.errors import AdapterTwinError
from adapter_twin.measure.scrape import METRICS, parse_metrics, record_series, wait_until_idle

# As vLLM 0.32 answered GET /metrics/?name[]=... during a run; HELP lines shortened.
PAGE = """\
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="tiny/base"} 1296.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny/base"} 0.015686822138435027
# HELP vllm:num_preemptions_total Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="tiny/base"} 2.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny/base"} 20.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny/base"} 1.234567e+06
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny/base"} 26.0
"""
SEEN = {
    "running": 20.0,
    "waiting": 26.0,
    "kv_usage": 0.015686822138435027,
    "preempted_total": 2.0,
    "prompt_tokens_total": 1234567.0,
    "generated_tokens_total": 1296.0,
}


def test_a_recorded_page_gives_the_columns_of_series() -> None:
    assert parse_metrics(PAGE) == SEEN


def test_engines_of_one_server_are_added_up() -> None:
    values = [line for line in PAGE.splitlines() if not line.startswith("#")]
    both = "\n".join([*values, *(line.replace('"0"', '"1"') for line in values)])
    assert parse_metrics(both + "\n") == {name: 2 * value for name, value in SEEN.items()}


def test_a_missing_metric_is_named() -> None:
    page = PAGE.replace("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
    with pytest.raises(AdapterTwinError, match=r"metrics: vllm:kv_cache_usage_perc is missing"):
        parse_metrics(page)


async def serve(handler: object) -> tuple[web.AppRunner, str]:
    app = web.Application()
    app.router.add_get("/metrics/", handler)  # type: ignore[arg-type]
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


def test_only_the_needed_metrics_are_asked_for_and_counters_start_with_the_window() -> None:
    asked = []

    async def page(request: web.Request) -> web.Response:
        asked.append(request.query.getall("name[]"))
        return web.Response(text=PAGE)

    async def main() -> None:
        runner, url = await serve(page)
        clock_s = asyncio.get_running_loop().time
        start_s = clock_s()
        series, unread = await record_series(url, SEEN, lambda: clock_s() - start_s, 0.1, 0.35)
        await runner.cleanup()
        assert unread == []
        assert 1 <= len(series) <= 4
        assert series["t_s"].is_monotonic_increasing
        assert series["t_s"].between(0, 0.4).all()
        assert (series["running"] == 20).all()
        assert (series[[name for name in METRICS if name.endswith("total")]] == 0).all(axis=None)

    asyncio.run(main())
    assert asked
    assert all(names == list(METRICS.values()) for names in asked)


def test_samples_from_before_the_server_died_are_kept() -> None:
    async def main() -> None:
        answers = iter([PAGE, PAGE])

        async def page(request: web.Request) -> web.Response:
            text = next(answers, None)
            if text is None:
                raise web.HTTPServiceUnavailable
            return web.Response(text=text)

        runner, url = await serve(page)
        clock_s = asyncio.get_running_loop().time
        start_s = clock_s()
        recording = record_series(url, SEEN, lambda: clock_s() - start_s, 0.05, 30.0)
        task = asyncio.create_task(recording)
        await asyncio.sleep(0.3)
        await runner.cleanup()
        series, unread = await asyncio.wait_for(task, 5)
        assert len(series) == 2
        assert "HTTP 503" in unread[0]

    asyncio.run(main())


def test_a_server_that_others_use_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_twin.measure.scrape.IDLE_WITHIN_S", 0.2)

    async def main() -> None:
        async def page(request: web.Request) -> web.Response:
            return web.Response(text=PAGE)

        runner, url = await serve(page)
        try:
            await wait_until_idle(url)
        finally:
            await runner.cleanup()

    with pytest.raises(AdapterTwinError, match="still busy after"):
        asyncio.run(main())
