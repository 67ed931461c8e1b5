"""A step of `make reproduce` says how far it is, and how to go on where it was stopped."""

import signal
import subprocess
import sys

import pytest

from adapter_twin.tables import datasets
from book import run

SLEEP = "import time; print('asleep', flush=True); time.sleep({})"


def test_the_rest_is_what_was_recorded_of_this_step_and_of_those_after_it() -> None:
    usual_s = {"01_problem": 600.0, "explorer": 60.0, "book": 120.0}
    assert run.left("explorer", usual_s, 30.0) == " of about 60 s; 2 min left in all"
    assert run.left("explorer", usual_s, 500.0) == " of about 60 s; 2 min left in all"
    assert run.left("02_how_vllm_serves", usual_s, 1.0) == ""


def test_a_step_is_told_of_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "EVERY_S", 0.2)
    status, _ = run.run("01_problem", [sys.executable, "-c", SLEEP.format(1)], {})
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert len(lines) > 3
    assert lines[0] == f"[ 1/{len(run.STEPS)}] 01_problem: 0 s"
    assert lines[-1].startswith(f"[ 1/{len(run.STEPS)}] 01_problem: done after ")


def test_times_are_kept_in_the_order_of_the_steps(tmp_path) -> None:
    path = tmp_path / "timings" / "usual.csv"
    for step, seconds in (("book", 3.0), ("01_problem", 1.0), ("book", 2.0)):
        run.write_time(path, step, seconds)
    rows = run.read_times(path)
    assert {step: row["seconds"] for step, row in rows.items()} == {
        "01_problem": "1.0",
        "book": "2.0",
    }
    assert list(rows) == ["01_problem", "book"]


def test_a_step_that_fails_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert run.main("book", "quick", sys.executable, "-c", "raise SystemExit(3)") == 3
    assert "`make book QUICK=1` goes on" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_stopped_takes_its_command_along() -> None:
    command = [sys.executable, "-m", "book.run", "book", "usual"]
    step = subprocess.Popen(
        [*command, sys.executable, "-c", SLEEP.format(60)],
        cwd=datasets.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert step.stdout is not None
    for line in step.stdout:
        if line == "asleep\n":
            break
    step.terminate()
    told, how = step.communicate(timeout=20)  # both ends of the pipes closed: the command is gone
    assert "stopped after" in told
    assert "`make book` goes on from here" in how
    assert step.returncode != 0


def test_small_and_full_version_at_once_are_refused() -> None:
    made = subprocess.run(
        ["make", "-n", "reproduce", "QUICK=1", "FULL=1"],
        cwd=datasets.REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 2
    assert "QUICK=1 and FULL=1: choose one" in made.stderr
