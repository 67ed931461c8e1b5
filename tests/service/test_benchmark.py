"""Results of `vllm bench serve` beside the twin: the same requests, the same window."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from adapter_twin import cli
from adapter_twin.errors import AdapterTwinError
from adapter_twin.service import benchmark
from adapter_twin.service.benchmark import compare_benchmarks
from adapter_twin.twin.records import Simulation
from adapter_twin.workload.trace import BASE_MODEL

LLAMA = "llama-3.1-8b-instruct"
RESULT: dict[str, Any] = {
    "date": "20260301-101500",
    "backend": "vllm",
    "model_id": "meta-llama/Llama-3.1-8B-Instruct",
    "num_prompts": 200,
    "request_rate": 10.0,
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 25.0,
    "completed": 200,
    "total_input_tokens": 44600,
    "total_output_tokens": 39600,
    "request_throughput": 8.0,
    "output_throughput": 1584.0,
    "total_token_throughput": 3368.0,
    "mean_ttft_ms": 40.0,
    "std_ttft_ms": 5.0,
    "p99_itl_ms": 30.0,
}
DETAILED = RESULT | {
    "num_prompts": 3,
    "completed": 3,
    "start_times": [353400.75, 353400.5, 353403.5],
    "input_lens": [100, 200, 300],
    "output_lens": [10, 20, 30],
}
SERVER: dict[str, Any] = {
    "engine": {"model": LLAMA, "max_loras": 8, "max_lora_rank": 16},
    "workload": {
        "adapters": {"count": 8, "ranks": [8, 16]},
        "lengths": {"distribution": "fixed"},
    },
}

Compare = Callable[..., pd.DataFrame]
pytestmark = pytest.mark.filterwarnings("ignore:.*extrapolation")


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write results, a line each, and the file of their server."""

    def write(*results: dict[str, Any], **workload: Any) -> tuple[Path, Path]:
        path, config = tmp_path / "bench.json", tmp_path / "server.yaml"
        path.write_text("\n".join(map(json.dumps, results)))
        told = {k: v for k, v in (SERVER["workload"] | workload).items() if v is not None}
        config.write_text(yaml.safe_dump(SERVER | {"workload": told}))
        return path, config

    return write


@pytest.fixture
def compare(files: Callable[..., tuple[Path, Path]]) -> Compare:
    return lambda *results, **workload: compare_benchmarks(*files(*results, **workload))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Simulation]:
    """Keep the twin's runs."""
    runs: list[Simulation] = []
    simulate = benchmark.simulate

    def keep(*arguments: Any, **options: Any) -> Simulation:
        runs.append(simulate(*arguments, **options))
        return runs[-1]

    monkeypatch.setattr(benchmark, "simulate", keep)
    return runs


def test_the_window_ends_with_the_last_answer(compare: Compare, served: list[Simulation]) -> None:
    table = compare(RESULT).set_index("figure")
    (run,) = served
    records = run.records
    assert len(records) == 200
    assert records.arrival_s[-1] == pytest.approx(20)  # the client stretches its gaps
    predicted = table["predicted"]
    assert predicted["duration_s"] == records.end_s.max() > 20
    assert predicted["request_throughput"] == 200 / records.end_s.max()
    assert predicted["total_throughput"] == pytest.approx(200 * 421 / records.end_s.max())
    waits_ms = 1e3 * (records.first_token_s - records.arrival_s)
    assert predicted["mean_ttft_ms"] == pytest.approx(waits_ms.mean())


def test_a_result_is_compared_in_what_its_version_saves(compare: Compare) -> None:
    table = compare(RESULT)
    assert list(table["figure"]) == [
        *("duration_s", "request_throughput", "output_throughput", "total_throughput"),
        *("mean_ttft_ms", "p99_itl_ms"),
    ]
    assert list(table["measured"]) == [25.0, 8.0, 1584.0, 3368.0, 40.0, 30.0]
    error = 100 * (table["predicted"] - table["measured"]) / table["measured"]
    assert table["error"].to_numpy() == pytest.approx(error.to_numpy())
    assert table.attrs["calibration"].startswith(LLAMA)


def test_the_measured_figures_do_not_reach_the_twin(compare: Compare) -> None:
    changed = {"duration": 99.0, "mean_ttft_ms": 1.0, "request_throughput": 1.0}
    assert list(compare(RESULT | changed)["predicted"]) == list(compare(RESULT)["predicted"])


def test_requests_are_dealt_alike_over_the_adapters(
    compare: Compare, served: list[Simulation]
) -> None:
    compare(RESULT | {"num_prompts": 4000, "completed": 4000, "request_rate": 50.0})
    assert np.bincount(served[0].records.adapter) == pytest.approx(np.full(8, 500), rel=0.2)
    named = [{"name": "sql", "rank": 8}, {"name": "law", "rank": 16}]
    compare(RESULT, adapters=named)
    assert set(served[1].records.adapter) == {0, 1}
    compare(RESULT, adapters=None)
    assert set(served[2].records.adapter) == {BASE_MODEL}


