"""Each shipped calibration comes out of its measurements again."""

import json
from typing import Any

import pytest

from adapter_twin.calibrate.from_tables import calibrate_tables
from adapter_twin.laws import list_calibrations
from adapter_twin.laws.calibration import FOLDER
from adapter_twin.tables import datasets

DATA = datasets.REPOSITORY / "data"
OWN = {"small@cpu-vllm0.32.0": DATA / "experiments" / "campaigns" / "cpu-small"}


def leaves(content: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of a JSON document by their path."""
    if not isinstance(content, dict | list):
        return {path: content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    return {
        place: leaf
        for key, value in items
        for place, leaf in leaves(value, f"{path}.{key}").items()
    }


@pytest.mark.parametrize("name", list_calibrations())
@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_a_shipped_calibration_comes_out_of_its_measurements(name: str) -> None:
    folder = OWN.get(name, DATA / datasets.DATASET)
    shipped = json.loads((FOLDER / f"{name}.json").read_text())
    fitted = json.loads(calibrate_tables(folder, shipped["model"]).to_json())
    for content in (shipped, fitted):
        for changing in ("date", "version"):
            del content["provenance"][changing]
    ours, theirs = leaves(fitted), leaves(shipped)
    assert ours.keys() == theirs.keys()
    numbers = [place for place, leaf in theirs.items() if isinstance(leaf, int | float)]
    for place in theirs.keys() - numbers:
        assert ours[place] == theirs[place], place
    assert [ours[place] for place in numbers] == pytest.approx(
        [theirs[place] for place in numbers], rel=1e-6
    )
