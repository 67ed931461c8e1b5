"""Predictions follow from configuration, calibration and seed, and from nothing else."""

from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.service.predict import predict, predict_scenario, predict_starts
from adapter_twin.tables.datasets import write_table
from adapter_twin.tables.schemas import PREDICTIONS
from adapter_twin.workload.files import Scenario, run_to_workload
from adapter_twin.workload.scenario import Slo

LLAMA = "llama-3.1-8b-instruct"
RUN = {
    "run_id": "light",
    "model": LLAMA,
    "rates_per_adapter": "0.1-0.05",
    "ranks": "8-16",
    "served_adapters": 32,
    "adapter_slots": 16,
    "max_lora_rank": 16,
    "max_num_seqs": 2048,
    "duration_s": 60.0,
    "mean_input_tokens": 223.0,
    "mean_requested_output_tokens": 198.0,
}
OVERLOADED = {**RUN, "run_id": "overloaded", "rates_per_adapter": "3.2"}
REFUSED = {
    **RUN,
    "run_id": "refused",
    "ranks": "32",
    "max_lora_rank": 32,
    "served_adapters": 320,
    "adapter_slots": 320,
}


def table(*runs: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame(list(runs or (RUN,)))


def forecast(*runs: dict[str, object], seed: int = 0, observer: bool = True) -> pd.DataFrame:
    """Predict in this process, without the one column that differs each time."""
    predicted = predict(table(*runs), seed=seed, jobs=1, observer=observer)
    return predicted.drop(columns="wall_s")


def test_one_row_per_run_with_exactly_the_agreed_columns() -> None:
    predicted = predict(table(REFUSED, RUN), jobs=1)
    always = [name for name, column in PREDICTIONS.columns.items() if column.required]
    assert list(predicted.columns) == always
    assert predicted["run_id"].tolist() == ["refused", "light"]
    assert (predicted["wall_s"] > 0).all()


def test_measured_columns_are_never_read() -> None:
    runs = table(RUN, OVERLOADED)
    measured = runs.assign(
        status="failed:unknown",
        offered_request_rate=[1e9, np.nan],
        total_throughput=[-1.0, np.inf],
        median_ttft_ms="text",
        sent_requests=[1, 2],
    )
    swapped = measured.assign(total_throughput=measured["total_throughput"].to_numpy()[::-1])
    expected = predict(runs, jobs=1).drop(columns="wall_s")
    for frame in (measured, swapped, measured[measured.columns[::-1]]):
        got = predict(frame, jobs=1).drop(columns="wall_s")
        pd.testing.assert_frame_equal(got, expected)


def test_a_prediction_does_not_depend_on_the_other_rows_or_the_processes() -> None:
    alone = forecast(RUN)
    with joblib.parallel_config("loky"):
        among = predict(table(REFUSED, OVERLOADED, RUN), jobs=2).drop(columns="wall_s")
    pd.testing.assert_frame_equal(among.tail(1).reset_index(drop=True), alone)


def test_rows_of_one_workload_serve_the_very_same_requests() -> None:
    # With slots for all, the load is served whole: as many tokens whatever the engine.
    more_slots = {**RUN, "run_id": "more slots", "adapter_slots": 32, "max_num_seqs": 256}
    assert forecast(RUN, more_slots)["completed_requests"].nunique() == 1


def test_the_seed_decides() -> None:
    pd.testing.assert_frame_equal(forecast(RUN, seed=1), forecast(RUN, seed=1))
    assert forecast(RUN, seed=1)["total_throughput"][0] != forecast(RUN)["total_throughput"][0]


def test_a_refused_start_has_no_figures_but_its_kv_cache() -> None:
    refused = forecast(REFUSED).iloc[0]
    assert not refused["feasible_start"]
    assert refused["starved"]
    assert refused["kv_cache_tokens"] >= 0
    figures = [name for name in refused.index if name.endswith(("_ms", "throughput"))]
    assert refused[[*figures, "completed_requests"]].isna().all()


def test_starvation_is_measured_against_the_offered_tokens() -> None:
    light, overloaded = forecast(RUN, OVERLOADED)["total_throughput"]
    run = {**RUN, "duration_s": 600.0}
    _, workload = run_to_workload(run)
    assert light < workload.offered_tokens_per_s < overloaded
    assert forecast(run, OVERLOADED)["starved"].tolist() == [False, True]


def test_the_measurements_own_effect_can_be_left_out() -> None:
    recorded, none = (forecast(RUN, observer=observer) for observer in (True, False))
    assert recorded["mean_itl_ms"][0] > none["mean_itl_ms"][0]
    assert recorded["feasible_start"][0]


def test_an_extrapolation_is_warned_of_once() -> None:
    long = {**RUN, "mean_input_tokens": 800.0}
    with pytest.warns(UserWarning, match="mean_input_tokens") as caught:
        forecast(long, {**long, "run_id": "again"})
    assert len(caught) == 1


def test_the_provenance_goes_into_the_file(tmp_path: Path) -> None:
    path = write_table(predict(table(), seed=3, jobs=1), tmp_path / "predictions.parquet")
    provenance = pd.read_parquet(path).attrs
    assert provenance["seed"] == 3
    assert provenance["calibrations"] == [f"{LLAMA}@h100-64gb-vllm0.8.5"]
    assert {"observer", "version"} <= set(provenance)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "llama-4"}, "model"),
        ({"rates_per_adapter": "-0.1"}, "rates_per_adapter"),
        ({"adapter_slots": 33}, "adapter_slots"),
        ({"ranks": "8-32"}, "ranks"),
        ({"max_lora_rank": 12}, "max_lora_rank"),
        ({"duration_s": 0.0}, "duration_s"),
    ],
)
def test_bad_configuration_is_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(AdapterTwinError, match=field):
        forecast({**RUN, **change})


def test_bad_options_are_refused() -> None:
    with pytest.raises(AdapterTwinError, match="seed"):
        predict(table(), seed=-1)
    with pytest.raises(AdapterTwinError, match="jobs"):
        predict(table(), jobs=0)
    with pytest.raises(AdapterTwinError, match="calibration"):
        predict(table(), "nonesuch")


def test_starts_are_predicted_from_model_slots_and_rank() -> None:
    starts = predict_starts(table(RUN, REFUSED)[["model", "adapter_slots", "max_lora_rank"]])
    assert starts["predicted_start"].tolist() == [True, False]
    assert starts["predicted_kv_cache_tokens"][0] == forecast(RUN)["kv_cache_tokens"][0]


def test_a_scenario_reports_service_and_provenance() -> None:
    engine, workload = run_to_workload(RUN)
    scenario = Scenario(engine=engine, workload=workload, seed=2, slo=Slo(ttft_ms=1e6))
    run, service = predict_scenario(scenario)
    assert len(run.records) > 0
    assert service["slo_attainment"] == 1
    assert 0 < service["jain_fairness"] <= 1
    assert {"kv_cache_tokens", "startup_s", "config_hash", "calibration"} <= set(service)
    assert service["seed"] == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("gpu_memory_utilization", 0.8),
        ("kv_cache_dtype", "fp8"),
        ("max_num_seqs", 256),
    ],
)
@pytest.mark.filterwarnings("ignore:.*")
def test_a_column_of_the_engines_flags_counts(flag: str, value: object) -> None:
    rows = RUN | {"run_id": "usual"}, RUN | {"run_id": "changed", flag: value}
    usual, changed = forecast(*rows)["kv_cache_tokens"]
    assert changed != usual
    with pytest.raises(AdapterTwinError, match=rf"{flag}\b.*much"):
        forecast(RUN | {"run_id": "wrong", flag: "much"})
