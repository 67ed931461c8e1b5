"""Studies: what is recommended is run beside its rivals, and judged by what was measured."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.slots import layer_slots_bytes
from adapter_twin.learn import slots_tree
from adapter_twin.measure import run_campaign as campaign_runner
from adapter_twin.measure.campaign import load_campaign
from adapter_twin.measure.client import ScheduleError
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure.serving import ServedRun
from adapter_twin.plan.candidates import candidate_slots
from adapter_twin.plan.demand import Demand, load_demand
from adapter_twin.plan.grid import simulate_quietly
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.prove import comparison, outcome, rivals
from adapter_twin.prove import run_study as runner
from adapter_twin.prove.outcome import read_outcome, service
from adapter_twin.prove.rivals import METHODS, Study, load_study, plain
from adapter_twin.tables import datasets
from adapter_twin.twin.records import Records
from adapter_twin.workload.adapters import zipf_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.models import model_config, model_shape
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.traffic import Lengths
from study.ch15_proof import bars, by_popularity, pairs, per_adapter, waits
from study.figures import proofs

CALIBRATION = load_calibration("auto", "small")
MACHINE = {
    "device": CALIBRATION.provenance["source"]["machine"],
    "vllm": f"{CALIBRATION.memory.version}+cpu",
}
WORKLOAD: dict[str, Any] = {
    "model": "small",
    "adapters": {"count": 12, "total_request_rate": 3, "zipf_exponent": 1, "ranks": [8, 16]},
    "lengths": {
        "distribution": "lognormal",
        "mean_input_tokens": 64,
        "mean_output_tokens": 32,
        "cv": 0.6,
    },
    "slo": {"ttft_ms": 1000, "itl_ms": 100, "percentile": 90},
    "engine": {"max_num_seqs": 64, "max_num_batched_tokens": 512, "block_size": 128},
}
HOPELESS = {"count": 12, "request_rates": [20], "ranks": [32]}

pytestmark = pytest.mark.filterwarnings("ignore:.*extrapolation")


def write(folder: Path, **changes: Any) -> Path:
    """Write a study of two workloads, the second of which nothing can serve."""
    for name, own in (("light", {}), ("hopeless", {"adapters": HOPELESS})):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(WORKLOAD | own))
    content = {
        "name": "test",
        "workloads": ["light.yaml", "hopeless.yaml"],
        "duration_s": 20,
        "repeats": 2,
        "budget_s": 1000,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in (content | changes).items() if v is not None}))
    return file


class TwinAsEngine:
    """Serves what it is sent exactly as the twin would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started, self.slow = folder, [], 1.0
        self.laws = warmed_up(CALIBRATION)

    def server(self, model: Path, adapters: dict[str, Path], flags: EngineFlags, port: int, log):
        engine, self.now = self, (flags, adapters)
        self.started.append((len(adapters), flags.max_loras))

        class Server:
            base_url, model_name, model_folder = "http://test", "small", model

            def __enter__(self):
                self.adapters = adapters
                if engine.refuses(flags):
                    raise AdapterTwinError("server: died (exit status 1): no memory")
                return self

            def __exit__(self, *_):
                pass

            def failure(self):
                return None

        return Server()

    def refuses(self, flags: EngineFlags) -> bool:
        return False

    def measure(self, server, trace, duration_s, seed):
        flags, _ = self.now
        hopeless = len(trace) > 1000
        demand = load_demand(self.folder / f"{'hopeless' if hopeless else 'light'}.yaml")
        engine, workload = demand.engine_with(flags.max_loras), demand.workload(duration_s)
        records = simulate_quietly(workload, engine, self.laws, seed, trace).records
        return ServedRun(
            row={"total_throughput": 1.0, "duration_s": duration_s},
            requests=as_requests(records, self.slow),
            series=pd.DataFrame(),
            schedule=ScheduleError(0.0, 0.0, 0.0),
            ended_s=duration_s,
            failure=None,
        )


