"""States that draws of a service settle in, and what a cold start does."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adapter_twin.laws import load_calibration
from adapter_twin.plan.cold_start import cold_start_states
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.service.states import states
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.traffic import Lengths

LLAMA = "llama-3.1-8b-instruct"

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")


def test_draws_far_apart_are_two_states_and_others_one() -> None:
    itl_ms = [70.0, 145.0, 150.0, 160.0]
    low, high = states(pd.DataFrame({"mean_itl_ms": itl_ms, "ttft": [1.0, 7, 8, 9]}))[::-1]
    assert (low["probability"], low["mean_itl_ms"]) == (0.25, 70)
    assert (high["probability"], high["mean_itl_ms"], high["ttft"]) == (0.75, 150, 8)
    assert len(states(pd.DataFrame({"mean_itl_ms": [100.0, 120, 140, 160]}))) == 1
    unserved = states(pd.DataFrame({"mean_itl_ms": [np.nan, np.nan]}))
    assert [one["probability"] for one in unserved] == [1]


def test_first_uses_can_leave_large_batches_behind() -> None:
    demand = Demand(
        model=LLAMA,
        adapters=deal_adapters(384, [0.05, 0.0125, 0.003125], [8, 8, 16]),
        lengths=Lengths(distribution="sharegpt", mean_input_tokens=223, mean_output_tokens=198),
    )
    shipped = load_calibration("auto", LLAMA)
    cold = cold_start_states(demand, demand.engine_with(128), shipped)[0]
    (warm,) = cold_start_states(demand, demand.engine_with(128), warmed_up(shipped))
    assert cold["probability"] >= 0.5
    assert cold["mean_itl_ms"] > 1.5 * warm["mean_itl_ms"]


def test_simulate_tells_the_states_of_its_draws(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    config = tmp_path / "short.yaml"
    config.write_text(
        f"engine: {{model: {LLAMA}, max_loras: 8, max_cpu_loras: 8, max_lora_rank: 8}}\n"
        "workload:\n"
        "  adapters: {count: 8, request_rates: [0.2], ranks: [8]}\n"
        "  duration_s: 120\n"
        "  lengths: {mean_input_tokens: 100, mean_output_tokens: 50}\n"
    )
    told = json.loads(run("simulate", str(config), "--draws", "3", "--json")[1])
    assert told["draws"] == 3
    (only,) = told["states"]
    assert only["probability"] == 1
    assert only["mean_itl_ms"] == pytest.approx(told["mean_itl_ms"], rel=0.1)
