"""A server's metrics beside the twin: what is read, what agrees, and which figure is named."""

import asyncio
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import prometheus_client
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.measure import metrics_page
from adapter_twin.measure.client import Replay, replay
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure.metrics_page import MetricsPage, Stretch, fetch
from adapter_twin.measure.model_folder import check_model, write_adapters, write_model
from adapter_twin.measure.vllm_server import Server, free_port
from adapter_twin.prove.watch import JUDGED_BY, watch
from adapter_twin.service.client_records import to_gaps, to_records
from adapter_twin.service.metrics import service
from adapter_twin.service.validate import HELD_OUT_BARS, pair_runs
from adapter_twin.tables import datasets
from adapter_twin.twin.records import Gaps, Records, Simulation
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import load_scenario, run_to_workload
from adapter_twin.workload.files import records as rows_of
from adapter_twin.workload.scenario import Scenario
from adapter_twin.workload.trace import generate, generators
from adapter_twin.workload.traffic import Workload

Cli = Callable[..., tuple[int, str, str]]

# As vLLM 0.32's CPU build answered GET /metrics, 20 s into the requests of `CONFIG` and after them;
# metrics that nobody reads, and HELP lines, are left out.
CAMPAIGN = datasets.REPOSITORY / "data" / "campaigns" / "cpu-small"
RECORDED = Path(__file__).parent / "recorded"
BEGIN, END = ((RECORDED / f"window-{which}.prom").read_text() for which in ("begin", "end"))
CONFIG = {
    "engine": {
        "model": "small",
        "max_loras": 2,
        "max_cpu_loras": 8,
        "max_lora_rank": 8,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "max_model_len": 1024,
        "block_size": 128,
        "kv_cache_memory_bytes": 2**28,
    },
    "workload": {
        "adapters": {"count": 8, "request_rates": [0.6, 0.15], "ranks": [8]},
        "duration_s": 60,
        "lengths": {
            "distribution": "lognormal",
            "mean_input_tokens": 64,
            "mean_output_tokens": 32,
            "cv": 0.6,
        },
    },
}
AS_IN_0_8_5 = {
    "vllm:inter_token_latency_seconds": "vllm:time_per_output_token_seconds",
    "vllm:kv_cache_usage_perc": "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache": "vllm:gpu_prefix_cache",
    'num_gpu_blocks="1024"': 'num_gpu_blocks="None"',
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    return file


@pytest.fixture
def scenario(config: Path) -> Scenario:
    return load_scenario(config)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], str]:
    def save(text: str) -> str:
        (tmp_path / "metrics.prom").write_text(text)
        return str(tmp_path / "metrics.prom")

    return save


