"""The reference study's figures hold its measured points, and nothing else."""

import pandas as pd
import pytest

from adapter_twin.laws import load_calibration
from adapter_twin.tables import datasets
from study import published_overheads


def line(served: list[float], throughput: list[float], offered: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "varied": "rank",
            "level": 8,
            "adapters": served,
            "total_throughput": throughput,
            "offered_tokens_per_s": offered,
        }
    )


def test_the_most_served_is_the_last_point_before_the_first_that_starves():
    points = line([10, 20, 30, 40], [100, 195, 200, 400], [100, 200, 300, 400])
    assert published_overheads.most_served(points)["adapters"].tolist() == [20]


def test_every_line_of_the_caching_problem_is_drawn_from_measured_runs():
    runs = datasets.load("overhead_runs_vllm050")
    points = published_overheads.caching_problem(runs)
    assert set(points["varied"]) == set(published_overheads.VARIED)
    assert points["total_throughput"].isin(runs["total_throughput"]).all()
    assert (points["total_throughput"] <= 1.02 * points["offered_tokens_per_s"]).all()


def test_more_slots_leave_fewer_running_requests_and_more_adapters_less_throughput():
    runs = datasets.load("overhead_runs_vllm050")
    memory, compute = (
        published_overheads.memory_overhead(runs),
        published_overheads.compute_overhead(runs),
    )
    for _, own in memory.groupby(["model", "requests", "max_lora_rank"]):
        running = own["running"].dropna()  # a server of one start was not sampled
        assert running.iloc[-1] < running.iloc[0]
    for _, own in compute.groupby(["requests", "max_lora_rank"]):
        assert own["total_throughput"].iloc[-1] < own["total_throughput"].iloc[0]


def test_a_load_weighs_most_on_the_smallest_request():
    calibration = load_calibration("auto", "llama-3.1-8b-instruct")
    loads = pd.DataFrame(
        {"model": calibration.model, "source": ["disk", "memory"], "rank": 16, "median": [80.0, 8]}
    )
    impact = published_overheads.load_impact(loads, calibration).set_index(["source", "requests"])
    by_size = impact["impact"]["disk"]
    assert by_size["small"] > by_size["medium"] > by_size["large"]
    assert by_size["small"] == pytest.approx(10 * impact["impact"]["memory", "small"])
