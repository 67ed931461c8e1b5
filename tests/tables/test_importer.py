"""The importer reads from raw run folders what the published tables say of the same runs."""

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.tables import datasets, importer, run_folder

VALIDATION, OPTIMUM = run_folder.CAMPAIGNS
FOLDER = "llama-3.1-8b-instruct/rank_16_rates_0.1_0.05_0.025/_4_6_16_"
START = "Namespace(server_args='--max-num-seqs=\"256\" --max-loras=4')\n"
TRAFFIC = """Server started
Adapter rates. Values: [0.025 0.05  0.1  ]. Counts: [2 2 2]
Prompts retrieved: 10 . Total input tokens: 2230 . Total output tokens: 1980
"""
REPORT = "===== Serving Benchmark Intermediate Result =====\n" + "".join(
    f"{label + ':':<40} {i + 1:<10}\n" for i, label in enumerate(run_folder.REPORT.values())
)
TIME = np.array([100.0, 102.0, 1902.0, 3702.0, 3704.0])  # the hour runs from 102 to 3702
SERIES = {
    "finished": [0, 0, 1, 2, 2],
    "num_running": [0, 1, 3, 5, 0],
    "num_waiting": [0, 0, 0, 8, 0],
    "num_preempted": [0, 0, 1, 4, 9],
    "gpu_cache_usage_perc": [0, 0.25, 0.5, 0.75, 0],
    "processed_tokens_prompt": [0, 10, 999_999, 0, 0],
    "processed_tokens_token": [0, 7, 20, 30, 30],
}


def write_run(root: Path, log: str = START + TRAFFIC + REPORT, series: bool = True) -> Path:
    """Write a run folder of the first campaign."""
    folder = root / VALIDATION.folder / FOLDER
    folder.mkdir(parents=True)
    (folder / "log_17.out").write_text(log)
    if series:
        np.save(folder / "time.npy", TIME)
        for name, values in SERIES.items():
            np.save(folder / f"{name}.npy", np.array(values, dtype=float))
    return folder


def refuse(folder: Path) -> str:
    with pytest.raises(AdapterTwinError) as caught:
        run_folder.read_run(folder, VALIDATION)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_run_is_read_from_its_names_log_and_series(tmp_path: Path) -> None:
    run, series = run_folder.read_run(write_run(tmp_path), VALIDATION)
    assert series is not None
    wanted = {
        "run_id": f"dt_real/{FOLDER}",
        "rates_per_adapter": "0.1-0.05-0.025",
        "ranks": "8-16",
        "adapter_slots": 4,
        "served_adapters": 6,
        "max_lora_rank": 16,
        "max_num_seqs": 256,
        "status": "ok",
        "rate_values": "0.025 0.05 0.1",
        "rate_counts": "2 2 2",
        "mean_input_tokens": 223.0,
        "duration_s": 1.0,
        "completed_requests": 2.0,
        "total_throughput": 11.0,
        "running_mean": 3.0,
        "running_mean_2nd_half": 4.0,
        "waiting_last": 8.0,
        "preemptions": 4.0,
        "kv_usage_max": 0.75,
        "sent_requests": 2.0 + 5 + 8,
        "sent_is_exact": False,
        "client_collapsed": False,
    }
    assert {name: run[name] for name in wanted} == wanted
    assert run["offered_request_rate"] == pytest.approx(0.35)
    assert run["waiting_slope_2nd_half_per_s"] == pytest.approx(8 / 1800)
    assert series["t_s"].tolist() == [-2, 0, 1800, 3600, 3602]


def test_a_token_counter_lost_past_a_million_is_missing_not_zero(tmp_path: Path) -> None:
    _, series = run_folder.read_run(write_run(tmp_path), VALIDATION)
    assert series is not None
    assert series["prompt_tokens_total"].isna().tolist() == [False, False, False, True, True]
    assert series["generated_tokens_total"].notna().all()


def test_recorded_arrivals_make_sent_requests_exact(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "arrivals.csv").write_text("arrival_time,input_tokens\n1.0,5\n2.0,5\n3.0,5\n")
    run, _ = run_folder.read_run(folder, VALIDATION)
    assert (run["sent_requests"], run["sent_is_exact"]) == (3.0, True)


