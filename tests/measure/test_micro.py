"""Micro-profiles: the batches asked for, recorded as the scheduler made them; failures are rows."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError, one_line
from adapter_twin.measure import micro, recorder
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure.micro import profile_engine, run_child
from adapter_twin.measure.micro_engine import visits
from adapter_twin.measure.micro_plan import MicroPlan, Point, check_plan, design
from adapter_twin.measure.model_folder import write_adapters, write_model
from adapter_twin.measure.recorder import Recorder

FLAGS = EngineFlags(
    max_loras=2, max_lora_rank=16, max_cpu_loras=4, max_num_seqs=8, cpu_kv_cache_gib=0.05
)
PLAN = MicroPlan(
    running=(1, 4, 16),
    context_tokens=(16, 128),
    adapters=(0, 1, 2, 4),
    ranks=(8, 16, 32),
    chunk_tokens=(32,),
    waiting=(6,),
)
BASE_ONLY = replace(FLAGS, max_loras=0)
MANY = {8: 4, 16: 4, 32: 4}


def points(flags: EngineFlags = FLAGS, kv_tokens: int = 10**6) -> list[Point]:
    return design(PLAN, flags, MANY, kv_tokens, block_size=16)


def test_levels_beyond_the_engine_are_left_out() -> None:
    found = points()
    assert {point.running for point in found if not point.waiting} == {0, 1, 4}
    assert {point.adapters for point in found} == {0, 1, 2}
    assert {point.rank for point in found} == {0, 8, 16}
    small = [point for point in points(kv_tokens=600) if point.running == 4]
    assert {point.context_tokens for point in small} == {16}


def test_running_requests_adapters_and_rank_are_fully_crossed() -> None:
    crossed = {
        (point.running, point.adapters, point.rank)
        for point in points()
        if not point.chunk_tokens and not point.waiting and point.context_tokens == 16
    }
    mixes = [(0, 0), (1, 8), (1, 16), (2, 8), (2, 16)]
    assert crossed == {(n, k, r) for n in (1, 4) for k, r in mixes if k <= n}


def test_prompts_meet_no_decodes_and_each_number_of_them() -> None:
    prompts = [point for point in points() if point.chunk_tokens]
    assert {(point.running, point.adapters) for point in prompts} == {
        *[(0, 0), (0, 1), (1, 0), (1, 1), (4, 0), (4, 2)]
    }


def test_requests_wait_for_a_slot_that_running_adapters_hold() -> None:
    (point,) = [point for point in points() if point.waiting]
    assert (point.running, point.adapters, point.waiting) == (2, 2, 6)


def test_an_engine_without_slots_is_profiled_with_the_base_model() -> None:
    assert {point.adapters for point in points(BASE_ONLY)} == {0}


def test_too_few_adapters_of_a_rank_are_named() -> None:
    with pytest.raises(AdapterTwinError, match=r"2 distinct adapters of rank 16 .* 1 are there"):
        check_plan(PLAN, FLAGS, MANY | {16: 1})


def test_a_plan_no_engine_runs_is_refused() -> None:
    plan = MicroPlan(running=(4,), context_tokens=(16,), adapters=(4,), ranks=(8,), chunk_tokens=())
    with pytest.raises(AdapterTwinError, match=r"^adapters: no level fits max_loras = 2"):
        check_plan(plan, FLAGS, MANY)


def test_every_repeat_visits_all_points_in_an_order_of_its_own() -> None:
    order = list(visits(20, 3, np.random.default_rng(1)))
    by_repeat = [[point for at, point in order if at == repeat] for repeat in range(3)]
    assert all(sorted(visited) == list(range(20)) for visited in by_repeat)
    assert by_repeat[0] != by_repeat[1]
    assert order == list(visits(20, 3, np.random.default_rng(1)))


def request(prompt_tokens: int, adapter: int) -> SimpleNamespace:
    lora = SimpleNamespace(lora_int_id=adapter) if adapter else None
    return SimpleNamespace(num_prompt_tokens=prompt_tokens, lora_request=lora)


def batch(new: dict[str, int], cached: dict[str, int], tokens: dict[str, int]) -> SimpleNamespace:
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=done) for name, done in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=list(cached.values())
        ),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
    )


class StubEngine:
    """Runs given batches, each `ahead` steps after it was scheduled."""

    def __init__(self, batches: list[SimpleNamespace], requests: dict[str, Any], ahead: int):
        pending: Iterator[SimpleNamespace] = iter(batches)
        self.scheduler = SimpleNamespace(
            requests=requests,
            schedule=lambda: next(pending),
            update_from_output=lambda output: output,
            get_request_counts=lambda: (len(requests), 3),
        )
        queue: list[SimpleNamespace] = []

        def step_fn() -> None:
            queue.append(self.scheduler.schedule())
            if len(queue) > ahead:
                self.scheduler.update_from_output(queue.pop(0))

        self.core = SimpleNamespace(scheduler=self.scheduler, step_fn=step_fn)
        self.engine_core = SimpleNamespace(engine_core=self.core)
        runner = SimpleNamespace(model_runner=SimpleNamespace())
        self.model_executor = SimpleNamespace(driver_worker=SimpleNamespace(worker=runner))

    def step(self) -> None:
        self.core.step_fn()


REQUESTS = {"decode": request(10, 1), "chunk": request(50, 2), "new": request(5, 0)}
MIXED = batch({"new": 0}, {"decode": 12, "chunk": 16}, {"decode": 1, "chunk": 20, "new": 5})
DECODE = batch({}, {"decode": 13}, {"decode": 1})


def test_a_batch_is_described_by_what_the_scheduler_gave_it() -> None:
    record = Recorder(StubEngine([MIXED], REQUESTS, ahead=0), {1: 8, 2: 16})
    record.step()
    (row,) = record.steps
    assert (row["batched_tokens"], row["prefill_tokens"]) == (26, 25)
    assert (row["decodes"], row["prompts"]) == (1, 2)
    assert row["context_tokens"] == 12 + 36 + 5
    assert (row["distinct_adapters"], row["rank"]) == (2, 16)
    assert (row["running"], row["waiting"], row["loads"]) == (3, 3, 0)
    assert row["step_ms"] >= row["schedule_ms"] > 0
    assert row["output_ms"] >= 0


def test_a_step_scheduled_ahead_lasts_from_the_end_of_the_one_before() -> None:
    record = Recorder(StubEngine([MIXED, DECODE, DECODE], REQUESTS, ahead=1), {1: 8, 2: 16})
    record.step()
    assert not record.steps
    record.step()
    first_end = record._last_end
    record.step()
    assert [row["batched_tokens"] for row in record.steps] == [26, 1]
    assert record.steps[1]["step_ms"] == pytest.approx((record._last_end - first_end) * 1e3)


class StubAdapters:
    """A worker's adapter manager with host cache and slots."""

    def __init__(self) -> None:
        self.cached: set[int] = set()
        self._adapter_manager = SimpleNamespace(_active_adapters=set())

    def list_adapters(self) -> set[int]:
        return self.cached

    def add_adapter(self, lora_request: SimpleNamespace) -> None:
        self.cached.add(lora_request.lora_int_id)
        self._adapter_manager._active_adapters.add(lora_request.lora_int_id)


