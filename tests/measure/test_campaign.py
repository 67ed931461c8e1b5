"""Campaigns: strict files, pieces that are measured once, tables that meet their schemas."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from adapter_twin import cli
from adapter_twin.calibrate.from_tables import calibrate_tables
from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.measure import run_campaign as runner
from adapter_twin.measure.campaign import Campaign, load_campaign
from adapter_twin.measure.client import ScheduleError
from adapter_twin.measure.engine_flags import EngineFlags, describe_machine
from adapter_twin.measure.pieces import ServingPiece, groups
from adapter_twin.measure.serving import ServedRun
from adapter_twin.service.predict import predict
from adapter_twin.tables import datasets
from adapter_twin.tables.campaign_schemas import CAMPAIGN_TABLES
from adapter_twin.twin.simulate import simulate, simulate_run
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import run_to_workload
from adapter_twin.workload.models import model_config
from adapter_twin.workload.trace import generate, generators
from adapter_twin.workload.traffic import Workload

CAMPAIGNS = sorted((datasets.REPOSITORY / "experiments" / "campaigns").glob("*.yaml"))
RUN = {
    "served_adapters": 4,
    "adapter_slots": 2,
    "rates": [2, 1],
    "ranks": [8],
    "max_lora_rank": 8,
}
LOGGED = {name: value for name, value in RUN.items() if name != "rates"} | {
    "request_log": "log.csv"
}
CONTENT = {
    "name": "test",
    "model": "model",
    "adapters": "adapters",
    "engine": {"max_num_seqs": 32, "max_model_len": 1024},
    "budget_s": 1000,
    "micro": {
        "engines": [{"max_loras": 2, "max_lora_rank": 8}, {"max_loras": 4, "max_lora_rank": 8}],
        "plan": {
            "running": [1],
            "context_tokens": [16],
            "adapters": [0, 1],
            "ranks": [8],
            "chunk_tokens": [],
        },
    },
    "serving": {
        "duration_s": 10,
        "lengths": {"distribution": "fixed", "mean_input_tokens": 8, "mean_output_tokens": 4},
        "runs": [
            {**RUN, "repeats": 2},
            {**RUN, "adapter_slots": 3},
            {**RUN, "rates": [0.00001, 3], "held_out": True},
        ],
    },
}
PIECES = ["micro-00", "micro-01", "run-000-0", "run-000-1", "run-001-0", "run-002-0"]


def write(folder: Path, changes: dict[str, object] | None = None) -> Path:
    """Write a campaign with a model and adapters that nobody will load; dots in keys nest."""
    (folder / "model").mkdir(exist_ok=True)
    config = model_config("tiny") | {"vocab_size": 100}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    for index in range(6):
        adapter = folder / "adapters" / f"adapter-{index}"
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
        (adapter / "adapter_model.safetensors").touch()
    content = json.loads(json.dumps(CONTENT))
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        place = content
        for key in parents:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    file = folder / "campaign.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


class Engine:
    """Stands for the real engine: writes down what it is asked, and fails as told."""

    def __init__(self) -> None:
        self.profiled: list[int] = []
        self.starts: list[int] = []
        self.served: list[int] = []
        self.die_in: set[int] = set()
        self.interrupt_in: int | None = None
        self.refuse, self.doubt = False, None
        self.step_ms = 1.0

    def profile(self, model, adapters, flags, plan, seed) -> dict[str, pd.DataFrame]:
        self.profiled.append(flags.max_loras)
        assert flags.max_cpu_loras == len(adapters) >= flags.max_loras + 1
        start = dict.fromkeys(("weights_gib", "startup_s", "capture_s"), 1.0)
        start |= {"adapter_slots": flags.max_loras, "max_lora_rank": flags.max_lora_rank}
        start |= {"kv_cache_tokens": 1600, "block_size": 16, "server_failure": None}
        start |= {"gpu_memory_utilization": 0.9, "cpu_kv_cache_gib": 1.0}
        start |= {"max_num_batched_tokens": 512, "max_num_seqs": 32, "max_model_len": 1024}
        steps, loads = (
            list(CAMPAIGN_TABLES[table].columns) for table in ("micro_steps", "adapter_loads")
        )
        row = dict.fromkeys(steps + loads, 1) | {"max_lora_rank": 8, "rank": 8, "source": "disk"}
        row |= {"step_ms": self.step_ms}
        frame = pd.DataFrame([row, row])
        if self.refuse:
            start |= {"server_failure": "no memory", "kv_cache_tokens": None}
            frame = frame.head(0)
        tables = {"micro_steps": frame[steps], "adapter_loads": frame[loads]}
        return {"engine_starts": pd.DataFrame([start]), **tables}

    def server(self, model, adapters, flags, port, log):
        """Return a context manager like `adapter_twin.measure.vllm_server.Server`."""
        engine = self

        class Server:
            base_url, model_name, model_folder = "http://test", "model", model

            def __enter__(self):
                engine.starts.append(flags.max_loras)
                if engine.refuse:
                    raise AdapterTwinError("server: died (exit status 1): no memory")
                self.adapters, self.dead = adapters, False
                engine.running = self
                return self

            def __exit__(self, *_):
                engine.running = None

            def failure(self):
                return "server: died (signal SIGKILL)" if self.dead else None

        return Server()

    def measure(self, server, trace, duration_s, seed):
        if len(self.served) == self.interrupt_in:
            raise KeyboardInterrupt
        assert self.running is not None
        assert list(server.adapters) == [f"adapter-{i}" for i in range(4)]
        self.served.append(seed)
        died = seed in self.die_in
        self.running.dead = died
        self.die_in.discard(seed)
        requests = trace.to_frame().rename(columns={"arrival_s": "scheduled_s"})
        times = {f"{name}_s": requests["scheduled_s"] for name in ("sent", "first_token", "end")}
        counts = {f"reported_{name}_tokens": 4 for name in ("prompt", "output")}
        gaps = {"itl_ms": [np.ones(3, np.float32)] * len(requests), "error": None}
        requests = requests.assign(request=range(len(requests)), **times, **counts, **gaps)
        series = pd.DataFrame({"t_s": [0.0, 1.0], "kv_usage": 0.5, "preempted_total": 0.0})
        for name in ("running", "waiting", "prompt_tokens_total", "generated_tokens_total"):
            series[name] = 1.0
        row = {"total_throughput": 12.0}
        failure = "server: stopped answering" if died else None
        schedule = ScheduleError(0.0, 0.0, 0.0)
        return ServedRun(requests, schedule, duration_s, failure, row, series, self.doubt)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    fake = Engine()
    monkeypatch.setattr(runner, "require_engine", lambda: None)
    monkeypatch.setattr(runner, "profile_engine", fake.profile)
    monkeypatch.setattr(runner, "Server", fake.server)
    monkeypatch.setattr(runner, "measure_run", fake.measure)
    memory = {"kv_cache_tokens": 1600, "block_size": 16}
    monkeypatch.setattr(runner, "kv_cache", lambda base_url: memory)
    return fake


@pytest.mark.parametrize("file", CAMPAIGNS, ids=lambda path: path.stem)
def test_committed_campaigns_can_be_read(file: Path) -> None:
    campaign = load_campaign(file)
    assert campaign.name == file.stem
    assert campaign.micro is not None


def test_the_recorded_campaign_has_enough_runs_and_ends_within_the_budget() -> None:
    campaign = load_campaign(datasets.REPOSITORY / "experiments" / "campaigns" / "cpu-small.yaml")
    assert campaign.serving is not None
    assert campaign.serving.duration_s >= 60
    runs = campaign.serving.runs
    assert sum(run.repeats for run in runs) >= 30
    assert sum(run.held_out for run in runs) >= 8
    assert campaign.budget_s <= 5400
    serving_s = sum(run.repeats for run in runs) * (campaign.serving.duration_s + 5)
    assert serving_s < campaign.budget_s


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modell": 1}, "modell: unknown key; did you mean 'model'?"),
        ({"model": "tinny"}, "model: 'tinny' is neither a folder nor a shape; did you mean 'tiny'"),
        ({"model": "adapters"}, "config.json: No such file"),
        ({"adapters": "nowhere"}, "is no folder"),
        ({"budget_s": 0}, "budget_s: must be above 0"),
        ({"engine.max_num_sequences": 8}, "engine.max_num_sequences: unknown key; did you mean"),
        ({"engine.max_loras": 8}, "engine.max_loras: give it per engine or run"),
        ({"engine": 8}, "engine: expected a mapping"),
        ({"micro": None, "serving": None}, "micro: nothing to measure"),
        ({"micro.engines": []}, "micro.engines: must not be empty"),
        ({"micro.engines.0.max_loras": "two"}, "micro.engines[0].max_loras: expected a whole"),
        (
            {"micro.engines.0.max_lora_rank": 12},
            "micro.engines[0].max_lora_rank: vLLM takes one of",
        ),
        ({"micro.plan.running": []}, "micro.plan.running: must not be empty"),
        ({"serving.lengths.mean_input_tokens": 0}, "serving.lengths.mean_input_tokens: must be"),
        ({"serving.lengths.mean_input_tokens": 1021}, "1025 tokens exceeds engine.max_model_len"),
        ({"serving.runs.0.adapter_slots": 5}, "serving.runs[0].adapter_slots: 5 exceed served"),
        ({"serving.runs.1.ranks": [8, 16]}, "serving.runs[1].ranks: 16 exceeds max_lora_rank"),
        ({"serving.runs.1.max_lora_rank": 12}, "serving.runs[1].max_lora_rank: vLLM takes one of"),
        ({"serving.runs.2.rates": []}, "serving.runs[2].rates: must not be empty"),
        ({"serving.runs.2.rates": None}, "serving.runs[2].rates: missing"),
        ({"serving.lengths": None}, "serving.lengths: missing"),
        ({"serving.runs": [LOGGED]}, "serving.lengths: the request_log tells; leave it out"),
        ({"serving.runs.2.rates": [0.0]}, "serving.runs[2].rates: not one request"),
        ({"serving.runs.2.heldout": True}, "serving.runs[2].heldout: unknown key; did you mean"),
    ],
)
def test_a_wrong_campaign_is_refused_in_one_line_that_names_the_key(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterTwinError) as caught:
        load_campaign(write(tmp_path, change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_serves_the_requests_that_the_twin_draws_from_its_seed(tmp_path: Path) -> None:
    lengths = {"distribution": "lognormal", "mean_input_tokens": 223, "mean_output_tokens": 198}
    run = {**RUN, "served_adapters": 8, "adapter_slots": 8, "rates": [0.5, 3]}
    changes = {"serving.lengths": lengths, "serving.runs": [run], "seed": 3}
    campaign = load_campaign(write(tmp_path, {"engine.max_model_len": 8192, **changes}))
    assert campaign.serving is not None
    (piece,) = (each for each in campaign.pieces() if isinstance(each, ServingPiece))
    sent = piece.trace()
    workload = Workload(
        adapters=deal_adapters(8, [0.5, 3], [8]),
        duration_s=10,
        lengths=campaign.serving.lengths,
    )
    calibration = load_calibration("auto", "llama-3.1-8b-instruct")
    engine = EngineConfig(
        model="llama-3.1-8b-instruct", max_loras=8, max_cpu_loras=8, max_lora_rank=16
    )
    drawn = simulate(workload, engine, calibration, seed=piece.seed).records
    for column in ("arrival_s", "adapter", "prompt_tokens"):
        np.testing.assert_array_equal(getattr(sent, column), getattr(drawn, column))


LOG = {
    "arrival_s": [0.1, 0.2, 0.9, 1.4, 1.5, 60.0],
    "adapter": ["adapter-1", "", "adapter-3", "adapter-1", "adapter-0", "adapter-2"],
    "prompt_tokens": [5, 9, 12, 7, 30, 8],
    "output_tokens": [2, 3, 1, 5, 4, 6],
}


def write_logged(folder: Path, log: pd.DataFrame, **changes: object) -> Path:
    """Write a campaign of one run that replays a log, for 2 s."""
    log.to_csv(folder / "log.csv", index=False)
    serving = {"duration_s": 2, "runs": [{**LOGGED, **changes}]}
    return write(folder, {"micro": None, "serving": serving})


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_a_run_replays_a_log_through_the_client_and_so_does_its_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "require_engine", lambda: None)
    memory = {"kv_cache_tokens": 1600, "block_size": 16}
    monkeypatch.setattr(runner, "kv_cache", lambda base_url: memory)
    runner.run_campaign(write_logged(tmp_path, pd.DataFrame(LOG)), tmp_path / "out")
    sent = pd.read_parquet(tmp_path / "out" / "requests.parquet")
    assert sent["scheduled_s"].tolist() == LOG["arrival_s"][:5]
    assert sent["adapter"].tolist() == [1, -1, 3, 1, 0]
    for column in ("prompt_tokens", "output_tokens"):
        assert sent[column].tolist() == LOG[column][:5]
    assert (sent["sent_s"] - sent["scheduled_s"]).abs().max() < 0.5
    (row,) = pd.read_parquet(tmp_path / "out" / "runs.parquet").to_dict("records")
    assert row["rates_per_adapter"] == "0.5-1-0-0.5"
    assert row["offered_request_rate"] == 2.5
    assert row["mean_input_tokens"] == pytest.approx(63 / 5)
    told = row | {"model": "llama-3.1-8b-instruct", "max_lora_rank": 16}
    laws = load_calibration("auto", told["model"])
    twin = simulate_run(told, laws).records
    np.testing.assert_array_equal(twin.arrival_s, sent["scheduled_s"])
    for column in ("adapter", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(twin, column), sent[column])
    (tmp_path / "log.csv").unlink()
    with pytest.raises(AdapterTwinError, match=r"^[^\n]*log\.csv[^\n]*$"):
        simulate_run(told, laws)


@pytest.mark.filterwarnings("ignore:.*names no adapters")
def test_a_log_without_adapters_is_dealt_alike_for_client_and_twin(tmp_path: Path) -> None:
    n = 2000
    log = pd.DataFrame({"arrival_s": np.linspace(0, 1.9, n), "prompt_tokens": 5})
    file = write_logged(tmp_path, log.assign(output_tokens=3), rates=[3, 1])
    (piece,) = load_campaign(file).pieces()
    sent = piece.trace()
    row = piece.columns() | {"duration_s": 2, "model": "llama-3.1-8b-instruct"}
    _, workload = run_to_workload(row | {"max_lora_rank": 16})
    drawn = generate(workload, generators(piece.seed)[0])
    np.testing.assert_array_equal(sent.adapter, drawn.adapter)
    shares = np.bincount(sent.adapter, minlength=4) / n
    assert shares == pytest.approx([3 / 8, 1 / 8, 3 / 8, 1 / 8], abs=0.05)
    assert sum(a.request_rate for a in workload.adapters) == pytest.approx(n / 2)


@pytest.mark.parametrize(
    ("log", "changes", "message"),
    [
        ({}, {"rates": [1]}, "rates: the request_log tells; leave them out"),
        ({"arrival_s": 5}, {}, "request_log: not one request falls into the window"),
        ({"adapter": "9"}, {}, "adapter"),
        ({"output_tokens": 2000}, {}, "request_log: a request of 2030 tokens exceeds"),
        ({"session_id": "a", "think_s": 1.0}, {}, "request_log: the client waits for no answers"),
        ({}, {"request_log": "none.csv"}, "none.csv"),
        ({}, {"request_log": 5}, "request_log: expected"),
    ],
)
def test_a_log_that_cannot_be_replayed_is_refused_in_one_line(
    tmp_path: Path, log: dict[str, object], changes: dict[str, object], message: str
) -> None:
    table = pd.DataFrame(LOG).assign(**log)
    with pytest.raises(AdapterTwinError, match=message) as caught:
        load_campaign(write_logged(tmp_path, table, **changes))
    assert "\n" not in str(caught.value)


def shuffled(campaign: Campaign) -> list[list[str]]:
    """Return the names of the pieces by engine, in the order in which they are measured."""
    return [[one.piece_id for one in group] for group in groups(campaign.pieces(), campaign.seed)]


def test_runs_with_the_same_flags_share_a_server_and_engines_start_in_random_order(
    tmp_path: Path,
) -> None:
    campaign = load_campaign(write(tmp_path))
    order = shuffled(campaign)
    assert sorted(name for group in order for name in group) == PIECES
    assert {"run-000-0", "run-000-1", "run-002-0"} in map(set, order)
    assert order == shuffled(campaign)
    others = (load_campaign(write(tmp_path, {"seed": seed})) for seed in range(1, 5))
    assert any(shuffled(other) != order for other in others)


def test_a_campaign_leaves_tables_that_meet_their_schemas(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, out = write(tmp_path), tmp_path / "out"
    with caplog.at_level(logging.INFO):
        summary = runner.run_campaign(file, out)
    assert (summary.complete, summary.pieces, summary.stopped) == (6, 6, None)
    assert summary.failed == {}
    assert sorted(engine.profiled) == [2, 4]
    assert sorted(engine.starts) == [2, 3]
    tables = datasets.read_campaign(out)
    assert list(tables) == list(CAMPAIGN_TABLES)
    for name, schema in CAMPAIGN_TABLES.items():
        table = tables[name]
        assert len(table) == summary.rows[name]
        assert list(table.columns)[: len(schema.columns)] == list(schema.columns)
    runs = pd.read_parquet(out / "runs.parquet").set_index("run_id")
    held_out = runs.loc["test/run-002-0"]
    assert held_out["held_out"]
    assert held_out["rates_per_adapter"] == "0.00001-3"
    assert held_out["offered_request_rate"] == pytest.approx(6.00002)
    assert (held_out["seed"], held_out["kv_cache_tokens"], held_out["block_size"]) == (2, 1600, 16)
    requests = pd.read_parquet(out / "requests.parquet")
    twice = [requests[requests["run_id"] == f"test/run-000-{repeat}"] for repeat in (0, 1)]
    pd.testing.assert_series_equal(*(each["scheduled_s"].reset_index(drop=True) for each in twice))
    assert yaml.safe_load((out / "campaign.yaml").read_text()) == yaml.safe_load(file.read_text())
    machine = json.loads((out / "machine.json").read_text())
    assert machine["cores"] == os.cpu_count()
    assert sum("micro-00: measured" in line for line in caplog.messages) == 1


def test_a_doubtful_run_is_told_and_its_server_serves_no_other(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine.doubt = "the client\nwas late"
    with caplog.at_level(logging.INFO):
        summary = runner.run_campaign(write(tmp_path, {"micro": None}), tmp_path / "out")
    assert any("run-001-0: doubtful (the client was late)" in line for line in caplog.messages)
    assert summary.failed == {}
    assert set(summary.doubtful.values()) == {"the client was late"}
    assert len(engine.starts) == len(engine.served) == 4
    runs = datasets.read_campaign(tmp_path / "out")["runs"]
    assert set(runs["status"]) == {"doubtful:the client was late"}


def test_a_micro_profile_that_breaks_its_schema_is_a_failed_start_and_stops_nothing(
    engine: Engine, tmp_path: Path
) -> None:
    engine.step_ms = -1.0
    out = tmp_path / "out"
    for _ in range(2):  # nor the next call
        summary = runner.run_campaign(write(tmp_path, {"serving": None}), out)
    assert summary.complete == summary.pieces == len(engine.profiled) == 2
    assert "step_ms in row 0 is -1.0: must be above 0" in summary.failed["micro-00"]
    tables = datasets.read_campaign(out)
    assert list(tables) == ["engine_starts"]
    assert tables["engine_starts"]["server_failure"].str.contains("step_ms").all()
    assert tables["engine_starts"]["kv_cache_tokens"].isna().all()


def test_an_interrupted_campaign_keeps_its_tables_and_repeats_nothing(
    engine: Engine, tmp_path: Path
) -> None:
    file, out = write(tmp_path), tmp_path / "out"
    engine.interrupt_in = 2
    with pytest.raises(KeyboardInterrupt):
        runner.run_campaign(file, out)
    assert len(pd.read_parquet(out / "runs.parquet")) == 2
    assert engine.running is None
    # a kill in the middle of writing a piece
    (out / "pieces" / ".run-001-0.tmp").mkdir()
    (out / "pieces" / ".run-001-0.tmp" / "runs.parquet").write_bytes(b"PAR1")
    engine.interrupt_in = None
    summary = runner.run_campaign(file, out)
    assert summary.complete == 6
    assert sorted(engine.profiled) == [2, 4]
    assert len(engine.served) == 4
    runner.run_campaign(file, out)
    assert len(engine.served) == 4
    runner.run_campaign(file, tmp_path / "at once")
    for name in CAMPAIGN_TABLES:
        pd.testing.assert_frame_equal(
            pd.read_parquet(out / f"{name}.parquet"),
            pd.read_parquet(tmp_path / "at once" / f"{name}.parquet"),
        )


def test_a_folder_without_a_campaign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError, match="holds no campaign's tables"):
        datasets.read_campaign(tmp_path)


def test_two_campaigns_are_not_mixed_in_a_folder(engine: Engine, tmp_path: Path) -> None:
    file, out = write(tmp_path, {"micro": None}), tmp_path / "out"
    runner.run_campaign(file, out)
    runner.run_campaign(write(tmp_path, {"micro": None, "budget_s": 2000}), out)
    other = write(tmp_path, {"micro": None, "serving.duration_s": 11})
    with pytest.raises(AdapterTwinError, match="holds another campaign than"):
        runner.run_campaign(other, out)


def test_a_folder_is_not_continued_on_another_machine(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = write(tmp_path, {"micro": None}), tmp_path / "out"
    for device in ("CPU A", "CPU B"):
        machine = {"device": device, "vllm": "0.32.0"}
        monkeypatch.setattr(runner, "describe_machine", lambda flags, machine=machine: machine)
        if device == "CPU A":
            runner.run_campaign(file, out)
    with pytest.raises(AdapterTwinError, match="was measured with device CPU A, this is CPU B"):
        runner.run_campaign(file, out)


def test_a_campaign_stops_before_a_piece_that_does_not_fit_in_its_budget(
    engine: Engine, tmp_path: Path
) -> None:
    start_s = runner.UNMEASURED_S["start"]
    out = tmp_path / "out"
    summary = runner.run_campaign(write(tmp_path, {"micro": None, "budget_s": start_s + 14}), out)
    assert (summary.complete, engine.starts) == (0, [])
    assert summary.stopped is not None
    assert "run it again to go on" in summary.stopped
    assert "runs" not in summary.rows
    # room for the first server's start; the second one's is known by then
    enough = write(tmp_path, {"micro": None, "budget_s": start_s + 16})
    assert runner.run_campaign(enough, out).complete == 4


def test_a_refused_start_is_a_row_with_its_reason(engine: Engine, tmp_path: Path) -> None:
    engine.refuse = True
    out = tmp_path / "out"
    summary = runner.run_campaign(write(tmp_path), out)
    assert summary.failed["micro-00"] == "no memory"
    assert sorted(summary.failed) == PIECES
    runs = datasets.read_table(out / "runs.parquet", CAMPAIGN_TABLES["runs"])
    assert set(runs["status"]) == {"failed:server: died (exit status 1): no memory"}
    starts = datasets.read_table(out / "engine_starts.parquet", CAMPAIGN_TABLES["engine_starts"])
    assert set(starts["server_failure"]) == {"no memory"}
    assert starts["kv_cache_tokens"].isna().all()
    assert sorted(engine.starts) == [2, 3]


def test_after_a_server_that_died_half_way_the_next_run_gets_a_new_one(
    engine: Engine, tmp_path: Path
) -> None:
    engine.die_in = {2}
    out = tmp_path / "out"
    summary = runner.run_campaign(write(tmp_path, {"micro": None}), out)
    assert summary.failed == {"run-002-0": "server: died (signal SIGKILL)"}
    runs = pd.read_parquet(out / "runs.parquet").set_index("run_id")["status"]
    assert runs.pop("test/run-002-0") == "failed:server: died (signal SIGKILL)"
    assert set(runs) == {"ok"}
    requests = pd.read_parquet(out / "requests.parquet")
    assert (requests["run_id"] == "test/run-002-0").any()
    shared = next(group for group in shuffled(load_campaign(write(tmp_path))) if len(group) == 3)
    is_last = shared[-1] == "run-002-0"
    assert engine.starts.count(2) == (1 if is_last else 2)


def test_too_few_adapters_of_ones_own_are_a_failed_run(engine: Engine, tmp_path: Path) -> None:
    run = {**RUN, "served_adapters": 7}
    file = write(tmp_path, {"micro": None, "serving.runs": [run]})
    summary = runner.run_campaign(file, tmp_path / "out")
    assert "7 of rank 8 are needed" in summary.failed["run-000-0"]


def test_the_machine_is_named_after_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 575.57.08'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    machine = describe_machine(EngineFlags(max_loras=0, max_lora_rank=8, max_cpu_loras=0))
    assert machine["device"] == "NVIDIA H100 80GB HBM3"
    assert machine["gpus"][0]["driver_version"] == "575.57.08"
    tool.write_text("#!/bin/sh\necho 'no devices were found'; exit 6\n")
    assert (
        describe_machine(EngineFlags(max_loras=0, max_lora_rank=8, max_cpu_loras=0))["gpus"] == []
    )


def command_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["profile", *arguments])
    return (exit_.value.code, *capsys.readouterr())


def test_the_verb_prints_what_is_there(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.die_in = {2}
    arguments = (str(write(tmp_path)), "--out", str(tmp_path / "out"))
    status, out, err = command_line(capsys, *arguments)
    assert status == 0
    assert "run-002-0 failed: server: died" in out
    assert "6 of 6 pieces; rows: runs 4" in out
    assert "6/6 " in err
    status, out, err = command_line(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["rows"]["runs"] == 4


def test_an_interrupted_verb_says_so_in_one_line(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.interrupt_in = 0
    out = tmp_path / "out"
    status, _, err = command_line(capsys, str(write(tmp_path)), "--out", str(out))
    assert status == 130
    assert err.splitlines()[-1] == "error: interrupted"
    assert (out / "machine.json").is_file()


@pytest.mark.parametrize("has_environment", [False, True])
def test_a_missing_engine_is_one_line_that_says_where_to_get_it(
    has_environment: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("adapter_twin.measure.engine_flags.engine_version", lambda: None)
    monkeypatch.chdir(tmp_path)
    if has_environment:
        (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
        (tmp_path / ".venv-vllm" / "bin" / "python").touch()
    status, out, err = command_line(capsys, str(write(tmp_path)), "--out", str(tmp_path / "out"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    remedy = "use .venv-vllm/bin/python" if has_environment else "make setup-vllm"
    assert remedy in err
    assert not (tmp_path / "out").exists()


class AdapterWatch(threading.Thread):
    """Reads from the server that a campaign starts which adapters ran together.

    vLLM keeps a label set for every combination that it saw, so the last page tells all of them.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.page, self.ended = os.fsencode(out), "", threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            for port in filter(None, map(self.port, Path("/proc").glob("[0-9]*/cmdline"))):
                url = f"http://127.0.0.1:{port}/metrics/?name[]=vllm:lora_requests_info"
                with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
                    self.page = answer.read().decode()

    def port(self, command: Path) -> str | None:
        with suppress(OSError):
            words = command.read_bytes().split(b"\0")
            if b"serve" in words and any(self.out in word for word in words):
                return words[words.index(b"--port") + 1].decode()
        return None

    def combinations(self) -> list[set[str]]:
        listed = re.findall(r'running_lora_adapters="([^"]*)"', self.page)
        return [set(names.split(",")) - {""} for names in listed]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AdapterWatch]:
    """Run the smoke campaign on the real engine, from the command line, and watch its server."""
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed (make setup-vllm)")
    out = tmp_path_factory.mktemp("campaign") / "smoke"
    campaign = datasets.REPOSITORY / "experiments" / "campaigns" / "smoke.yaml"
    command = [sys.executable, "-m", "adapter_twin", "profile", str(campaign), "--out", str(out)]
    watch = AdapterWatch(out)
    watch.start()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=900)
    watch.ended.set()
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["failed"], summary["stopped"]) == ({}, None)
    return out, watch


