"""A serving run: rows as the tables want them, and vLLM's own definitions of every figure."""

import asyncio
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.measure.client import Replay, replay
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure.model_folder import check_model, write_adapters, write_model
from adapter_twin.measure.scrape import sample
from adapter_twin.measure.serving import measure_run
from adapter_twin.measure.vllm_server import Server, free_port
from adapter_twin.service.client_records import to_gaps, to_records
from adapter_twin.service.metrics import summarize
from adapter_twin.tables.campaign_schemas import CAMPAIGN_SERIES, REQUESTS
from adapter_twin.tables.schemas import validate
from adapter_twin.workload.trace import BASE_MODEL, Trace

FLAGS = EngineFlags(
    max_loras=2, max_lora_rank=16, max_cpu_loras=4, max_num_seqs=8, cpu_kv_cache_gib=0.05
)


STATISTICS = ("mean", "median")


def make_trace(requests: int, duration_s: float, adapters: int) -> Trace:
    rng = np.random.default_rng(5)
    return Trace(
        np.sort(rng.random(requests)) * duration_s,
        np.arange(requests, dtype=np.int32) % (adapters + 1) - 1,
        rng.integers(1, 40, requests).astype(np.int32),
        rng.integers(1, 20, requests).astype(np.int32),
    )


def serve_fake(folder: Path, **behaviour: int) -> Server:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(behaviour | {"vocab_size": 50}))
    return Server(model, {}, FLAGS, free_port(), folder / "log")


@pytest.mark.usefixtures("fake_vllm")
def test_a_run_fills_its_tables(tmp_path: Path) -> None:
    trace = make_trace(30, 1.0, adapters=0)
    with serve_fake(tmp_path) as server:
        run = measure_run(server, trace, 1.5, seed=1, period_s=0.25)
    assert run.failure is None
    assert run.doubt is None
    validate(run.requests.assign(run_id="a"), REQUESTS, "requests")
    validate(run.series.assign(run_id="a"), CAMPAIGN_SERIES, "series")
    row = run.row
    assert row["duration_s"] == 1.5
    assert row["completed_requests"] == row["sent_requests"] == 30
    assert row["input_tokens"] == trace.prompt_tokens.sum()
    assert row["output_throughput"] == pytest.approx(trace.output_tokens.sum() / 1.5)
    assert row["mean_requested_output_tokens"] == pytest.approx(trace.output_tokens.mean())
    assert row["failed_requests"] == 0
    assert row["schedule_error_p99_ms"] == run.schedule.p99_ms
    # the stand-in has counted the warm-up before
    assert run.series["prompt_tokens_total"].iloc[0] == 0
    assert run.series["generated_tokens_total"].iloc[-1] == trace.output_tokens.sum()


@pytest.mark.usefixtures("fake_vllm")
def test_a_server_that_dies_leaves_what_was_measured(tmp_path: Path) -> None:
    trace = make_trace(60, 3.0, adapters=0)
    with serve_fake(tmp_path, dies_after=21) as server:
        run = measure_run(server, trace, 60.0, seed=1, period_s=0.25)
        assert "OutOfMemoryError: CUDA out of memory" in (server.failure() or "")
    assert run.failure is not None
    assert run.row["duration_s"] < 10
    assert 0 < run.row["completed_requests"] <= 20
    assert run.row["failed_requests"] > 0
    assert len(run.series) >= 1


@pytest.mark.usefixtures("fake_vllm")
def test_a_run_that_cannot_begin_says_why(tmp_path: Path) -> None:
    trace = make_trace(4, 1.0, adapters=1)
    server = serve_fake(tmp_path)
    with pytest.raises(AdapterTwinError, match="trace: asks for adapter 0, but 0 are served"):
        measure_run(server, trace, 1.0, seed=1)
    with server:
        server.adapters = {"a": tmp_path}
        with pytest.raises(
            AdapterTwinError, match=r"a: the server did not answer \(HTTP 404: .*`a`"
        ):
            measure_run(server, trace, 1.0, seed=1)
    with pytest.raises(AdapterTwinError, match="model: the server did not answer"):
        measure_run(server, trace, 1.0, seed=1)


