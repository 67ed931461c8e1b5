"""What is left out of a fold is left out of all tables."""

import numpy as np
import pandas as pd
import pytest

from adapter_twin import crossvalidate
from adapter_twin.reference_client import reference_arrivals


def tables() -> dict[str, pd.DataFrame]:
    runs = pd.DataFrame(
        {
            "run_id": list("abcd"),
            "model": ["m", "m", "m", "n"],
            "rates_per_adapter": ["1", "1", "2", "1"],
            "ranks": "8",
            "status": ["ok", "failed:oom", "ok", "ok"],
            "client_collapsed": False,
        }
    )
    return {"runs": runs, "series": runs[["run_id"]], "windows": runs[["run_id"]], "steps": runs}


def test_all_runs_of_the_workload_are_left_out_whatever_became_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}

    def calibrate(kept: dict[str, pd.DataFrame], *_: object, **__: object) -> str:
        seen.update({name: "".join(table.run_id) for name, table in kept.items()})
        return "calibration"

    def predict_run(row: dict, calibration: str, **_: object) -> tuple[dict, list]:
        assert calibration == "calibration"
        return {"run_id": row["run_id"]}, []

    monkeypatch.setattr(crossvalidate, "calibrate", calibrate)
    monkeypatch.setattr(crossvalidate, "predict_run", predict_run)
    measured, predicted = crossvalidate.leave_one_workload_out(tables(), None, jobs=1)
    assert sorted(predicted.run_id) == sorted(measured.run_id) == list("acd")
    # the last of the three folds: other models and workloads stay, and calibration steps do
    assert sorted(seen) == ["runs", "series", "steps", "windows"]
    assert seen["steps"] == "abcd"
    assert seen["runs"] == seen["series"] == seen["windows"]
    assert seen["runs"] in ("cd", "abd", "abc")


def test_the_reference_clients_arrivals_are_in_order_and_as_many_as_its_rates_say() -> None:
    rates = np.array([3.0, 0.0, 1.0])
    arrival_s, source = reference_arrivals(rates, 1000.0)
    assert (np.diff(arrival_s) >= 0).all()
    assert arrival_s[-1] < 1000
    counts = np.bincount(source, minlength=3)
    assert counts[1] == 0
    assert counts == pytest.approx(1000 * rates, rel=0.1)
