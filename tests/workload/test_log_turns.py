"""Conversations in logs: who follows whom, after what delay, and what is repeated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.plan.demand import load_demand
from adapter_twin.plan.logged import stretch
from adapter_twin.tables.datasets import write_table
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.request_log import read_requests
from adapter_twin.workload.trace import Trace, generate
from adapter_twin.workload.traffic import Arrivals, Lengths, Workload

LOG = """arrival_s,session_id,adapter,prompt_tokens,output_tokens,think_s
1,a,0,10,5,
2,b,1,20,5,
9,a,0,20,5,3
30,b,1,12,5,4
40,,0,7,1,
50,a,0,40,5,0.5
"""
AIPERF = [
    {"timestamp": 1000, "session_id": "s", "input_length": 300, "output_length": 40},
    {"timestamp": 1500, "session_id": "t", "input_length": 10, "output_length": 4},
    {"delay": 2000, "session_id": "s", "input_length": 150, "output_length": 20},
    {"delay": 500, "session_id": "s", "input_length": 50, "output_length": 10},
]
ROOT = {"chat_id": 7, "parent_chat_id": -1, "timestamp": 61.1, "type": "text", "turn": 1}
BAILIAN = [
    ROOT | {"input_length": 40, "output_length": 9, "hash_ids": [1, 2, 3]},
    ROOT
    | {"chat_id": 9, "parent_chat_id": 7, "timestamp": 90.0, "turn": 2}
    | {"input_length": 64, "output_length": 3, "hash_ids": [1, 2, 4, 5]},
    ROOT
    | {"chat_id": 8, "parent_chat_id": 6, "timestamp": 95.0, "turn": 3}
    | {"input_length": 5, "output_length": 3, "hash_ids": [6]},
]


def write(path: Path, content: str | list[Any]) -> Path:
    path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
    return path


def replay(path: Path, duration_s: float = 1000.0, **arrivals: Any) -> Trace:
    workload = Workload(
        adapters=deal_adapters(2, [1.0], [8]),
        duration_s=duration_s,
        lengths=Lengths(mean_input_tokens=1, mean_output_tokens=1),
        arrivals=Arrivals(process="trace", path=str(path), **arrivals),
    )
    return generate(workload, np.random.default_rng(0))


def told(trace: Trace) -> tuple[list[int], list[float]]:
    assert trace.after is not None
    assert trace.think_s is not None
    return trace.after.tolist(), trace.think_s.tolist()


def test_rows_of_a_session_follow_each_other(tmp_path: Path) -> None:
    trace = replay(write(tmp_path / "log.csv", LOG), max_concurrency=3)
    assert told(trace) == ([-1, -1, 0, 1, -1, 2], [0, 0, 3, 4, 0, 0.5])
    assert trace.max_concurrency == 3
    assert trace.contents is not None
    own = np.split(trace.contents.piece, trace.contents.first[1:-1])
    assert own[5].tolist() == [*own[2].tolist(), 11, 12] == [1, 2, 5, 6, 11, 12]
    assert own[3].tolist() == [7, 8]  # 12 tokens cannot repeat 25
    ends = np.split(trace.contents.end, trace.contents.first[1:-1])
    assert ends[5].tolist() == [10, 15, 20, 25, 40, 45]
    assert told(replay(tmp_path / "log.csv", 40.0)) == ([-1, -1, 0, 1], [0, 0, 3, 4])


@pytest.mark.filterwarnings("ignore:.*names no adapters")
def test_turns_of_aiperf_tell_what_is_new_and_their_delay_in_ms(tmp_path: Path) -> None:
    trace = replay(write(tmp_path / "aiperf.jsonl", AIPERF))
    assert trace.arrival_s.tolist() == [1, 1, 1, 1.5]
    assert told(trace) == ([-1, 0, 1, -1], [0, 2, 0.5, 0])
    assert trace.prompt_tokens.tolist() == [300, 490, 560, 10]
    assert len(set(trace.adapter[:3].tolist())) == 1  # dealt as a whole


@pytest.mark.filterwarnings("ignore:.*names no adapters")
def test_bailians_rows_tell_whole_prompts_in_seconds_and_blocks_of_16(tmp_path: Path) -> None:
    trace = replay(write(tmp_path / "qwen.jsonl", BAILIAN))
    assert trace.arrival_s.tolist() == [61.1, 90, 95]
    assert told(trace) == ([-1, 0, -1], [0, 0, 0])  # the parent of the last one is not in the log
    assert trace.prompt_tokens.tolist() == [40, 64, 5]
    assert trace.contents is not None
    assert trace.contents.piece.tolist() == [1, 2, 3, 1, 2, 4, 5, 6]
    assert trace.contents.end.tolist() == [16, 32, 40, 16, 32, 48, 64, 5]


@pytest.mark.parametrize("content", [LOG, AIPERF, BAILIAN], ids=["log", "aiperf", "bailian"])
def test_the_common_form_is_read_back_as_it_was(tmp_path: Path, content: Any) -> None:
    suffix = "csv" if isinstance(content, str) else "jsonl"
    log = read_requests(write(tmp_path / f"log.{suffix}", content))
    again = read_requests(write_table(log.to_frame(), tmp_path / "common.parquet"))
    assert log.after is not None
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "after", "think_s"):
        np.testing.assert_array_equal(getattr(again, name), getattr(log, name))
    assert again.block_tokens == log.block_tokens or log.blocks is None
    assert again.describe()["sessions"] == (log.after < 0).sum()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"conversations": [{"from": "human", "value": "Hi"}]}],
            "conversations holds text; count",
        ),
        ([{"messages": [], "output_length": 3, "session_id": "a"}], "messages holds text; count"),
        ([AIPERF[0] | {"hash_ids": [1]}], "turns cannot have hash_ids"),
        ([BAILIAN[0], BAILIAN[0]], "chat_id must differ"),
        ([BAILIAN[0] | {"parent_chat_id": 9}, BAILIAN[1]], "a parent_chat_id is that of a later"),
        ([AIPERF[0] | {"delay": -1}], "delay must be at least 0"),
        ([AIPERF[0] | {"delay": "soon"}], "delay holds text"),
        ([AIPERF[2]], "arrival_s is missing"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, rows: list[Any], words: str
) -> None:
    path = write(tmp_path / "log.jsonl", rows)
    with pytest.raises(AdapterTwinError, match=words) as caught:
        read_requests(path)
    assert "\n" not in str(caught.value)


def test_plans_replay_conversations(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", LOG)
    dealt = "{count: 2, ranks: [8]}"
    plan = f"model: llama-3.1-8b-instruct\nadapters: {dealt}\nrequest_log: log.csv\n"
    trace = load_demand(write(tmp_path / "plan.yaml", plan)).trace
    assert told(trace) == ([-1, -1, 0, 1, -1, 2], [0, 0, 3, 4, 0, 0.5])
    drawn, *_ = stretch(trace, 1, lead_in_s=0.0)
    after, _ = told(drawn)
    turns = [turn for turn, before in enumerate(after) if before >= 0]
    assert turns
    for turn in turns:
        before = after[turn]
        assert before < turn
        assert drawn.adapter[before] == drawn.adapter[turn]
        assert drawn.arrival_s[before] <= drawn.arrival_s[turn]