def as_requests(records: Records, slow: float) -> pd.DataFrame:
    """Return what a client writes down, times to first token stretched."""
    first = records.arrival_s + slow * (records.first_token_s - records.arrival_s)
    done = np.isfinite(records.end_s)
    return pd.DataFrame(
        {
            "request": range(len(records.arrival_s)),
            "adapter": records.adapter,
            "prompt_tokens": records.prompt_tokens,
            "output_tokens": records.output_tokens,
            "reported_prompt_tokens": np.where(done, records.prompt_tokens, np.nan),
            "reported_output_tokens": np.where(done, records.output_tokens, np.nan),
            "scheduled_s": records.arrival_s,
            "sent_s": records.arrival_s,
            "first_token_s": first,
            "end_s": records.end_s + (first - records.first_token_s),
            "error": None,
        }
    )


def install_twin(monkeypatch: pytest.MonkeyPatch, folder: Path) -> TwinAsEngine:
    """Let the twin serve a study whose workloads are in a folder."""
    fake = TwinAsEngine(folder)
    monkeypatch.setattr(runner, "require_engine", lambda: None)
    monkeypatch.setattr(runner, "is_cpu_build", lambda: True)
    monkeypatch.setattr(runner, "describe_machine", lambda flags: MACHINE)
    monkeypatch.setattr(campaign_runner, "Server", fake.server)
    monkeypatch.setattr(campaign_runner, "measure_run", fake.measure)
    monkeypatch.setattr(campaign_runner, "write_model", lambda shape, folder: folder)
    monkeypatch.setattr(campaign_runner, "write_adapters", lambda model, folder, ranks: list(ranks))
    memory = {"kv_cache_tokens": 131072, "block_size": 128}
    monkeypatch.setattr(campaign_runner, "kv_cache", lambda base_url: memory)
    return fake


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TwinAsEngine:
    return install_twin(monkeypatch, tmp_path)


