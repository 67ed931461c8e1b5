import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError
from study import results
from study.results import Results, accuracy_table, read_expected, record, update_readme

BARS = pd.DataFrame(
    [
        ("llama", "mean_itl_ms", "mape", 3.25, 5.0, True, 7),
        ("qwen", "mean_itl_ms", "mape", 5.5, 5.0, False, 8),
        ("all", "starved", "macro_f1", 0.991, 0.99, True, 15),
    ],
    columns=["model", "figure", "measure", "value", "bar", "passed", "n_runs"],
)

TIMES = "step,seconds,cores,day\n01_problem,60.0,2,2026-11-30\nbook,2520.0,2,2026-11-30\n"


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Recorded results, apart from the repository's."""
    folder = tmp_path / "expected"
    (folder / "timings").mkdir(parents=True)
    (folder / "t.csv").write_text("x\n7\n")
    for size in ("usual", "quick", "full"):
        (folder / "timings" / f"{size}.csv").write_text(TIMES)
    monkeypatch.setattr(results, "EXPECTED", folder)
    return folder


def test_a_table_is_shown_as_it_is_and_written_with_six_digits(tmp_path):
    shown = Results(tmp_path).table("t", pd.DataFrame({"x": [1 / 3], "n": [2]}))
    assert shown["x"].iloc[0] == 1 / 3
    assert (tmp_path / "full" / "t.csv").read_text() == "x,n\n0.333333,2\n"


def test_small_version_goes_apart_from_the_full_one(tmp_path):
    assert Results(tmp_path, quick=True).folder != Results(tmp_path).folder


def test_absent_record_is_one_line_with_the_remedy():
    with pytest.raises(AdapterTwinError, match="nothing: no recorded result; `python -m"):
        read_expected("nothing")


def test_only_the_small_version_warns_at_the_top_of_a_chapter(tmp_path):
    assert "Small version" in Results(tmp_path, quick=True).notice()
    assert Results(tmp_path).notice() is None


def made(small: bool) -> pd.DataFrame:
    return pd.DataFrame({"x": [1 if small else 100]})


def test_long_table_is_the_recorded_one_and_says_so(recorded, tmp_path, capsys):
    asked = []
    table = Results(tmp_path).long_table("t", lambda small: asked.append(small) or made(small))
    assert table["x"].tolist() == [7]
    assert asked == [True]
    assert "Recorded** on 2026-11-30. `make reproduce FULL=1` (43 min on 2 cores)" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize(("size", "x"), [("quick", 1), ("full", 100)])
def test_long_table_is_made_small_or_in_full_where_that_is_asked_for(recorded, tmp_path, size, x):
    table = Results(tmp_path, **{size: True}).long_table("t", made)
    assert table["x"].tolist() == [x]
    assert (tmp_path / size / "t.csv").read_text() == f"x\n{x}\n"


CONFORMANCE = pd.DataFrame(
    {"scheduler": ["vLLM 0.8.5"], "cases": 12, "steps": 3456, "preemptions": 78, "differ": 0}
)
LEFT_OUT = BARS.assign(value=[4.0, 6.0, 0.98], low=[3.5, 5.75, 0.97], high=[4.5, 6.25, 0.99])

README = """above
<!-- times: begin -->
old
<!-- times: end -->
between
<!-- accuracy: begin -->
old
<!-- accuracy: end -->
below
"""


def test_accuracy_table_has_both_kinds_of_errors_and_pooled_figures_for_each_model():
    lines = accuracy_table(LEFT_OUT[LEFT_OUT["model"] != "qwen"], BARS).splitlines()
    kinds = "llama, left out | llama, fitted | qwen, left out | qwen, fitted"
    assert lines[0] == f"| figure | measure | asked | {kinds} | runs |"
    cells = "**4** (3.5–4.5) | 3.25 | – | 5.5 | 7 / 8 |"
    assert lines[2] == f"| mean ITL | MAPE, % | at most 5 | {cells}"
    cells = "**0.98** (0.97–0.99) | 0.991 | **0.98** (0.97–0.99) | 0.991 | 15 |"
    assert lines[3] == f"| starved | macro-F1 | at least 0.99 | {cells}"


def test_readme_keeps_its_text_around_the_tables(recorded):
    for name, table in (("conformance", CONFORMANCE), ("bars_left_out", LEFT_OUT), ("bars", BARS)):
        table.to_csv(recorded / f"{name}.csv", index=False)
    renewed = update_readme(README)
    assert "| vLLM 0.8.5 | 12 | 3,456 | 78 | 0 |" in renewed
    assert "| `make reproduce FULL=1` | 43 min on 2 cores |" in renewed
    assert [line for line in renewed.splitlines() if line in README.splitlines()] == (
        [line for line in README.splitlines() if line != "old"]
    )
    assert "old" not in renewed
    assert accuracy_table(LEFT_OUT, BARS) in renewed


def test_record_takes_over_tables_times_pictures_and_readme(recorded, monkeypatch, tmp_path):
    run = tmp_path / "results" / "full"
    (run.parent / "timings").mkdir(parents=True)
    run.mkdir()
    BARS.to_csv(run / "bars.csv", index=False)
    CONFORMANCE.to_csv(run / "conformance.csv", index=False)
    LEFT_OUT.to_csv(run / "bars_left_out.csv", index=False)
    (run / "service.png").write_bytes(b"png")
    (run.parent / "timings" / "usual.csv").write_text(TIMES)
    for name in ("IMAGES", "README"):
        monkeypatch.setattr(results, name, tmp_path / name)
    (tmp_path / "README").write_text(README)
    written = record(run)
    assert {path.relative_to(tmp_path).as_posix() for path in written} == {
        "expected/bars.csv",
        "expected/bars_left_out.csv",
        "expected/conformance.csv",
        "expected/timings/usual.csv",
        "IMAGES/service.png",
        "README",
    }
    assert accuracy_table(LEFT_OUT, BARS) in (tmp_path / "README").read_text()


def test_record_refuses_a_folder_without_results(tmp_path):
    with pytest.raises(AdapterTwinError, match="make reproduce"):
        record(tmp_path)


def test_readme_shows_the_recorded_accuracy_and_times():
    text = results.README.read_text()
    assert update_readme(text) == text
