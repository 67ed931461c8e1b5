"""Recorded tables that take long to make are what the code makes, by a row each."""

from itertools import islice

import pandas as pd
import pytest

from adapter_twin.calibrate.published_fit import TABLES
from adapter_twin.laws import load_calibration
from adapter_twin.learn.design import load_design
from adapter_twin.plan.criterion import MARGIN, Criterion
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.service.predict import predict
from adapter_twin.tables import datasets
from study import ch08_to_10, ch08_window, ch12_fleets, ch14_limits
from study.ch11_sensitivity import FACTORS
from study.placement_scenarios import MODEL, scenarios
from study.results import read_expected

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is an extrapolation"),
]


def assert_recorded(made: pd.DataFrame, name: str, by: list[str]) -> None:
    """Find each row of a table among the recorded ones, to the digits that are kept."""
    keys = made[by].reset_index(drop=True)
    found = keys.merge(read_expected(name), on=by, how="left")
    made = made[list(found)].reset_index(drop=True)
    pd.testing.assert_frame_equal(made, found, check_dtype=False, rtol=1e-5)


@pytest.mark.parametrize(("name", "fail"), [("routers", False), ("routers_failure", True)])
def test_routers(name: str, fail: bool) -> None:
    made = ch12_fleets.compare_routers(
        ch12_fleets.GPUS, 75.0, range(3), 1200.0, fail=fail, routers=["placed"]
    )
    assert_recorded(made, name, ["router"])


def test_placements() -> None:
    made = ch12_fleets.compare_placements(islice(scenarios(), 2, 3))
    assert_recorded(made, "placements", ["name"])


def test_homes_chosen_anew() -> None:
    kinds = {"steady": ch12_fleets.KINDS["steady"]}
    laws = warmed_up(load_calibration("auto", MODEL))
    made = ch12_fleets.how_often(laws, kinds, [None], range(3))
    assert_recorded(made, "drift", ["traffic", "every_s"])


def test_windows() -> None:
    workloads = load_design(datasets.REPOSITORY / "experiments/designs/paper.yaml").workloads()
    chosen = workloads.query("model == @ch08_to_10.LLAMA").iloc[::105]
    laws = load_calibration("auto", ch08_to_10.LLAMA)
    runs = ch08_window.repeat_windows(chosen, laws, [600.0], range(6))
    made = ch08_window.by_window(ch08_window.judge(runs, Criterion(margin=MARGIN)))
    # The other columns ask the longest windows.
    recorded = read_expected("windows").set_index("duration_s")
    scatter = recorded.throughput_scatter[600.0]
    assert made.throughput_scatter.tolist() == pytest.approx([scatter], rel=1e-5)


def test_errors_by_regime() -> None:
    runs = datasets.load("runs").query("status == 'ok' and client_collapsed").iloc[::12]
    made = ch14_limits.errors_by_regime(runs, predict(runs))
    assert_recorded(made, "errors_by_regime", ["figure", "regime"])


def test_extrapolation() -> None:
    tables = {name: datasets.load(name) for name in TABLES}
    clean = tables["runs"].query("status == 'ok' and not client_collapsed")
    runs = clean.query("model == @ch08_to_10.LLAMA and adapter_slots == 192")
    made = ch14_limits.extrapolation(tables, runs, predict(runs), [("adapter_slots", 32)])
    assert_recorded(made, "extrapolation", ["model", "column", "highest", "value", "figure"])


@pytest.mark.parametrize("name", ["sobol_knee", "sobol_light"])
def test_sobol_indices_are_of_the_factors(name: str) -> None:
    for _, indices in read_expected(name).groupby("answer"):
        assert indices.factor.tolist() == list(FACTORS)