@contextmanager
def served(*pages: str, status: int = 200) -> Iterator[str]:
    """Serve one page after the other on this machine."""
    left = list(pages)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(left.pop(0).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def by_name(told: dict) -> dict[str, dict]:
    return {figure["figure"]: figure for figure in told["figures"]}


def test_a_recorded_page_tells_the_requests_that_were_sent(
    scenario: Scenario, saved: Callable[[str], str]
) -> None:
    sent = generate(scenario.workload, generators(5)[0], None)
    told = watch(saved(END), scenario, span_s=64.0)
    figures = by_name(told)
    assert told["finished_requests"] == len(sent) == 169
    assert figures["offered_requests_per_s"]["server"] == len(sent) / 64.0
    assert figures["mean_prompt_tokens"]["server"] == sent.prompt_tokens.mean()
    assert figures["mean_output_tokens"]["server"] == sent.output_tokens.mean()
    tokens = int(sent.prompt_tokens.sum()) + int(sent.output_tokens.sum())
    assert figures["total_throughput"]["server"] == tokens / 64.0
    assert figures["kv_cache_tokens"]["server"] == figures["kv_cache_tokens"]["twin"] == 131072
    assert figures["mean_ttft_ms"]["server"] == pytest.approx(75.2, abs=0.01)
    assert figures["median_ttft_ms"]["server_low"] == 20
    assert figures["median_ttft_ms"]["server_high"] == 40
    assert all(figures[name]["agrees"] for name in ("max_loras", "block_size", "kv_cache_tokens"))


def test_a_window_counts_from_its_first_page(scenario: Scenario) -> None:
    with served(BEGIN, END) as url:
        told = watch(f"{url}/metrics/", scenario, every_s=0.5)
    assert told["finished_requests"] == 169 - 58
    assert 0.5 <= told["span_s"] < 5
    arrived = 169 - 58 - 1  # one was in flight at the first page
    offered = by_name(told)["offered_requests_per_s"]["server"]
    assert offered == pytest.approx(arrived / told["span_s"])
    assert told["load_factor"] == pytest.approx(offered / 3)


@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_the_twin_begins_as_the_server_did(
    config: Path, saved: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty and without an adapter read yet, or warm; outputs are as long as they were emitted."""
    lengths = {"distribution": "fixed", "mean_input_tokens": 64, "mean_output_tokens": 32}
    content = {"engine": CONFIG["engine"], "workload": {**CONFIG["workload"], "lengths": lengths}}
    content["engine"] = {**content["engine"], "model": "llama-3.1-8b-instruct"}
    del content["engine"]["kv_cache_memory_bytes"]
    config.write_text(yaml.safe_dump(content))
    given = []

    def noted(workload: Workload, *others: Any, **more: Any) -> Simulation:
        given.append((workload, others[1]))
        return simulate(workload, *others, **more)

    monkeypatch.setattr("adapter_twin.prove.watch.simulate", noted)
    watch(saved(END), load_scenario(config), span_s=64.0)
    with served(BEGIN, END) as url:
        span_s = watch(url, load_scenario(config), every_s=1.0)["span_s"]
    (empty, as_measured), (warm, warmed) = given[0], given[-1]
    assert (empty.duration_s, warm.duration_s) == (64.0, 300.0 + span_s)
    assert as_measured.front_end.first_use_ms_ > warmed.front_end.first_use_ms_ == 0
    assert as_measured.early_stop.probability_ == warmed.early_stop.probability_ == 0
    assert (empty.lengths.mean_input_tokens, empty.lengths.mean_output_tokens) == (65, 31)


def test_adapters_in_use_are_those_of_the_last_step(
    scenario: Scenario, saved: Callable[[str], str]
) -> None:
    assert watch(saved(BEGIN), scenario, span_s=21.0)["adapters_in_use"] == ["adapter-4"]
    assert watch(saved(END), scenario, span_s=64.0)["adapters_in_use"] == []


def test_the_metrics_of_vllm_0_8_5_give_the_same_figures(
    scenario: Scenario, saved: Callable[[str], str]
) -> None:
    old = END
    for new, name in AS_IN_0_8_5.items():
        assert new in old
        old = old.replace(new, name)
    told, as_new = (by_name(watch(saved(page), scenario, span_s=64.0)) for page in (old, END))
    assert told["kv_cache_tokens"]["agrees"] is None
    for name in ("mean_itl_ms", "p99_itl_ms", "kv_cache_usage_now", "mean_waiting_requests"):
        assert told[name]["server"] == as_new[name]["server"]


def test_a_saved_page_counts_from_when_its_counters_began(
    scenario: Scenario, saved: Callable[[str], str]
) -> None:
    page = saved(END)
    os.utime(page, (1796047076.0, 1796047076.0))
    assert watch(page, scenario)["span_s"] == pytest.approx(63.837, abs=0.001)
    without = END.replace("vllm:num_preemptions_created", "other")
    os.utime(saved(without), (1796047076.0, 1796047076.0))
    assert watch(page, scenario)["span_s"] == pytest.approx(88.83, abs=0.001)
    with pytest.raises(AdapterTwinError, match=r"span_s: .*give --span-s"):
        watch(saved(without.replace("process_start", "x")), scenario)


@given(
    st.lists(st.floats(1e-4, 90.0), min_size=1, max_size=200),
    st.sampled_from([1.0, 20.0, 50.0, 99.0, 100.0]),
)
def test_a_percentile_lies_in_the_bucket_that_holds_it(values: list[float], percent: float) -> None:
    registry = prometheus_client.CollectorRegistry()
    edges = [0.01, 0.1, 1.0, 10.0]
    histogram = prometheus_client.Histogram("x", "", buckets=edges, registry=registry)
    for value in values:
        histogram.observe(value)
    page = MetricsPage.parse(prometheus_client.generate_latest(registry).decode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_page, "PERCENTILES", {"some": percent})
        told = Stretch(1.0, page).statistics("ms", "x", scale=1e3)
    value, low, high = told["some_ms"]
    true = 1e3 * float(np.percentile(values, percent, method="inverted_cdf"))
    assert low <= true <= high * (1 + 1e-12)
    assert low <= value <= high
    assert told["mean_ms"] == pytest.approx((1e3 * np.mean(values),) * 3)


def page_of(records: Records, gaps: Gaps, engine: EngineConfig, slower: float = 1.0) -> str:
    """Return the page of a server that did this, but for its times in the engine."""
    registry = prometheus_client.CollectorRegistry()
    edges = {
        "request": [1, 10, 100, 1000],
        "time": [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5],
        "inter": [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1],
    }

    def histogram(name: str, values: np.ndarray) -> None:
        buckets = edges[name.partition("_")[0]]
        kept = prometheus_client.Histogram(f"vllm:{name}", "", buckets=buckets, registry=registry)
        for value in values.tolist():
            kept.observe(value)

    def gauge(name: str, value: float, **labels: object) -> None:
        kept = prometheus_client.Gauge(f"vllm:{name}", "", list(labels), registry=registry)
        (kept.labels(**labels) if labels else kept).set(value)

    done = records[np.isfinite(records.end_s)]
    in_flight = len(records) - len(done)
    begun = records[np.isfinite(records.first_token_s)]
    for name in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions"):
        prometheus_client.Counter(f"vllm:{name}", "", registry=registry)
    finished = prometheus_client.Counter("vllm:request_success", "", registry=registry)
    finished.inc(len(done))
    gauge("num_requests_running", in_flight)
    gauge("num_requests_waiting", 0)
    gauge("kv_cache_usage_perc", 0.01)
    gauge("lora_requests_info", 2, max_lora=engine.max_loras, running_lora_adapters="a,b")
    blocks = 131072 // engine.block_size
    gauge("cache_config_info", 1, block_size=engine.block_size, num_gpu_blocks=blocks)
    histogram("request_prompt_tokens", done.prompt_tokens)
    histogram("request_generation_tokens", done.output_tokens)
    # a client does not see when its requests are scheduled
    scheduled_s = np.where(np.isnan(done.scheduled_s), done.arrival_s, done.scheduled_s)
    histogram("request_queue_time_seconds", scheduled_s - done.arrival_s)
    histogram("request_inference_time_seconds", slower * (done.end_s - scheduled_s))
    histogram("time_to_first_token_seconds", slower * (begun.first_token_s - begun.arrival_s))
    histogram("inter_token_latency_seconds", slower * np.repeat(gaps.gap_s, gaps.count))
    return prometheus_client.generate_latest(registry).decode()


@pytest.fixture
def like_the_twin(scenario: Scenario) -> Callable[..., str]:
    """Give the page after ten minutes of the twin itself, with another seed, as a server's."""
    laws = load_calibration("auto", "small")
    workload = replace(scenario.workload, duration_s=600.0)

    def page(slower: float = 1.0, load: float = 1.0, **engine: int) -> str:
        adapters = tuple(
            replace(adapter, request_rate=load * adapter.request_rate)
            for adapter in workload.adapters
        )
        changed = replace(scenario.engine, **engine)
        run = simulate(replace(workload, adapters=adapters), changed, laws, seed=99)
        return page_of(run.records, run.gaps, changed, slower)

    return page


def test_a_server_that_does_as_the_twin_agrees_in_every_figure(
    scenario: Scenario, like_the_twin: Callable[..., str], saved: Callable[[str], str]
) -> None:
    told = watch(saved(like_the_twin()), scenario, span_s=600.0)
    judged = [figure for figure in told["figures"] if figure["agrees"] is not None]
    assert len(judged) == 15
    assert all(figure["agrees"] for figure in judged), told["conclusion"]
    assert told["first_disagreement"] is None
    assert told["adapters_in_use"] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "slower", "named", "words"),
    [
        (
            {"max_loras": 3},
            1.0,
            "max_loras",
            r"max_loras, 3 on the server and 2 expected \(.*otherwise",
        ),
        ({"block_size": 64}, 1.0, "block_size", "block_size, 64 on the server and 128 expected"),
        ({}, 1.4, "mean_itl_ms", "steps take another time"),
        ({"load": 0.7}, 1.0, "offered_requests_per_s", "all that follows agrees"),
        ({"load": 0.7}, 1.4, "offered_requests_per_s", "mean_itl_ms, .* is the next"),
    ],
    ids=["slots", "blocks", "steps", "load", "load and steps"],
)
def test_what_is_not_as_configured_is_named_first(
    scenario: Scenario,
    like_the_twin: Callable[..., str],
    saved: Callable[[str], str],
    changes: dict[str, float],
    slower: float,
    named: str,
    words: str,
) -> None:
    told = watch(saved(like_the_twin(slower, **changes)), scenario, span_s=600.0)
    assert told["first_disagreement"] == named
    assert told["conclusion"].startswith(f"The first figure that disagrees is {named}, ")
    assert re.search(words, told["conclusion"])
    assert told["load_factor"] == pytest.approx(changes.get("load", 1.0), rel=0.1)


