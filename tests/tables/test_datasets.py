"""Measured tables are found in the agreed order; files are read and written whole or not at all."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.tables import datasets
from adapter_twin.tables.schemas import TABLES

CONFIGURATION = {
    "run_id": "7",
    "model": "llama-3.1-8b-instruct",
    "rates_per_adapter": "0.1",
    "ranks": "8",
    "served_adapters": 64,
    "adapter_slots": 32,
    "max_lora_rank": 16,
    "max_num_seqs": 2048,
    "duration_s": 3600.0,
    "mean_input_tokens": 223.0,
    "mean_requested_output_tokens": 198.0,
}
LENGTHS = (
    "kind,bin_left_tokens,bin_right_tokens,count\nprompt,4,8,3\nprompt,8,16,1\noutput,4,10,5\n"
)


def runs_table() -> pd.DataFrame:
    return pd.DataFrame([CONFIGURATION])


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Four empty roots in look-up order."""
    own = tmp_path / "repository/data"
    chosen, external, shared = tmp_path / "chosen", own / "external", tmp_path / "shared/data"
    monkeypatch.setenv("ADAPTER_TWIN_DATA", str(chosen))
    monkeypatch.setattr(datasets, "REPOSITORY", tmp_path / "repository")
    monkeypatch.setattr(datasets, "EXTERNAL", external)
    for root in (chosen, own, external, shared):
        (root / "agullo2025").mkdir(parents=True)
    return [chosen, own, external, shared]


def one_line(caught: pytest.ExceptionInfo[AdapterTwinError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_first_place_that_has_a_table_wins(places: list[Path]) -> None:
    for root in reversed(places):
        (root / "agullo2025/sharegpt_lengths.csv").write_text(LENGTHS)
        assert datasets.find("sharegpt_lengths") == root / "agullo2025/sharegpt_lengths.csv"


def test_a_partial_import_does_not_hide_the_other_tables(places: list[Path]) -> None:
    (places[0] / "agullo2025/runs.parquet").touch()
    (places[2] / "agullo2025/sharegpt_lengths.csv").write_text(LENGTHS)
    assert len(datasets.load("sharegpt_lengths")) == 3


def test_absent_data_says_where_it_was_looked_for_and_how_to_get_it(places: list[Path]) -> None:
    with pytest.raises(AdapterTwinError) as caught:
        datasets.load("runs")
    message = one_line(caught)
    assert all(str(root) in message for root in places)
    assert "point ADAPTER_TWIN_DATA to a folder that holds agullo2025/" in message


def test_a_mistyped_table_is_answered_with_the_right_name() -> None:
    with pytest.raises(AdapterTwinError, match="did you mean 'runs'"):
        datasets.load("rums")


def test_the_length_histograms_keep_their_bins(places: list[Path]) -> None:
    (places[0] / "agullo2025/sharegpt_lengths.csv").write_text(LENGTHS)
    marginals = datasets.sharegpt_lengths()
    assert tuple(marginals.prompt_edges) == (4, 8, 16)
    assert tuple(marginals.prompt_counts) == (3, 1)
    assert tuple(marginals.output_edges) == (4, 10)


def test_length_bins_with_a_gap_are_refused(places: list[Path]) -> None:
    (places[0] / "agullo2025/sharegpt_lengths.csv").write_text(LENGTHS.replace("8,16", "9,16"))
    with pytest.raises(AdapterTwinError, match="prompt bins do not join"):
        datasets.sharegpt_lengths()


def test_the_inventory_tells_a_changed_table_from_the_published_one(
    places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pooch

    lengths = places[0] / "agullo2025/sharegpt_lengths.csv"
    lengths.write_text(LENGTHS)
    (places[1] / "agullo2025/runs.parquet").write_bytes(b"damaged")
    datasets.write_table(runs_table(), places[2] / "agullo2025/memory.parquet")
    registry = places[0] / "checksums.json"
    known = f"sha256:{pooch.file_hash(str(lengths))}"
    registry.write_text(
        f'{{"agullo2025": {{"sharegpt_lengths.csv": "{known}", "runs.parquet": "sha256:0"}}}}'
    )
    monkeypatch.setattr(datasets, "CHECKSUMS", registry)
    listed = datasets.inventory().set_index("table")
    expected = {
        "sharegpt_lengths": "ok",
        "runs": "mismatch",
        "memory": "unregistered",
        "steps": "absent",
    }
    assert listed["checksum"][list(expected)].to_dict() == expected
    assert listed["rows"][list(expected)].tolist() == [3, 0, 1, 0]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_runs_are_read_with_their_configuration_columns_only(tmp_path: Path, suffix: str) -> None:
    # The answer is in the file, in a column that must not be read.
    frame = runs_table().assign(total_throughput="secret")
    path = datasets.write_table(frame, tmp_path / f"runs{suffix}")
    pd.testing.assert_frame_equal(datasets.read_runs(path), runs_table())


def test_measured_runs_need_the_measured_columns(tmp_path: Path) -> None:
    path = datasets.write_table(runs_table(), tmp_path / "runs.csv")
    with pytest.raises(AdapterTwinError, match="status"):
        datasets.read_measured_runs(path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("runs.xlsx", b"x", "name it .parquet or .csv"),
        ("runs.csv", b"", "the file is empty"),
        ("runs.csv", b"\n\n", "malformed or truncated csv"),
        ("runs.csv", b"a,b\n1,2,3,4\n1\n1,2,3,4,5,6\n", "malformed or truncated csv"),
        ("runs.csv", b"run_id,model\n1,llama\n", "columns rates_per_adapter"),
        ("runs.csv", b"\xff\xfe\x00bad", "malformed or truncated csv"),
        ("runs.parquet", b"PAR1 and then nothing of use", "malformed or truncated parquet"),
    ],
)
def test_an_unreadable_table_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AdapterTwinError) as caught:
        datasets.read_runs(path)
    assert reason in one_line(caught)


def test_a_truncated_parquet_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = datasets.write_table(runs_table(), tmp_path / "runs.parquet")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(AdapterTwinError) as caught:
        datasets.read_runs(path)
    assert "truncated" in one_line(caught)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError, match="no such file"):
        datasets.read_runs(tmp_path / "runs.csv")


