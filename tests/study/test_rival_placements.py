"""Rivals' placements: copies on GPUs of their own, even loads, few moves; never fewer GPUs."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups
from adapter_twin.workload.gpu_fleet import GpuFleet
from adapter_twin.workload.traffic import Lengths
from study.placement_scenarios import PlacementScenario, draw_demand
from study.rival_placements import balanced, compare_rivals, hashed, min_cost_flow, rendezvous

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")

LENGTHS = Lengths(mean_input_tokens=250, mean_output_tokens=231)
DEMAND = draw_demand(np.random.default_rng(0), 30, 2.0, 0.5, "narrow", LENGTHS)
TWICE = replace(DEMAND, fleet=GpuFleet(copies=2))


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(TWICE)


def homes(oracle: Oracle, groups: Groups) -> list[set[int]]:
    return [set(oracle.parts.adapter[group].tolist()) for group in groups]


@pytest.mark.parametrize("deal", [hashed, balanced])
def test_copies_are_on_different_gpus(oracle: Oracle, deal: object) -> None:
    groups = deal(oracle, 5)  # type: ignore[operator]
    assert sorted(chain.from_iterable(groups)) == list(range(len(oracle.parts)))
    adapters = [a for own in homes(oracle, groups) for a in own]
    assert all(adapters.count(adapter) == 2 for adapter in range(30))


def test_another_gpu_moves_only_what_it_gets(oracle: Oracle) -> None:
    before, after = homes(oracle, hashed(oracle, 5)), homes(oracle, hashed(oracle, 6))
    assert all(new <= old for old, new in zip(before, after[:5], strict=True))
    assert after[5]


def test_a_flow_evens_the_numbers_and_leaves_most_where_hashing_has_them(oracle: Oracle) -> None:
    by_flow, by_hash = homes(oracle, balanced(oracle, 5)), homes(oracle, hashed(oracle, 5))
    assert max(map(len, by_flow)) == 12 < max(map(len, by_hash))
    kept = sum(len(a & b) for a, b in zip(by_flow, by_hash, strict=True))
    assert kept >= 0.8 * 60


@pytest.mark.parametrize("method", [rendezvous, min_cost_flow])
def test_no_gpu_of_a_rival_starves(oracle: Oracle, method: object) -> None:
    assert all(oracle.serve(group) is not None for group in method(oracle))  # type: ignore[operator]


def test_a_placement_takes_no_more_gpus_than_its_rivals() -> None:
    row = compare_rivals([PlacementScenario("small", "narrow", 0.5, DEMAND)], copies=2).iloc[0]
    assert row.bound <= row.placed <= min(row.rendezvous, row.min_cost_flow)