def requests_seen() -> pd.DataFrame:
    """Return requests as measured: completed, cut off by the window's end, failed, merged."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(200):
        sent_s = 0.3 * index + 0.001
        output = int(rng.integers(1, 30))
        chunks = max(1, output - int(rng.integers(0, 3)))  # some tokens share a chunk
        gaps_ms = rng.lognormal(3, 1, chunks - 1).astype(np.float32)
        first_s = sent_s + rng.lognormal(-3, 0.5)
        row = {
            "adapter": index % 4 - 1,
            "prompt_tokens": 50,
            "output_tokens": output,
            "reported_prompt_tokens": 51.0,
            "reported_output_tokens": float(output),
            "scheduled_s": 0.3 * index,
            "sent_s": sent_s,
            "first_token_s": first_s,
            "end_s": first_s + float(gaps_ms.astype(np.float64).sum()) / 1e3,
            "itl_ms": gaps_ms,
            "error": None,
        }
        if index % 10 == 3:
            row |= {"end_s": np.nan, "error": "HTTP 500: no"}
        if index % 10 == 7:
            row |= dict.fromkeys(("sent_s", "first_token_s", "end_s"), np.nan)
        rows.append(row)
    return pd.DataFrame(rows)


def test_requests_become_records() -> None:
    requests = requests_seen()
    records, gaps = to_records(requests), to_gaps(requests)
    done = requests["end_s"].notna()
    assert done.sum() == 160
    assert (records.prompt_tokens == np.where(done, 51, 50)).all()
    assert gaps.count.sum() == sum(map(len, requests["itl_ms"][done]))
    assert (records.arrival_s[requests["sent_s"].isna()] == requests["scheduled_s"][7::10]).all()
    none = requests[~done]
    assert summarize(to_records(none), to_gaps(none), 60.0)["completed_requests"] == 0
    assert to_gaps(none).count.sum() == 0


@pytest.mark.live
def test_every_figure_is_defined_as_vllm_bench_serve_defines_it() -> None:
    pytest.importorskip("vllm")
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    requests, duration_s = requests_seen(), 60.0
    outputs = [
        RequestFuncOutput(
            success=bool(np.isfinite(row.end_s)),
            latency=row.end_s - row.sent_s,
            output_tokens=int(row.reported_output_tokens),
            ttft=row.first_token_s - row.sent_s,
            itl=[float(gap_ms) / 1e3 for gap_ms in row.itl_ms],
            prompt_len=int(row.reported_prompt_tokens),
            start_time=row.sent_s,
        )
        for row in requests.itertuples()
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        theirs, _ = calculate_metrics([], outputs, duration_s, None, [99.0], {})
    expected = {
        "completed_requests": theirs.completed,
        "request_throughput": theirs.request_throughput,
        "input_throughput": theirs.total_input / duration_s,
        "output_throughput": theirs.output_throughput,
        "total_throughput": theirs.total_token_throughput,
    }
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        expected |= {f"{label}_{name}": getattr(theirs, f"{label}_{name}") for label in STATISTICS}
        expected[f"p99_{name}"] = dict(getattr(theirs, f"percentiles_{name}"))[99.0]
    ours = summarize(to_records(requests), to_gaps(requests), duration_s)
    assert ours == pytest.approx(expected, rel=1e-9)


@pytest.fixture(scope="module")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("live")
    model = write_model("tiny", folder / "model")
    folders = write_adapters(model, folder / "adapters", [8, 16, 8])
    adapters = {adapter.name: adapter for adapter in folders}
    with Server(model, adapters, FLAGS, free_port(), folder / "log") as server:
        yield server


@pytest.mark.live
def test_a_real_server_answers_with_the_tokens_and_adapters_asked_for(live_server: Server) -> None:
    trace = make_trace(24, 3.0, adapters=3)
    run = measure_run(live_server, trace, 20.0, seed=1)
    requests = run.requests
    assert requests["error"].isna().all()
    assert (requests["reported_prompt_tokens"] == requests["prompt_tokens"]).all()
    assert (requests["reported_output_tokens"] == requests["output_tokens"]).all()
    assert requests["adapter"].value_counts().to_dict() == {BASE_MODEL: 6, 0: 6, 1: 6, 2: 6}
    chunks = requests["itl_ms"].map(len) + 1
    assert (chunks <= requests["output_tokens"]).all()
    assert run.series["prompt_tokens_total"].iloc[-1] == trace.prompt_tokens.sum()
    assert run.series["generated_tokens_total"].iloc[-1] == trace.output_tokens.sum()
    assert run.series["running"].max() <= FLAGS.max_num_seqs


@pytest.mark.live
def test_a_real_server_loads_and_unloads_adapters_at_run_time(live_server: Server) -> None:
    name, folder = next(iter(live_server.adapters.items()))
    trace = make_trace(4, 0.5, adapters=3)
    live_server.unload_adapter(name)
    with pytest.raises(AdapterTwinError, match=f"{name}: the server did not answer .*HTTP 404"):
        measure_run(live_server, trace, 10.0, seed=1)
    live_server.load_adapter(name, folder)
    with pytest.raises(AdapterTwinError, match=f"{name}: the server did not load it .*already"):
        live_server.load_adapter(name, folder)
    assert measure_run(live_server, trace, 10.0, seed=1).row["completed_requests"] == 4


async def both_clients(server: Server, command: list[str], trace: Trace) -> Replay:
    """Run `vllm bench serve` and, as soon as it sends, our client beside it."""
    async with aiohttp.ClientSession() as session:
        before = await sample(session, server.base_url)
        theirs = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            while theirs.returncode is None and before == await sample(session, server.base_url):
                await asyncio.sleep(0.1)
            names = [*server.adapters, server.model_name]
            vocabulary = check_model(server.model_folder)["vocab_size"]
            ours = await replay(server.base_url, names, trace, 90.0, vocabulary, seed=1)
            output, _ = await theirs.communicate()
        finally:
            if theirs.returncode is None:
                theirs.kill()
    assert theirs.returncode == 0, output.decode()[-2000:]
    return ours


@pytest.mark.live
def test_vllm_bench_serve_sees_the_same_service(live_server: Server, tmp_path: Path) -> None:
    requests, rate, prompt, output = 48, 3.0, 32, 16
    command = [
        *(sys.executable, "-m", "adapter_twin.measure.vllm_cli", "bench", "serve"),
        *("--base-url", live_server.base_url, "--model", live_server.model_name),
        *("--tokenizer", str(live_server.model_folder), "--dataset-name", "random"),
        *("--random-input-len", str(prompt), "--random-output-len", str(output)),
        *("--num-prompts", str(requests), "--request-rate", str(rate), "--ignore-eos"),
        *("--lora-modules", *live_server.adapters, "--lora-assignment", "round-robin"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "bench.json"),
        "--disable-tqdm",
    ]
    trace = replace(
        make_trace(requests, requests / rate, adapters=3),
        adapter=np.arange(requests, dtype=np.int32) % 3,
        prompt_tokens=np.full(requests, prompt, np.int32),
        output_tokens=np.full(requests, output, np.int32),
    )
    seen = asyncio.run(both_clients(live_server, command, trace)).requests
    theirs = json.loads((tmp_path / "bench.json").read_text())
    ours = summarize(to_records(seen), to_gaps(seen), requests / rate)
    assert theirs["completed"] == ours["completed_requests"] == requests
    assert theirs["total_output_tokens"] == seen["reported_output_tokens"].sum()
    # At the same time on the same server, but not the same requests.
    for name in ("median_ttft_ms", "median_itl_ms", "median_tpot_ms"):
        print(f"{name}: ours {ours[name]:.2f}, vllm bench serve {theirs[name]:.2f}")
        # on a busy machine tokens pile up, and most of them come without a gap
        below_notice = max(ours[name], theirs[name]) < 1
        assert below_notice or 0.5 < ours[name] / theirs[name] < 2, name
