"""What a person sees: tables that fit a terminal, and a clear line for what new users get wrong."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from adapter_twin.cli import report
from adapter_twin.parallel import track
from adapter_twin.tables import datasets

WIDTH = 80
LLAMA = "llama-3.1-8b-instruct"
LENGTHS = {"distribution": "sharegpt", "mean_input_tokens": 223, "mean_output_tokens": 198}
ADAPTERS = {"count": 16, "request_rates": [0.1, 0.05], "ranks": [8, 16]}
DEMAND = {"model": LLAMA, "adapters": ADAPTERS, "lengths": LENGTHS}
CONFIG = {
    "engine": {"model": LLAMA, "max_loras": 8, "max_cpu_loras": 16, "max_lora_rank": 16},
    "workload": {"duration_s": 30, "adapters": ADAPTERS, "lengths": LENGTHS},
}
DESIGN = {
    "name": "tiny",
    "models": [LLAMA],
    "served_adapters": [8, 16],
    "adapter_slots": [8],
    "duration_s": 30,
    "factorial": {"rate_values": [0.1], "rates_per_workload": 1, "ranks": ["16"]},
}
OPTIMUM = ("optimum", "--model", LLAMA, "--ranks", "16", "--rates")
SMALL_GRID = ("--served-grid", "32,64", "--slots-grid", "16,32", "--jobs", "1")
TO_COPY = ("  /",)
"""Paths are not broken into lines."""

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(run: Call, tmp_path: Path) -> Call:
    """Run the command line in a folder with one file of each kind."""
    for name, content in (("config", CONFIG), ("demand", DEMAND), ("design", DESIGN)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return run


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("simulate", "config.yaml"), "median TTFT, ms"),
        (("memory", "Qwen/Qwen3-8B", "--gpu", "l40s"), "KV cache, GiB"),
        (("recommend", "demand.yaml"), "What if"),
        (("place", "demand.yaml", "--jobs", "1"), "1 GPU serves"),
        ((*OPTIMUM, "0.1", *SMALL_GRID), "Alternatives"),
        (("sweep", "design.yaml", "--out", "sweep", "--jobs", "1"), "workloads now"),
        (("data",), "data --fetch"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_a_verb_prints_fits_a_terminal(
    call: Call, arguments: tuple[str, ...], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "roots", lambda: [Path.cwd()])  # measured data is absent
    status, out, _ = call(*arguments)
    assert status == 0
    assert shown in out
    lines = [line for line in out.splitlines() if not line.startswith(TO_COPY)]
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.usefixtures("terminal")
def test_a_header_that_is_too_wide_breaks_between_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [f"{letter}_long_name_of_a_column" for letter in "abcdef"]
    report.print_table(pd.DataFrame([range(6)], columns=names), "Wide")
    heads = capsys.readouterr().out.split("─")[0].splitlines()[1:]
    assert len(heads) == 6
    assert heads[1].split() == ["long"] * 6


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("verb", ["recommend", "place"])
def test_the_answer_comes_first_then_flags_to_copy_then_tables(call: Call, verb: str) -> None:
    told = call(verb, "demand.yaml")[1]
    answer = json.loads(call(verb, "demand.yaml", "--json")[1])
    first, _, rest = told.partition("\n\n")
    assert "mean TTFT" in first
    commands, _, tables = rest.partition("─")
    flags = answer["replicas"][0]["vllm_args"] if verb == "place" else answer["vllm_args"]
    copied = commands[commands.index("vllm serve") :].partition("\n\n")[0]
    shell = f"vllm() {{ printf '%s\\n' \"$@\"; }}\n{copied}"
    words = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert words.stdout.split("\n") == ["serve", "MODEL", *flags, ""]
    assert "tokens/s" in commands  # the first header
    assert answer["config_hash"] in tables


@pytest.mark.usefixtures("terminal")
def test_tables_have_units_in_their_headers_and_shares_in_percent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"mean_ttft_ms": 80.5, "total_throughput": 2324.0, "utilisation": 0.27, "slots": 8}
    report.print_table(pd.DataFrame([row]), "Table")
    head, _, values = capsys.readouterr().out.splitlines()[1:4]
    assert head.split("  ") == [
        "mean TTFT, ms",
        "total throughput, tokens/s",
        "utilisation, %",
        "slots",
    ]
    assert values.split() == ["80.5", "2,324", "27", "8"]
    report.print_mapping(row, "Mapping")
    assert re.search(r"^utilisation, % +27 *$", capsys.readouterr().out, re.MULTILINE)
    assert report.figures(row, "utilisation", "p99_ttft_ms") == "utilisation 27 %"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (278_212.4, "278,212"),
        (1234.5, "1,234"),
        (93.7777, "93.78"),
        (0.00290233, "0.002902"),
        (212_000, "212,000"),
        (float("nan"), "–"),
        (True, "True"),
    ],
)
def test_numbers_are_short_and_without_exponents(
    value: Any, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report.print_mapping({"figure": value}, "Numbers")
    assert capsys.readouterr().out.splitlines()[1].split() == ["figure", text]


def changed(name: str, content: Any, *path: str, value: object) -> str:
    """Write a copy of a file's content with one value replaced."""
    content = yaml.safe_load(yaml.safe_dump(content))
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    Path(name).write_text(yaml.safe_dump(content))
    return name


