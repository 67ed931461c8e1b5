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


def test_a_table_is_shown_as_it_is_and_written_with_six_digits(tmp_path):
    shown = Results(tmp_path).table("t", pd.DataFrame({"x": [1 / 3], "n": [2]}))
    assert shown["x"].iloc[0] == 1 / 3
    assert (tmp_path / "full" / "t.csv").read_text() == "x,n\n0.333333,2\n"


def test_small_version_goes_apart_from_the_full_one(tmp_path):
    assert Results(tmp_path, quick=True).folder != Results(tmp_path).folder


def test_absent_record_is_one_line_with_the_remedy():
    with pytest.raises(AdapterTwinError, match="nothing: no recorded result; `python -m"):
        read_expected("nothing")


def test_chapter_says_what_it_was_made_from(tmp_path):
    assert "small version" in Results(tmp_path, quick=True)._repr_markdown_()
    assert "the measured tables" in Results(tmp_path)._repr_markdown_()


CONFORMANCE = pd.DataFrame(
    {"scheduler": ["vLLM 0.8.5"], "cases": 12, "steps": 3456, "preemptions": 78, "differ": 0}
)
LEFT_OUT = BARS.assign(value=[4.0, 6.0, 0.98], low=[3.5, 5.75, 0.97], high=[4.5, 6.25, 0.99])


def test_accuracy_table_has_both_kinds_of_errors_and_pooled_figures_for_each_model():
    lines = accuracy_table(LEFT_OUT[LEFT_OUT["model"] != "qwen"], BARS).splitlines()
    kinds = "llama, left out | llama, fitted | qwen, left out | qwen, fitted"
    assert lines[0] == f"| figure | measure | asked | {kinds} | runs |"
    cells = "**4** (3.5–4.5) | 3.25 | – | 5.5 | 7 / 8 |"
    assert lines[2] == f"| mean ITL | MAPE, % | at most 5 | {cells}"
    cells = "**0.98** (0.97–0.99) | 0.991 | **0.98** (0.97–0.99) | 0.991 | 15 |"
    assert lines[3] == f"| starved | macro-F1 | at least 0.99 | {cells}"


def test_readme_keeps_its_text_around_the_table():
    text = f"above\n{results.BEGIN}\nold\n{results.END}\nbelow\n"
    renewed = update_readme(text, CONFORMANCE, LEFT_OUT, BARS)
    assert "| vLLM 0.8.5 | 12 | 3,456 | 78 | 0 |" in renewed
    assert renewed.startswith("above\n")
    assert renewed.endswith("\nbelow\n")
    assert "old" not in renewed
    assert accuracy_table(LEFT_OUT, BARS) in renewed


def test_record_takes_over_tables_pictures_and_readme(monkeypatch, tmp_path):
    run = tmp_path / "full"
    run.mkdir()
    BARS.to_csv(run / "bars.csv", index=False)
    CONFORMANCE.to_csv(run / "conformance.csv", index=False)
    LEFT_OUT.to_csv(run / "bars_left_out.csv", index=False)
    (run / "service.png").write_bytes(b"png")
    (run / "timings").mkdir()
    BARS.to_csv(run / "timings" / "speed.csv", index=False)
    for name in ("EXPECTED", "IMAGES", "README"):
        monkeypatch.setattr(results, name, tmp_path / name)
    (tmp_path / "EXPECTED").mkdir()
    (tmp_path / "README").write_text(f"{results.BEGIN}\n{results.END}")
    written = record(run)
    assert {path.relative_to(tmp_path).as_posix() for path in written} == {
        "EXPECTED/bars.csv",
        "EXPECTED/bars_left_out.csv",
        "EXPECTED/conformance.csv",
        "EXPECTED/timings/speed.csv",
        "IMAGES/service.png",
        "README",
    }
    assert accuracy_table(LEFT_OUT, BARS) in (tmp_path / "README").read_text()


def test_record_refuses_a_folder_without_results(tmp_path):
    with pytest.raises(AdapterTwinError, match="make reproduce"):
        record(tmp_path)


def test_readme_shows_the_recorded_accuracy():
    text = results.README.read_text()
    tables = (read_expected(name) for name in ("conformance", "bars_left_out", "bars"))
    assert update_readme(text, *tables) == text
