"""Each published assumption changes what it is about, and nothing else."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from adapter_twin.laws import load_calibration
from adapter_twin.plan.criterion import Criterion
from adapter_twin.plan.grid import evaluate, grid_runs
from adapter_twin.service.predict import predict_run
from adapter_twin.twin.clock import FrontEnd, StepLaw
from adapter_twin.twin.layout import new_session
from adapter_twin.twin.session import Session
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import Trace
from study import ch13_published, ch14_ablation, measured_grids
from study.ch01_to_06 import configurations
from study.ch14_ablation import ABLATIONS, Assumptions, OneSlotCount, run_with_free_prompts
from study.figures import ablations

LLAMA = "llama-3.1-8b-instruct"


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    """Two configurations, as if measured: as the twin predicts them."""
    asked = configurations(LLAMA, [32], [16, 32], rates="0.4-0.2", ranks="8-16", duration_s=200.0)
    calibration = load_calibration("auto", LLAMA)
    served = pd.DataFrame(
        predict_run(row, calibration, 0, observer=True)[0] for row in asked.to_dict("records")
    )
    return asked.join(served.drop(columns="run_id")).assign(
        status="ok",
        campaign="made up",
        client_collapsed=False,
        offered_request_rate=9.6,
        waiting_mean=0.0,
    )


def two_requests(law: StepLaw) -> Session:
    """Return a run of a prompt of 100 tokens, and one that comes while it decodes."""
    columns = ([0, 0], [100, 40], [4, 2])
    return new_session(
        Trace(np.array([0.0, 1.5]), *(np.array(column, np.int32) for column in columns)),
        EngineConfig(model="any", max_loras=1, max_cpu_loras=1, max_lora_rank=8),
        law,
        FrontEnd(1000.0, 1000),
        1000,
        np.zeros(1),
        np.zeros(1),
    )


def step_law(**seconds: float) -> StepLaw:
    features = ("launch", "tokens", "decodes", "context_tokens", "adapters")
    coefficients = np.zeros((1, 8))
    coefficients[0, :5] = [seconds.get(name, 0.0) for name in features]
    return StepLaw(np.empty(0), coefficients, 0.0, np.zeros(3))


def with_free_prompts(session: Session) -> Session:
    session.loop = run_with_free_prompts
    session.run()
    return session


def test_free_prompts_take_the_time_of_one_decode() -> None:
    run = with_free_prompts(two_requests(step_law(launch=1.0, tokens=0.1)))
    # 1 + 0.1 for one running request, and 0.1 more for each further one, prompt or not
    assert run.requests.first_token_s == pytest.approx([1.1, 3.4])
    assert run.requests.end_s == pytest.approx([4.6, 4.6])
    usual = two_requests(step_law(launch=1.0, tokens=0.1))
    usual.run()
    assert usual.requests.first_token_s[0] == pytest.approx(1 + 0.1 * 100)


def test_prompts_that_cost_nothing_anyway_cannot_be_made_free() -> None:
    law = step_law(launch=1.0, context_tokens=0.01, adapters=0.5)
    usual, free = two_requests(law), two_requests(law)
    usual.run()
    assert with_free_prompts(free).requests.end_s == pytest.approx(usual.requests.end_s)


def test_a_run_with_free_prompts_grows_its_table_of_steps() -> None:
    small = two_requests(step_law(launch=1.0))
    small.steps = small.steps[:2]
    whole = two_requests(step_law(launch=1.0))
    assert with_free_prompts(small).requests.end_s == pytest.approx(
        with_free_prompts(whole).requests.end_s
    )


def test_normal_lengths_keep_the_arrivals_and_carry_what_is_cut_off() -> None:
    rng = np.random.default_rng(0)
    tokens = np.rint(rng.exponential(200, 200_000)).astype(np.int32) + 1
    trace = Trace(np.arange(200_000.0), np.zeros(200_000, np.int32), tokens, tokens)
    drawn = ch14_ablation.with_normal_lengths(trace, np.random.default_rng(1))
    assert (drawn.arrival_s == trace.arrival_s).all()
    assert drawn.prompt_tokens.min() == 1
    assert drawn.output_tokens.min() == 2
    # E[max(X, 0)] of a normal whose mean is its standard deviation: 1.0833 of the mean
    assert drawn.prompt_tokens.mean() / tokens.mean() == pytest.approx(1.0833, rel=0.01)
    narrow = replace(trace, prompt_tokens=np.full_like(tokens, 50))
    kept = ch14_ablation.with_normal_lengths(narrow, np.random.default_rng(1))
    assert (kept.prompt_tokens == 50).all()


def test_one_slot_count_prices_every_engine_like_the_profiled_one() -> None:
    law = load_calibration("auto", LLAMA).step_time
    one = OneSlotCount.from_dict(vars(law))
    profiled = law.for_engine(ch14_ablation.PROFILED_SLOTS, ch14_ablation.PROFILED_RANK)
    assert (one.for_engine(16, 32) == profiled).all()
    assert (law.for_engine(16, 32) != profiled).any()


def test_without_an_assumption_it_is_the_twin_itself(runs) -> None:
    predicted = ch14_ablation.predict_with(runs, ABLATIONS["this twin"], jobs=1)
    for figure in ("total_throughput", "mean_itl_ms", "p99_ttft_ms"):
        assert predicted[figure].to_list() == runs[figure].to_list()


def test_assumptions_act_together(runs) -> None:
    one = runs.head(1)
    itl = {
        name: ch14_ablation.predict_with(one, assumptions, jobs=1)["mean_itl_ms"].iloc[0]
        for name, assumptions in (
            ("twin", Assumptions()),
            ("free", Assumptions(free_prompts=True)),
            ("slots", Assumptions(one_slot_count=True)),
            ("both", Assumptions(free_prompts=True, one_slot_count=True)),
        )
    }
    assert itl["free"] < itl["twin"] < itl["slots"]
    assert itl["free"] < itl["both"] < itl["slots"]


def test_errors_and_their_bias_are_told_by_regime_and_over_all(runs) -> None:
    guess = runs[["run_id"]].assign(total_throughput=runs["total_throughput"] * [1.1, 0.7])
    table = ch14_ablation.error_table(runs, {"wrong": guess})
    overall = table[table["regime"] == "all"].iloc[0]
    assert overall["figure"] == "total_throughput"  # what is not predicted is not scored
    assert overall["value"] == pytest.approx(20)
    assert overall["bias"] == pytest.approx(-10)
    assert overall["n_runs"] == 2


def test_every_ablation_is_a_row_and_every_figure_a_panel() -> None:
    rows = [
        {"ablation": name, "figure": figure, "measure": measure, "regime": regime, "value": 3.0,
         "low": 2.0, "high": 5.0}
        for name in ABLATIONS
        for figure, measure in ch14_ablation.MEASURES.items()
        for regime in ablations.REGIMES
    ]  # fmt: skip
    figure = ablations.errors(pd.DataFrame(rows))
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "MAPE (%)",
        "MAPE (%)",
        "median error (%)",
    ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(ABLATIONS)
    plt.close(figure)


@pytest.fixture(scope="module")
def sweep() -> pd.DataFrame:
    """A workload of which a few adapters are all that a GPU can serve."""
    mix = {
        "model": LLAMA,
        "rates_per_adapter": "0.8-0.4",
        "ranks": "8-16",
        "mean_input_tokens": 223.0,
        "mean_requested_output_tokens": 200.0,
    }
    runs = grid_runs(mix, [16, 64, 192], [16, 64, 192], 600.0)
    return evaluate(runs, load_calibration("auto", LLAMA))


def test_the_published_rule_labels_a_busy_engine_that_starves(sweep) -> None:
    table = ch13_published.as_published(sweep)
    assert not sweep.simulated.all()
    assert table.total_throughput.notna().all()
    feasible = Criterion().feasible(table)
    kept = measured_grids.authors_picks(table).iloc[0]
    right = measured_grids.authors_picks(table[feasible]).iloc[0]
    assert right.served_adapters == 16
    assert kept.served_adapters > 16
    assert kept.total_throughput > right.total_throughput


def test_an_unfinished_request_is_charged_the_window() -> None:
    runs = pd.DataFrame(
        {
            "run_id": ["a"],
            "model": "m",
            "campaign": "c",
            "rates_per_adapter": "1",
            "ranks": "8",
            "status": "ok",
            "client_collapsed": False,
            "waiting_mean": 0.0,
            "mean_input_tokens": 100.0,
            "mean_requested_output_tokens": 100.0,
            "offered_request_rate": 1.0,
            "duration_s": 1000.0,
            "total_throughput": 198.0,
            "completed_requests": 990.0,
            "sent_requests": 1000.0,
            "mean_ttft_ms": 100.0,
        }
    )
    row = ch13_published.ttft_convention(runs).iloc[0]
    assert row["regime"] == "light"
    assert row["unfinished"] == pytest.approx(1.0)
    assert row["charged_s"] == pytest.approx(0.99 * 0.1 + 10)
    assert row["charge"] == pytest.approx(100 * 10 / 10.099)


def test_both_clocks_and_the_analytic_model_are_timed_beside_the_published_times(runs) -> None:
    authors = pd.DataFrame({"run_id": runs["run_id"], "mode": "replay", "wall_s": [2.0, 4.0]})
    table = ch13_published.speed(runs, authors, simpy_runs=1, repeats=1).set_index("simulator")
    assert table.loc["published twin", "seconds"] == 3.0
    assert table.loc["published twin", "times_real_time"] == 1200.0
    assert table.loc["this twin, SimPy", "runs"] == 1
    assert table["seconds"].between(1e-6, 60).all()