def test_a_server_without_the_prefix_cache_that_shared_prefixes_want_is_named(
    config: Path, saved: Callable[[str], str]
) -> None:
    shared = {**CONFIG["workload"]["lengths"], "shared_prefix_tokens": 16}
    config.write_text(
        yaml.safe_dump({**CONFIG, "workload": {**CONFIG["workload"], "lengths": shared}})
    )
    told = watch(saved(END), load_scenario(config), span_s=64.0)
    assert told["first_disagreement"] == "enable_prefix_caching"
    page = END.replace('enable_prefix_caching="False"', 'enable_prefix_caching="True"')
    page = re.sub(r"(cache_queries_total.*) 0.0", r"\1 11015.0", page)
    page = re.sub(r"(cache_hits_total.*) 0.0", r"\1 2203.0", page)
    figures = by_name(watch(saved(page), load_scenario(config), span_s=64.0))
    assert figures["enable_prefix_caching"]["agrees"]
    assert figures["prefix_hit_rate"]["server"] == 0.2


def test_a_cache_of_another_size_is_named(scenario: Scenario, saved: Callable[[str], str]) -> None:
    page = END.replace('num_gpu_blocks="1024"', 'num_gpu_blocks="1000"')
    told = watch(saved(page), scenario, span_s=64.0)
    assert told["first_disagreement"] == "kv_cache_tokens"
    assert "128,000 on the server and 131,072 expected" in told["conclusion"]


