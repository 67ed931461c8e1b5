"""A release says the same of itself everywhere, and the checks run what the Makefile has."""

import re
import tomllib
from typing import Any

import pytest
import yaml

from adapter_twin import __version__
from adapter_twin.tables import datasets

ROOT = datasets.REPOSITORY
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
WORKFLOW, SUPPLY_CHAIN = WORKFLOWS["ci"], WORKFLOWS["supply-chain"]
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
EVERY_STEP = [
    step
    for workflow in WORKFLOWS.values()
    for job in workflow["jobs"].values()
    for step in job["steps"]
]


def released() -> dict[str, str]:
    """The dates of the versions in the changelog, the last one first."""
    return dict(re.findall(r"^## (\d\S*) - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE))


def test_the_version_is_written_once_and_cited_as_it_is() -> None:
    assert __version__ == PROJECT["version"] == CITATION["version"]


def test_the_date_of_the_citation_is_that_of_the_changelog() -> None:
    date = CITATION.get("date-released")
    assert (None if date is None else str(date)) == released().get(__version__)


def test_the_changelog_begins_with_what_is_not_released_yet_and_is_in_order() -> None:
    headings = re.findall(r"^## (\S+)", CHANGELOG, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:] == list(released())
    assert sorted(released().values(), reverse=True) == list(released().values())


@pytest.mark.parametrize(
    "file", [".ci/run", *(f".github/workflows/{name}.yml" for name in WORKFLOWS)]
)
def test_the_targets_that_are_run_are_in_the_makefile(file: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    calls = re.findall(r"\bmake((?: [a-z-]+)+)", (ROOT / file).read_text())
    asked = {target for call in calls for target in call.split()}
    assert asked
    assert asked <= targets


def test_the_workflow_runs_what_a_fresh_clone_must_pass_once() -> None:
    runs = [step["run"] for step in STEPS if "run" in step]
    assert runs.count(".ci/run") == 1
    assert all(run == ".ci/run" or re.fullmatch(r"make( [a-z-]+)+", run) for run in runs)


def test_the_workflow_may_read_and_only_the_publishing_job_may_more() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    allowed = {name: job["permissions"] for name, job in JOBS.items() if "permissions" in job}
    assert allowed == {"publish": {"pages": "write", "id-token": "write"}}
    assert set(JOBS["publish"]["needs"]) == set(JOBS) - {"publish"}


def test_a_release_is_audited_listed_and_attested_before_it_is_handed_out() -> None:
    assert SUPPLY_CHAIN["permissions"] == {"contents": "read"}
    audit, build = (SUPPLY_CHAIN["jobs"][name] for name in ("audit", "build"))
    assert [step["run"] for step in audit["steps"] if "run" in step] == ["make audit"]
    assert "permissions" not in audit
    assert (build["needs"], build["if"]) == ("audit", "startsWith(github.ref, 'refs/tags/v')")
    assert build["permissions"]["attestations"] == build["permissions"]["id-token"] == "write"
    done = [step.get("run") or step["uses"].partition("@")[0] for step in build["steps"]]
    order = ["make build", "actions/attest-build-provenance", "actions/upload-artifact"]
    assert [step for step in done if step in order] == order
    (written,) = {
        step["with"]["path"] for step in audit["steps"] if "upload" in step.get("uses", "")
    }
    assert f"--output-file {written}" in (ROOT / "Makefile").read_text()


def test_dependabot_watches_what_the_workflows_and_the_package_use() -> None:
    watched = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())
    assert watched["version"] == 2
    kinds = {update["package-ecosystem"] for update in watched["updates"]}
    assert kinds == {"github-actions", "pip"}


def test_actions_are_pinned_to_a_major_version() -> None:
    used = [step["uses"] for step in EVERY_STEP if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in used)


def test_the_pythons_are_those_that_the_package_supports() -> None:
    setups = [step["with"]["python-version"] for step in STEPS if "python" in step.get("uses", "")]
    versions = {*JOBS["test"]["strategy"]["matrix"]["python"], *setups} - {"${{ matrix.python }}"}
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert min(versions, key=lambda version: int(version.split(".")[1])) == oldest