@pytest.fixture
def smoke(watched: tuple[Path, AdapterWatch]) -> Path:
    return watched[0]


@pytest.mark.live
def test_live_the_server_got_the_requests_of_the_trace_and_served_every_token(smoke: Path) -> None:
    campaign = load_campaign(smoke / "campaign.yaml")
    requests = datasets.read_table(smoke / "requests.parquet", CAMPAIGN_TABLES["requests"])
    runs = pd.read_parquet(smoke / "runs.parquet").set_index("run_id")
    for piece in campaign.pieces():
        if not isinstance(piece, ServingPiece):
            continue
        run_id, trace = piece.run_id, piece.trace()
        sent = requests[requests["run_id"] == run_id]
        assert np.bincount(sent["adapter"]).tolist() == np.bincount(trace.adapter).tolist()
        np.testing.assert_array_equal(sent["output_tokens"], trace.output_tokens)
        done = sent[sent["end_s"].notna()]
        assert len(done) == runs.loc[run_id, "completed_requests"] > 0
        for kind in ("prompt_tokens", "output_tokens"):
            np.testing.assert_array_equal(done[kind], done[f"reported_{kind}"])
        assert sent["error"].isna().all()
        assert runs.loc[run_id, "status"] == "ok"
        assert runs.loc[run_id, "total_throughput"] > 0