@pytest.mark.parametrize(("burstiness", "cv"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_burstiness_is_the_shape_of_the_gaps(
    compare: Compare, served: list[Simulation], burstiness: float, cv: float
) -> None:
    sent = {"num_prompts": 5000, "completed": 5000, "request_rate": 20.0}
    compare(RESULT | sent | {"burstiness": burstiness})
    gaps = np.diff(served[0].records.arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_without_a_rate_all_are_sent_at_once(compare: Compare, served: list[Simulation]) -> None:
    compare(RESULT | {"request_rate": "inf"})
    assert set(served[0].records.arrival_s) == {0.0}


def test_saved_requests_are_sent_as_they_were(compare: Compare, served: list[Simulation]) -> None:
    compare(DETAILED, lengths=None)
    records = served[0].records
    assert records.arrival_s.tolist() == [0, 0.25, 3]
    assert records.prompt_tokens.tolist() == [200, 100, 300]
    assert records.output_tokens.tolist() == [20, 10, 30]


@pytest.mark.filterwarnings("ignore:.*is a prior")
def test_the_calibration_that_is_asked_for_takes_the_place_of_the_files(
    files: Callable[..., tuple[Path, Path]], served: list[Simulation]
) -> None:
    path, config = files(RESULT)
    server = SERVER | {"engine": {**SERVER["engine"], "defaults": "vllm"}}
    config.write_text(yaml.safe_dump(server))
    compare_benchmarks(path, config, "auto@h200")
    assert served[-1].calibration.endswith("@h200-vllm0.8.5-prior")
    assert served[-1].engine.max_num_batched_tokens == 8192  # vLLM's on that GPU, not the file's
    config.write_text(yaml.safe_dump(server | {"gpu": "l40s"}))
    with pytest.raises(AdapterTwinError, match=r"calibration: the file has 'auto@l40s'; leave one"):
        compare_benchmarks(path, config, "auto@h200")


def test_each_line_of_a_file_is_a_benchmark(compare: Compare) -> None:
    table = compare(RESULT, RESULT | {"request_rate": 2.0})
    measured = table.pivot(index="benchmark", columns="figure", values="predicted")
    assert measured.loc[1, "duration_s"] > 100 > measured.loc[0, "duration_s"]


def test_requests_that_failed_are_left_out(compare: Compare, served: list[Simulation]) -> None:
    totals = {"total_input_tokens": 223 * 150, "total_output_tokens": 198 * 150}
    with pytest.warns(UserWarning, match="50 requests failed; they are left out"):
        compare(RESULT | {"completed": 150} | totals)
    assert len(served[0].records) == 150
    assert set(served[0].records.prompt_tokens) == {223}


@pytest.mark.parametrize(
    ("result", "workload", "message"),
    [
        ({"ramp_up_strategy": "linear"}, {}, "ramp_up_strategy: a growing rate is not known"),
        ({"model_id": "Qwen/Qwen3-8B"}, {}, "engine.model: the benchmark is of Qwen/Qwen3-8B, not"),
        ({"request_rate": 0}, {}, "request_rate"),
        ({"completed": 0}, {}, "completed: must be at least 1"),
        ({}, {"duration_s": 60}, "workload: duration_s: the benchmark tells; leave it out"),
        ({}, {"lengths": {"mean_input_tokens": 9}}, "workload: mean_input_tokens: the benchmark"),
        ({}, {"lengths": None}, "workload.lengths: the benchmark holds means alone; tell"),
        ({}, {"lengths": "fixed"}, "workload.lengths: expected a mapping"),
        ({}, {"adapters": [{"name": "a", "rank": 8, "request_rate": 1}]}, "request_rate: the be"),
        ({}, {"adapters": {"count": 1, "request_rates": [1], "ranks": [8]}}, "request_rates: the"),
        (DETAILED, {}, "workload.lengths: the requests' own are saved; leave it out"),
        (DETAILED | {"input_lens": None}, {"lengths": None}, "benchmark: holds no input_lens"),
    ],
)
def test_what_cannot_be_compared_is_named(
    compare: Compare, result: dict[str, Any], workload: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterTwinError, match=message) as caught:
        compare(RESULT | result, **workload)
    assert "\n" not in str(caught.value)


def test_a_client_holds_requests_back(compare: Compare, served: list[Simulation]) -> None:
    fast = RESULT | {"request_rate": "inf"}
    few, all_at_once = (
        compare(fast | {"max_concurrency": held}).set_index("figure")["predicted"]
        for held in (16, 200)
    )
    records = served[0].records
    running = [((records.arrival_s <= at) & (records.end_s > at)).sum() for at in records.arrival_s]
    assert max(running) == 16
    assert few["mean_ttft_ms"] < 0.5 * all_at_once["mean_ttft_ms"]
    assert few["duration_s"] > all_at_once["duration_s"]


@pytest.mark.parametrize("key", ["slo", "fleet", "seed"])
def test_a_server_of_another_kind_is_refused(
    files: Callable[..., tuple[Path, Path]], key: str
) -> None:
    path, config = files(RESULT)
    value = {"slo": {"ttft_ms": 100}, "fleet": {"replicas": 2}, "seed": 3}[key]
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {key: value}))
    with pytest.raises(AdapterTwinError, match=f"^{key}: counts for nothing beside"):
        compare_benchmarks(path, config)


def test_the_verb_validates_a_benchmark(
    files: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = files(RESULT)

    def run(*arguments: object) -> Any:
        with pytest.raises(SystemExit) as done:
            cli.main([*map(str, arguments)])
        return done.value.code, capsys.readouterr()

    out = tmp_path / "report"
    status, told = run("validate", path, "--config", config, "--json", "--out", out)
    assert status == 0
    figures = json.loads(told.out)["figures"]
    assert figures[0]["figure"] == "duration_s"
    assert len(pd.read_csv(out / "benchmarks.csv")) == len(figures)
    status, told = run("validate", path)
    assert (status, told.err.count("\n")) == (2, 1)
    assert "tell the server's engine and workload.adapters by --config" in told.err
    status, told = run("predict", path, "--out", tmp_path / "pred.csv")
    assert (status, "benchmarks are for `validate --config`" in told.err) == (2, True)
    status, told = run("validate", tmp_path / "runs.parquet", "--config", config)
    assert (status, "config: a table of runs tells its engines" in told.err) == (2, True)
