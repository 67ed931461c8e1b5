"""Policies by name: in a configuration, as an option, and where none can be honoured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.routers import ROUTERS
from adapter_twin.plan.demand import load_demand
from adapter_twin.service.predict import predict
from adapter_twin.twin.policies import POLICIES, Drain, Policy, UnifiedPool, make_policy
from adapter_twin.workload.files import load_scenario
from adapter_twin.workload.named import parse_named

EXAMPLES = Path(__file__).parents[2] / "examples"


def written(path: Path, **engine: Any) -> Path:
    content = yaml.safe_load((EXAMPLES / "simulate.yaml").read_text())
    content["engine"] |= engine
    content["workload"]["duration_s"] = 30
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_policy_is_a_name_or_a_name_with_parameters() -> None:
    assert make_policy("unified_pool") == UnifiedPool()
    assert make_policy({"name": "drain", "max_wait_s": 5}) == Drain(max_wait_s=5)
    assert make_policy("adapter_twin.twin.policies:UnifiedPool") == UnifiedPool()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("drian", r"policy\.name: unknown name 'drian'; did you mean 'drain'\?"),
        ("drain", r"policy\.max_wait_s: missing; add this key"),
        ({"max_wait_s": 5}, r"policy\.name: give one of vllm, drain, .* or module:Class"),
        ({"name": "drain", "wait_s": 5}, r"policy\.wait_s: unknown key; did you mean 'max_wait_s'"),
        ({"name": "drain", "max_wait_s": -1}, r"policy\.max_wait_s: must be at least 0"),
        ("nowhere:Policy", r"No module named 'nowhere'; put its folder on PYTHONPATH"),
        ("json:Policy", r"json:Policy: module 'json' has no attribute 'Policy'"),
        ("json:JSONEncoder", r"json:JSONEncoder does not inherit from Policy"),
    ],
)
def test_a_policy_that_cannot_be_made_is_refused_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(AdapterTwinError, match=message) as caught:
        make_policy(given)
    assert "\n" not in str(caught.value)


def test_every_name_stands_for_one_class() -> None:
    assert len(set(POLICIES.values())) == len(POLICIES)
    assert len(set(ROUTERS.values())) == len(ROUTERS)


def test_the_option_takes_the_place_of_the_configurations_policy(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    config = str(written(tmp_path / "config.yaml", policy={"name": "drain", "max_wait_s": 5}))
    status, out, error = run("simulate", config, "--json")
    assert (status, "Drain(max_wait_s=5.0, tolerance=1.2)" in out) == (0, True), error
    status, out, _ = run("simulate", config, "--json", "--policy", "drain max_wait_s=7 tolerance=0")
    assert (status, "Drain(max_wait_s=7.0, tolerance=0.0)" in out) == (0, True)
    assert '"policy"' not in run("simulate", config, "--json", "--policy", "vllm")[1]
    status, _, error = run("simulate", config, "--policy", "merge switch_s")
    assert (status, error[:44]) == (2, "error: engine.policy.switch_s: expected a nu")


def test_a_policy_beside_the_engine_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "config.yaml")
    file.write_text(f"{file.read_text()}\npolicy: drain\n")
    with pytest.raises(AdapterTwinError, match=r"policy: unknown key; did you mean engine\.policy"):
        load_scenario(file)
    assert make_policy(load_scenario(written(file)).policy) == Policy()


def test_what_cannot_honour_a_policy_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError, match=r"policy: a table of runs is predicted for vLLM's"):
        predict(pd.DataFrame({"policy": ["drain"]}))
    file = tmp_path / "place.yaml"
    file.write_text((EXAMPLES / "place.yaml").read_text() + "\npolicy: drain\n")
    with pytest.raises(AdapterTwinError, match="policy: unknown key"):
        load_demand(file)


def test_an_option_without_a_name_is_refused() -> None:
    with pytest.raises(AdapterTwinError, match="unknown name ''"):
        make_policy(parse_named(""))