def test_expectations_of_the_recorded_campaign_are_within_its_bars(
    saved: Callable[[str], str],
) -> None:
    runs = datasets.read_measured_runs(CAMPAIGN / "runs.parquet")
    runs = runs[runs["held_out"] & (runs["status"] == "ok")]
    requests = pd.read_parquet(CAMPAIGN / "requests.parquet")
    twins, agree = [], []
    for row in rows_of(runs):
        engine, workload = run_to_workload(row)
        own = requests[requests["run_id"] == row["run_id"]]
        page = page_of(to_records(own), to_gaps(own), engine)
        scenario = Scenario(engine=engine, workload=workload)
        told = watch(saved(page), scenario, span_s=row["duration_s"])
        figures = by_name(told)
        assert told["finished_requests"] == row["completed_requests"]
        assert figures["mean_itl_ms"]["server"] == pytest.approx(row["mean_itl_ms"])
        twins.append({"run_id": row["run_id"]} | {name: figures[name]["twin"] for name in figures})
        agree += [figures[name]["agrees"] for name in JUDGED_BY]
    pairs = pair_runs(runs, pd.DataFrame(twins))
    # Which requests a server gets that falls behind decides its figures, and no page tells that.
    keeps_up = pairs.loc[pairs["figure"] == "median_ttft_ms", "run_id"]
    assert len(keeps_up) == 7
    for figure, _, bar in HELD_OUT_BARS:
        error = pairs.loc[pairs["run_id"].isin(keeps_up) & (pairs["figure"] == figure), "error"]
        assert error.abs().mean() < bar, figure

    assert np.mean(agree) > 0.85


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("", "vllm:request_success_total is missing"),
        ("<!doctype html>\n<p>Not found</p>\n", "no page of metrics"),
        ("# TYPE up gauge\nup 1\n", "vllm:request_success_total is missing"),
        (END.replace("first_token_seconds_bucket", "other"), "buckets of vllm:time_to_first"),
        (re.sub(r'.*latency_seconds_bucket.*"[+]Inf".*', "", END), "buckets of vllm:inter_token"),
        (re.sub(r'(.*le="100.0".*) 169.0', r"\1 17.0", END), "buckets of vllm:request_gen"),
        (END.replace("vllm:request_queue_time", "x"), "request_queue_time_seconds_sum is missing"),
        (re.sub(r'(vllm:num_requests_run.*)"0"(.*)', r'\g<0>\n\1"1"\2', END), "2 engines"),
        (re.sub(r"(.*length.*) 169.0", r"\1 0.0", END), "0 requests finished in 64 s"),
    ],
)
def test_a_page_that_cannot_be_compared_is_refused_in_one_line(
    scenario: Scenario, saved: Callable[[str], str], page: str, words: str
) -> None:
    assert page != END
    with pytest.raises(AdapterTwinError, match=re.escape(words)) as error:
        watch(saved(page), scenario, span_s=64.0)
    assert "\n" not in str(error.value)


