"""Logs and public traces in their own forms."""

import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest

from adapter_twin import cli
from adapter_twin.errors import AdapterTwinError
from adapter_twin.tables.datasets import write_table
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.request_log import RequestLog, read_requests
from adapter_twin.workload.trace import BASE_MODEL, read_trace

ADAPTERS = (
    Adapter(name="sql", rank=8, request_rate=3.0),
    Adapter(name="law", rank=16, request_rate=1.0),
)
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:05.2500000,110,27
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
"""
MOONCAKE = [
    {"timestamp": 3052, "input_length": 1300, "output_length": 5, "hash_ids": [1, 2, 7]},
    {"timestamp": 0, "input_length": 1536, "output_length": 9, "hash_ids": [1, 2, 3]},
    {"timestamp": 3052, "input_length": 100, "output_length": 2, "hash_ids": [4]},
]
LOG = """when,user,adapter,prompt_tokens,completion_tokens,arrival_s
x,1,sql,10,5,2026-03-01T12:00:00+01:00
x,2,law,20,6,2026-03-01T11:00:01Z
x,3,,30,7,2026-03-01T11:00:02.5+00:00
x,4,sql,40,,2026-03-01T11:00:03Z
"""


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["azure.csv", "azure.csv.gz"])
def test_the_azure_traces_are_read_from_their_first_request(tmp_path: Path, name: str) -> None:
    log = read_requests(write(tmp_path / name, AZURE))
    assert log.arrival_s.tolist() == pytest.approx([0, 0.052, 1.27004])
    assert log.prompt_tokens.tolist() == [4808, 3180, 110]
    assert log.output_tokens.tolist() == [10, 8, 27]
    assert log.adapter is None


def test_burstgpts_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "burst.csv", BURSTGPT)
    log = read_requests(path)
    assert (log.arrival_s.tolist(), log.left_out) == ([5, 45], 1)
    with (
        pytest.warns(UserWarning, match="1 rows without output are left out"),
        pytest.warns(UserWarning, match="dealt over the workload's by their rates"),
    ):
        read_trace(path, ADAPTERS, rng=np.random.default_rng(0))


@pytest.mark.filterwarnings("ignore:.*names no adapters")
def test_mooncakes_hashes_are_pieces_that_prompts_share(tmp_path: Path) -> None:
    text = "\n".join(map(json.dumps, MOONCAKE))
    trace = read_trace(
        write(tmp_path / "m.jsonl", text), ADAPTERS[:1], rng=np.random.default_rng(0)
    )
    assert trace.arrival_s.tolist() == [0, 3.052, 3.052]
    assert trace.contents is not None
    assert trace.contents.first.tolist() == [0, 3, 6, 7]
    assert trace.contents.piece.tolist() == [1, 2, 3, 1, 2, 7, 4]
    assert trace.contents.end.tolist() == [512, 1024, 1536, 512, 1024, 1300, 100]


@pytest.mark.filterwarnings("ignore:.*without output")
def test_a_gateways_log_has_names_time_zones_and_columns_of_its_own(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "log.csv", LOG), ADAPTERS)
    assert trace.arrival_s.tolist() == [0, 1, 2.5]
    assert trace.adapter.tolist() == [0, 1, BASE_MODEL]
    assert trace.output_tokens.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("begins", "gap"), [(0.5, 1.5), (1_760_000_000, 1.5), (1_760_000_000_000, 1500)]
)
def test_times_may_count_from_1970(tmp_path: Path, begins: float, gap: float) -> None:
    rows = f"arrival_s,prompt_tokens,output_tokens\n{begins},1,1\n{begins + gap},1,1\n"
    arrival_s = read_requests(write(tmp_path / "log.csv", rows)).arrival_s
    assert np.diff(arrival_s).tolist() == [1.5]


@pytest.mark.filterwarnings("ignore:.*names no adapters")
def test_requests_without_adapters_are_dealt_by_popularity(tmp_path: Path) -> None:
    rows = "arrival_s,prompt_tokens,output_tokens\n" + "1,1,1\n" * 4000
    path = write(tmp_path / "log.csv", rows)
    first, again = (
        read_trace(path, ADAPTERS, 4.0, np.random.default_rng(5)).adapter for _ in range(2)
    )
    assert (first == again).all()
    shares = [float((first == k).mean()) for k in (0, 1, BASE_MODEL)]
    assert shares == pytest.approx([3 / 8, 1 / 8, 4 / 8], abs=0.03)


def test_a_log_of_strange_names_takes_the_workloads_adapters_in_order(tmp_path: Path) -> None:
    rows = "arrival_s,adapter,prompt_tokens,output_tokens\n1,tax,1,1\n2,art,1,1\n3,tax,1,1\n"
    path = write(tmp_path / "log.csv", rows)
    with pytest.warns(UserWarning, match="names none of the workload's adapters; its own"):
        assert read_trace(path, ADAPTERS).adapter.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("arrival,prompt_tokens,output_tokens\n1,1,1\n", "unknown column 'arrival'; did you mean"),
        ("t,prompt_tokens,output_tokens\n1,1,1\n", "the column arrival_s is missing; add it"),
        ("arrival_s,prompt_tokens,output_tokens\nsoon,1,1\n", "text that is no date"),
        ("arrival_s,prompt_tokens,output_tokens\n1,1,0\n", "at least one request with output"),
        ("arrival_s,prompt_tokens,output_tokens\n1,1,-4\n", "output_tokens must be a whole number"),
        ("arrival_s,adapter,prompt_tokens,output_tokens\n1,sq,1,1\n2,sql,1,1\n", "'sq' is not"),
    ],
)
def test_what_no_request_can_have_is_refused_in_one_line(
    tmp_path: Path, rows: str, message: str
) -> None:
    with pytest.raises(AdapterTwinError, match=message) as caught:
        read_trace(write(tmp_path / "log.csv", rows), ADAPTERS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["log.csv", "m.jsonl", "azure.csv"])
def test_the_common_form_is_read_back_as_it_was(tmp_path: Path, name: str) -> None:
    texts = {"log.csv": LOG, "azure.csv": AZURE, "m.jsonl": "\n".join(map(json.dumps, MOONCAKE))}
    log = read_requests(write(tmp_path / name, texts[name]))
    again = read_requests(write_table(log.to_frame(), tmp_path / "common.parquet"))
    assert again.arrival_s.tolist() == log.arrival_s.tolist()
    assert again.output_tokens.tolist() == log.output_tokens.tolist()
    assert (again.adapter is None) == (log.adapter is None)
    assert log.adapter is None or again.adapter.tolist() == log.adapter.tolist()
    assert log.blocks is None or [list(own) for own in again.blocks] == log.blocks


def test_a_log_tells_its_rate_its_bursts_and_who_asks_most(tmp_path: Path) -> None:
    rows = [f"{t},{'sql' if t % 3 else 'law'},10,20" for t in range(90)] + ["500,,10,20"]
    text = "arrival_s,adapter,prompt_tokens,output_tokens\n" + "\n".join(rows)
    told = read_requests(write(tmp_path / "log.csv", text)).describe(window_s=60.0)
    assert (told["requests"], told["span_s"], told["adapters"]) == (91, 500.0, 2)
    assert (told["top_adapter"], told["top_share"]) == ("sql", pytest.approx(60 / 91))
    assert told["base_model_share"] == pytest.approx(1 / 91)
    assert (told["busiest_from_s"], told["busiest_request_rate"]) == (0.0, 1.0)
    sql_gaps, law_gaps = np.tile([1, 2], 30)[:59] * 59 / 88, np.ones(29)
    assert told["gap_cv"] == pytest.approx(np.concatenate([sql_gaps, law_gaps]).std())
    unnamed = "arrival_s,prompt_tokens,output_tokens\n"
    unnamed += "\n".join(f"{row.split(',')[0]},10,20" for row in rows)
    assert read_requests(write(tmp_path / "unnamed.csv", unnamed)).gap_cv > 3
    assert told["mean_output_tokens"] == told["p99_output_tokens"] == 20


def test_bursts_of_thousands_of_adapters_are_told_in_one_pass() -> None:
    rng = np.random.default_rng(0)
    n, adapters = 1_000_000, 20_000
    ones = np.ones(n, np.int32)
    names = rng.integers(adapters, size=n).astype(str)
    log = RequestLog(np.sort(rng.uniform(0, 3600, n)), ones, ones, names, None, 0)
    began_s = time.perf_counter()
    assert log.gap_cv == pytest.approx(1, rel=0.05)  # a mask per adapter takes minutes
    assert time.perf_counter() - began_s < 20


def test_the_verb_tells_and_writes_what_it_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "azure.csv", AZURE), tmp_path / "common.parquet"
    with pytest.raises(SystemExit) as done:
        cli.main(["traffic", str(source), "--out", str(out), "--json"])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 3
    assert len(read_requests(out).arrival_s) == 3
