"""Traffic that drifts, and adapters that are moved after it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.workload.adapters import zipf_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.traffic import Lengths
from study.drift import Drift, drifting_rates, drifting_trace, place_again, rebalance

LLAMA = "llama-3.1-8b-instruct"
LENGTHS = Lengths(mean_input_tokens=223, mean_output_tokens=200)

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")

loads = st.lists(st.floats(0.01, 100), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def laws() -> Calibration:
    return warmed_up(load_calibration("auto", LLAMA))


def demand(count: int = 60, rate: float = 40.0, **changes: Any) -> Demand:
    adapters = zipf_adapters(count, rate, 0.8, [8, 16])
    return Demand(model=LLAMA, adapters=adapters, lengths=LENGTHS, **changes)


@given(loads, st.integers(1, 6), st.integers(0, 9))
def test_rebalancing_never_makes_it_worse(own: list[float], gpus: int, seed: int) -> None:
    home = np.random.default_rng(seed).integers(0, gpus, len(own))
    before, old = np.bincount(home, own, minlength=gpus), home.copy()
    moved = rebalance(own, home, gpus)
    after = np.bincount(home, own, minlength=gpus)
    assert after.max() <= before.max() + 1e-9
    assert (home != old).sum() <= moved
    if before.max() - before.min() <= 0.05 * before.mean():
        assert moved == 0


@given(st.integers(1, 6), st.integers(0, 9))
def test_rebalancing_ends_where_gpus_are_within_a_twentieth_of_each_other(
    gpus: int, seed: int
) -> None:
    """Of small items, any difference can be made up."""
    home = np.random.default_rng(seed).integers(0, gpus, 600)
    rebalance(np.ones(600), home, gpus)
    after = np.bincount(home, minlength=gpus)
    assert after.max() - after.min() <= 0.05 * after.mean()


def test_drift_trades_popularity_and_keeps_the_total() -> None:
    rates = np.array([adapter.request_rate for adapter in demand().adapters])
    table = drifting_rates(rates, Drift(epoch_s=300.0, churn=0.3), 3600.0, seed=0)
    assert table.shape == (12, 60)
    np.testing.assert_allclose(np.sort(table, axis=1), np.sort(table[:1], axis=1).repeat(12, 0))
    np.testing.assert_array_equal(table[0], rates)
    assert not np.array_equal(table[-1], rates)
    swung = drifting_rates(rates, Drift(churn=0.0, swing=0.5), 3600.0, seed=0).sum(axis=1)
    assert swung.max() > 1.4 * rates.sum()
    assert swung.mean() == pytest.approx(rates.sum(), rel=1e-6)


def test_drifting_requests_come_at_the_rates_of_the_table(laws: Calibration) -> None:
    asked, drift = demand(), Drift(epoch_s=600.0, churn=0.5, burst_cv=0.5)
    rates = np.array([adapter.request_rate for adapter in asked.adapters])
    table = drifting_rates(rates, drift, 3600.0, seed=1)
    trace = drifting_trace(asked, table, drift, 3600.0, laws, seed=1)
    assert (np.diff(trace.arrival_s) >= 0).all()
    epoch = (trace.arrival_s // 600).astype(int)
    counts = np.zeros(table.shape)
    np.add.at(counts, (epoch, trace.adapter), 1)
    expected = 600 * table
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 5).all()


def test_placing_again_moves_adapters_and_serves_as_much(laws: Calibration) -> None:
    asked = demand(40, 30.0)
    engine = EngineConfig(model=LLAMA, max_loras=16, max_cpu_loras=40, max_lora_rank=16)
    drift = Drift(epoch_s=60.0, churn=0.5)
    still, moving = (
        place_again(asked, engine, 2, laws, drift, every_s=every_s, duration_s=600.0)
        for every_s in (None, 60.0)
    )
    assert still["moved"] == 0
    assert moving["moved"] > 0
    assert moving["worst_served"] > 90
