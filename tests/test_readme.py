"""The commands that README.md gives to each kind of user run."""

import re
import shlex
from pathlib import Path

import pytest

from adapter_twin import cli

ROOT = Path(__file__).parents[1]
SECTION = (
    (ROOT / "README.md").read_text().partition("## Which user are you?")[2].partition("\n## ")[0]
)
LINES = [
    line.partition("#")[0].strip() for line in re.findall(r"^    (.+)$", SECTION, re.MULTILINE)
]
COMMANDS = [command.strip() for line in LINES for command in line.split("&&")]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXAMPLES = [
    path.read_text().splitlines()[0].partition(": ")[2] for path in ROOT.glob("examples/*.yaml")
]


def test_each_kind_of_user_has_a_path() -> None:
    assert re.findall(r"^\*\*(.+?)\*\*", SECTION, re.MULTILINE) == [
        "A reviewer",
        "An operator",
        "A reader",
    ]
    assert len(SECTION.splitlines()) < 40


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_has_the_target_and_the_files(command: str) -> None:
    words = command.split()[1:]
    assert {word for word in words if "=" not in word} <= TARGETS
    files = [word.partition("=")[2] for word in words if word.endswith(".yaml")]
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("adapter-twin ")])
def test_the_command_line_runs(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command in EXAMPLES:
        return  # tests/cli/test_cli.py runs every example by that line
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[1:]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr().err
    # What was to be measured before is not there; all else about the call is right.
    assert ended.value.code == 0 or said.startswith(f"error: {arguments[1]}: no such folder")


def test_nothing_else_is_asked() -> None:
    kinds = {command.split()[0] for command in COMMANDS}
    assert kinds == {"make", "adapter-twin", "."}


def test_the_run_made_by_hand_is_as_told(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    *lines, last = code.group(1).splitlines()
    exec("\n".join([*lines, f"print({last})"]), {})
    assert "worst_adapter_mean_ttft_ms" in capsys.readouterr().out
