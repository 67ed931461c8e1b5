"""What is left out of a fold is left out of all tables."""

import numpy as np
import pandas as pd
import pytest

from adapter_twin.workload.arrivals import reference_arrivals
from study import left_out


def tables() -> dict[str, pd.DataFrame]:
    runs = pd.DataFrame(
        {
            "run_id": list("abcd"),
            "model": ["m", "m", "m", "n"],
            "rates_per_adapter": ["1", "1", "2", "1"],
            "ranks": "8",
            "status": ["ok", "failed:oom", "ok", "ok"],
            "client_collapsed": False,
            "grid": [True, True, False, False],
        }
    )
    return {"runs": runs, "series": runs[["run_id"]], "windows": runs[["run_id"]], "steps": runs}


def test_all_runs_of_the_workload_are_left_out_whatever_became_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, told_the_prior = {}, []

    def prior_of(kept: dict[str, pd.DataFrame], _: object) -> str:
        told_the_prior.append("".join(kept["runs"].run_id))
        return "prior"

    def calibrate(kept: dict[str, pd.DataFrame], *_: object, prior: str, **__: object) -> str:
        assert prior == "prior"
        seen.update({name: "".join(table.run_id) for name, table in kept.items()})
        return "calibration"

    def predict_run(row: dict, calibration: str, **_: object) -> tuple[dict, list]:
        assert calibration == "calibration"
        return {"run_id": row["run_id"]}, []

    def twin_runs(grids: pd.DataFrame, calibration: str, **_: object) -> pd.DataFrame:
        assert calibration == "calibration"
        return grids[["run_id"]]

    monkeypatch.setattr(left_out, "prior_of", prior_of)
    monkeypatch.setattr(left_out, "calibrate", calibrate)
    monkeypatch.setattr(left_out, "replicate", lambda *_, **__: None)
    monkeypatch.setattr(left_out, "spread_of", lambda *_: {"mean_itl_ms": 0.1})
    monkeypatch.setattr(left_out, "predict_run", predict_run)
    monkeypatch.setattr(left_out.measured_grids, "twin_runs", twin_runs)
    monkeypatch.setattr(left_out.measured_grids, "measured_grids", lambda runs: runs[runs.grid])
    moves = {"m": None, "n": None}
    predicted, grids = left_out.leave_one_workload_out(tables(), None, moves, jobs=1)
    for seed in range(left_out.SEEDS):
        assert sorted(predicted.run_id[predicted.seed == seed]) == list("acd")
        assert sorted(grids.run_id[grids.seed == seed]) == list("ab")
    # the last of the three folds: other models and workloads stay, and calibration steps do
    assert sorted(seen) == ["runs", "series", "steps", "windows"]
    assert seen["steps"] == "abcd"
    assert seen["runs"] == seen["series"] == seen["windows"]
    assert seen["runs"] in ("cd", "abd", "abc")
    assert sorted(told_the_prior) == ["abd", "c", "c"]  # without the workload of any model


def test_bars_are_means_and_ranges_over_seeds() -> None:
    runs = pd.DataFrame(
        {
            "run_id": ["a", "b"],
            "model": "m",
            "campaign": "twin_validation",
            "rates_per_adapter": "1",
            "ranks": "8",
            "status": "ok",
            "client_collapsed": False,
            "offered_request_rate": 1.0,
            "mean_input_tokens": 100.0,
            "mean_requested_output_tokens": 100.0,
            "waiting_mean": 0.0,
            "total_throughput": 200.0,
            **dict.fromkeys(("mean_itl_ms", "mean_tpot_ms", "p99_itl_ms"), 10.0),
            **dict.fromkeys(("median_ttft_ms", "p99_ttft_ms"), 100.0),
        }
    )
    figures = runs.drop(columns=["model", "status", "campaign"])
    worse = figures.assign(mean_itl_ms=11.0, median_ttft_ms=[100.0, 130.0])
    predictions = pd.concat(
        [
            part.assign(seed=seed, starved=False, feasible_start=True)
            for seed, part in enumerate((figures, worse))
        ]
    )
    bars = left_out.bars_left_out(runs, predictions).set_index(["figure", "measure"])
    shown = bars[["value", "low", "high", "n_runs", "n_seeds", "passed"]]
    assert shown.loc["mean_itl_ms", "mape"].tolist() == [5.0, 0.0, pytest.approx(10.0), 2, 2, True]
    assert shown.loc["median_ttft_ms", "within_25"].tolist() == [75.0, 50.0, 100.0, 2, 2, False]
    assert "start refused or not" not in bars.index


def test_the_reference_clients_arrivals_are_in_order_and_as_many_as_its_rates_say() -> None:
    rates = np.array([3.0, 0.0, 1.0])
    arrival_s, source = reference_arrivals(rates, 1000.0)
    assert (np.diff(arrival_s) >= 0).all()
    assert arrival_s[-1] < 1000
    counts = np.bincount(source, minlength=3)
    assert counts[1] == 0
    assert counts == pytest.approx(1000 * rates, rel=0.1)
