"""Each shipped calibration comes out of its measurements again."""

import json
from dataclasses import replace
from typing import Any

import pytest

from adapter_twin.calibrate.from_tables import calibrate_tables
from adapter_twin.calibrate.published_fit import TABLES, fitted_runs, unsaturated_runs
from adapter_twin.laws import Calibration, list_calibrations, load_calibration
from adapter_twin.laws.emitted_lengths import EarlyStopLaw, LengthLaw
from adapter_twin.laws.loading import LoadingLaw
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.scheduling import SchedulingLaw, of_scheduler_runs
from adapter_twin.tables import datasets
from adapter_twin.workload.calibration_files import FOLDER
from adapter_twin.workload.models import model_shape

DATA = datasets.REPOSITORY / "data"
OWN = {"small@cpu-vllm0.32.0": DATA / "campaigns" / "cpu-small"}
PUBLISHED = [name for name in list_calibrations() if name not in OWN]


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


def assert_refitted(fitted: Calibration, name: str, rel: float = 1e-6) -> None:
    """Compare with what is shipped: numbers by value, all else to the letter."""
    shipped, found = json.loads((FOLDER / f"{name}.json").read_text()), json.loads(fitted.to_json())
    for content in (shipped, found):
        for changing in ("date", "version"):
            del content["provenance"][changing]
        del content["off_by"]  # left-out workloads tell it, see `study.left_out`
    ours, theirs = leaves(found), leaves(shipped)
    assert ours.keys() == theirs.keys()
    numbers = [place for place, leaf in theirs.items() if isinstance(leaf, int | float)]
    for place in theirs.keys() - numbers:
        assert ours[place] == theirs[place], place
    assert [ours[place] for place in numbers] == pytest.approx(
        [theirs[place] for place in numbers], rel=rel
    )


@pytest.mark.parametrize("name", OWN)
def test_a_calibration_comes_out_of_its_campaign(name: str) -> None:
    assert_refitted(calibrate_tables(OWN[name]), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_a_calibration_comes_out_of_the_published_tables(name: str) -> None:
    runs = datasets.find("runs")
    assert runs is not None
    # Fitted step by step through simulations, where another processor's rounding shows.
    assert_refitted(calibrate_tables(runs.parent, name.partition("@")[0]), name, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_laws_that_take_no_simulation_come_out_of_the_published_tables(name: str) -> None:
    model = name.partition("@")[0]
    shipped, tables = load_calibration(name, model), {one: datasets.load(one) for one in TABLES}
    runs, windows = tables["runs"], tables["windows"]
    light = unsaturated_runs(fitted_runs(runs[runs.model == model]))
    busy = windows[windows.run_id.isin(light.run_id) & (windows.running > 5)]
    lengths = LengthLaw(shipped.lengths.longest_output).fit(datasets.sharegpt_lengths(), busy)
    lengths.throughput_error_percent_ = shipped.lengths.throughput_error_percent_
    refitted = replace(
        shipped,
        memory=MemoryLaw(model_shape(model), "0.8.5", 63.43).fit(
            tables["memory"].query("model == @model")
        ),
        loading=LoadingLaw(model).fit(tables["adapter_loads"]),
        scheduling=SchedulingLaw().fit(of_scheduler_runs(tables["scheduler_runs"])),
        early_stop=EarlyStopLaw().fit(light, tables["series"]),
        lengths=lengths,
    )
    assert_refitted(refitted, name)
