"""A reproduction card tells what was really read, run and written."""

import hashlib

import pandas as pd

from adapter_twin.laws import list_calibrations, load_calibration
from adapter_twin.tables import datasets
from study.card import SHOWN_DIGITS, Watch
from study.results import Results

NAME = list_calibrations()[0]


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:SHOWN_DIGITS]


def test_a_watch_hears_calibrations_recorded_tables_and_parquet():
    watch = Watch()
    load_calibration(NAME, NAME.split("@")[0])
    datasets.read_campaign(datasets.REPOSITORY / "data/campaigns/cpu-small")
    inputs = watch.inputs()
    assert f"data/calibrations/{NAME}.json" in inputs
    assert "data/campaigns/cpu-small/runs.parquet" in inputs
    assert all(path.is_file() for path in inputs.values())


def test_measured_tables_are_named_in_the_repository_or_else_by_their_data_set(
    tmp_path, monkeypatch
):
    watch = Watch()
    lengths = datasets.REPOSITORY / "data/agullo2025/sharegpt_lengths.csv"
    (tmp_path / "agullo2025").mkdir()
    (tmp_path / "agullo2025/sharegpt_lengths.csv").write_bytes(lengths.read_bytes())
    monkeypatch.setenv("ADAPTER_TWIN_DATA", str(tmp_path))
    datasets.load("sharegpt_lengths")
    datasets.load("memory")
    inputs = watch.inputs()
    assert {"agullo2025/sharegpt_lengths.csv", "data/agullo2025/memory.parquet"} <= inputs.keys()


def test_files_outside_the_data_and_files_written_are_no_inputs(tmp_path):
    watch = Watch()
    (tmp_path / "own.csv").write_text("a\n1\n")
    (tmp_path / "own.csv").read_text()
    assert watch.inputs() == {}


def test_a_card_lists_parameters_inputs_and_tables_with_their_checksums(tmp_path):
    results = Results(tmp_path, quick=True)
    load_calibration(NAME, NAME.split("@")[0])
    table = results.table("found", pd.DataFrame({"a": [1.0]}))
    card = results.card("0", campaign="here")
    source = datasets.REPOSITORY / "data/calibrations" / f"{NAME}.json"
    assert "`quick = True`" in card
    assert "`campaign = 'here'`" in card
    assert f"{NAME}.json (`{digest(source)}`)" in card
    assert f"found.csv (`{digest(tmp_path / 'quick' / 'found.csv')}`)" in card
    assert "numpy" in card
    assert len(table) == 1
    assert card._repr_markdown_() == card
