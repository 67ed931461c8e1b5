"""Errors are those of the definitions, on the right runs, with intervals over whole workloads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.service import validate
from adapter_twin.service.validate import validate_runs, write_validation

MEASURED = {
    "model": "llama-3.1-8b-instruct",
    "campaign": "optimum_grid",
    "rates_per_adapter": "0.1",
    "ranks": "8",
    "status": "ok",
    "client_collapsed": False,
    "offered_request_rate": 10.0,
    "mean_input_tokens": 60.0,
    "mean_requested_output_tokens": 40.0,
    "waiting_mean": 0.0,
    "total_throughput": 1000.0,
    **dict.fromkeys(validate.FIGURES, 1000.0),
}


def measured(*changes: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(
        [{**MEASURED, "run_id": f"r{i}", **change} for i, change in enumerate(changes or ({},))]
    )


def predicted(runs: pd.DataFrame, *factors: float) -> pd.DataFrame:
    """Predict every figure off by a factor."""
    factor = np.array(factors or (1.0,) * len(runs))
    frame = pd.DataFrame({"run_id": runs["run_id"], "starved": False, "feasible_start": True})
    for figure in validate.FIGURES:
        frame[figure] = runs[figure] * factor
    return frame


def value(table: pd.DataFrame, **row: Any) -> float:
    chosen = table[(table[list(row)] == list(row.values())).all(axis=1)]
    assert len(chosen) == 1
    return float(chosen["value"].iloc[0])


def pooled(result: validate.Validation, figure: str, measure: str, **row: Any) -> float:
    place = {"twin": "ours", "runs": "all", "model": "all", "campaign": "all", "regime": "all"}
    return value(result.errors, **{**place, **row}, figure=figure, measure=measure)


def test_the_measures_are_those_of_the_definitions() -> None:
    runs = measured({}, {}, {})
    result = validate_runs(runs, predicted(runs, 1.1, 0.9, 1.5))
    assert pooled(result, "mean_itl_ms", "mape") == pytest.approx(70 / 3)
    assert pooled(result, "mean_itl_ms", "median_error") == pytest.approx(10)
    assert pooled(result, "mean_itl_ms", "within_25") == pytest.approx(200 / 3)
    halved = [0.1 / 2.1, 0.1 / 1.9, 0.5 / 2.5]
    assert pooled(result, "mean_itl_ms", "half_smape") == pytest.approx(100 * np.mean(halved))


def test_regimes_are_told_by_the_measured_run() -> None:
    runs = measured(
        {},
        {"waiting_mean": 3.0},
        {"total_throughput": 800.0},
        {"total_throughput": 800.0, "client_collapsed": True},
    )
    result = validate_runs(runs, predicted(runs, 1.1, 1.2, 1.3, 1.4))
    model = MEASURED["model"]
    errors = [
        pooled(result, "mean_itl_ms", "mape", model=model, regime=regime)
        for regime in ("light", "near saturation", "starved", "client collapsed")
    ]
    assert errors == pytest.approx([10, 20, 30, 40])


def test_collapsed_runs_are_scored_apart() -> None:
    runs = measured({}, {"client_collapsed": True})
    result = validate_runs(runs, predicted(runs, 1.1, 9.0))
    assert pooled(result, "total_throughput", "mape") == pytest.approx(10)
    bars = result.bars.set_index("figure")["value"]
    assert bars["total_throughput (client collapsed)"] == pytest.approx(800)
    assert "r1" not in set(result.worst["run_id"])


def test_ttft_is_scored_where_the_run_does_not_starve() -> None:
    runs = measured({}, {"total_throughput": 800.0})
    result = validate_runs(runs, predicted(runs, 1.1, 9.0))
    assert pooled(result, "median_ttft_ms", "mape") == pytest.approx(10)
    assert pooled(result, "p99_itl_ms", "mape") == pytest.approx(405)


def test_a_figure_that_is_not_predicted_is_an_error_not_a_gap() -> None:
    runs = measured({}, {})
    predictions = predicted(runs)
    predictions.loc[1, "total_throughput"] = np.nan
    result = validate_runs(runs, predictions)
    assert pooled(result, "total_throughput", "mape") == pytest.approx(50)


def test_only_completed_runs_are_scored() -> None:
    runs = measured({}, {"status": "log_truncated_series_ok"}, {"status": "failed:unknown"})
    result = validate_runs(runs, predicted(runs, 1.0, 9.0, 9.0))
    assert pooled(result, "total_throughput", "mape") == 0
    assert result.counts == {
        "runs": 3,
        "scored": 1,
        "client_collapsed": 0,
        "start_refused": 0,
        "left_out": 2,
    }


def test_intervals_are_over_whole_workloads() -> None:
    # Ten runs each of two workloads, whose errors agree within and differ between workloads.
    runs = measured(*[{"ranks": "8"}] * 10, *[{"ranks": "16"}] * 10)
    result = validate_runs(runs, predicted(runs, *[1.0] * 10, *[1.2] * 10))
    row = result.errors.query(
        "figure == 'mean_itl_ms' and measure == 'mape' and model == 'all' and campaign == 'all'"
    ).iloc[0]
    assert row["n_workloads"] == 2
    assert (row["low"], row["value"], row["high"]) == pytest.approx((0, 10, 20))


def test_one_workload_gives_no_interval() -> None:
    runs = measured({}, {})
    result = validate_runs(runs, predicted(runs, 1.0, 1.2))
    assert result.errors["low"].isna().all()


def test_the_interval_of_a_median_is_that_of_resampled_workloads() -> None:
    # Of errors of 1 to 7 %, a resample's median is 1 % once in 100 times, at most 2 % nine times.
    runs = measured(*({"ranks": str(8 + i)} for i in range(7)))
    result = validate_runs(runs, predicted(runs, *(1 + 0.01 * i for i in range(1, 8))))
    row = result.errors.query(
        "figure == 'mean_itl_ms' and measure == 'median_error' and regime == 'all'"
        " and model == 'all' and campaign == 'all'"
    ).iloc[0]
    assert (row["low"], row["value"], row["high"]) == pytest.approx((2, 4, 6))


def test_starvation_leaves_out_what_chance_decides() -> None:
    runs = measured(
        {},
        {"total_throughput": 500.0},
        {"total_throughput": 910.0},  # within 0.02 of the threshold
        {"total_throughput": 500.0, "client_collapsed": True},
    )
    predictions = predicted(runs).assign(starved=[False, True, True, False])
    bar = validate_runs(runs, predictions).bars.set_index("figure").loc["starved"]
    assert (bar["value"], bar["n_runs"], bar["passed"]) == (1.0, 2, True)


def test_starvation_is_scored_for_both_classes_alike() -> None:
    runs = measured({}, {}, {}, {"total_throughput": 500.0})
    bar = validate_runs(runs, predicted(runs)).bars.set_index("figure").loc["starved"]
    assert bar["value"] == pytest.approx((6 / 7 + 0) / 2)
    assert not bar["passed"]


def test_accidents_are_no_refusals() -> None:
    runs = measured(
        {},
        {"status": "failed:oom"},
        {"status": "failed:kv_lt_max_seq_len"},
        {"status": "failed:port_in_use"},
        {"status": "failed:unknown"},
    )
    feasible = [True, False, True, False, False]
    result = validate_runs(runs, predicted(runs).assign(feasible_start=feasible))
    bar = result.bars.set_index("figure").loc["start refused or not"]
    assert (bar["n_runs"], bar["passed"]) == (3, False)
    assert bar["value"] == pytest.approx(200 / 3)


def test_measured_starts_count_with_the_runs() -> None:
    runs = measured()
    starts = pd.DataFrame(
        {
            "model": MEASURED["model"],
            "server_failure": [None, "oom"],
            "kv_cache_tokens": [1000.0, np.nan],
            "predicted_kv_cache_tokens": [1005.0, 0.0],
            "predicted_start": [True, False],
        }
    )
    bars = validate_runs(runs, predicted(runs), starts=starts).bars.set_index("figure")
    assert bars.loc["start refused or not", "n_runs"] == 3
    assert bars.loc["kv_cache_tokens", "value"] == pytest.approx(0.5)
    assert bars["passed"].all()


def test_bars_are_met_or_missed_per_model() -> None:
    runs = measured({}, {"model": "qwen-2.5-7b-instruct"})
    bars = validate_runs(runs, predicted(runs, 1.01, 1.02)).bars
    throughput = bars[bars["figure"] == "total_throughput"].set_index("model")["passed"]
    assert throughput.to_dict() == {MEASURED["model"]: True, "qwen-2.5-7b-instruct": False}


def test_the_authors_twin_is_scored_beside_ours_on_the_same_runs() -> None:
    runs = measured({}, {})
    authors = predicted(runs.head(1), 1.3)[["run_id", "total_throughput", "mean_itl_ms"]]
    authors = authors.assign(mode="replay")
    result = validate_runs(runs, predicted(runs, 1.1, 5.0), authors=authors)
    assert pooled(result, "total_throughput", "mape", twin="authors", runs="replay") == (
        pytest.approx(30)
    )
    assert pooled(result, "total_throughput", "mape", runs="replay") == pytest.approx(10)
    beside = result.errors[result.errors["runs"] == "replay"]
    assert set(beside["figure"]) == {"total_throughput", "mean_itl_ms"}


def test_the_worst_runs_are_named_worst_first() -> None:
    runs = measured({}, {}, {})
    worst = validate_runs(runs, predicted(runs, 1.1, 0.5, 1.2)).worst
    assert worst[worst["figure"] == "mean_itl_ms"]["run_id"].tolist() == ["r1", "r2", "r0"]


def test_a_run_without_prediction_is_refused() -> None:
    runs = measured({}, {})
    with pytest.raises(AdapterTwinError, match="r1 has no prediction"):
        validate_runs(runs, predicted(runs).head(1))


def test_runs_of_which_none_completed_are_refused() -> None:
    runs = measured({"status": "failed:oom"})
    with pytest.raises(AdapterTwinError, match="status"):
        validate_runs(runs, predicted(runs))


def test_the_report_is_written_and_can_be_read(tmp_path: Path) -> None:
    runs = measured({}, {})
    predictions = predicted(runs)
    predictions.attrs = {"seed": 0}
    result = validate_runs(runs, predictions)
    write_validation(result, predictions, tmp_path / "report")
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {"predictions.parquet", "errors.csv", "worst.csv", "summary.json"}
    summary = json.loads((tmp_path / "report/summary.json").read_text())
    assert summary["provenance"] == {"seed": 0}
    assert len(summary["bars"]) == len(result.bars)
    assert len(pd.read_csv(tmp_path / "report/errors.csv")) == len(result.errors)
