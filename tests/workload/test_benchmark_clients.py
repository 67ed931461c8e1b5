"""What benchmark clients save, as a log of requests."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.workload.benchmark_clients import read_benchmark
from adapter_twin.workload.request_log import read_requests

VLLM: dict[str, Any] = {
    "date": "20260301-101500",
    "endpoint_type": "openai",
    "backend": "openai",
    "label": None,
    "model_id": "meta-llama/Llama-3.1-8B-Instruct",
    "tokenizer_id": "meta-llama/Llama-3.1-8B-Instruct",
    "num_prompts": 4,
    "request_rate": 2.0,
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 2.4,
    "completed": 3,
    "failed": 1,
    "total_input_tokens": 60,
    "total_output_tokens": 12,
    "request_goodput": None,
    "mean_ttft_ms": 40.0,
    "input_lens": [10, 99, 20, 30],
    "output_lens": [3, 0, 4, 5],
    "ttfts": [0.04, 0.0, 0.05, 0.03],
    "itls": [[0.01, 0.01], [], [0.01, 0.02, 0.01], [0.01] * 4],
    "start_times": [353400.5, 0.0, 353401.0, 353400.75],
    "errors": ["", "Bad Gateway", "", ""],
}
"""A detailed result as vLLM 0.32 saves it: the second request failed before it was sent."""


def guidellm(began: str, rows: list[tuple[float, int, int]]) -> dict[str, Any]:
    requests = [{began: s, "prompt_tokens": i, "output_tokens": o} for s, i, o in rows]
    breakdown = {"successful": requests, "incomplete": [], "errored": [], "total": None}
    totals = {"successful": len(rows), "incomplete": 0, "errored": 0, "total": len(rows)}
    return {
        "metadata": {"version": 2, "guidellm_version": "0.7.3"},
        "benchmarks": [{"requests": breakdown, "metrics": {"request_totals": totals}}],
    }


def aiperf(began_ns: int, prompt: int, output: int, phase: str = "profiling") -> dict[str, Any]:
    metrics = {
        "input_sequence_length": {"value": prompt, "unit": "tokens"},
        "time_to_first_token": {"value": 255.9, "unit": "ms"},
        "output_sequence_length": {"value": output, "unit": "tokens"},
    }
    about = {"session_num": 0, "request_start_ns": began_ns, "benchmark_phase": phase}
    return {"metadata": about, "metrics": metrics, "error": None}


AIPERF = [
    aiperf(1_759_813_206_000_000_000, 7, 7, "warmup"),
    aiperf(1_759_813_207_500_000_000, 550, 9),
    aiperf(1_759_813_207_000_000_000, 400, 8),
    {
        "metadata": {"request_start_ns": 1_759_813_208_000_000_000, "benchmark_phase": "profiling"},
        "metrics": {"error_isl": {"value": 550, "unit": "tokens"}},
        "error": {"code": 499, "type": "RequestCancellationError", "message": "cancelled"},
    },
]


def write(path: Path, *contents: object, indent: int | None = None) -> Path:
    path.write_text("\n".join(json.dumps(content, indent=indent) for content in contents))
    return path


@pytest.mark.parametrize("indent", [None, 2])
def test_a_detailed_result_of_vllm_is_a_log_from_its_first_answered_request(
    tmp_path: Path, indent: int | None
) -> None:
    log = read_requests(write(tmp_path / "bench.json", VLLM, indent=indent))
    assert log.arrival_s.tolist() == [0, 0.25, 0.5]
    assert log.prompt_tokens.tolist() == [10, 30, 20]
    assert log.output_tokens.tolist() == [3, 5, 4]
    assert (log.left_out, log.adapter) == (1, None)


@pytest.mark.parametrize("began", ["request_start_time", "start_time"])
def test_guidellms_requests_are_a_log(tmp_path: Path, began: str) -> None:
    content = guidellm(began, [(1.76e9 + 1.5, 100, 8), (1.76e9, 90, 7)])
    log = read_requests(write(tmp_path / "benchmarks.json", content))
    assert log.arrival_s.tolist() == [0, 1.5]
    assert log.prompt_tokens.tolist() == [90, 100]
    assert log.output_tokens.tolist() == [7, 8]


def test_aiperfs_records_are_a_log_without_warm_up_and_failures(tmp_path: Path) -> None:
    log = read_requests(write(tmp_path / "profile_export.jsonl", *AIPERF))
    assert log.arrival_s.tolist() == pytest.approx([0, 0.5], abs=1e-6)
    assert log.prompt_tokens.tolist() == [400, 550]
    assert (log.output_tokens.tolist(), log.left_out) == ([8, 9], 1)


TWO = guidellm("start_time", [(1.0, 5, 5)])["benchmarks"] * 2
SAMPLED = guidellm("start_time", [(1.0, 5, 5)])
SAMPLED["benchmarks"][0]["metrics"]["request_totals"]["successful"] = 9


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([VLLM | {"start_times": None}], "holds no start_times; save the benchmark with"),
        ([{k: v for k, v in VLLM.items() if k != "input_lens"}], "holds no input_lens"),
        ([VLLM | {"output_lens": [1]}], "lists differ in length"),
        ([VLLM, VLLM], "holds 2 benchmarks, each of other traffic; give a file of one"),
        ([{"benchmarks": TWO}], "holds 2 benchmarks"),
        ([SAMPLED], "holds 1 of 9 requests; save all"),
        ([{"benchmarks": [{"requests": None}]}], "holds no successful requests"),
        ([{"input_config": {}}], r"no result of `vllm bench serve` or guidellm; of AIPerf give"),
        ([[1, 2]], "holds no JSON object"),
    ],
)
def test_what_is_missing_for_a_log_is_named_in_one_line(
    tmp_path: Path, contents: list[Any], message: str
) -> None:
    with pytest.raises(AdapterTwinError, match=message) as caught:
        read_requests(write(tmp_path / "bench.json", *contents))
    assert "\n" not in str(caught.value)


def test_records_of_aiperf_without_lengths_are_refused(tmp_path: Path) -> None:
    raw = [{"metadata": {"request_start_ns": 1}, "metrics": {"x": {"value": 1}}}]
    with pytest.raises(AdapterTwinError, match="the column prompt_tokens is missing"):
        read_requests(write(tmp_path / "profile_export.jsonl", *raw))


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{broken")
    with pytest.raises(AdapterTwinError, match="not valid JSON; give a benchmark's result"):
        read_requests(tmp_path / "bench.json")
    with pytest.raises(AdapterTwinError, match="No such file"):
        read_requests(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "sending_s"), [({}, 2.0), ({"request_rate": "inf"}, 0.0), ({"burstiness": 0.5}, 2.0)]
)
def test_a_benchmark_says_how_long_it_sends(change: dict[str, Any], sending_s: float) -> None:
    assert read_benchmark(VLLM | change, "bench.json").sending_s == sending_s


def test_a_result_of_another_kind_lacks_a_field() -> None:
    embeddings = {k: v for k, v in VLLM.items() if k != "total_output_tokens"}
    with pytest.raises(AdapterTwinError, match=r"bench.json.total_output_tokens: missing"):
        read_benchmark(embeddings, "bench.json")
