"""Keys of files: what `init` writes runs, and its comments are the code's own words."""

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from adapter_twin.cli.keys import READS, START, Key, keys_of
from adapter_twin.plan.demand import Demand, load_demand
from adapter_twin.workload.engine_config import ServeFlags
from adapter_twin.workload.files import load_scenario
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.traffic import Sessions

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")

Cli = Callable[..., tuple[int, str, str]]


def all_on(text: str) -> str:
    """Take the # away from the keys of a file, as its second line says."""
    return re.sub(r"^( *)#(?! \S)", r"\1", text, flags=re.MULTILINE)


def names(keys: tuple[Key, ...]) -> Iterator[str]:
    for key in keys:
        yield key.name
        yield from names(key.keys)


@pytest.mark.parametrize("verb", sorted(START))
def test_what_init_writes_runs_as_it_is(run: Cli, verb: str) -> None:
    assert run("init", "mine.yaml", "--kind", verb)[0] == 0
    first = Path("mine.yaml").read_text().splitlines()[0]
    assert first == f"# For: adapter-twin {verb} mine.yaml"
    assert run(*first.split()[3:], "--json")[0] == 0


def test_init_writes_over_a_file_only_when_told(run: Cli) -> None:
    Path("workload.yaml").write_text("kept")
    status, _, err = run("init")
    assert (status, Path("workload.yaml").read_text()) == (2, "kept")
    assert "--force" in err
    assert run("init", "--force")[0] == 0
    assert load_demand("workload.yaml").model
    assert run("init", "workload.json")[0] == 2


def test_a_key_that_is_off_shows_its_default(run: Cli) -> None:
    run("init")
    text = Path("workload.yaml").read_text()
    Path("on.yaml").write_text(all_on(text))
    keys = {f.name for f in fields(Demand)} - {"trace"}
    keys |= {"gpu", "request_log", "sessions", "samples"}
    assert set(yaml.safe_load(all_on(text))) == keys
    assert load_demand("on.yaml") == load_demand("workload.yaml")
    run("init", "simulate.yaml", "--kind", "simulate")
    text = all_on(Path("simulate.yaml").read_text()).replace("turns: null", "turns: 2")
    Path("on.yaml").write_text(text)
    on, off = load_scenario("on.yaml"), load_scenario("simulate.yaml")
    assert on.workload.sessions == Sessions(turns=2)
    assert replace(on.workload, sessions=None) == off.workload
    assert (on.engine, on.slo) == (off.engine, off.slo)


def test_every_key_stands_behind_what_its_docstring_says(run: Cli) -> None:
    run("init")
    text = Path("workload.yaml").read_text()
    assert re.search(r"# GPUs that share every layer\.\n#  tensor_parallel_size: 1\n", text)
    assert re.search(r"# Limit on the time to first token\.\n  ttft_ms: 2000\n", text)
    assert re.search(r"auto is the model's own\. \(auto \| fp8\)", text)
    assert "zipf_exponent" in text
    assert "`" not in text


def test_keys_are_the_attributes_and_what_loaders_take_besides() -> None:
    engine = {key.name: key for key in keys_of("recommend")}["engine"]
    told = {key.name for key in engine.keys}
    assert told == {*(flag.name for flag in fields(ServeFlags)), "defaults"}
    scenario = {key.name: key for key in keys_of("simulate")}
    assert "policy" not in scenario
    assert "policy" in {key.name for key in scenario["engine"].keys}
    assert [key.name for key in keys_of("optimum")] == [field.name for field in fields(Slo)]


@pytest.mark.parametrize("verb", sorted(READS))
def test_help_names_the_keys_of_the_file(run: Cli, verb: str) -> None:
    status, out, _ = run(verb, "--help")
    assert status == 0
    told = out.partition("Keys of the YAML file")[2]
    assert set(names(keys_of(verb))) <= set(re.findall(r"\w+", told))
