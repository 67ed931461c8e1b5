"""What the chapter on limits counts, on made-up tables and on the recorded campaign."""

import numpy as np
import pandas as pd
import pytest

from adapter_twin.laws import list_calibrations, load_calibration
from adapter_twin.plan.steady_state import TWIN_ERROR
from adapter_twin.service.predict import predict
from adapter_twin.service.validate import FIGURES
from adapter_twin.tables import datasets
from study import ch14_limits
from study.ch01_to_06 import configurations

LLAMA = "llama-3.1-8b-instruct"
CAMPAIGN = datasets.REPOSITORY / "data" / "campaigns" / "cpu-small"


def measured(ratio: list[float]) -> pd.DataFrame:
    """Return runs that serve so much of their load."""
    return pd.DataFrame(
        {
            "run_id": [f"{i}" for i in range(len(ratio))],
            "model": LLAMA,
            "campaign": "made up",
            "rates_per_adapter": "1",
            "ranks": "8",
            "status": "ok",
            "client_collapsed": False,
            "waiting_mean": 0.0,
            "offered_request_rate": 1.0,
            "mean_input_tokens": 100.0,
            "mean_requested_output_tokens": 100.0,
            "total_throughput": [200 * share for share in ratio],
            "mean_itl_ms": 10.0,
            "mean_tpot_ms": 10.0,
        }
    )


def test_each_calibration_tells_its_range() -> None:
    ranges = ch14_limits.valid_ranges()
    assert set(ranges["calibration"]) == set(list_calibrations())
    assert (ranges["low"] <= ranges["high"]).all()


def test_a_refit_sees_nothing_beyond_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    class Law(ch14_limits.MemoryLaw, ch14_limits.RooflineLaw):
        version = "0.8.5"

        def __init__(self, *_: object) -> None: ...

        def fit(self, given: object, *_: object) -> "Law":
            seen[len(seen)] = given
            return self

    monkeypatch.setattr(ch14_limits, "MemoryLaw", Law)
    monkeypatch.setattr(ch14_limits, "RooflineLaw", Law)
    monkeypatch.setattr(ch14_limits, "step_observations", lambda tables, *_: tables)
    monkeypatch.setattr(
        ch14_limits,
        "without_copies",
        lambda law, tables, runs, jobs, prior: seen.update(again=runs) or law,
    )
    slots = pd.DataFrame({"adapter_slots": [8, 32, 64], "model": LLAMA})
    runs = slots.assign(status="ok", client_collapsed=False)
    tables = {"memory": slots, "runs": runs, "base_steps": pd.DataFrame({"ms": [1, 2]})}
    calibration = load_calibration("auto", LLAMA)
    refit = ch14_limits.refit_below(calibration, tables, ("adapter_slots", 32))
    memory, observed, again = seen.values()
    assert again["adapter_slots"].tolist() == [8, 32]
    assert memory["adapter_slots"].tolist() == observed["runs"]["adapter_slots"].tolist() == [8, 32]
    assert len(observed["base_steps"]) == 2
    assert isinstance(refit.step_time, Law)
    assert refit.lengths is calibration.lengths


def test_runs_beyond_a_cut_are_scored_with_both_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = configurations(LLAMA, [64], [16, 32, 64], duration_s=120.0)
    seen = predict(asked, observer=True, jobs=1)
    runs = measured([1.0, 1.0, 1.0]).assign(**asked.to_dict("series"))
    runs = runs.drop(columns=list(FIGURES), errors="ignore").join(seen[list(FIGURES)])
    # the refit is the calibration itself here: it errs like the one that has seen the runs
    monkeypatch.setattr(ch14_limits, "refit_below", lambda calibration, *_: calibration)
    table = ch14_limits.extrapolation({}, runs, seen, [("adapter_slots", 16)], jobs=1)
    assert sorted(set(table["times"])) == [2.0, 4.0]
    assert table["n_runs"].tolist() == [1] * len(table)
    assert table["left_out"].tolist() == table["seen"].tolist()


def test_seeds_part_at_the_knee() -> None:
    table = ch14_limits.seed_spread(LLAMA, 32, [0.5, 1.0], range(3))
    assert table["utilisation"].to_list() == pytest.approx([0.5, 1.0], rel=0.01)
    assert (table["low"] <= table["middle"]).all()
    assert table["spread"].iloc[0] < 1.1 < table["spread"].iloc[1]


def test_a_run_is_covered_up_to_the_twins_own_error() -> None:
    runs = measured([1.0, 1.0, 1.0, 0.5])
    edge = 1 + TWIN_ERROR["total_throughput"]
    factor = np.array([0.999 * edge, 1.001 * edge, 1 / (0.999 * edge), 1.0])
    predicted = runs.assign(total_throughput=runs["total_throughput"] * factor)
    table = ch14_limits.coverage(runs, predicted).set_index(["figure", "regime"])
    assert table.loc[("total_throughput", "all"), "covered"] == 75
    assert table.loc[("total_throughput", "light"), "covered"] == pytest.approx(200 / 3)
    assert table.loc[("total_throughput", "starved"), "covered"] == 100
    assert table.loc[("total_throughput", "light"), "needed"] == pytest.approx(
        100 * (1.001 * edge - 1), rel=0.01
    )
    assert table.loc[("mean_itl_ms", "all"), "n_runs"] == 4


def test_errors_are_told_for_every_regime_there_is() -> None:
    runs = measured([1.0, 0.5, 0.5]).assign(client_collapsed=[False, False, True])
    predicted = runs.assign(mean_itl_ms=[11.0, 12.0, 10.0])
    table = ch14_limits.errors_by_regime(runs, predicted)
    itl = table[table["figure"] == "mean_itl_ms"].set_index("regime")
    assert itl["median_error"].to_dict() == pytest.approx(
        {"light": 10.0, "starved": 20.0, "client collapsed": 0.0}
    )


def test_parts_of_a_campaign_are_smaller_and_judged_by_the_same_runs() -> None:
    table = ch14_limits.learning_curve(datasets.read_campaign(CAMPAIGN), [0.1], draws=1)
    whole = table[table["share"] == 1].iloc[0]
    assert set(table["part"]) == {"batches", "engines"}
    assert table.loc[table["share"] < 1, "steps"].max() < whole["steps"]
    assert table.loc[table["share"] == 0.1, "steps"].iloc[0] < 0.2 * whole["steps"]
    assert whole["mean_itl_ms"] < 15
