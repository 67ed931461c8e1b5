"""Each shipped calibration comes out of its measurements again."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapter_twin import datasets
from adapter_twin.calibration import list_calibrations
from adapter_twin.calibration.calibration import FOLDER
from adapter_twin.calibration.from_tables import calibrate_tables

CAMPAIGNS = Path(__file__).resolve().parents[1] / "data" / "campaigns"
OWN = {"small@cpu-vllm0.32.0": CAMPAIGNS / "cpu-small"}


def numbers(content: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of a JSON document by their path."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    leaves: dict[str, Any] = {}
    for key, value in items:
        place = f"{path}.{key}"
        leaves |= numbers(value, place) if isinstance(value, dict | list) else {place: value}
    return leaves


@pytest.mark.parametrize("name", list_calibrations())
@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_a_shipped_calibration_comes_out_of_its_measurements(name: str) -> None:
    published = datasets.find("runs")
    folder = OWN.get(name) or (published and published.parent)
    if folder is None:
        pytest.skip("the measured tables are not here")
    shipped = json.loads((FOLDER / f"{name}.json").read_text())
    fitted = json.loads(calibrate_tables(folder, shipped["model"]).to_json())
    for content in (shipped, fitted):
        for changing in ("date", "version"):
            del content["provenance"][changing]
    assert numbers(fitted) == pytest.approx(numbers(shipped), rel=1e-6)
