"""What ``--json`` prints is as the book's page tells: keys, types, and one page for all verbs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from adapter_twin import cli
from adapter_twin.cli.keys import READS, keys_of
from adapter_twin.tables import datasets
from book.answers import CALLS, TARGET, merged, schema, schema_of

command_line = pytest.importorskip("book.command_line", exc_type=ImportError)  # needs docutils
file_rows, json_rows = command_line.file_rows, command_line.json_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*is (an extrapolation|a prior)")

PAGE = (datasets.REPOSITORY / "book/api/command_line.rst").read_text()


@pytest.mark.parametrize("verb", sorted(CALLS))
def test_json_has_the_recorded_keys_and_types(verb: str) -> None:
    """Where a key is new: ``python -m book.answers``; where one is gone: a new SCHEMA_VERSION."""
    here = Path.cwd()
    assert schema(verb) == json.loads(TARGET.read_text())[verb]
    assert Path.cwd() == here


def test_every_verb_with_json_and_every_file_is_on_the_page() -> None:
    verbs: Any = get_command(cli.app)
    with_json = {
        name
        for name, verb in verbs.commands.items()
        if any("--json" in option.opts for option in verb.params)
    }
    told = set(re.findall(r"``(\w+)``", PAGE))
    assert with_json <= told
    assert set(re.findall(r"json-keys:: (\w+)", PAGE)) == set(CALLS)
    shown = set(re.findall(r"file-keys:: (\w+)", PAGE))
    assert {READS[verb] for verb in shown} == set(READS.values())


def test_a_schema_allows_what_was_seen_and_no_more() -> None:
    one = {"a": 1, "rows": [{"b": 1.5}, {"b": None, "c": "x"}], "by_rank": {"8": 1, "16": 2}}
    found = merged(schema_of(one), schema_of({"a": 2.5, "rows": [], "by_rank": {}}))
    assert found["properties"]["a"]["type"] == ["number"]
    assert found["required"] == ["a", "by_rank", "rows"]
    rows = found["properties"]["rows"]["items"]
    assert rows["properties"]["b"]["type"] == ["null", "number"]
    assert rows["required"] == ["b"]
    assert found["properties"]["by_rank"]["additionalProperties"] == {"type": ["integer"]}


def test_the_tables_tell_places_kinds_units_and_defaults() -> None:
    files = {name: told for name, *told in file_rows(keys_of("recommend"))}
    assert files["adapters[].rank"][:2] == ["whole number ≥ 1", "none, needed"]
    assert files["engine.gpu_memory_utilization"][:2] == ["number > 0, ≤ 1", "0.9"]
    assert files["lengths.distribution"][0] == "sharegpt or lognormal or fixed"
    assert "percent" in files["slo.percentile"][2]
    rows = {name: told for name, *told in json_rows(json.loads(TARGET.read_text())["place"])}
    assert rows["replicas[].mean_ttft_ms"] == ["number", "ms"]
    assert rows["replicas[].utilisation"] == ["number", "share of 1"]
    assert rows["replicas[].slo_attainment"][0] == "number, not always there"
