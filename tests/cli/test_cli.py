"""The command line keeps its contract: verbs, files, JSON, and one clear line on bad input."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import yaml

from adapter_twin import __version__, cli
from adapter_twin.cli import doctor, report
from adapter_twin.laws import Calibration
from adapter_twin.tables import datasets, importer
from adapter_twin.tables.schemas import PREDICTIONS

LLAMA = "llama-3.1-8b-instruct"
RUN = {
    "run_id": "run",
    "model": LLAMA,
    "rates_per_adapter": "0.1-0.05",
    "ranks": "8-16",
    "served_adapters": 32,
    "adapter_slots": 16,
    "max_lora_rank": 16,
    "max_num_seqs": 2048,
    "duration_s": 30.0,
    "mean_input_tokens": 223.0,
    "mean_requested_output_tokens": 198.0,
}
MEASURED = {
    **RUN,
    "campaign": "optimum_grid",
    "status": "ok",
    "sent_is_exact": True,
    "client_collapsed": False,
    "offered_request_rate": 2.4,
    "total_throughput": 1000.0,
    "waiting_mean": 0.0,
    "source_path": "somewhere",
}
CONFIG = {
    "engine": {"model": LLAMA, "max_loras": 16, "max_cpu_loras": 32, "max_lora_rank": 16},
    "workload": {
        "duration_s": 30,
        "adapters": {"count": 32, "request_rates": [0.1, 0.05], "ranks": [8, 16]},
        "lengths": {
            "distribution": "sharegpt",
            "mean_input_tokens": 223,
            "mean_output_tokens": 198,
        },
    },
}
EXAMPLES = Path(__file__).parents[2] / "examples"
SLOW = ("place", "mixed")
VERBS = ("predict", "validate", "simulate", "calibrate", "profile", "watch", "data", "doctor")

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refused(run: Cli, tmp_path: Path) -> Callable[..., str]:
    """Run what must be refused: status 2, one line, and no file left behind."""

    def call(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return call


def write_runs(folder: Path, **changes: object) -> str:
    path = folder / "runs.csv"
    pd.DataFrame([{**RUN, **changes}]).to_csv(path, index=False)
    return str(path)


def write_config(folder: Path, **engine: object) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "engine": {**CONFIG["engine"], **engine}}))
    return str(path)


def write_measured(folder: Path) -> str:
    figures = {name: 1000.0 for name in datasets_columns() if name.endswith("_ms")}
    others = {name: float("nan") for name in datasets_columns()}
    path = folder / "measured.parquet"
    pd.DataFrame([{**others, **figures, **MEASURED}]).to_parquet(path)
    return str(path)


def datasets_columns() -> list[str]:
    from adapter_twin.tables.schemas import RUNS

    return [name for name, column in RUNS.columns.items() if column.required]


def test_help_names_every_verb(run: Cli) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_an_example(run: Cli, verb: str) -> None:
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert f"Example: adapter-twin {verb} " in out


def test_the_version_is_printed(run: Cli) -> None:
    assert run("--version") == (0, f"{__version__}\n", "")


def test_predict_writes_the_agreed_table(run: Cli, tmp_path: Path) -> None:
    arguments = (write_runs(tmp_path), "--calibration", "auto", "--seed", "1", "--jobs", "1")
    status, out, err = run("predict", *arguments, "--out", "pred.parquet")
    assert (status, err) == (0, "")
    assert "pred.parquet: 1 runs, " in out
    predicted = pd.read_parquet(tmp_path / "pred.parquet")
    always = [name for name, column in PREDICTIONS.columns.items() if column.required]
    assert list(predicted.columns) == always
    assert run("predict", *arguments, "--intervals", "--out", "ends.parquet")[0] == 0
    told = pd.read_parquet(tmp_path / "ends.parquet")
    assert list(told.columns) == list(PREDICTIONS.columns)
    assert told["mean_itl_ms_low"][0] < predicted["mean_itl_ms"][0] < told["mean_itl_ms_high"][0]
    assert run("predict", *arguments, "--observer", "none", "--out", "none.parquet")[0] == 0
    without = pd.read_parquet(tmp_path / "none.parquet")
    assert without["mean_itl_ms"][0] < predicted["mean_itl_ms"][0]
    assert run("predict", *arguments, "--out", "pred.csv")[0] == 0


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_and_no_failure(run: Cli, tmp_path: Path) -> None:
    runs = write_runs(tmp_path, mean_input_tokens=900.0)
    status, _, err = run("predict", runs, "--jobs", "1", "--out", "pred.parquet")
    assert status == 0
    assert err.startswith("warning: ")
    assert err.count("\n") == 1


def test_validate_prints_and_writes_the_bars(run: Cli, tmp_path: Path) -> None:
    measured = write_measured(tmp_path)
    status, out, _ = run("validate", measured, "--jobs", "1", "--json", "--out", "report")
    assert status == 0
    summary = json.loads(out)
    assert summary["counts"]["scored"] == 1
    assert {"figure", "measure", "value", "bar", "passed"} <= set(summary["bars"][0])
    written = json.loads((tmp_path / "report/summary.json").read_text())
    assert {"schema_version": report.SCHEMA_VERSION, **written} == summary
    status, out, _ = run("validate", measured, "--jobs", "1")
    assert status == 0
    assert "Bars" in out
    assert "Worst" in out


def test_the_shell_completes_verbs(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_ADAPTER_TWIN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "adapter-twin pr")
    monkeypatch.setenv("COMP_CWORD", "1")
    status, out, _ = run()
    assert (status, out.split()) == (0, ["predict", "profile", "prove"])


@pytest.mark.filterwarnings("ignore:.*is (an extrapolation|a prior)")
@pytest.mark.parametrize(
    "example",
    [
        pytest.param(path, id=path.name, marks=pytest.mark.slow if path.stem in SLOW else ())
        for path in sorted(EXAMPLES.glob("*.yaml"))
    ],
)
def test_examples_run_by_the_command_in_their_first_line(
    run: Cli, monkeypatch: pytest.MonkeyPatch, example: Path
) -> None:
    _, command = example.read_text().splitlines()[0].split(": adapter-twin ")
    monkeypatch.chdir(EXAMPLES.parent)
    status, out, _ = run(*command.split(), "--json")
    assert status == 0
    assert json.loads(out)["calibration"]


def test_simulate_prints_the_service_as_json(run: Cli, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    status, out, err = run("simulate", config, "--json")
    assert (status, err) == (0, "")
    service = json.loads(out)
    assert service["schema_version"] == report.SCHEMA_VERSION
    assert service["completed_requests"] > 0
    assert service["completed_mean_ttft_ms"] > 0
    assert service["worst_adapter"].startswith("adapter-")
    assert service["adapter_loads"] > service["adapter_loads_per_step"] > 0
    assert 0 < service["loading_share"] < 1
    assert {"config_hash", "seed", "version", "calibration"} <= set(service)


def test_a_pinned_adapter_is_simulated_and_refused_where_it_cannot_be(
    run: Cli, tmp_path: Path
) -> None:
    adapters = [{"name": f"a{i}", "rank": 8, "request_rate": 2.0} for i in range(9)]
    adapters[0] |= {"pinned": True, "request_rate": 0.0}
    workload = {**CONFIG["workload"], "adapters": adapters}
    engine = {**CONFIG["engine"], "max_loras": 8, "max_cpu_loras": 9}
    (tmp_path / "pin.yaml").write_text(yaml.safe_dump({"engine": engine, "workload": workload}))
    status, out, err = run("simulate", "pin.yaml")
    assert (status, out) == (2, "")
    assert "pinned: a batch needs the slot of a pinned adapter" in err
    engine["max_loras"] = 9
    (tmp_path / "pin.yaml").write_text(yaml.safe_dump({"engine": engine, "workload": workload}))
    status, out, _ = run("simulate", "pin.yaml", "--json")
    assert json.loads(out)["adapter_loads"] == 8  # the pinned one is there from the start
    adapters[0]["request_rate"] = 1.0
    plan = {"model": engine["model"], "adapters": adapters, "lengths": workload["lengths"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    status, _, err = run("recommend", "plan.yaml")
    assert status == 2
    assert "'a0'" in err
    assert "leave `pinned` out" in err


def test_simulate_writes_records_and_a_trace(run: Cli, tmp_path: Path) -> None:
    adapters = {"count": 8, "request_rates": [0.025], "ranks": [8]}
    engine = {**CONFIG["engine"], "max_loras": 8, "max_cpu_loras": 8}
    sparse = {"engine": engine, "workload": {**CONFIG["workload"], "adapters": adapters}}
    (tmp_path / "sparse.yaml").write_text(yaml.safe_dump(sparse))
    files = ("--records", "records.parquet", "--trace", "trace.json")
    status, out, _ = run("simulate", "sparse.yaml", *files)
    assert status == 0
    assert "total throughput" in out
    records = pd.read_parquet(tmp_path / "records.parquet")
    assert {"arrival_s", "first_token_s", "end_s", "load_wait_s"} <= set(records.columns)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("cat") == "request" for event in events) == 2 * len(records)
    steps = [event for event in events if event["name"] == "step"]
    gaps_us = [b["ts"] - a["ts"] - a["dur"] for a, b in pairwise(steps)]
    assert min(gaps_us) == 0  # no two steps at a time
    assert max(gaps_us) > 1e6  # nothing to do between two requests
    assert min(step["dur"] for step in steps) > 1000


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_a_table_is_written_as_its_name_says(run: Cli, tmp_path: Path, name: str) -> None:
    calls = (
        ("simulate", write_config(tmp_path), "--records", name),
        ("predict", write_runs(tmp_path), "--jobs", "1", "--out", name),
        ("traffic", "requests.csv", "--out", name),
    )
    log = {"arrival_s": [0.0, 1.0], "prompt_tokens": 9, "output_tokens": 9}
    pd.DataFrame(log).to_csv(tmp_path / "requests.csv", index=False)
    read = pd.read_csv if name.endswith(".csv") else pd.read_parquet
    for call in calls:
        assert run(*call)[0] == 0
        assert len(read(tmp_path / name)) >= 1
        (tmp_path / name).unlink()
        assert run(*call[:-1], "out.txt")[0] == 2


def test_a_calibration_lies_beside_the_file_that_names_it(run: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    demand = {"model": LLAMA, **{key: CONFIG["workload"][key] for key in ("adapters", "lengths")}}
    shipped = datasets.REPOSITORY / "data/calibrations" / f"{LLAMA}@h100-64gb-vllm0.8.5.json"
    (folder / "own.json").write_text(shipped.read_text().replace("@h100", "@own"))
    for verb, content in (("simulate", CONFIG), ("recommend", demand), ("place", demand)):
        for named in ("mine/own.json", "own.json"):
            told = yaml.safe_dump({**content, "calibration": named})
            (folder / "file.yaml").write_text(told)
            status, out, err = run(verb, "mine/file.yaml", "--json")
            assert (status == 0) == (named == "own.json"), err
        assert json.loads(out)["calibration"] == f"{LLAMA}@own-64gb-vllm0.8.5"


@pytest.mark.parametrize(
    "arguments",
    [("simulate", "none.yaml"), ("optimum",), ("doctor", "--wrong"), ("memory", "m", "--gpu", "x")],
)
def test_with_json_an_error_is_json_too(run: Cli, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments, "--json")
    assert status == 2
    told = json.loads(out)
    assert told["schema_version"] == report.SCHEMA_VERSION
    assert err == f"error: {told['error']['message']}\n"


def test_an_empty_run_gives_null_and_not_nan(run: Cli, tmp_path: Path) -> None:
    workload = {**CONFIG["workload"], "duration_s": 0.001}
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump({**CONFIG, "workload": workload}))
    status, out, _ = run("simulate", "empty.yaml", "--json", "--trace", "trace.json")
    assert status == 0
    assert json.loads(out)["median_ttft_ms"] is None
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_data_lists_every_table(run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, "roots", lambda: [tmp_path])
    status, out, _ = run("data", "--json")
    assert status == 0
    listing = json.loads(out)
    assert listing["roots"] == [str(tmp_path)]
    assert {row["checksum"] for row in listing["tables"]} == {"absent"}
    status, out, _ = run("data")
    assert status == 0
    assert "adapter-twin data --fetch" in out


def test_data_imports_a_clone(run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imported: list[Path | None] = []
    monkeypatch.setattr(importer, "import_repository", imported.append)
    status, out, _ = run("data", "--import", str(tmp_path))
    assert status == 0
    assert "data/external reads the imported tables first" in " ".join(out.split())
    assert run("data", "--fetch")[0] == 0
    assert imported == [tmp_path, None]


def test_a_prior_needs_no_tables_and_says_what_it_is(run: Cli, tmp_path: Path) -> None:
    asked = ("--model", "mistralai/Mistral-7B-v0.3", "--gpu", "h100-64gb", "--engine", "vllm-0.8.5")
    status, out, err = run("calibrate", "--prior", *asked, "--out", "prior.json")
    assert (status, err) == (0, "")
    told = "a prior: mistralai/Mistral-7B-v0.3 was not measured on h100-64gb with vLLM 0.8.5"
    assert told in " ".join(out.split())
    assert Calibration.from_json(tmp_path / "prior.json").model == "mistralai/Mistral-7B-v0.3"
    for wrong, told in (
        (("--prior", *asked[2:]), "model: a prior needs it; give --model"),
        (("--prior", *asked, "--jobs", "2"), "jobs: a prior simulates nothing; leave it out"),
        (("--prior", ".", *asked), "TABLES: a prior is made without"),
        (
            ("--prior", "--model", "llama-3.1-8b-instruct", *asked[2:]),
            "model: it was measured there; use calibration llama-3.1-8b-instruct@h100-64gb",
        ),
        (asked, "TABLES: give the folder of measured tables, or --prior"),
    ):
        status, _, err = run("calibrate", *wrong, "--out", "none.json")
        assert (status, err.count("\n")) == (2, 1)
        assert told in err
    assert not (tmp_path / "none.json").exists()


def test_calibrate_writes_a_calibration(
    run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from adapter_twin.calibrate import published_fit
    from adapter_twin.laws import Calibration, load_calibration

    known = load_calibration("auto", LLAMA)
    asked: dict[str, object] = {}

    def fake_fit(tables: object, marginals: object, model: str, **options: object) -> Calibration:
        asked.update(options, model=model)
        return known

    runs = pd.DataFrame({"model": [LLAMA, "qwen-2.5-7b-instruct"]})
    monkeypatch.setattr(datasets, "load", lambda table, dataset: runs)
    monkeypatch.setattr(datasets, "sharegpt_lengths", lambda dataset: None)
    monkeypatch.setattr(published_fit, "calibrate", fake_fit)
    (tmp_path / "agullo2025").mkdir()
    status, _, err = run("calibrate", "agullo2025", "--out", "cal.json")
    assert status == 2
    assert "--model" in err
    assert not (tmp_path / "cal.json").exists()
    status, out, _ = run("calibrate", "agullo2025", "--out", "cal.json", "--model", LLAMA)
    assert status == 0
    assert known.name in out
    assert asked["model"] == LLAMA
    assert asked["source"] == {
        "dataset": "agullo2025",
        "repository": importer.REPOSITORY_URL,
        "commit": importer.COMMIT,
    }
    assert load_calibration("cal.json", LLAMA).name == known.name


def test_doctor_says_whether_the_core_works(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run("doctor")
    assert status == 0
    assert "the core works" in out
    assert {"torch", "vllm", "CUDA"} <= {line.split()[1].rstrip(":") for line in out.splitlines()}
    monkeypatch.setattr("adapter_twin.laws.list_calibrations", list)
    status, out, _ = run("doctor", "--json")
    findings = json.loads(out)
    missing = [check for check in findings["checks"] if check["needed"] and not check["found"]]
    assert (status, findings["works"]) == (1, False)
    assert [check["name"] for check in missing] == ["calibrations"]
    assert "adapter-twin calibrate" in missing[0]["detail"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "llama-4"}, ["model", "llama-3.1-8b-instruct"]),
        ({"rates_per_adapter": "-0.1"}, ["rates_per_adapter", "row 0"]),
        ({"adapter_slots": 64}, ["adapter_slots", "served_adapters"]),
        ({"ranks": "8-32"}, ["ranks", "max_lora_rank"]),
        ({"max_lora_rank": 12}, ["max_lora_rank", "16"]),
        ({"served_adapters": "many"}, ["served_adapters", "many"]),
    ],
)
def test_a_bad_row_is_refused(
    refused: Callable[..., str], tmp_path: Path, changes: dict[str, object], words: list[str]
) -> None:
    message = refused("predict", write_runs(tmp_path, **changes), "--out", "pred.parquet")
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"model": "llama-4"}, ["model", "llama-4"]),
        ({"max_lora": 8}, ["engine.max_lora", "did you mean 'max_loras'"]),
        ({"max_loras": 64}, ["max_loras", "max_cpu_loras"]),
        ({"max_lora_rank": 8}, ["max_lora_rank", "rank 16"]),
        ({"max_loras": 500, "max_cpu_loras": 500}, ["max_loras", "lower"]),
    ],
)
def test_a_bad_engine_is_refused(
    refused: Callable[..., str], tmp_path: Path, engine: dict[str, object], words: list[str]
) -> None:
    config = write_config(tmp_path, **engine)
    message = refused("simulate", config, "--records", "r.parquet", "--trace", "t.json")
    assert all(word in message for word in words)


def test_a_negative_rate_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    path = Path(write_config(tmp_path))
    path.write_text(path.read_text().replace("- 0.05", "- -0.05"))
    assert "request_rate" in refused("simulate", str(path))


@pytest.mark.parametrize("verb", ["predict", "validate"])
@pytest.mark.parametrize("content", [b"", b"run_id,model\n", b"\x00\xff\xfe", b"PAR1 cut off"])
@pytest.mark.parametrize("name", ["runs.csv", "runs.parquet"])
def test_a_damaged_table_is_refused(
    refused: Callable[..., str], tmp_path: Path, verb: str, content: bytes, name: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refused(verb, name, "--out", "out.parquet" if verb == "predict" else "out")


def test_a_truncated_table_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    whole = Path(write_measured(tmp_path)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    message = refused("predict", "cut.parquet", "--out", "pred.parquet")
    assert "truncated" in message
    assert "again" in message


def test_a_table_without_rows_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    pd.DataFrame([RUN]).head(0).to_parquet(tmp_path / "runs.parquet")
    assert "no rows" in refused("predict", "runs.parquet", "--out", "pred.parquet")


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "none.parquet", "--out", "pred.parquet"),
        ("validate", "none.parquet"),
        ("simulate", "none.yaml"),
        ("calibrate", "none", "--out", "cal.json", "--model", LLAMA),
        ("data", "--import", "none"),
    ],
)
def test_a_missing_input_is_named(refused: Callable[..., str], arguments: tuple[str, ...]) -> None:
    assert "none" in refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("predict", "RUNS", "--out", "none/pred.parquet"), "none does not exist"),
        (("predict", "RUNS", "--out", "pred.txt"), ".parquet"),
        (("validate", "RUNS", "--out", "none/report"), "none does not exist"),
        (("validate", "RUNS", "--out", "runs.csv"), "folder"),
        (("simulate", "CONFIG", "--trace", "none/trace.json"), "none does not exist"),
        (("simulate", "CONFIG", "--records", "none/records.parquet"), "none does not exist"),
        (("calibrate", ".", "--out", "none/cal.json"), "none does not exist"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    word: str,
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("the work began")

    for name in ("predict", "predict_scenario"):
        monkeypatch.setattr(f"adapter_twin.service.predict.{name}", work)
    places = {"RUNS": write_runs(tmp_path), "CONFIG": write_config(tmp_path)}
    assert word in refused(*(places.get(argument, argument) for argument in arguments))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("predikt",), "predikt"),
        (("predict",), "Missing"),
        (("predict", "RUNS", "--out", "p.parquet", "--sed", "1"), "--sed"),
        (("predict", "RUNS", "--out", "p.parquet", "--seed", "-1"), "--seed"),
        (("predict", "RUNS", "--out", "p.parquet", "--seed", "x"), "--seed"),
        (("predict", "RUNS", "--out", "p.parquet", "--jobs", "0"), "jobs"),
        (("predict", "RUNS", "--out", "p.parquet", "--observer", "some"), "--observer"),
        (("predict", "RUNS", "--out", "p.parquet", "--calibration", "x@y"), "calibration"),
        (("predict", "RUNS", "--out", "p.parquet", "--calibration", "x.json"), "x.json"),
        (("data", "--fetch", "--import", "."), "not both"),
    ],
)
def test_bad_usage_is_refused(
    refused: Callable[..., str], tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    runs = write_runs(tmp_path)
    assert word in refused(*(runs if argument == "RUNS" else argument for argument in arguments))


def test_without_arguments_the_help_is_shown(run: Cli) -> None:
    status, out, _ = run()
    assert status == 2
    assert "predict" in out


def test_a_failed_write_leaves_the_old_file(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pred.parquet").write_text("old")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full_disk)
    arguments = (write_runs(tmp_path), "--jobs", "1", "--out", "pred.parquet")
    status, _, err = run("predict", *arguments)
    assert status == 2
    assert "No space left" in err
    assert (tmp_path / "pred.parquet").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt, cli.typer.Abort])
def test_an_interruption_has_its_own_status(
    run: Cli, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def interrupt() -> list[object]:
        raise stop

    monkeypatch.setattr("adapter_twin.cli.doctor.examine", interrupt)
    status, out, err = run("doctor")
    assert (status, out) == (130, "")
    assert err.count("\n") <= 1


def test_a_table_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table(pd.DataFrame({"remedy": ["pip install 'x[gpu]'"]}), "Title")
    assert "x[gpu]" in capsys.readouterr().out


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "adapter_twin", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def test_the_module_runs_as_the_command_does(tmp_path: Path) -> None:
    process = start("predict", str(tmp_path / "none.parquet"), "--out", str(tmp_path / "p.parquet"))
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == f"error: {tmp_path}/none.parquet: no such file; check the path\n"


def test_help_is_quick() -> None:
    started_s = children_s()
    assert "predict" in start("--help").communicate()[0]
    assert children_s() - started_s < 1.0  # 0.3 s here


def children_s() -> float:
    """Computing time of all child processes so far: a busy machine does not add to it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_doctor_names_what_is_broken_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["nonesuch-package>=1.0", "numpy>=2.0", "vllm==1; extra == 'gpu'"]
    monkeypatch.setattr(doctor, "requires", lambda _: wanted)
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    monkeypatch.setattr(doctor, "_one_more", lambda number: number + 2)
    monkeypatch.setenv("NUMBA_CACHE_DIR", f"{__file__}/below-a-file")
    checks = {check.name: check for check in doctor.examine()}
    for name in ("python", "nonesuch-package", "numba compiles", "compilation cache"):
        assert not checks[name].found
    assert "pip install 'nonesuch-package>=1.0'" in checks["nonesuch-package"].detail
    assert "NUMBA_CACHE_DIR" in checks["compilation cache"].detail
    assert checks["numpy"].found
    assert not checks["vllm"].needed  # an extra is no need of the core
    assert not doctor.works(list(checks.values()))


def test_progress_is_shown_on_a_terminal_only(
    run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ("predict", write_runs(tmp_path), "--jobs", "1", "--out", "pred.parquet")
    assert "predicting" not in run(*arguments)[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "predicting" in run(*arguments)[2]
