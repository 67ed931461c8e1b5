"""Intervals: a run's own spread, and how many of them the twin has been off."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.random import default_rng

from adapter_twin import load_calibration
from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import Calibration
from adapter_twin.laws.roofline import DRAWS, RooflineLaw
from adapter_twin.service.intervals import (
    LEAST_SPREAD,
    interval,
    multiples,
    regime_of,
    replication,
    spread_of,
)
from adapter_twin.service.predict import predict
from adapter_twin.service.validate import LIGHT, NEAR_SATURATION, STARVED
from adapter_twin.tables.schemas import WITH_INTERVALS

LLAMA = "llama-3.1-8b-instruct"
MEASURED = Path(__file__).parents[2] / "data" / "agullo2025" / "runs.parquet"


@pytest.fixture
def calibration() -> Calibration:
    return load_calibration("auto", LLAMA)


def a_prediction(**figures: object) -> dict[str, object]:
    return {
        "starved": False,
        "mean_ttft_ms": 60.0,
        "median_itl_ms": 20.0,
        **dict.fromkeys(LEAST_SPREAD, 100.0),
        **figures,
    }


def test_a_table_has_the_figures_that_have_intervals() -> None:
    assert tuple(LEAST_SPREAD) == WITH_INTERVALS


def test_the_spread_is_that_of_the_replications_and_never_none() -> None:
    one = a_prediction()
    alike = pd.DataFrame([one] * 4)
    assert spread_of(one, alike) == LEAST_SPREAD
    apart = alike.assign(mean_itl_ms=[80.0, 125.0, 80.0, 125.0])
    spread = spread_of(one, apart)["mean_itl_ms"]
    assert spread == pytest.approx(math.hypot(0.02, math.log(1.25)))


def test_a_regime_is_told_from_the_prediction_alone() -> None:
    assert regime_of(a_prediction(starved=True)) == STARVED
    assert regime_of(a_prediction(mean_ttft_ms=1000.0)) == NEAR_SATURATION
    assert regime_of(a_prediction()) == LIGHT


def test_an_interval_is_as_wide_as_its_regime_was_off(calibration: Calibration) -> None:
    off_by = dict.fromkeys([LIGHT, STARVED, NEAR_SATURATION], dict.fromkeys(LEAST_SPREAD, 2.0))
    off_by[LIGHT] = {**off_by[LIGHT], "p99_itl_ms": 3.0}
    told = replace(calibration, off_by=off_by)
    ends = interval(a_prediction(), pd.DataFrame([a_prediction()]), told)
    assert ends["mean_itl_ms_high"] == pytest.approx(100 * math.exp(2 * 0.02))
    assert ends["mean_itl_ms_low"] == pytest.approx(100 * math.exp(-2 * 0.02))
    assert ends["p99_itl_ms_high"] == pytest.approx(100 * math.exp(3 * 0.08))


def test_without_known_errors_intervals_are_refused(calibration: Calibration) -> None:
    unknown = replace(calibration, off_by={})
    with pytest.raises(AdapterTwinError, match=r"^intervals: how far llama.*leave them out$"):
        interval(a_prediction(), pd.DataFrame([a_prediction()]), unknown)


def test_each_replication_has_laws_of_its_own_and_the_same_for_all(
    calibration: Calibration,
) -> None:
    law = calibration.step_time
    assert isinstance(law, RooflineLaw)
    assert {len(draws) for draws in law.draws_.values()} == {DRAWS}
    first, again, second = (replication(calibration, i).step_time for i in (0, 0, 1))
    assert first.constants_ == again.constants_ != second.constants_
    spread = {name: np.std(np.log(draws)) for name, draws in law.draws_.items()}
    assert all(0.001 < value < 0.5 for value in spread.values())


def test_multiples_cover_nine_in_ten_with_each_workload_counting_alike() -> None:
    rng = default_rng(0)
    many = [{"workload": f"w{i % 20}", "regime": LIGHT} for i in range(2000)]
    scores = pd.DataFrame(many).assign(**{name: rng.random(2000) for name in LEAST_SPREAD})
    found = multiples(scores)[LIGHT]["mean_itl_ms"]
    assert found == pytest.approx(0.9 * 21 / 20, abs=0.02)
    # One workload with many exact runs does not make the others' errors rare.
    exact = pd.DataFrame([{"workload": "exact", "regime": LIGHT}] * 20_000)
    exact = exact.assign(**dict.fromkeys(LEAST_SPREAD, 0.0))
    assert multiples(pd.concat([scores, exact]))[LIGHT]["mean_itl_ms"] > 0.85


@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_measured_runs_lie_in_their_intervals(calibration: Calibration) -> None:
    runs = pd.read_parquet(MEASURED).query("model == @LLAMA and status == 'ok'")
    runs = runs[~runs.client_collapsed & (runs.waiting_mean < 1)].iloc[::20]
    predictions = predict(runs, intervals=True)
    assert len(predictions) == len(runs) > 3
    for figure in LEAST_SPREAD:
        low, middle, high = (predictions[f"{figure}{end}"] for end in ("_low", "", "_high"))
        assert (low < middle).all()
        assert (middle < high).all()
    measured = runs.total_throughput.to_numpy()
    inside = (predictions.total_throughput_low <= measured) & (
        measured <= predictions.total_throughput_high
    )
    assert inside.mean() > 0.6
    assert "total_throughput_low" not in predict(runs.iloc[:1])


def test_off_by_is_kept_in_the_file(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "cal.json"
    off_by = {LIGHT: {"mean_itl_ms": 1.5}}
    path.write_text(replace(calibration, off_by=off_by).to_json())
    assert Calibration.from_json(path).off_by == off_by
    saved = json.loads(path.read_text())
    saved["off_by"][LIGHT]["mean_itl_ms"] = -1.0
    path.write_text(json.dumps(saved))
    with pytest.raises(AdapterTwinError, match=r"off_by\.light\.mean_itl_ms: must be at least 0"):
        Calibration.from_json(path)
