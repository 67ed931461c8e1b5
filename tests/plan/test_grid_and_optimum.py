"""The rule, the grid, the design, the sweep, the labels and the optimum."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_twin import parallel
from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.learn.design import Design, Factorial, SpaceFilling, load_design
from adapter_twin.learn.sweep import label, read_sweep, run_sweep
from adapter_twin.plan.criterion import TIE, Criterion
from adapter_twin.plan.demand import load_demand
from adapter_twin.plan.grid import evaluate, grid_runs
from adapter_twin.plan.optimum import optimum, optimum_of_log
from adapter_twin.plan.recommend import recommend
from adapter_twin.service.metrics import STARVATION_THRESHOLD
from adapter_twin.service.predict import predict
from adapter_twin.workload.files import run_to_workload
from adapter_twin.workload.scenario import Slo

LLAMA = "llama-3.1-8b-instruct"
MIX: dict[str, Any] = {
    "model": LLAMA,
    "rates_per_adapter": "0.4-0.1-0.05",
    "ranks": "8-16",
    "mean_input_tokens": 223.0,
    "mean_requested_output_tokens": 200.0,
}


def runs(*rows: tuple[float, float, float]) -> pd.DataFrame:
    """Return runs of (offered, throughput, mean TTFT)."""
    table = pd.DataFrame(rows, columns=["offered_tokens_per_s", "total_throughput", "mean_ttft_ms"])
    return table.assign(feasible_start=True, slo_attainment=1.0)


def test_the_best_feasible_throughput_wins_and_ties_go_to_the_lower_ttft() -> None:
    table = runs((1000, 990, 50), (1005, 995, 20), (2000, 1700, 1), (600, 600, 1))
    ranked = Criterion().ranked(table)
    assert ranked.index.tolist() == [1, 0, 3]
    assert ranked["tied"].tolist() == [True, True, False]


def test_nothing_feasible_means_no_pick() -> None:
    assert Criterion().ranked(runs((1000, 500, 1))).empty


def test_the_margin_excludes_what_is_close_to_starving() -> None:
    table = runs((1000, 905, 1), (500, 500, 1))
    assert Criterion().ranked(table).index[0] == 0
    assert Criterion(margin=0.02).ranked(table).index.tolist() == [1]


def test_an_slo_must_be_met_besides() -> None:
    slo = Slo(ttft_ms=100, percentile=99)
    table = runs((1000, 1000, 1), (500, 500, 1)).assign(slo_attainment=[0.98, 0.995])
    assert Criterion(slo=slo).ranked(table).index.tolist() == [1]


@given(
    st.lists(
        st.tuples(st.floats(1, 1e4), st.floats(0, 1), st.floats(1, 1e5)), min_size=1, max_size=20
    )
)
def test_a_pick_never_starves_and_loses_at_most_a_tie(rows: list[tuple[float, float, float]]):
    table = runs(*((offered, offered * share, ttft) for offered, share, ttft in rows))
    ranked = Criterion().ranked(table)
    feasible = table[table.total_throughput >= STARVATION_THRESHOLD * table.offered_tokens_per_s]
    assert len(ranked) == len(feasible)
    if len(ranked):
        best = feasible.total_throughput.max()
        assert ranked.iloc[0].total_throughput >= (1 - TIE) * best * (1 - 1e-12)


@pytest.mark.parametrize("margin", [-0.1, 0.1, 0.5])
def test_a_margin_out_of_range_is_refused(margin: float) -> None:
    with pytest.raises(AdapterTwinError, match="margin: must be"):
        Criterion(margin=margin)


def test_a_grid_holds_no_more_slots_than_adapters_and_reserves_the_largest_rank() -> None:
    table = grid_runs(MIX, [32, 16], [16, 64, 32], 60.0)
    assert table[["served_adapters", "adapter_slots"]].values.tolist() == [
        [16, 16],
        [32, 16],
        [32, 32],
    ]
    assert (table["max_lora_rank"] == 16).all()


def test_evaluating_a_grid_gives_what_predict_gives() -> None:
    table = grid_runs(MIX, [16, 32], [16, 32], 60.0)
    ours = evaluate(table, load_calibration("auto", LLAMA))
    theirs = predict(table, observer=False, jobs=1)
    assert ours["simulated"].all()
    for column in ("total_throughput", "mean_itl_ms", "p99_itl_ms", "kv_cache_tokens"):
        np.testing.assert_array_equal(ours[column], theirs[column])


def test_hopeless_and_refused_runs_are_not_simulated() -> None:
    table = grid_runs(MIX | {"ranks": "32", "rates_per_adapter": "3.2"}, [384], [16, 384], 60.0)
    served = evaluate(table, load_calibration("auto", LLAMA))
    assert served["feasible_start"].tolist() == [True, False]
    assert not served["simulated"].any()
    assert served["total_throughput"].isna().all()


def test_the_optimum_satisfies_the_rule_and_lists_what_came_next() -> None:
    found = optimum(MIX, served_grid=[16, 32, 64, 128], slots_grid=[16, 64], duration_s=600.0)
    assert found["served_adapters"] in (16, 32, 64, 128)
    assert found["adapter_slots"] <= found["served_adapters"]
    assert found["starved"] is False
    best = [other["total_throughput"] for other in found["alternatives"]]
    assert found["total_throughput"] >= (1 - TIE) * max(best)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"rates_per_adapter": "50"}, {}, "served_grid: every configuration starves"),
        ({"model": "lama"}, {}, "lama"),
        ({"ranks": "8-1024"}, {}, "ranks: 1024 is above 512"),
        ({"rates_per_adapter": "a"}, {}, "rates_per_adapter: expected numbers"),
        ({}, {"served_grid": [0, 16]}, r"served_grid\[0\]: must be at least 1"),
        ({}, {"served_grid": []}, "served_grid: must not be empty"),
        ({}, {"slots_grid": [512]}, "slots_grid: all are above served_grid"),
        ({"ranks": "256"}, {"served_grid": [384], "slots_grid": [384]}, "starts with none"),
        (
            {},
            {"criterion": Criterion(slo=Slo(ttft_ms=0.1))},
            "slo: no configuration of the grid meets it",
        ),
    ],
)
def test_what_cannot_be_answered_says_why(
    change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    options = {"served_grid": [16, 32], "slots_grid": [16], "duration_s": 600.0} | options
    with pytest.raises(AdapterTwinError, match=message):
        optimum(MIX | change, **options)


DESIGN: dict[str, Any] = {
    "name": "tiny",
    "models": [LLAMA],
    "served_adapters": [8, 16],
    "adapter_slots": [8],
    "duration_s": 20,
    "slo": {"ttft_ms": 500, "percentile": 90},
    "factorial": {"rate_values": [0.4, 0.1, 0.003125], "rates_per_workload": 2, "ranks": ["8-16"]},
}


@pytest.fixture
def design(tmp_path: Path) -> Path:
    path = tmp_path / "design.yaml"
    path.write_text(yaml.safe_dump(DESIGN))
    return path


def test_a_factorial_has_every_choice_of_rates_with_every_mix_of_ranks() -> None:
    factorial = Factorial(
        rate_values=(0.1, 0.4, 0.003125), rates_per_workload=2, ranks=("8", "16-32")
    )
    drawn = [(row["rates_per_adapter"], row["ranks"]) for row in factorial.draw(0)]
    assert len(set(drawn)) == len(drawn) == 6
    assert ("0.4-0.003125", "8") in drawn


def test_the_paper_design_is_the_papers_grid() -> None:
    design = load_design(Path(__file__).parents[2] / "experiments" / "designs" / "paper.yaml")
    workloads = design.workloads()
    assert len(workloads) == 2 * 120 * 7
    assert workloads.groupby("model")["rates_per_adapter"].nunique().eq(120).all()
    assert workloads["workload_id"].is_unique


SPACE = SpaceFilling(
    workloads=50,
    mean_rate=(0.01, 1.0),
    mean_input_tokens=(64, 1024),
    mean_output_tokens=(50, 400),
    zipf_exponent=(0, 1.5),
    arrival_cv=(1, 4),
    ranks=("8", "16-32"),
)


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 1000))
def test_a_space_filling_sample_stays_in_its_ranges_and_fills_them(seed: int) -> None:
    points = pd.DataFrame(SPACE.draw(seed))
    assert len(points) == 50
    for column, (low, high) in {
        "mean_input_tokens": SPACE.mean_input_tokens,
        "zipf_exponent": SPACE.zipf_exponent,
        "arrival_cv": SPACE.arrival_cv,
    }.items():
        assert points[column].between(low, high).all()
        bins = pd.cut(points[column].rank(), 5).value_counts()
        assert bins.eq(10).all()
    assert set(points["ranks"]) == set(SPACE.ranks)


def test_skewed_and_bursty_rows_become_the_workload_they_describe() -> None:
    row = {**MIX, "rates_per_adapter": "0.5", "zipf_exponent": 1.0, "arrival_cv": 2.0}
    table = grid_runs(row, [8], [8], 60.0)
    _, workload = run_to_workload(table.iloc[0])
    rates = [adapter.request_rate for adapter in workload.adapters]
    assert sum(rates) == pytest.approx(8 * 0.5)
    assert rates[0] == pytest.approx(8 * rates[-1])
    assert (workload.arrivals.process, workload.arrivals.cv) == ("gamma", 2.0)


def test_a_sweep_is_resumed_without_repeating_or_losing_a_workload(
    design: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_sweep(design, out, jobs=1) == 3
    first = read_sweep(out)
    part = next((out / "parts").glob("*/*.parquet"))
    part.unlink()
    assert run_sweep(design, out, jobs=1) == 1
    pd.testing.assert_frame_equal(read_sweep(out), first)
    assert run_sweep(design, out, jobs=1) == 0


def test_a_killed_sweep_goes_on_and_ends_as_if_it_had_not_been(
    design: Path, tmp_path: Path
) -> None:
    factorial = DESIGN["factorial"] | {"rate_values": [1.6, 0.8, 0.4, 0.1, 0.05], "ranks": ["8"]}
    design.write_text(yaml.safe_dump(DESIGN | {"factorial": factorial, "duration_s": 900}))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "adapter_twin", "sweep", str(design), "--out", str(out)]
    with subprocess.Popen([*command, "--jobs", "1"], start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("parts/*/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    kept = len(list(out.glob("parts/*/*.parquet")))
    assert kept > 0
    assert run_sweep(design, out, jobs=1) == 10 - kept
    straight = tmp_path / "straight"
    run_sweep(design, straight, jobs=1)
    pd.testing.assert_frame_equal(read_sweep(out), read_sweep(straight))


def test_a_terminated_sweep_takes_its_workers_along(design: Path, tmp_path: Path) -> None:
    factorial = DESIGN["factorial"] | {"rate_values": [1.6, 0.8, 0.4, 0.1, 0.05], "ranks": ["8"]}
    design.write_text(yaml.safe_dump(DESIGN | {"factorial": factorial}))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "adapter_twin", "sweep", str(design), "--out", str(out)]
    with subprocess.Popen(
        [*command, "--jobs", "2"], start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("parts/*/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert "error: interrupted" in process.stderr.read()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("worker processes are left")


def test_a_folder_takes_one_sweep_only(design: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_sweep(design, out, jobs=1)
    design.write_text(yaml.safe_dump(DESIGN | {"seed": 1}))
    with pytest.raises(AdapterTwinError, match="holds another sweep"):
        run_sweep(design, out, jobs=1)


def test_dask_workers_give_the_same_sweep(
    design: Path, tmp_path: Path, dask_scheduler: str
) -> None:
    run_sweep(design, tmp_path / "here", jobs=1)
    run_sweep(design, tmp_path / "there", scheduler=dask_scheduler)
    pd.testing.assert_frame_equal(read_sweep(tmp_path / "there"), read_sweep(tmp_path / "here"))


def test_a_scheduler_that_does_not_answer_is_named(
    design: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(parallel, "CONNECT_S", 0.5)
    with pytest.raises(AdapterTwinError, match=r"scheduler: tcp:.* cannot be reached"):
        run_sweep(design, tmp_path / "out", scheduler="tcp://127.0.0.1:9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modles": [LLAMA]}, "modles: unknown key; did you mean 'models'"),
        ({"models": ["lama"]}, "lama"),
        ({"models": []}, "models: must not be empty"),
        ({"factorial": None}, "factorial: give factorial or space_filling"),
        ({"adapter_slots": [64]}, "adapter_slots: all are above served_adapters"),
        ({"served_adapters": [16, 16]}, "served_adapters: a number is there twice"),
        ({"factorial": DESIGN["factorial"] | {"rates_per_workload": 4}}, "rates_per_workload"),
        (
            {"factorial": DESIGN["factorial"] | {"ranks": ["8-x"]}},
            "factorial.ranks: expected whole numbers",
        ),
    ],
)
def test_a_wrong_design_names_the_key(
    design: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = {k: v for k, v in (DESIGN | change).items() if v is not None}
    design.write_text(yaml.safe_dump(content))
    with pytest.raises(AdapterTwinError, match=message):
        run_sweep(design, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def labelled(*throughputs: float) -> pd.DataFrame:
    """Return a sweep of one workload at N = 16, 32, ... whose offered load grows with N."""
    table = runs(*((1000.0 * (i + 1), x, 10.0) for i, x in enumerate(throughputs)))
    table = table.assign(served_adapters=[16 * (i + 1) for i in table.index], adapter_slots=16)
    return table.assign(
        **MIX, workload_id="w", zipf_exponent=0.0, arrival_cv=1.0, max_lora_rank=16, seed=0
    )


def test_labels_mark_the_grids_edge_and_keep_ties() -> None:
    sweep = labelled(1000, 2000)
    more_slots = sweep[sweep["served_adapters"] == 32].assign(adapter_slots=32, mean_ttft_ms=5.0)
    row = label(pd.concat([sweep, more_slots]), Criterion()).iloc[0]
    assert (row.served_adapters, row.adapter_slots, row.tied_slots) == (32, 32, "16-32")
    assert row.censored
    assert not label(labelled(1000, 1500), Criterion()).iloc[0].censored


def test_a_workload_that_always_starves_gets_no_label() -> None:
    row = label(labelled(100, 200), Criterion()).iloc[0]
    assert not row.has_optimum
    assert "served_adapters" not in row or np.isnan(row.served_adapters)


def test_a_design_without_runs_left_out_is_complete(design: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_sweep(design, out, jobs=1)
    table = read_sweep(out)
    assert len(table) == 3 * 2
    assert table["slo_attainment"].between(0, 1).all()
    assert isinstance(load_design(design), Design)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of a few busy adapters and many idle ones, in bursts."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 13)
    names = rng.permutation([f"customer-{i}" for i in range(12)])
    n = 6000
    table = pd.DataFrame(
        {
            "arrival_s": np.sort(np.repeat(np.arange(12) * 50.0, n // 12) + rng.gamma(2, 15, n)),
            "adapter": rng.choice([*names, ""], n, p=[*(0.9 * share / share.sum()), 0.1]),
            "prompt_tokens": rng.integers(50, 500, n),
            "output_tokens": rng.integers(50, 400, n),
        }
    )
    table.to_csv(tmp_path / "log.csv", index=False)
    return tmp_path / "log.csv"


@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_of_a_log_the_busiest_adapters_are_served_as_recommend_says(log: Path) -> None:
    rule = Criterion(margin=0.02, slo=Slo(ttft_ms=2000, itl_ms=24, percentile=99))
    grids = {"served_grid": [2, 4, 8, 16], "slots_grid": [1, 2, 4, 8, 12]}
    found = optimum_of_log(log, LLAMA, "8-16", criterion=rule, jobs=1, **grids)
    served = found["served_adapters"]
    assert 2 <= served < 12
    assert not found["at_edge"]
    requests = pd.read_csv(log, keep_default_na=False)
    busy = requests.adapter[requests.adapter != ""].value_counts().index[:12]

    def recommended(count: int) -> dict[str, Any]:
        of_them = requests[requests.adapter.isin([*busy[:count], ""])]
        of_them.to_csv(log.with_name("busiest.csv"), index=False)
        content = {
            "model": LLAMA,
            "adapters": [{"name": busy[i], "rank": [8, 16][i % 2]} for i in range(count)],
            "request_log": "busiest.csv",
            "slots": [slots for slots in grids["slots_grid"] if slots <= count],
            "slo": {"ttft_ms": 2000, "itl_ms": 24, "percentile": 99},
        }
        log.with_name("workload.yaml").write_text(yaml.safe_dump(content))
        return recommend(load_demand(log.with_name("workload.yaml")))

    answer = recommended(served)
    assert found["adapter_slots"] == answer["adapter_slots"]
    for name in ("total_throughput", "mean_ttft_ms", "p99_ttft_ms"):
        assert found[name] == pytest.approx(answer["expected"][name]["value"], rel=1e-3)
    more = next(size for size in (4, 8, 12) if size > served)
    with pytest.raises(AdapterTwinError, match=r"^slo: no number of slots meets it"):
        recommended(more)


@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_all_adapters_of_a_log_are_no_edge_of_the_grid(log: Path) -> None:
    found = optimum_of_log(log, LLAMA, "8", served_grid=[4, 400], slots_grid=[4, 12], jobs=1)
    assert (found["served_adapters"], found["at_edge"]) == (12, False)
    assert found["traffic"].startswith("a log of")


@pytest.mark.parametrize(
    ("change", "grid", "message"),
    [
        (lambda log: log.drop(columns="adapter"), [4], r"log.csv: names no adapters"),
        (lambda log: log.assign(adapter=""), [4], r"log.csv: names no adapters"),
        (lambda log: log.assign(adapter="-- x"), [4], r"log.csv: adapter.name: "),
        (lambda log: log.assign(arrival_s=5), [4], "request_log: give requests at two"),
        (lambda log: log, [100], "slots_grid: all are above"),
    ],
)
def test_a_log_without_busiest_adapters_is_refused(
    log: Path, change: Any, grid: list[int], message: str
) -> None:
    change(pd.read_csv(log, keep_default_na=False)).to_csv(log, index=False)
    with pytest.raises(AdapterTwinError, match=message) as refused:
        optimum_of_log(log, LLAMA, "8", slots_grid=grid, jobs=1)
    assert "\n" not in str(refused.value)