RATES = ("workload", "adapters", "request_rates")


@pytest.mark.parametrize(
    ("content", "path", "value", "words"),
    [
        (CONFIG, ("engine", "max_lorra"), 8, ("engine.max_lorra", "did you mean 'max_loras'")),
        (CONFIG, ("engine", "max_loras"), 64, ("engine.max_loras", "lower the slots")),
        (CONFIG, ("engine", "model"), "llama-3.1-8b", ("'llama-3.1-8b' has no calibration", LLAMA)),
        (CONFIG, ("engine", "model"), "gpt", ("model: 'gpt'", LLAMA)),
        (CONFIG, RATES, "0.1-0.05", (".".join(RATES), "expected a list")),
        (CONFIG, RATES, ["0.1"], (".".join(RATES), "not in quotes")),
        (CONFIG, RATES, [-0.1], (".".join(RATES), "at least 0", "-0.1")),
        (CONFIG, ("workload", "adapters", "ranks"), [0], ("workload.adapters.ranks", "at least 1")),
        (CONFIG, ("workload", "adapters", "ranks"), [64], ("max_lora_rank", "raise")),
        (CONFIG, ("calibration",), "nope", ("calibration: 'nope'", "auto")),
        (
            CONFIG,
            ("workload", "arrivals"),
            {"process": "trace", "path": "none.csv"},
            ("none.csv", "No such file"),
        ),
    ],
)
def test_a_mistake_in_a_configuration_is_named_with_its_remedy(
    call: Call, content: Any, path: tuple[str, ...], value: object, words: tuple[str, ...]
) -> None:
    refused(call, words, "simulate", changed("wrong.yaml", content, *path, value=value))


def refused(call: Call, words: tuple[str, ...], *arguments: str) -> None:
    """Check that a call ends with status 2 and one line, and leaves nothing behind."""
    before = sorted(Path().rglob("*"))
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("file.yaml", "is empty")),
        ("a: [1,\nb", ("file.yaml", "line 3, column 1", "expected")),
        ("a: 2024-13-01", ("file.yaml", "not valid YAML", "month")),
        ("- 1", ("expected a mapping",)),
    ],
)
def test_what_is_no_configuration_at_all_is_refused(
    call: Call, text: str, words: tuple[str, ...]
) -> None:
    Path("file.yaml").write_text(text)
    refused(call, words, "simulate", "file.yaml")
    refused(call, words, "recommend", "file.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*OPTIMUM, "fast"), ("rates: ", "'0.1-0.05-0.025'")),
        ((*OPTIMUM, "-0.1"), ("rates: ", "'-0.1'")),
        ((*OPTIMUM, "0"), ("rates: ", "above zero")),
        ((*OPTIMUM, "0.1", "--served-grid", "8", "--slots-grid", "16"), ("slots_grid", "lower")),
        ((*OPTIMUM, "0.1", "--slo", "config.yaml"), ("ttft_ms, itl_ms, percentile",)),
        (("place", "demand.yaml", "--margin", "2"), ("margin: must be below 0.1",)),
        (("place", "demand.yaml", "--replicate-above", "0"), ("replicate_above: got 0.0",)),
        (("place", "demand.yaml", "--picture", "p.bmp"), ("p.bmp", ".png")),
        (("place", "config.yaml"), ("engine.max_cpu_loras: unknown key", "max_num_seqs")),
        (("train", ".", "--out", "models"), ("run adapter-twin sweep first",)),
        (("calibrate", ".", "--out", "c.json"), ("runs.parquet: not found",)),
        (("predict", ".", "--out", "p.csv"), ("is a folder",)),
        (("validate", "few.csv"), ("run_id", "more missing")),
    ],
)
def test_a_mistake_in_a_call_is_named_with_its_remedy(
    call: Call, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    Path("few.csv").write_text("model\nllama\n")
    refused(call, words, *arguments)


def test_a_scheduler_that_is_away_leaves_no_folder(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_twin.parallel.CONNECT_S", 0.2)
    options = ("--out", "sweep", "--scheduler", "tcp://127.0.0.1:1")
    refused(call, ("scheduler: tcp://127.0.0.1:1", "start dask"), "sweep", "design.yaml", *options)


@pytest.mark.parametrize("target", ["p.csv", "old.csv"])
def test_a_place_without_permission_is_refused_before_the_work(
    call: Call, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    Path("old.csv").write_text("kept")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refused(call, (target, "cannot be written to"), "predict", "runs.csv", "--out", target)
    assert Path("old.csv").read_text() == "kept"


def test_help_fits_a_terminal(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("TERMINAL_WIDTH", str(WIDTH))
    for verb in re.findall(r"│ ([a-z]+) ", call("--help")[1]):
        assert max(map(len, call(verb, "--help")[1].splitlines())) <= WIDTH


def test_a_log_gets_lines_about_long_work_that_count_what_was_done_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert list(track("ab", "quick work", 2)) == ["a", "b"]
        monkeypatch.setattr("adapter_twin.parallel.LINE_EVERY_S", -1.0)
        assert list(track("ab", "long work", 5, done=3)) == ["a", "b"]
    assert caplog.messages == ["4/5 long work", "5/5 long work"]