Started = list[tuple[int, int]]


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Started]:
    """Run the study on the twin; return its folder and the servers that were started."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        fake = install_twin(patch, folder)
        runner.run_study(write(folder), "cpu", folder / "out")
    return folder, fake.started


@pytest.fixture
def done(run_once: tuple[Path, Started], tmp_path: Path) -> Path:
    """Return a copy of the folder of a study that was run, its file beside it."""
    shutil.copytree(run_once[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workloads": []}, "workloads: must not be empty"),
        ({"workloads": ["light.yaml", "light.yaml"]}, "workloads: their file names must differ"),
        ({"methods": ["twins"]}, "methods[0]: got 'twins'; did you mean 'twin'?"),
        ({"methods": ["G = 8"]}, "methods: add twin"),
        ({"repeats": 0}, "repeats: must be at least 1"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"name": ""}, "name: must not be empty"),
        ({"workload": "light.yaml"}, "workload: unknown key; did you mean 'workloads'?"),
    ],
)
def test_a_study_file_is_strict(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError) as caught:
        load_study(write(tmp_path, **changes))
    assert message in str(caught.value)


def test_a_study_is_of_one_model(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    (tmp_path / "hopeless.yaml").write_text(yaml.safe_dump(WORKLOAD | {"model": "tiny"}))
    with pytest.raises(AdapterTwinError, match="all must name one model, not small, tiny"):
        study.demands()


def test_a_model_without_a_shape_needs_its_folder(tmp_path: Path) -> None:
    file = write(tmp_path)
    for name in ("light", "hopeless"):
        content = WORKLOAD | {"model": "llama-3.1-8b-instruct"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(AdapterTwinError, match="give a study's model_folder"):
        load_study(file).demands()
    study = load_study(write(tmp_path, model_folder="model"))
    assert study.model_folder == str(tmp_path / "model")
    assert study.asked()["model_folder"] == "model"


def test_a_workload_alone_is_a_study_of_one(tmp_path: Path) -> None:
    write(tmp_path)
    study = load_study(tmp_path / "light.yaml")
    assert study == Study(name="light", workloads=(str(tmp_path / "light.yaml"),))
    assert study.demands()["light"] == load_demand(tmp_path / "light.yaml")


def test_what_a_study_asks_names_no_place_on_this_machine(tmp_path: Path) -> None:
    asked = load_study(write(tmp_path, campaign="campaign.yaml")).asked()
    assert str(tmp_path) not in yaml.safe_dump(asked)
    assert asked["campaign"] == "campaign.yaml"
    demand = load_demand(tmp_path / "light.yaml")
    told = plain(replace(demand, calibration=str(tmp_path / "own.json")))
    assert told["calibration"] == "own.json"


def demand(**changes: Any) -> Demand:
    adapters = zipf_adapters(12, 3, 1, [8, 16])
    lengths = Lengths(**WORKLOAD["lengths"])
    return Demand(**({"model": "small", "adapters": adapters, "lengths": lengths} | changes))


def small_engine(slots: int, rank: int) -> EngineConfig:
    return EngineConfig(model="small", max_loras=slots, max_lora_rank=rank, block_size=128)


def test_rules_of_thumb_are_what_operators_use() -> None:
    shape = model_shape("small")
    tokens = 1024 + 16  # the engine keeps a block to itself
    taken = layer_slots_bytes(small_engine(9, 16), shape) + tokens * shape.kv_bytes_per_token()
    memory = MemoryLaw(shape, "0.32.0", taken / 2**30)
    memory.slots_, memory.max_model_len_ = "bytes", 1024
    rules = rivals.rules_of_thumb(demand(), memory)
    assert rules == {"G = N": 12, "G = 8": 8, "G = N/4": 3, "largest that starts": 9}


def test_neighbours_are_the_next_candidates() -> None:
    assert candidate_slots(demand()) == [1, 2, 3, 4, 6, 8, 12]
    assert rivals.neighbours(demand(), 6) == {"fewer slots": 4, "more slots": 8}
    assert rivals.neighbours(demand(), 12) == {"fewer slots": 8}
    assert rivals.neighbours(demand(), 1) == {"more slots": 2}
    assert rivals.neighbours(demand(), None) == {}


def test_a_plan_keeps_the_methods_that_are_asked(tmp_path: Path) -> None:
    write(tmp_path)
    light = load_demand(tmp_path / "light.yaml")
    planned = rivals.plan(light, {"tree": lambda demand: 2}, ["twin", "tree", "G = 8"])
    assert planned["picks"] == {
        "twin": planned["recommended"]["adapter_slots"],
        "tree": 2,
        "G = 8": 8,
    }
    refused = rivals.plan(load_demand(tmp_path / "hopeless.yaml"), {})
    assert refused["picks"]["twin"] is None
    assert "one GPU cannot serve them" in refused["refused"]


def test_every_repeat_runs_every_configuration_once_in_random_order(
    run_once: tuple[Path, Started], done: Path
) -> None:
    runs = pd.read_parquet(done / "runs.parquet")
    planned = json.loads((done / "plan.json").read_text())["workloads"]
    arms = {
        (name, slots)
        for name, plan in planned.items()
        for slots in plan["picks"].values()
        if slots is not None
    }
    for _, own in runs.groupby("repeat"):
        assert set(zip(own.source_path, own.adapter_slots, strict=True)) == arms
        assert len(own) == len(arms)
    started = run_once[1]
    halves = started[: len(arms)], started[len(arms) :]
    assert sorted(halves[0]) == sorted(halves[1])
    assert halves[0] != halves[1]
    assert set(planned["light"]["picks"]) <= set(METHODS)
    assert runs.groupby("repeat").seed.unique().map(list).to_dict() == {0: [0], 1: [1]}


def test_a_run_is_predicted_from_its_configuration_alone(done: Path) -> None:
    table = service(read_outcome(done))
    for figure in ("total_throughput", "median_ttft_ms", "p99_ttft_ms", "slo_attainment"):
        np.testing.assert_allclose(table[figure], table[f"predicted_{figure}"])
    assert (table.serves == table.predicted_serves).all()
    light = table.workload == "light"
    assert table[light].serves.any()
    assert not table[~light].serves.any()
    assert table[~light].starved.all()


def test_a_server_that_keeps_up_is_not_starved_by_the_ends_of_its_window() -> None:
    arrival_s = np.arange(0.0, 40.0, 0.5)
    unknown, whole = np.full(80, np.nan), np.zeros(80, np.int32)
    records = Records(
        arrival_s=arrival_s,
        adapter=whole,
        prompt_tokens=whole + 10,
        output_tokens=whole + 90,
        scheduled_s=unknown,
        first_token_s=arrival_s + 0.1,
        end_s=np.where(arrival_s + 6 < 40, arrival_s + 6, np.nan),
        preemptions=whole,
        load_wait_s=unknown,
        rejected=whole.astype(bool),
        refused=whole.astype(bool),
        cached_tokens=whole - 1,
    )
    slo = Slo(ttft_ms=200, percentile=95)
    told = outcome._figures(records, slo, 40.0)
    assert told["total_throughput"] == pytest.approx(0.85 * 200)
    assert not told["starved"]
    assert told["serves"]
    none = replace(records, end_s=unknown)
    assert np.isnan(outcome._figures(none, slo, 40.0)["mean_itl_ms"])
    half = replace(records, end_s=np.where(np.arange(80) % 2, records.end_s, np.nan))
    assert outcome._figures(half, slo, 40.0)["starved"]


def test_verdicts_are_judged_where_something_was_recommended_and_where_not(done: Path) -> None:
    measured = read_outcome(done)
    runs = service(measured)
    said = comparison.verdicts(runs, measured.picks)
    assert said.right.all()
    assert said[said.workload == "light"].adapter_slots.nunique() == 1
    hopeless = said[said.workload == "hopeless"]
    assert len(hopeless) == (runs.workload == "hopeless").sum()
    assert not hopeless.said.any()
    better = runs.assign(serves=True)
    assert (
        not comparison.verdicts(better, measured.picks).query("workload == 'hopeless'").right.any()
    )


def test_slow_first_tokens_show_in_errors_and_bars(engine: TwinAsEngine, tmp_path: Path) -> None:
    engine.slow = 2.0
    runner.run_study(write(tmp_path), "cpu", tmp_path / "out")
    measured = read_outcome(tmp_path / "out")
    runs = service(measured)
    scored = pairs(runs)
    assert not (scored.workload == "hopeless").any()
    ttft = scored[scored.figure == "median_ttft_ms"]
    np.testing.assert_allclose(ttft.error, -50)
    chosen = comparison.choices(runs, measured.picks)
    told = bars(runs, chosen, comparison.verdicts(runs, measured.picks))
    reached = told.set_index("what").reached
    assert reached["median_ttft_ms MAPE (at most)"] == pytest.approx(50)
    assert reached["recommendation serves (at least)"] == 100
    assert reached["every verdict right (at least)"] == 100


def test_doubtful_runs_tell_nothing_of_a_configuration(done: Path) -> None:
    whole = read_outcome(done).runs
    tables = pd.read_parquet(done / "runs.parquet")
    tables.loc[0, "status"] = "doubtful:the client was late"
    tables.to_parquet(done / "runs.parquet")
    first = whole.iloc[0]  # its repeat is gone: the others of it have nothing to be paired with
    same = (whole.workload == first["workload"]) & (whole["repeat"] == first["repeat"])
    assert len(read_outcome(done).runs) == len(whole) - same.sum() < len(whole) - 1
    tables.assign(status="doubtful:the client was late").to_parquet(done / "runs.parquet")
    with pytest.raises(AdapterTwinError, match="no run is to be trusted"):
        read_outcome(done)


def test_a_study_goes_on_and_keeps_its_plan(
    run_once: tuple[Path, Started], engine: TwinAsEngine, done: Path
) -> None:
    before = (done / "plan.json").read_text()
    file = done.parent / "study.yaml"
    summary = runner.run_study(file, "cpu", done)
    assert not engine.started
    assert summary.complete == len(run_once[1])
    assert (done / "plan.json").read_text() == before
    with pytest.raises(AdapterTwinError, match="holds another campaign"):
        runner.run_study(write(done.parent, repeats=3), "cpu", done)


def test_no_time_left_is_said_and_nothing_is_lost(engine: TwinAsEngine, tmp_path: Path) -> None:
    summary = runner.run_study(write(tmp_path, budget_s=10), "cpu", tmp_path / "out")
    assert summary.complete == 0
    assert "run it again to go on" in str(summary.stopped)
    with pytest.raises(AdapterTwinError, match="nothing is measured yet"):
        read_outcome(tmp_path / "out")
    with pytest.raises(AdapterTwinError, match=r"plan\.json: missing"):
        read_outcome(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean_input_tokens": 5000}, "exceeds engine.max_model_len = 1024"),
        ({}, "not one request falls into the window"),
    ],
)
def test_traffic_that_the_engine_could_not_serve_is_refused_before_it_starts(
    changes: dict[str, Any], message: str, engine: TwinAsEngine, tmp_path: Path
) -> None:
    file = write(tmp_path, workloads=["light.yaml"], duration_s=20 if changes else 0.001)
    lengths = WORKLOAD["lengths"] | changes
    (tmp_path / "light.yaml").write_text(yaml.safe_dump(WORKLOAD | {"lengths": lengths}))
    with pytest.raises(AdapterTwinError, match=message):
        runner.run_study(file, "cpu", tmp_path / "out")
    assert not engine.started


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"device": "NVIDIA H100"}, "is of device AMD EPYC, this is NVIDIA H100"),
        ({"vllm": "0.99.0"}, "is of vllm 0.32.0, this is 0.99.0"),
    ],
)
def test_a_calibration_of_another_machine_is_refused(
    machine: dict[str, str],
    message: str,
    engine: TwinAsEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "describe_machine", lambda flags: MACHINE | machine)
    with pytest.raises(AdapterTwinError, match=message):
        runner.run_study(write(tmp_path), "cpu", tmp_path / "out")
    assert not engine.started


def test_a_build_of_vllm_that_is_not_here_is_refused(engine: TwinAsEngine, tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError, match="installed here is for cpu; use --engine cpu"):
        runner.run_study(write(tmp_path), "cuda", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refused_start_is_a_choice_that_loses_everything(
    engine: TwinAsEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "refuses", lambda flags: flags.max_loras == 12)
    runner.run_study(write(tmp_path), "cpu", tmp_path / "out")
    measured = read_outcome(tmp_path / "out")
    chosen = comparison.choices(service(measured), measured.picks)
    light = chosen[chosen.workload == "light"].set_index("method")
    assert light.loc["G = N", "regret"] == 100
    assert not light.loc["G = N", "starts"]
    methods = comparison.methods(chosen, 2).set_index("method")
    assert methods.loc["G = N", ["named", "start", "serve"]].tolist() == [2, 0, 0]


def test_the_verb_tells_how_each_choice_did(
    engine: TwinAsEngine, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ("prove", str(write(tmp_path)), "--engine", "cpu", "--out", str(tmp_path / "out"))
    status, out, _ = run(*arguments)
    assert status == 0
    assert "Choices, as measured: light" in out
    assert "runs bear out what was said" in out
    status, out, _ = run(*arguments, "--json")
    content = json.loads(out)
    assert content["complete"] == content["pieces"] == len(content["runs"])
    assert {row["method"] for row in content["methods"]} <= set(METHODS)
    assert all(row["right"] for row in content["verdicts"])


def test_the_verb_without_an_engine_is_one_line(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_twin.measure.engine_flags.engine_version", lambda: None)
    status, out, err = run("prove", str(write(tmp_path)), "--engine", "cpu", "--out", "out")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "make setup-vllm" in err
    assert not (tmp_path / "out").exists()


RUNS = pd.DataFrame(
    {
        "workload": "w",
        "adapter_slots": [4, 4, 8, 8, 16, 16],
        "repeat": [0, 1, 0, 1, 0, 1],
        "starts": True,
        "serves": [True, True, True, False, False, False],
        "total_throughput": [99.0, 95.0, 90.0, 76.0, 60.0, 61.0],
        "mean_ttft_ms": [50.0, 70.0, 40.0, 60.0, 900.0, 1100.0],
        "slo_attainment": 0.9,
    }
)
PICKS = pd.DataFrame(
    {"workload": "w", "method": ["twin", "G = 8", "G = N"], "adapter_slots": [4, 8, 16]}
).astype({"adapter_slots": "Int64"})


def test_regret_compares_runs_of_the_same_requests() -> None:
    chosen = comparison.choices(RUNS, PICKS).set_index("method")
    assert chosen.loc["twin", ["regret", "low", "high"]].tolist() == [0, 0, 0]
    lost = np.array(
        [[100 * (1 - 90 / 99), 100 * (1 - 76 / 95)], [100 * (1 - 60 / 99), 100 * (1 - 61 / 95)]]
    )
    assert chosen.loc["G = 8", "regret"] == pytest.approx(lost[0].mean())
    spread = np.sqrt(lost.var(axis=1, ddof=1).mean())
    half = stats.t.ppf(0.975, 2) * spread / np.sqrt(2)
    assert chosen.loc["G = 8", "high"] - chosen.loc["G = 8", "regret"] == pytest.approx(half)
    assert chosen.loc["G = 8", "ttft_ratio"] == pytest.approx(50 / 60)
    assert not chosen.loc["G = N", "serves"]


def test_a_single_repeat_has_no_interval() -> None:
    chosen = comparison.choices(RUNS[RUNS.repeat == 0], PICKS).set_index("method")
    assert np.isnan(chosen.loc["G = 8", "high"])
    assert chosen.loc["G = 8", "regret"] == pytest.approx(100 / 11)


def test_the_interval_of_a_share_is_wilsons(done: Path) -> None:
    measured = read_outcome(done)
    runs = service(measured)
    said = pd.DataFrame({"said": True, "right": [True] * 9 + [False]})
    told = bars(runs, comparison.choices(runs, measured.picks), said).set_index("what")
    share = told.loc["recommendation serves (at least)", ["reached", "low", "high"]]
    assert share.to_list() == pytest.approx([90, 59.6, 98.2], abs=0.1)


def test_waits_are_told_for_each_adapter_and_for_groups_of_them(done: Path) -> None:
    requests = waits(read_outcome(done))
    np.testing.assert_allclose(requests.ttft_ms, requests.predicted_ttft_ms)
    light = requests[requests.workload == "light"]
    top = light[light.place == 1]
    assert set(top.adapter) == {0}
    own = top[top.adapter_slots == 8]
    table = per_adapter(light).set_index(["adapter_slots", "adapter"])
    assert table.loc[(8, 0), "p99_ttft_ms"] == pytest.approx(np.percentile(own.ttft_ms, 99))
    assert table.loc[(8, 0), "requests"] == len(own)
    grouped = by_popularity(light)
    assert set(grouped.group) == {"most popular tenth", "between", "rarer half"}
    counts = grouped.groupby("adapter_slots").requests.sum()
    assert counts.to_dict() == light.groupby("adapter_slots").size().to_dict()


def test_figures_show_every_workload_and_method(done: Path) -> None:
    measured = read_outcome(done)
    runs = service(measured)
    drawn = proofs.slots(runs, measured.picks)
    assert {axes.get_title() for axes in drawn.axes} >= {"light", "hopeless"}
    chosen = comparison.choices(runs, measured.picks)
    methods = comparison.methods(chosen, 2)
    drawn = proofs.regrets(chosen, methods)
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert labels == list(methods.method)[::-1]
    drawn = proofs.fairness(per_adapter(waits(measured)))
    assert [axes.get_title() for axes in drawn.axes] == ["hopeless", "light"]


def learn(monkeypatch: pytest.MonkeyPatch, best: Callable[[int, float], int]) -> Any:
    """Teach a tree the best slots by adapters and skew; return the method that it becomes."""
    rows = [
        {
            "workload_id": f"w{rate}-{skew}",
            "model": "small",
            "rates_per_adapter": f"{rate}",
            "ranks": "8",
            "max_lora_rank": 8,
            "mean_input_tokens": 64.0,
            "mean_requested_output_tokens": 32.0,
            "zipf_exponent": skew,
            "arrival_cv": 1.0,
            "served_adapters": served,
            "adapter_slots": slots,
            "feasible_start": True,
            "offered_tokens_per_s": 96 * rate * served,
            "total_throughput": 96 * rate * served * (0.99 if slots == best(served, skew) else 0.5),
            "mean_ttft_ms": 50.0,
        }
        for rate in (0.1, 0.2, 0.3, 0.4)
        for skew in (0.0, 0.8, 1.0, 1.2, 1.4)
        for served in (8, 12, 16)
        for slots in (4, 6, 8)
    ]
    monkeypatch.setattr(slots_tree, "run_sweep", lambda *_, **__: None)
    monkeypatch.setattr(slots_tree, "read_sweep", lambda _: pd.DataFrame(rows))
    return slots_tree.learn_slots(Path("design.yaml"), Path("out"), "auto")


def test_a_tree_learns_the_best_slots_for_so_many_adapters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = learn(monkeypatch, lambda served, _: served // 2)
    for count in (8, 12, 16):
        assert choose(demand(adapters=zipf_adapters(count, 3, 0, [8]))) == count // 2


@pytest.mark.parametrize(("exponent", "slots"), [(0.0, 8), (1.0, 6), (1.4, 4)])
def test_a_tree_sees_the_skew_of_a_demand(
    monkeypatch: pytest.MonkeyPatch, exponent: float, slots: int
) -> None:
    best = {0.0: 8, 0.8: 6, 1.0: 6, 1.2: 4, 1.4: 4}
    choose = learn(monkeypatch, lambda _, skew: best[skew])
    assert choose(demand(adapters=zipf_adapters(12, 3, exponent, [8]))) == slots


def test_slots_and_kv_cache_share_a_cpus_memory_to_the_byte(tmp_path: Path) -> None:
    campaign = load_campaign(datasets.REPOSITORY / "experiments" / "campaigns" / "cpu-memory.yaml")
    shape = model_shape("small")
    for piece in campaign.pieces():
        slots = small_engine(piece.flags.max_loras, piece.flags.max_lora_rank)
        taken = layer_slots_bytes(slots, shape) / 2**30
        assert piece.flags.cpu_kv_cache_gib + taken == pytest.approx(campaign.cpu_memory_gib)
    content = yaml.safe_load(
        (datasets.REPOSITORY / "experiments" / "campaigns" / "cpu-memory.yaml").read_text()
    )
    for change, message in (
        ({"cpu_memory_gib": 0.01}, "micro.engines[1].max_loras: 48 slots of rank 8 take"),
        ({"model": str(tmp_path)}, "cpu_memory_gib: only for a shipped shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(model_config("tiny")))
        (tmp_path / "campaign.yaml").write_text(yaml.safe_dump(content | change))
        with pytest.raises(AdapterTwinError) as caught:
            load_campaign(tmp_path / "campaign.yaml")
        assert message in str(caught.value)


def test_the_memory_law_tells_shared_memory_from_a_kv_cache_of_its_own() -> None:
    shape = model_shape("small")
    starts = pd.DataFrame(
        {
            "model": "small",
            "adapter_slots": [2, 48, 24],
            "max_lora_rank": [8, 8, 32],
            "graph_capture_s": np.nan,
            "max_model_len": 1024,
            "block_size": 128,
        }
    )
    engines = [small_engine(*pair) for pair in ((2, 8), (48, 8), (24, 32))]
    asked = 0.05 - np.array([layer_slots_bytes(one, shape) / 2**30 for one in engines])
    tokens = np.floor(asked * 2**30 / shape.kv_bytes_per_token() / 128) * 128
    law = MemoryLaw(shape, "0.32.0", 0.0)
    law.fit(starts.assign(cpu_kv_cache_gib=asked, kv_cache_tokens=tokens))
    assert law.slots_ == "bytes"
    assert law.total_gib == pytest.approx(0.05)
    assert [law.kv_cache_tokens(one) for one in engines] == tokens.tolist()
    least = small_engine(8, 8)
    block_gib = law.block_gib(least)
    # half a block more, lest rounding decides
    law.total_gib = layer_slots_bytes(least, shape) / 2**30 + (8 + 1.5) * block_gib
    assert law.starts(least)
    law.total_gib -= block_gib
    assert not law.starts(least), "a block is the engine's own"
    same = starts.assign(cpu_kv_cache_gib=0.25, kv_cache_tokens=0.25 * 2**30 / 2048)
    assert MemoryLaw(shape, "0.32.0", 0.0).fit(same).slots_ == "apart"


@pytest.mark.live
def test_live_the_smoke_study_runs_and_is_judged(tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed (make setup-vllm)")
    study = datasets.REPOSITORY / "experiments" / "studies" / "smoke.yaml"
    command = [sys.executable, "-m", "adapter_twin", "prove", str(study), "--engine", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["complete"] == content["pieces"] >= 2
    assert content["failed"] == {}
    assert all(row["starts"] and row["total_throughput"] > 0 for row in content["runs"])
    assert {row["method"] for row in content["choices"]} == {"twin", "G = N", "G = 8"}
