"""What the chapter on fleets tabulates."""

import warnings

import numpy as np
import pandas as pd
import pytest

from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.parallel import workers
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.workload.traffic import Lengths
from study import ch12_fleets
from study.placement_scenarios import MODEL, PlacementScenario, draw_demand

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")


@pytest.fixture(scope="module")
def laws() -> Calibration:
    return warmed_up(load_calibration("auto", MODEL))


LENGTHS = Lengths(mean_input_tokens=250, mean_output_tokens=231)
SMALL = PlacementScenario(
    "small", "equal", 0.5, draw_demand(np.random.default_rng(0), 30, 2.0, 0.5, "equal", LENGTHS)
)


@pytest.fixture(scope="module")
def placements() -> pd.DataFrame:
    return ch12_fleets.compare_placements([SMALL])


def test_the_best_method_needs_least_and_not_less_than_the_bound(placements: pd.DataFrame) -> None:
    row = placements.iloc[0]
    assert row.bound <= row[ch12_fleets.BEST]
    assert row[ch12_fleets.BEST] <= row[list(ch12_fleets.METHODS)].min() + row.repaired


def test_dask_workers_place_alike(placements: pd.DataFrame, dask_scheduler: str) -> None:
    there = ch12_fleets.compare_placements([SMALL], scheduler=dask_scheduler)
    pd.testing.assert_frame_equal(there, placements)


def test_gaps_are_means_over_scenarios_with_an_interval(placements: pd.DataFrame) -> None:
    best, others = ch12_fleets.BEST, dict.fromkeys(ch12_fleets.METHODS, 8)
    table = pd.DataFrame(
        [
            {"skewed": True, "bound": 4, best: 4, **others},
            {"skewed": False, "bound": 4, best: 5, **others},
        ]
    )
    found = ch12_fleets.gaps(table).set_index("method")
    assert found.gap[best] == pytest.approx(12.5)
    assert found.low[best] == 0
    assert found.high[best] == pytest.approx(25)
    assert found.saved.drop(best).tolist() == [50.0] * len(others)


def test_placing_anew_is_tabulated_by_traffic_and_interval(laws: Calibration) -> None:
    kinds = {name: ch12_fleets.KINDS[name] for name in ("steady", "bursty adapters")}
    table = ch12_fleets.how_often(laws, kinds, [None, 60.0], [0], rate=20.0, duration_s=120.0)
    assert table.traffic.tolist() == ["steady", "steady", "bursty adapters", "bursty adapters"]
    assert table.moved[table.every_s.isna()].eq(0).all()
    assert (table.low == table.high).all()


def test_every_policy_serves_the_same_requests(laws: Calibration) -> None:
    table = ch12_fleets.compare_policies(laws, [0], 120.0, adapters=40)
    assert table.policy.tolist() == list(ch12_fleets.POLICIES)
    assert table.served.between(50, 100).all()
    by_policy = table.set_index("policy")
    pooled, own = by_policy.loads["shared pool (S-LoRA)"], by_policy.loads["vLLM"]
    assert pooled <= own


def test_a_process_that_joblib_replaces_is_nothing_to_tell(
    recwarn: pytest.WarningsRecorder,
) -> None:
    with workers(None):
        warnings.warn("A worker stopped while some jobs were given to the executor.", stacklevel=1)
    assert len(recwarn) == 0