def test_a_client_out_of_ports_is_flagged_and_its_requests_taken_as_offered(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    np.save(folder / "num_waiting.npy", np.array([0, 0, 25_000, 100, 0.0]))
    run, _ = run_folder.read_run(folder, VALIDATION)
    assert run["client_collapsed"]
    assert run["sent_requests"] == pytest.approx(3600 * 0.35)


def test_a_cut_log_keeps_the_series_without_client_figures(tmp_path: Path) -> None:
    run, series = run_folder.read_run(write_run(tmp_path, START + TRAFFIC), VALIDATION)
    assert run["status"] == "log_truncated_series_ok"
    assert np.isnan(run["total_throughput"])
    assert np.isnan(run["sent_requests"])
    assert run["running_mean"] == 3.0
    assert series is not None


def test_a_series_that_never_shows_a_request_has_no_counters(tmp_path: Path) -> None:
    folder = write_run(tmp_path, START + TRAFFIC)
    np.save(folder / "num_running.npy", np.zeros(5))
    run, series = run_folder.read_run(folder, VALIDATION)
    assert series is not None
    assert series["t_s"].iloc[-1] == 3615
    assert series["waiting"].isna().all()
    assert np.isnan(run["waiting_mean"])


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("ValueError: 16.00 GiB KV cache is needed, which is larger than the available KV cache "
         "memory (14.76 GiB)", "kv_lt_max_seq_len"),
        ("ValueError: No available memory for the cache blocks. Try", "no_mem_cache_blocks"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "oom"),
        ("CUDA error: an illegal memory access was encountered", "illegal_mem_access"),
        ("OSError: [Errno 98] Address already in use", "port_in_use"),
        ("something else", "unknown"),
        (None, "unknown"),
    ],
)  # fmt: skip
def test_a_failed_start_carries_its_reason(tmp_path: Path, text: str | None, failure: str) -> None:
    folder = write_run(tmp_path, START, series=False)
    if text is not None:
        (folder / "server_err.log").write_text(text)
    run, series = run_folder.read_run(folder, VALIDATION)
    assert run["status"] == f"failed:{failure}"
    assert series is None


def test_a_truncated_series_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    path = folder / "num_waiting.npy"
    path.write_bytes(path.read_bytes()[:-12])
    assert "num_waiting.npy: malformed or truncated series" in refuse(folder)


def test_a_series_of_another_length_or_absent_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    np.save(folder / "num_waiting.npy", np.zeros(3))
    assert "num_waiting.npy: shape (3,)" in refuse(folder)
    (folder / "num_waiting.npy").unlink()
    assert "num_waiting.npy" in refuse(folder)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    np.save(folder / "num_waiting.npy", np.array([{}] * 5), allow_pickle=True)
    assert "num_waiting.npy" in refuse(folder)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "--max-num-seqs"),
        (START + TRAFFIC + REPORT[:400], "the client's report lacks"),
        (START + TRAFFIC + REPORT.replace(" 7  ", " x  "), "not a number"),
        (START + TRAFFIC.replace("[2 2 2]", "[2 2]") + REPORT, "malformed traffic"),
    ],
)
def test_a_malformed_log_is_refused(tmp_path: Path, log: str, reason: str) -> None:
    assert reason in refuse(write_run(tmp_path, log))


def test_a_folder_without_a_log_or_with_a_strange_name_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "log_17.out").unlink()
    assert "no client log" in refuse(folder)
    assert "_SLOTS_SERVED_MAXRANK_" in refuse(folder.parent)


def test_the_optimum_campaign_spells_out_its_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "qwen-2.5-7b-instruct/rate_0.4-0.05-0.025_size_8-8-32/_16_96_32_"
    names = run_folder.read_names(folder, OPTIMUM)
    assert names["run_id"] == (
        "ml_test/qwen-2.5-7b-instruct/rate_0.4-0.05-0.025_size_8-8-32/_16_96_32_"
    )
    assert (names["ranks"], names["rates_per_adapter"]) == ("8-8-32", "0.4-0.05-0.025")


