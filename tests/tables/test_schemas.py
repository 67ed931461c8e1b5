"""Tables that break their schema are refused in one line that names table, column and value."""

import numpy as np
import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.tables import datasets, schemas

PREDICTION_COLUMNS = [
    *("run_id", "input_throughput", "output_throughput", "total_throughput", "completed_requests"),
    *("mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms"),
    *("mean_itl_ms", "median_itl_ms", "p99_itl_ms", "mean_tpot_ms"),
    *("starved", "feasible_start", "kv_cache_tokens", "wall_s"),
]
INTERVAL_COLUMNS = [
    *("total_throughput_low", "total_throughput_high", "mean_itl_ms_low", "mean_itl_ms_high"),
    *("median_ttft_ms_low", "median_ttft_ms_high", "p99_itl_ms_low", "p99_itl_ms_high"),
]


def configuration(rows: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run_id": [f"run-{i}" for i in range(rows)],
            "model": "llama-3.1-8b-instruct",
            "rates_per_adapter": "0.1-0.05-0.025",
            "ranks": "8-16",
            "served_adapters": 64,
            "adapter_slots": 32,
            "max_lora_rank": 16,
            "max_num_seqs": 2048,
            "duration_s": 3600.0,
            "mean_input_tokens": 223.0,
            "mean_requested_output_tokens": 198.0,
        }
    )


def refuse(frame: pd.DataFrame, schema: object = schemas.RUN_CONFIGURATION) -> str:
    with pytest.raises(AdapterTwinError) as caught:
        schemas.validate(frame, schema, "runs.csv")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("runs.csv: ")
    return message


def test_a_sound_configuration_passes_unchanged() -> None:
    pd.testing.assert_frame_equal(
        schemas.validate(configuration(), schemas.RUN_CONFIGURATION, "runs.csv"), configuration()
    )


def test_a_run_that_never_started_may_lack_duration_and_lengths() -> None:
    frame = configuration()
    frame.loc[1, ["duration_s", "mean_input_tokens", "mean_requested_output_tokens"]] = np.nan
    checked = schemas.validate(frame, schemas.RUN_CONFIGURATION, "runs.csv")
    assert checked["duration_s"].isna().sum() == 1


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("adapter_slots", 65, "must not exceed served_adapters"),
        ("adapter_slots", 0, "must be at least 1"),
        ("adapter_slots", 1.5, "must be a whole number"),
        ("served_adapters", None, "must be a whole number"),
        ("max_lora_rank", 12, "must be one of 1, 8, 16"),
        ("max_lora_rank", 8, "a rank exceeds max_lora_rank"),
        ("rates_per_adapter", "-0.1-0.05", "must look like 0.1-0.05-0.025"),
        ("ranks", "8,16", "must look like 8-16"),
        ("mean_input_tokens", -3.0, "must be at least 1"),
        ("mean_input_tokens", "many", "must be of type float64"),
        ("duration_s", 0.0, "must be above 0"),
        ("duration_s", float("inf"), "must be finite"),
        ("model", None, "must not be empty"),
        ("run_id", "run-0", "must be unique"),
    ],
)
def test_a_bad_value_is_named_with_its_column_and_row(
    column: str, value: object, reason: str
) -> None:
    frame = configuration()
    frame[column] = frame[column].astype(object)
    frame.loc[2, column] = value
    message = refuse(frame)
    assert reason in message
    assert "in row 2" in message or column == "run_id"


def test_missing_columns_are_all_named() -> None:
    assert "columns model, ranks missing" in refuse(
        configuration().drop(columns=["ranks", "model"])
    )


def test_a_table_without_rows_is_refused() -> None:
    assert "no rows" in refuse(configuration().head(0))


def test_text_does_not_pass_for_a_flag() -> None:
    frame = pd.DataFrame({name: [0.0] for name in PREDICTION_COLUMNS})
    frame = frame.assign(run_id="run-0", feasible_start=True, starved="no")
    assert "starved" in refuse(frame, schemas.PREDICTIONS)


def test_predictions_have_the_agreed_columns_in_their_order() -> None:
    assert list(schemas.PREDICTIONS.columns) == PREDICTION_COLUMNS + INTERVAL_COLUMNS


@pytest.mark.parametrize("table", sorted(schemas.TABLES))
def test_every_measured_table_meets_its_schema(table: str) -> None:
    path = datasets.REPOSITORY / "data" / datasets.DATASET / datasets.file_name(table)
    assert len(datasets.read_table(path, schemas.TABLES[table])) > 0
