"""No input ends a verb in a traceback: files and options damaged by chance, in processes apart.

`HOSTILE_CASES` is the number of cases of each kind, `HOSTILE_SEED` decides which (``make fuzz``).
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from copy import deepcopy
from difflib import unified_diff
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from typer.main import get_command

from adapter_twin import cli
from adapter_twin.tables import datasets
from book.answers import TARGET, merged, schema_of
from tests.hostile import (
    ALONE,
    BOMB,
    CONFIG,
    DEALT,
    DEMANDS,
    DESIGN,
    DRAINING,
    ENGINE,
    FLEET,
    KINDS,
    LOGNORMAL,
    USUAL,
    Hostile,
    json_of,
)

CASES = int(os.environ.get("HOSTILE_CASES", "4"))
SEED = int(os.environ.get("HOSTILE_SEED", "0"))
ANSWERS = json.loads(TARGET.read_text())
LONGEST_CPU_S = 40
LONGEST_S = 200.0
MOST_BYTES = 3 << 30
"""A case may take these times, and this memory beside what is loaded."""


def run_alone(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """Run the command line in a fork, which has all that is loaded; a signal is below 0."""
    child = os.fork()
    if child == 0:
        _in_child(arguments, folder)
    ends_s = time.monotonic() + LONGEST_S
    while True:
        ended, state, _ = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > ends_s:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    out, err = ((folder.parent / name).read_text(errors="replace") for name in ("out", "err"))
    return os.waitstatus_to_exitcode(state), out, err


def _in_child(arguments: list[str], folder: Path) -> NoReturn:
    status = 99
    try:
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (LONGEST_CPU_S, LONGEST_CPU_S))
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, resource.RLIM_INFINITY))
        warnings.resetwarnings()
        cli.main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wrong_answer(verb: str, status: int, out: str, told: list[str]) -> str:
    """Return what is wrong with JSON, held to `book/answers.json`, nothing if all is well."""
    try:
        answer = json.loads(out, parse_constant=refuse)
    except ValueError as error:
        return f"no JSON ({error})"
    if status == 2:
        said = {"error": {"message": told[0].removeprefix("error: ")}} if told else {}
        return "" if said.items() <= answer.items() else "another error than on stderr"
    if verb not in ANSWERS:
        return ""
    told_of, seen = (
        json.dumps(schema, indent=0, sort_keys=True).splitlines()
        for schema in (ANSWERS[verb], merged(ANSWERS[verb], schema_of(answer)))
    )
    changed_lines = list(unified_diff(told_of, seen, lineterm=""))
    return "\n".join(["not as the book says", *changed_lines]) if changed_lines else ""


def refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def fault_of(arguments: list[str], folder: Path) -> str:
    """Run a case; return what is wrong with how it ends, nothing if all is well."""
    before = sorted(folder.rglob("*"))
    status, out, err = run_alone(arguments, folder)
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    left = [p.name for p in folder.rglob("*") if p.suffix == ".tmp"]
    if status not in (0, 2):
        return f"status {status}: {err[-3000:]}"
    if "Traceback" in err or left:
        return f"traceback, or half-written {left}: {err[-3000:]}"
    if any(ord(letter) < 32 and letter not in "\n\t" for letter in out + err):
        return f"a raw control character: {(out + err)!r}"[:2000]
    if "--json" in arguments and (wrong := wrong_answer(arguments[0], status, out, told)):
        return f"{out[:500]}: {wrong}"
    if status == 2:
        others = [
            line for line in err.splitlines() if not line.startswith(("warning: ", "error: "))
        ]
        if len(told) != 1 or others or len(err.splitlines()[-1]) > 1000:
            return f"not one short line: {err[-3000:]}"
        if sorted(folder.rglob("*")) != before and arguments[0] not in ("profile", "prove"):
            return f"left {set(folder.rglob('*')) - set(before)}: {err}"
    return ""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Load and compile what verbs need, which a fork then has, and make a sweep to damage."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "f.yaml").write_text(yaml.safe_dump(FLEET))
    (folder / "p.yaml").write_text(yaml.safe_dump(DRAINING))
    (folder / "d.yaml").write_text(yaml.safe_dump(DEMANDS[0]))
    (folder / "s.yaml").write_text(yaml.safe_dump(DESIGN))
    verbs = (
        *(("simulate", folder / name) for name in ("c.yaml", "f.yaml", "p.yaml")),
        *(("recommend", folder / "d.yaml"), ("place", folder / "d.yaml", "--jobs", "1")),
        ("sweep", folder / "s.yaml", "--out", folder / "sweep", "--jobs", "1"),
        ("train", folder / "sweep", "--out", folder / "models", "--jobs", "1"),
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        for verb in verbs:
            with pytest.raises(SystemExit) as ended:
                cli.main([str(word) for word in verb])
            # Where the sound file is refused, no damage to it is seen.
            assert verb[0] != "simulate" or ended.value.code == 0, verb
    return folder / "sweep"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@seed(SEED)
@settings(
    max_examples=CASES,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(chance=st.randoms(use_true_random=False))
def test_damaged_input_ends_well_or_in_one_line(
    kind: str, chance: random.Random, warm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "case" / "in"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    more = [warm] if kind == "sweep_folder" else []
    arguments = KINDS[kind](Hostile(chance, folder), *more)
    fault = fault_of(arguments, folder)
    assert not fault, f"{folder}: adapter-twin {arguments!r}: {fault}"


def test_every_verb_and_option_is_damaged() -> None:
    commands: Any = get_command(cli.app)
    told = {verb: set(line.split()) for verb, line in USUAL.items()}
    assert told.keys() == commands.commands.keys()
    for verb, command in commands.commands.items():
        options = {one.opts[0] for one in command.params if one.param_type_name == "option"}
        assert options - ALONE.keys() <= told[verb], verb


def changed(content: Any, *path: Any, to: Any) -> Any:
    """Return content with one place changed."""
    content = deepcopy(content)
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = to
    return content


CALIBRATION = json_of(datasets.SHIPPED / "calibrations" / "small@cpu-vllm0.32.0.json")
DURATION = ("workload", "duration_s")
HUGE = {"count": 100_000, "request_rates": [10.0], "ranks": [8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(FLEET, *DURATION, to=1e9), ("workload.duration_s", "at most")),
        (changed(FLEET, "engine", "max_num_batched_tokens", to=2**40), ("max_num_batched_tokens",)),
        (changed(FLEET, "workload", "adapters", "count", to=10**12), ("adapters.count", "1e+06")),
        (changed(FLEET, "fleet", "replicas", to=10**9), ("fleet.replicas",)),
        (
            changed(CONFIG, "workload", "adapters", 0, "name", to="-h"),
            ("adapters[0].name", "letters"),
        ),
        (changed(CONFIG, "workload", "adapters", 0, "name", to="../x"), ("adapters[0].name",)),
        (changed(CONFIG, "workload", "lengths", "mean_input_tokens", to=1e300), ("at most 1e+07",)),
        (
            changed(changed(FLEET, "workload", "adapters", to=HUGE), *DURATION, to=3600),
            ("duration_s", "1e+06 requests/s", "GiB"),
        ),
    ],
)
def test_sizes_and_names_are_bounded(
    run: Callable[..., tuple[int, str, str]], content: Any, words: tuple[str, ...]
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(content))
    status, out, err = run("simulate", "c.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("step_time", "terms_", 0, "ms"), float("nan"), "step_time.terms_[0].ms: must be finite"),
        (("step_time", "terms_", 0, "ms"), -1.0, "step_time.terms_[0].ms: must be at least 0"),
        (("step_time", "terms_", 0, "ms"), 1e308, "step_time.terms_[0].ms: must be at most"),
        (("step_time", "terms_", 0, "regime"), 9, "step_time.terms_[0].regime: must be at most 2"),
        (("step_time", "terms_", 0, "feature"), "x", "step_time.terms_[0].feature: must be one of"),
        (("step_time", "token_breaks_"), [9.0, 1.0], "step_time.token_breaks_: must increase"),
        (("loading", "full_slot_ms_"), "fast", "loading.full_slot_ms_: expected a number"),
        (("valid_range", "adapter_slots"), [1], "valid_range.adapter_slots: "),
        (("valid_range",), {}, "valid_range.adapter_slots: missing"),
    ],
)
def test_a_calibration_is_checked_where_it_is_read(
    run: Callable[..., tuple[int, str, str]], path: tuple[Any, ...], value: Any, words: str
) -> None:
    Path("cal.json").write_text(json.dumps(changed(CALIBRATION, *path, to=value)))
    engine = {**ENGINE, "model": "small"}
    Path("c.yaml").write_text(
        yaml.safe_dump({**FLEET, "engine": engine, "calibration": "cal.json"})
    )
    status, out, err = run("simulate", "c.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_aliases_that_stand_for_too_much_are_refused_at_once(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    Path("c.yaml").write_text(BOMB)
    status, _, err = run("simulate", "c.yaml")
    assert status == 2
    assert "its aliases stand for 4e+09 values" in err


def test_what_no_one_foresaw_is_one_line_and_a_traceback_on_demand(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a \x1b[31mfault")

    monkeypatch.setattr("adapter_twin.cli.keys.template", fail)
    status, _, err = run("init", "w.yaml")
    assert (status, err.count("\n")) == (1, 1)
    assert r"(ZeroDivisionError: a \x1b[31mfault); ADAPTER_TWIN_DEBUG=1 shows where" in err
    monkeypatch.setenv("ADAPTER_TWIN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["init", "w.yaml"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemError("in compiled code")])
def test_an_interrupt_is_one_line_wherever_it_comes(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def interrupted(*_: object) -> None:
        raise error from KeyboardInterrupt()

    monkeypatch.setattr("adapter_twin.cli.keys.template", interrupted)
    assert run("init", "w.yaml") == (130, "", "error: interrupted\n")


class Interrupted:
    """Its finalizer is where Ctrl-C comes."""

    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_in_a_finalizer_is_not_lost(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def collected(*_: object) -> str:
        Interrupted()
        time.sleep(5)
        return ""

    monkeypatch.setattr("adapter_twin.cli.keys.template", collected)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        assert run("init", "w.yaml") == (130, "", "error: interrupted\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_placement_takes_the_place_of_the_one_before(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    demand = {**DEMANDS[0], "lengths": LOGNORMAL, "slo": "none"}
    for count, gpus in ((8, "2"), (4, "1")):
        content = {**demand, "adapters": {**DEALT, "count": count}}
        Path("d.yaml").write_text(yaml.safe_dump(content))
        assert run("place", "d.yaml", "--gpus", gpus, "--manifests", "k8s", "--jobs", "1")[0] == 0
    Path("k8s/service.yaml").touch()
    assert sorted(path.name for path in Path("k8s").iterdir()) == [
        "replica-0.yaml",
        "routes.yaml",
        "service.yaml",
    ]


def test_a_refused_sweep_leaves_its_folder_to_the_corrected_one(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    wrong = changed(DESIGN, "factorial", "ranks", to=["8-x"])
    for content, expected in ((wrong, 2), (changed(DESIGN, "name", to="../x"), 2), (DESIGN, 0)):
        Path("s.yaml").write_text(yaml.safe_dump(content))
        assert run("sweep", "s.yaml", "--out", "so", "--jobs", "1")[0] == expected