def test_a_load_comes_from_disk_then_from_memory_then_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder, "_wait_for_accelerator", lambda: None)
    engine, manager = StubEngine([], {}, ahead=0), StubAdapters()
    engine.model_executor.driver_worker.worker.model_runner.lora_manager = manager
    record, adapter = Recorder(engine, {1: 8}), SimpleNamespace(lora_int_id=1)
    manager.add_adapter(adapter)
    manager._adapter_manager._active_adapters.clear()
    manager.add_adapter(adapter)
    manager.add_adapter(adapter)
    assert [(row["source"], row["rank"]) for row in record.loads] == [("disk", 8), ("memory", 8)]


def test_a_failed_child_says_why_with_its_last_line(tmp_path: Path) -> None:
    program = "import sys; print('starting'); sys.exit('no such device')"
    failure = run_child([sys.executable, "-c", program], {}, tmp_path / "log")
    assert failure == "no such device"


def test_a_killed_child_is_told_by_its_signal(tmp_path: Path) -> None:
    program = "import os; os.kill(os.getpid(), 9)"
    failure = run_child([sys.executable, "-c", program], {}, tmp_path / "log")
    assert failure == "killed by SIGKILL"


def test_an_interrupted_profile_leaves_no_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def interrupt(child: Any, timeout: float | None = None) -> int:
        if not started:
            started.append(child.pid)
            raise KeyboardInterrupt
        os.waitpid(child.pid, 0)
        child.returncode = -signal.SIGKILL
        return -signal.SIGKILL

    monkeypatch.setattr("subprocess.Popen.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "log")
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Profile a model whose engine process leaves the given files and ends as given."""
    (tmp_path / "config.json").write_text("{}")

    def profile(files: dict[str, str], failure: str | None) -> dict[str, pd.DataFrame]:
        def child(command: list[str], variables: dict[str, str], log: Path) -> str | None:
            for name, content in files.items():
                (Path(command[-1]) / name).write_text(content)
            return failure

        monkeypatch.setattr(micro, "run_child", child)
        monkeypatch.setattr(micro, "require_engine", lambda: None)
        return profile_engine(tmp_path, [], BASE_ONLY, PLAN, seed=0)

    return profile


def test_a_refused_start_is_a_row_with_its_reason(profile: Any) -> None:
    refused = profile({"start.json": '{"server_failure": "no KV cache"}'}, None)
    assert refused["engine_starts"].iloc[0]["server_failure"] == "no KV cache"
    assert refused["engine_starts"].iloc[0]["max_num_seqs"] == 8
    assert refused["engine_starts"].iloc[0]["kv_cache_tokens"] is None
    assert len(refused["micro_steps"]) == len(refused["adapter_loads"]) == 0
    assert "step_ms" in refused["micro_steps"]


def test_an_engine_that_dies_keeps_the_steps_measured_until_then(profile: Any) -> None:
    died = profile(
        {
            "start.json": json.dumps({"kv_cache_tokens": 1600}),
            "micro_steps.jsonl": '{"step": 0, "step_ms": 4.0}\n{"step": 1, "st',
        },
        "killed by SIGKILL",
    )
    assert died["engine_starts"].iloc[0]["server_failure"] == "killed by SIGKILL"
    assert died["engine_starts"].iloc[0]["kv_cache_tokens"] == 1600
    assert died["micro_steps"]["step_ms"].tolist() == [4.0]
    assert died["micro_steps"]["adapter_slots"].tolist() == [0]


def test_a_reason_is_one_short_line() -> None:
    assert one_line(ValueError("too\n  little ")) == "too little"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 300


LIVE = MicroPlan(
    running=(1, 4),
    context_tokens=(16,),
    adapters=(0, 2),
    ranks=(8,),
    chunk_tokens=(32,),
    waiting=(6,),
    repeats=2,
    steps=3,
    loads=2,
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("live")
    model = write_model("tiny", folder / "model")
    adapters = write_adapters(model, folder / "adapters", [8, 8, 8, 32])
    return profile_engine(model, adapters, FLAGS, LIVE, seed=3)


@pytest.mark.live
def test_a_real_engine_runs_the_batches_asked_for(live: dict[str, pd.DataFrame]) -> None:
    assert live["engine_starts"].iloc[0]["server_failure"] is None
    start = live["engine_starts"].iloc[0]
    asked = design(LIVE, FLAGS, {8: 3}, start["kv_cache_tokens"], start["block_size"])
    assert set(live["micro_steps"]["point"]) == set(range(len(asked)))
    for (_, number), steps in live["micro_steps"].groupby(["repeat", "point"]):
        point, measured = asked[number], steps.tail(LIVE.steps)
        assert (measured["decodes"] == point.running).all()
        assert (measured["batched_tokens"] == point.running + point.chunk_tokens).all()
        assert (measured["prefill_tokens"] == point.chunk_tokens).all()
        assert (measured["distinct_adapters"] == point.adapters).all()
        assert (measured["rank"] == point.rank).all()
        assert (measured["waiting"] == point.waiting).all()
        # context grows by one token per request and step
        if not point.chunk_tokens:
            assert (measured["context_tokens"].diff().dropna() == point.running).all()


@pytest.mark.live
def test_no_recorded_step_exceeds_slots_budget_or_requests(live: dict[str, pd.DataFrame]) -> None:
    steps = live["micro_steps"]
    assert (steps["distinct_adapters"] <= FLAGS.max_loras).all()
    assert (steps["batched_tokens"] <= FLAGS.max_num_batched_tokens).all()
    assert (steps["running"] <= FLAGS.max_num_seqs).all()
    assert (steps["batched_tokens"] == steps["decodes"] + steps["prefill_tokens"]).all()
    assert (steps["schedule_ms"] < steps["step_ms"]).all()
    assert (steps["schedule_ms"] > 0).all()


@pytest.mark.live
def test_a_real_start_and_real_loads_are_measured(live: dict[str, pd.DataFrame]) -> None:
    assert live["engine_starts"].iloc[0]["kv_cache_tokens"] > 0
    assert live["engine_starts"].iloc[0]["startup_s"] > 0
    assert live["engine_starts"].iloc[0]["slots_gib"] > 0
    loads = live["adapter_loads"]
    counts = loads.groupby(["source", "rank"]).size()
    assert counts["disk", 8] == LIVE.loads  # after the warm-up, all others are in host memory
    assert counts["memory", 8] >= LIVE.loads
    assert loads["load_ms"].min() > 0
    assert loads["index"].tolist() == list(range(len(loads)))


@pytest.mark.live
def test_a_real_engine_that_refuses_to_start_says_why(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model = write_model("tiny", tmp_path / "model")
    small = EngineFlags(max_loras=0, max_lora_rank=8, max_cpu_loras=0, cpu_kv_cache_gib=1e-4)
    refused = profile_engine(model, [], small, LIVE, seed=0)
    assert "KV cache" in refused["engine_starts"].iloc[0]["server_failure"]
    assert len(refused["micro_steps"]) == 0
