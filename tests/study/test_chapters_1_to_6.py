"""What chapter 6 tabulates and draws, on tables made up for the test."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from adapter_twin.laws import load_calibration
from adapter_twin.laws.roofline import CONSTANTS
from adapter_twin.laws.step_time import batch_features
from adapter_twin.plan.steady_state import warmed_up
from study import ch01_to_06
from study.figures import twin_runs

N = 12


@pytest.fixture
def runs() -> pd.DataFrame:
    index = np.arange(N)
    return pd.DataFrame(
        {
            "run_id": [f"run-{i:02d}" for i in index],
            "model": "llama-3.1-8b-instruct",
            "rates_per_adapter": "0.1-0.05-0.025",
            "ranks": ch01_to_06.CURVES["llama-3.1-8b-instruct"],
            "served_adapters": 32 * (1 + index // 2),
            "adapter_slots": np.where(index % 2 == 0, 16, 32),
            "status": "ok",
            "client_collapsed": index >= N - 2,
            "offered_request_rate": 10.0,
            "mean_input_tokens": 200.0,
            "mean_requested_output_tokens": 200.0,
            "total_throughput": np.where(index < 8, 4000.0, 2000.0),
            "mean_itl_ms": 20.0 + index,
            "median_ttft_ms": 50.0 + index,
        }
    )


def test_measured_runs_and_both_twins_are_stacked_run_by_run(runs):
    authors = runs[["run_id", "total_throughput", "mean_itl_ms"]].assign(mode="replay")
    stacked = ch01_to_06.beside(runs, runs.assign(total_throughput=1.0), authors)
    assert stacked["twin"].value_counts().to_dict() == {"measured": N, "ours": N, "authors": N}
    assert (stacked.loc[stacked["twin"] == "ours", "total_throughput"] == 1.0).all()
    assert stacked.loc[stacked["twin"] == "authors", "median_ttft_ms"].isna().all()


def test_starvation_is_counted_without_collapsed_clients(runs):
    predicted = runs[["run_id"]].assign(starved=runs["total_throughput"] < 3000)
    counts = ch01_to_06.starvation_counts(runs, predicted).set_index(["measured", "predicted"])[
        "runs"
    ]
    assert counts.to_dict() == {(False, False): 8, (True, True): 2}


def test_a_subsample_keeps_the_drawn_curve_whole(runs):
    kept = ch01_to_06.subsample(runs, every=100, collapsed_every=100)
    clean = runs[(runs["adapter_slots"] == 16) & ~runs["client_collapsed"]]
    assert set(clean["run_id"]) <= set(kept["run_id"])
    assert kept["client_collapsed"].sum() == 1


def test_errors_are_drawn_in_the_order_of_load():
    rows = [
        {"twin": twin, "regime": regime, "figure": "mean_itl_ms", "value": 3, "low": 2, "high": 5}
        for twin in ("ours", "authors")
        for regime in ("starved", "light")
    ]
    figure = twin_runs.errors(pd.DataFrame(rows), ["mean_itl_ms"])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["light", "starved"]
    plt.close(figure)


def test_the_example_takes_the_same_steps_over_plain_lists():
    calibration = warmed_up(load_calibration("auto", "llama-3.1-8b-instruct"))
    run = ch01_to_06.small_example(calibration)
    plain = ch01_to_06.plain_steps(run, calibration)
    ours = pd.DataFrame(run.steps)[list(plain.columns)]
    assert len(plain) > 100
    assert plain["loads"].sum() >= 5
    pd.testing.assert_frame_equal(ours, plain, check_dtype=False, rtol=1e-6)


def test_the_parts_of_a_step_are_all_of_it():
    calibration = load_calibration("auto", "llama-3.1-8b-instruct")
    costs = ch01_to_06.step_costs(calibration, 32, 16)
    assert (costs["cost"] > 0).all()
    whole = costs.groupby("tokens")["cost"].sum()
    tokens = whole.index.to_numpy()
    decodes = np.minimum(tokens, ch01_to_06.COSTED_REQUESTS)
    context = ch01_to_06.COSTED_CONTEXT * decodes
    adapters = np.array(ch01_to_06.COSTED_ADAPTERS)
    law = calibration.step_time
    coefficients = law.for_engine(32, 16)[np.searchsorted(law.token_breaks_, tokens)]
    expected = (batch_features(tokens, decodes, context, adapters) * coefficients).sum(axis=1)
    assert whole.to_numpy() == pytest.approx(expected)


def test_every_constant_is_told_by_model():
    calibration = load_calibration("auto", "llama-3.1-8b-instruct")
    table = ch01_to_06.step_constants([calibration]).set_index("constant")
    assert tuple(table.index) == CONSTANTS
    assert table[calibration.model].to_dict() == calibration.step_time.constants_
    assert set(table["of the"]) == {"GPU", "engine"}
    assert not table["for"].str.contains("`").any()
