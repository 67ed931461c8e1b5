"""The file of a calibration: it survives being read, and a wrong one is refused by its field."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws.calibration import Calibration
from adapter_twin.workload.calibration_files import FOLDER

SHIPPED = sorted(FOLDER.glob("*.json"))
MISSING = object()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_calibration_is_written_as_it_was_read(path: Path) -> None:
    assert Calibration.from_json(path).to_json() == path.read_text()


@pytest.mark.parametrize(
    ("law", "field", "value", "complaint"),
    [
        ("memory", "reserve_gib_", "38", r"memory\.reserve_gib_: expected a number"),
        ("memory", "max_model_len_", 1.5, r"memory\.max_model_len_: expected a whole number"),
        ("memory", "slots_", "segment", r"memory\.slots_: .*did you mean 'segments'"),
        ("memory", "reserve_gib_interval_", [1.0], r"memory\.reserve_gib_interval_\[1\]: miss"),
        ("loading", "read_ms_", MISSING, r"loading\.read_ms_: missing"),
        ("lengths", "rank_corelation_", -0.3, r"lengths\.rank_corelation_: unknown key"),
        ("scheduling", "base_ms_", float("nan"), r"scheduling\.base_ms_: must be finite"),
        ("step_time", "constants_", 128, r"step_time\.constants_: expected "),
        ("step_time", "constants_", {"knee": "2"}, r"step_time\.constants_\.knee: expected a num"),
        ("step_time", "constants_", {"knee": 0.0}, r"step_time\.constants_\.knee: must be above"),
        ("step_time", "constants_", {"knee": 2.0}, r"step_time\.constants_\.\w+: missing"),
    ],
)
def test_a_wrong_field_of_a_law_is_named(
    law: str, field: str, value: Any, complaint: str, tmp_path: Path
) -> None:
    content = json.loads(SHIPPED[0].read_text())
    content[law][field] = value
    if value is MISSING:
        del content[law][field]
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(content))
    with pytest.raises(AdapterTwinError, match=f"is no calibration .{complaint}") as caught:
        Calibration.from_json(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"name": "x"}'])
def test_a_file_that_is_no_calibration_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(AdapterTwinError, match="is no calibration"):
        Calibration.from_json(path)