def test_an_import_writes_both_tables_and_damaged_sources_write_none(tmp_path: Path) -> None:
    source, out = tmp_path / "clone", tmp_path / "external"
    folder = write_run(source / run_folder.RESULTS)
    written = importer.import_repository(source, out)
    assert [path.name for path in written] == ["runs.parquet", "series.parquet"]
    assert datasets.read_measured_runs(written[0])["status"].tolist() == ["ok"]
    assert len(pd.read_parquet(written[1])) == 5

    (folder / "time.npy").write_bytes(b"")
    with pytest.raises(AdapterTwinError, match=r"time\.npy"):
        importer.import_repository(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_that_is_no_clone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError, match="no run folders"):
        importer.read_repository(tmp_path)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_fetch_takes_the_campaigns_of_the_pinned_commit_only(tmp_path: Path) -> None:
    upstream = tmp_path / "upstream"
    write_run(upstream / run_folder.RESULTS)
    (upstream / "csrc").mkdir()
    (upstream / "csrc/kernel.cu").write_text("not needed")
    git(upstream, "init", "--quiet")
    git(upstream, "config", "uploadpack.allowFilter", "true")
    git(upstream, "config", "uploadpack.allowAnySHA1InWant", "true")
    git(upstream, "add", ".")
    git(upstream, "commit", "--quiet", "-m", "pinned")
    commit = git(upstream, "rev-parse", "HEAD")
    git(upstream, "rm", "-r", "--quiet", run_folder.RESULTS)
    git(upstream, "commit", "--quiet", "-m", "later")

    clone = importer.fetch_repository(tmp_path / "clone", upstream.as_uri(), commit)
    runs, _ = importer.read_repository(clone)
    assert runs["run_id"].tolist() == [f"dt_real/{FOLDER}"]
    assert not (clone / "csrc").exists()
    # Nor was its content transferred.
    absent = git(clone, "rev-list", "--objects", "--missing=print", commit)
    assert sum(line.startswith("?") for line in absent.splitlines()) == 1


def test_a_fetch_that_fails_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError) as caught:
        importer.fetch_repository(tmp_path / "clone", (tmp_path / "nowhere").as_uri(), "0" * 40)
    assert "git fetch failed" in str(caught.value)
    assert "clone https://github.com/" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- against the published tables ------------------------------------------------------------------

PUBLISHED = datasets.REPOSITORY / "data" / datasets.DATASET
NOT_IN_A_FOLDER = {"sent_requests", "sent_is_exact"}
"""Counted from the client's arrivals, which the sample leaves out, in the first campaign."""


@pytest.fixture(scope="module")
def imported() -> tuple[pd.DataFrame, pd.DataFrame]:
    return importer.read_repository(PUBLISHED / "raw_sample")


def test_imported_runs_equal_the_published_rows(
    imported: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    runs = imported[0].set_index("source_path")
    published = datasets.load("runs").set_index("source_path").loc[runs.index]
    assert set(runs) == set(published)
    assert sorted(runs["status"]) == ["failed:kv_lt_max_seq_len", "ok", "ok"]
    same = [name for name in published if name not in NOT_IN_A_FOLDER]
    # The published slope and sum depend on the linear algebra library in their last digits.
    rounded = {"waiting_slope_2nd_half_per_s": 1e-9, "offered_request_rate": 1e-12}
    pd.testing.assert_frame_equal(
        runs[same].drop(columns=list(rounded)),
        published[same].drop(columns=list(rounded)),
        check_exact=True,
    )
    for name, rtol in rounded.items():
        np.testing.assert_allclose(runs[name], published[name], rtol=rtol, atol=1e-12)


def test_estimated_sent_requests_are_within_one_percent(
    imported: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    runs = imported[0].set_index("source_path")
    published = datasets.load("runs").set_index("source_path").loc[runs.index]
    estimated = ~published["sent_is_exact"]
    pd.testing.assert_series_equal(
        runs["sent_requests"][estimated], published["sent_requests"][estimated]
    )
    np.testing.assert_allclose(runs["sent_requests"], published["sent_requests"], rtol=0.01)


def test_imported_series_equal_the_published_rows(
    imported: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    series = imported[1]
    published = datasets.load("series")
    kept = ["t_s", "stopped_by_eos_total", "running"]
    for run_id, rows in series.groupby("run_id", observed=True):
        expected = published.loc[published["run_id"] == run_id, kept].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows[kept].reset_index(drop=True), expected, check_exact=True)