def test_a_failed_write_leaves_the_folder_and_the_old_table_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = datasets.write_table(runs_table(), tmp_path / "runs.csv")
    before = path.read_bytes()

    def fail(frame: pd.DataFrame, target: Path, **_: object) -> None:
        Path(target).write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(AdapterTwinError, match="No space left"):
        datasets.write_table(runs_table(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writing_into_no_folder_or_under_no_known_suffix_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError, match="create it first"):
        datasets.write_table(runs_table(), tmp_path / "none/runs.csv")
    with pytest.raises(AdapterTwinError, match=r"\.parquet or \.csv"):
        datasets.write_table(runs_table(), tmp_path / "runs.txt")
    assert list(tmp_path.iterdir()) == []


# -- the tables in the repository ------------------------------------------------------------------

MEASURED = datasets.REPOSITORY / "data" / datasets.DATASET


def test_the_measured_tables_are_those_whose_checksums_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ADAPTER_TWIN_DATA", raising=False)
    listed = datasets.inventory()
    assert set(listed["checksum"]) == {"ok"}
    assert {Path(file).parent for file in listed["file"]} == {MEASURED}
    known = json.loads(datasets.CHECKSUMS.read_text())[datasets.DATASET]
    assert {Path(file).name for file in listed["file"]} == set(known)


@pytest.mark.parametrize("table", TABLES)
def test_the_dictionary_lists_every_column_and_no_other(table: str) -> None:
    _, *sections = re.split(r"^### ", (MEASURED / "README.md").read_text(), flags=re.MULTILINE)
    cells = {
        section.split("\n")[0]: " ".join(re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE))
        for section in sections
    }
    listed = {title: set(re.findall(r"`(\w+)`", text)) for title, text in cells.items()}
    columns = set(datasets.read_frame(MEASURED / datasets.file_name(table)))
    assert listed[table] <= columns
    assert columns <= listed[table] | listed["In several tables"]


def test_the_histograms_have_the_published_means() -> None:
    marginals = datasets.sharegpt_lengths()
    for edges, counts, mean in (
        (marginals.prompt_edges, marginals.prompt_counts, 251),
        (marginals.output_edges, marginals.output_counts, 231),
    ):
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        weighted = sum(m * c for m, c in zip(middles, counts, strict=True)) / sum(counts)
        assert weighted == pytest.approx(mean, rel=0.05)