def test_a_server_that_was_started_anew_meanwhile_is_refused(scenario: Scenario) -> None:
    with served(END, BEGIN) as url, pytest.raises(AdapterTwinError, match="started anew"):
        watch(url, scenario, every_s=0.01)


def test_a_server_that_does_not_answer_is_refused_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(AdapterTwinError, match=r"no metrics .*Connect"):
            fetch(f"http://127.0.0.1:{port}/metrics")
        silent.listen()
        with pytest.raises(AdapterTwinError, match=r"no metrics .*no answer within 0\.2 s"):
            fetch(f"http://127.0.0.1:{port}/metrics", timeout_s=0.2)
    with served("", status=503) as url, pytest.raises(AdapterTwinError, match="503"):
        fetch(f"{url}/metrics")
    for url in ("file:///etc/hostname", "http://", "http://[", "ftp://localhost/metrics"):
        with pytest.raises(AdapterTwinError, match="no metrics"):
            fetch(url)


def test_a_server_on_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with served(BEGIN) as url:
        assert fetch(f"{url}/metrics") == BEGIN


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arrivals": {"process": "trace", "path": "trace.parquet"}}, "arrivals.process: a trace"),
        ({"adapters": []}, "adapters: none"),
        ({"sessions": {"turns": 3}}, "sessions, samples, arrivals: metrics tell of single"),
        ({"samples": 2}, "sessions, samples, arrivals: metrics tell of single"),
        ({"arrivals": {"max_concurrency": 2}}, "sessions, samples, arrivals: metrics tell"),
        ({"lengths": {**CONFIG["workload"]["lengths"], "shared_prefix_tokens": 65}}, "shared_pref"),
    ],
)
def test_traffic_that_cannot_be_given_the_load_is_refused(
    config: Path, saved: Callable[[str], str], changes: dict[str, object], words: str
) -> None:
    config.write_text(yaml.safe_dump({**CONFIG, "workload": {**CONFIG["workload"], **changes}}))
    with pytest.raises(AdapterTwinError, match=words):
        watch(saved(END), load_scenario(config), span_s=64.0)


def test_an_slo_that_metrics_cannot_be_held_to_is_refused(
    config: Path, saved: Callable[[str], str]
) -> None:
    config.write_text(yaml.safe_dump({**CONFIG, "slo": {"ttft_ms": 500}}))
    with pytest.raises(AdapterTwinError, match=r"^slo: metrics tell of no request by itself"):
        watch(saved(END), load_scenario(config), span_s=64.0)