@pytest.mark.live
def test_live_no_step_has_more_adapters_than_slots_or_more_tokens_than_its_budget(
    smoke: Path,
) -> None:
    steps = datasets.read_table(smoke / "micro_steps.parquet", CAMPAIGN_TABLES["micro_steps"])
    assert (steps["distinct_adapters"] <= steps["adapter_slots"]).all()
    assert set(steps["distinct_adapters"]) >= {0, 1, 2}
    assert (steps["batched_tokens"] == steps["decodes"] + steps["prefill_tokens"]).all()
    assert (steps["batched_tokens"] <= 512).all()
    assert steps["waiting"].max() > 0
    loads = datasets.read_table(smoke / "adapter_loads.parquet", CAMPAIGN_TABLES["adapter_loads"])
    assert set(loads["source"]) == {"disk", "memory"}


@pytest.mark.live
def test_live_the_server_never_runs_more_adapters_than_slots(
    watched: tuple[Path, AdapterWatch],
) -> None:
    together = watched[1].combinations()
    assert set.union(*together) == {f"adapter-{i}" for i in range(4)}
    assert max(map(len, together)) == 2


@pytest.mark.live
def test_live_what_was_measured_can_be_calibrated_and_predicted(smoke: Path) -> None:
    calibration = calibrate_tables(smoke)
    runs = datasets.read_measured_runs(smoke / "runs.parquet")
    predicted = predict(runs, calibration)
    assert calibration.model == "tiny"
    assert np.allclose(predicted["total_throughput"], runs["total_throughput"], rtol=0.5)


@pytest.mark.live
def test_live_no_process_of_the_engine_is_left(smoke: Path) -> None:
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in commands if os.fsencode(smoke) in line]
