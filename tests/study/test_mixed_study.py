"""Placements on several kinds of GPU beside the exact program."""

import pytest

from adapter_twin.plan.demand import Demand
from study.mixed_scenarios import compare_with_exact, small_demands

pytestmark = pytest.mark.filterwarnings("ignore:.*is (an extrapolation|a prior)")


def told(demand: Demand) -> tuple[str, int]:
    return demand.fleet.objective, len(demand.fleet.kinds)


def test_small_demands_are_the_same_every_time_and_of_all_kinds() -> None:
    first = list(small_demands(12))
    assert first == list(small_demands(12)) != list(small_demands(12, seed=1))
    assert set(map(told, first)) >= {("price", 2), ("price", 3), ("gpus", 2), ("gpus", 3)}
    assert any(kind.available for demand in first for kind in demand.fleet.kinds)


@pytest.mark.slow
def test_placements_are_within_five_percent_of_the_exact_program_and_not_below_the_bound() -> None:
    table = compare_with_exact(16)
    assert len(table) >= 12
    assert (table.bound <= table.exact + 1e-6).all()
    assert (table.cost >= table.exact - 1e-6).all()
    assert (table.cost / table.exact).mean() <= 1.05