def test_the_verb_prints_the_figures_and_last_the_conclusion(
    run: Cli, config: Path, saved: Callable[[str], str]
) -> None:
    page = saved(END)
    status, out, err = run("watch", page, str(config), "--span-s", "64")
    assert (status, err) == (0, "")
    assert "mean_itl_ms" in out
    assert out.splitlines()[-1].startswith("The first figure that disagrees is mean_itl_ms, 12.5 ")
    status, out, _ = run("watch", page, str(config), "--span-s", "64", "--json")
    told = json.loads(out)
    assert (status, told["first_disagreement"]) == (0, "mean_itl_ms")
    assert by_name(told)["prefix_hit_rate"]["server"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.prom",), "none.prom: cannot be read"),
        (("PAGE", "--every", "5"), "every: only for a URL"),
        (("http://127.0.0.1:9", "--span-s", "5"), "span_s: only for a saved page"),
        (("http://127.0.0.1:9",), "http://127.0.0.1:9/metrics: no metrics"),
        (("PAGE", "--span-s", "-1"), "span_s: "),
    ],
)
def test_bad_input_is_refused(
    run: Cli, config: Path, saved: Callable[[str], str], arguments: tuple[str, ...], words: str
) -> None:
    page = saved(END)
    given = [page if argument == "PAGE" else argument for argument in arguments]
    status, out, err = run("watch", given[0], str(config), *given[1:])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.live
def test_live_a_real_server_is_seen_as_its_client_saw_it(
    scenario: Scenario, saved: Callable[[str], str], tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    model = write_model("small", tmp_path / "small")
    adapters = write_adapters(model, tmp_path / "adapters", [8] * 8)
    flags = EngineFlags(
        max_loras=2,
        max_lora_rank=8,
        max_cpu_loras=8,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        max_model_len=1024,
        cpu_kv_cache_gib=0.25,
    )
    trace = generate(replace(scenario.workload, duration_s=40.0), generators(5)[0], None)
    folders = {folder.name: folder for folder in adapters}
    vocabulary = check_model(model)["vocab_size"]
    with Server(model, folders, flags, free_port(), tmp_path / "log") as server:

        async def watch_in_use() -> tuple[Replay, dict]:
            names = [*folders, server.model_name]
            sending = replay(server.base_url, names, trace, 120.0, vocabulary, seed=1)
            task = asyncio.create_task(sending)
            await asyncio.sleep(5)
            told = await asyncio.to_thread(watch, server.base_url, scenario, every_s=25.0)
            return await task, told

        seen, in_use = asyncio.run(watch_in_use())
        told = watch(saved(fetch(f"{server.base_url}/metrics")), scenario)
    figures, rate = by_name(told), len(trace) / told["span_s"]
    assert told["finished_requests"] == len(trace)
    assert figures["offered_requests_per_s"]["server"] == pytest.approx(rate)
    assert figures["mean_prompt_tokens"]["server"] == trace.prompt_tokens.mean()
    assert figures["mean_output_tokens"]["server"] == trace.output_tokens.mean()
    tokens = trace.prompt_tokens.mean() + trace.output_tokens.mean()
    assert figures["total_throughput"]["server"] == pytest.approx(rate * tokens)
    client = service(to_records(seen.requests), to_gaps(seen.requests), told["span_s"])
    for name in ("mean_ttft_ms", "mean_itl_ms", "median_ttft_ms", "median_itl_ms"):
        figure = figures[name]
        print(f"{name}: client {client[name]:.2f}", figure)
        assert 0.7 * figure["server_low"] <= client[name] <= 1.4 * figure["server_high"]
    for page in (told, in_use):
        figures = by_name(page)
        for name in ("max_loras", "block_size", "kv_cache_tokens"):
            assert figures[name]["server"] == figures[name]["twin"]
        assert figures["total_throughput"]["agrees"]
        # the calibration is of another machine, or of this one on another day
        itl = figures["mean_itl_ms"]
        assert 1 / 3 < itl["server"] / itl["twin"] < 3
    assert in_use["finished_requests"] >= 30
    assert by_name(in_use)["offered_requests_per_s"]["agrees"]
