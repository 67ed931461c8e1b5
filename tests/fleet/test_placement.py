"""Placements starve nobody, no method beats the bound, and what cannot be placed is named."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import (
    Groups,
    best_greedy,
    fill,
    first_fit_decreasing,
    grouped_by_rank,
    improve,
)
from adapter_twin.fleet.placement import Placement, ReplicaPlan, replica_workload
from adapter_twin.fleet.proof.bound import best_weights, lower_bound, measures, priced, prices_of
from adapter_twin.fleet.proof.envelope import active_share, levels_of
from adapter_twin.plan.demand import Demand
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.traffic import Lengths
from study.baselines import first_fit_by_count, round_robin
from study.exact import fewest_gpus
from study.placement_scenarios import RANK_MIXES, SCENARIOS, draw_demand, scenarios

LLAMA = "llama-3.1-8b-instruct"
LENGTHS = Lengths(mean_input_tokens=250, mean_output_tokens=231)
ENGINE = EngineConfig(model=LLAMA, max_loras=1, max_cpu_loras=4, max_lora_rank=16)
SLO = Slo(ttft_ms=2000.0)
METHODS: dict[str, Callable[[Oracle], Groups]] = {
    "first fit": first_fit_decreasing,
    "by rank": lambda oracle: grouped_by_rank(oracle, fill_gaps=False),
    "gaps filled": lambda oracle: grouped_by_rank(oracle, fill_gaps=True),
    "round robin": round_robin,
    "by count": first_fit_by_count,
}


def demand(rates: list[float], ranks: list[int], **changes: Any) -> Demand:
    adapters = tuple(
        Adapter(name=f"a{i}", rank=rank, request_rate=rate)
        for i, (rate, rank) in enumerate(zip(rates, ranks, strict=True))
    )
    return Demand(**({"model": LLAMA, "adapters": adapters, "lengths": LENGTHS} | changes))


def drawn(adapters: int, gpus: float, exponent: float, ranks: str, slo: Slo | None) -> Demand:
    return draw_demand(np.random.default_rng(1), adapters, gpus, exponent, ranks, LENGTHS, slo)


def starving(oracle: Oracle, groups: Groups) -> int:
    """Return how many of the GPUs cannot serve what they were given."""
    return sum(oracle.serve(group) is None for group in groups)


@pytest.fixture(scope="module", params=[None, SLO], ids=["starvation", "slo"])
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(drawn(80, 5.0, 1.0, "skewed", request.param))


@pytest.fixture(scope="module")
def bound(oracle: Oracle) -> int:
    return lower_bound(oracle)


def holds_all(oracle: Oracle, groups: Groups) -> bool:
    return sorted(chain.from_iterable(groups)) == list(range(len(oracle.parts)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_places_all_and_starves_none(oracle: Oracle, bound: int, method: str) -> None:
    groups = METHODS[method](oracle)
    assert holds_all(oracle, groups)
    assert starving(oracle, groups) == 0
    assert len(groups) >= bound
    placement = oracle.place(groups)  # checks itself
    assert all(oracle.serve_plan(plan) is not None for plan in placement.replicas)


def test_the_best_greedy_is_near_the_bound_and_far_below_dealing_blindly(
    oracle: Oracle, bound: int
) -> None:
    best = len(best_greedy(oracle))
    assert best <= bound + 2
    assert best <= 0.6 * len(round_robin(oracle))


def test_a_finer_bound_is_not_lower_and_still_one() -> None:
    oracle = Oracle(drawn(30, 2.0, 1.0, "equal", SLO))
    assert lower_bound(oracle) <= lower_bound(oracle, finer=2) <= len(best_greedy(oracle))


@pytest.mark.parametrize(
    ("exponent", "ranks", "slo"),
    [(0.5, "narrow", None), (1.2, "skewed", Slo(ttft_ms=5000.0, itl_ms=60.0))],
)
def test_no_set_that_the_oracle_accepts_is_more_than_a_gpu_by_any_measure(
    exponent: float, ranks: str, slo: Slo | None
) -> None:
    oracle = Oracle(drawn(60, 2.5, exponent, ranks, slo))
    levels = levels_of(oracle)
    rate, rank = oracle.parts.rate, oracle.parts.rank
    measured = measures(levels, rate)
    weights = best_weights([oracle], [levels], np.ones(1), np.full(1, np.inf))[0]
    prices = priced(levels, weights, rate, rank)
    rng = np.random.default_rng(0)
    dearest = 0.0
    for _ in range(30):
        # of random sets as many adapters as fit, so that they are near the edge
        of_ranks = np.flatnonzero(rank <= rng.choice(np.unique(rank)))
        order = rng.permutation(of_ranks)
        if rng.random() < 0.5:  # neighbours by load
            order = order[np.argsort(rate[order])][rng.integers(len(order)) :]
        fitting = order[fill(oracle, [], order, guess=8)]
        width, load = rank[fitting].max(), rate[fitting].sum()
        level = np.flatnonzero((levels.rank == width) & (levels.high >= load))[-1]
        assert measured[:, level, fitting].sum(axis=1).max() <= 1 + 1e-9
        dearest = max(dearest, float(prices[fitting].sum()))
    assert 0.8 < dearest <= 1


@settings(max_examples=6, deadline=None)
@given(
    rates=st.lists(st.floats(0.5, 30.0), min_size=1, max_size=4),
    ranks=st.lists(st.sampled_from([8, 64]), min_size=4, max_size=4),
    slo=st.sampled_from([None, SLO]),
)
def test_the_program_is_as_good_as_trying_all_partitions(
    rates: list[float], ranks: list[int], slo: Slo | None
) -> None:
    oracle = Oracle(demand(rates, ranks[: len(rates)], slo=slo))
    exact = fewest_gpus(oracle)
    fewest = min(
        len(blocks)
        for blocks in partitions(list(range(len(oracle.parts))))
        if all(oracle.serve(block) is not None for block in blocks)
    )
    assert exact.complete
    assert exact.optimal
    assert len(exact.groups) == exact.bound == fewest
    assert lower_bound(oracle) <= fewest <= len(best_greedy(oracle))


def partitions(items: list[int]) -> list[Groups]:
    if not items:
        return [[]]
    first, *rest = items
    found = []
    for blocks in partitions(rest):
        found.append([[first], *blocks])
        for i, block in enumerate(blocks):
            found.append([*blocks[:i], [first, *block], *blocks[i + 1 :]])
    return found


def test_the_program_refuses_parts_that_are_not_exchangeable() -> None:
    with pytest.raises(AdapterTwinError, match="replicate_above"):
        fewest_gpus(Oracle(demand([5.0, 5.0], [8, 8]), replicate_above=0.1))


def test_a_program_with_too_many_patterns_still_has_a_placement_and_a_bound() -> None:
    oracle = Oracle(drawn(12, 3.0, 0.5, "narrow", None))
    exact = fewest_gpus(oracle, most_patterns=5)
    assert not exact.complete
    assert exact.bound <= len(exact.groups) <= len(best_greedy(oracle))
    assert starving(oracle, exact.groups) == 0


def test_the_search_gets_rid_of_gpus_that_a_bad_placement_wastes() -> None:
    oracle = Oracle(drawn(30, 2.0, 0.5, "narrow", None))
    wasteful = [[part] for part in range(len(oracle.parts))]
    prices = prices_of(oracle)
    better = improve(oracle, wasteful, prices)
    assert holds_all(oracle, better)
    assert starving(oracle, better) == 0
    assert len(better) <= len(best_greedy(oracle)) + 1
    assert improve(oracle, wasteful, prices) == better
    assert improve(oracle, better, prices, enough=len(better)) == better


def test_an_adapter_that_is_too_much_for_a_gpu_is_split_into_equal_shares() -> None:
    oracle = Oracle(demand([100.0, 0.1, 0.0], [8, 16, 512]))
    placement = oracle.place(best_greedy(oracle))
    shares = [
        share
        for plan in placement.replicas
        for adapter, share in zip(plan.adapters, plan.shares, strict=True)
        if adapter == 0
    ]
    assert len(shares) >= 3
    assert sum(shares) == pytest.approx(1)
    assert len(set(shares)) == 1
    assert all(2 not in plan.adapters for plan in placement.replicas)  # idle, and far too wide
    rates = [
        replica_workload(oracle.demand, plan).offered_request_rate for plan in placement.replicas
    ]
    assert sum(rates) == pytest.approx(100.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": [1.0], "ranks": [8], "slo": Slo(itl_ms=1.0)}, "no GPU serves a0.*slo"),
        (
            {"rates": [1.0], "ranks": [8], "base_model_request_rate": 1.0},
            "base_model_request_rate: only adapters",
        ),
    ],
)
def test_what_cannot_be_placed_is_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterTwinError, match=message) as error:
        Oracle(demand(**changes))
    assert "\n" not in str(error.value)


def test_an_adapter_too_wide_for_the_gpu_is_named() -> None:
    calibration = Oracle(demand([1.0], [8])).calibration
    memory = copy(calibration.memory)
    memory.reserve_gib_ += (
        20.0  # leaves less than one request of the longest length and one wide slot
    )
    small = replace(calibration, memory=memory)
    with pytest.raises(AdapterTwinError, match="no GPU serves a1: one slot of rank 512 leaves"):
        Oracle(demand([1.0, 1.0], [8, 512]), small)


def test_an_oracle_refuses_to_place_what_would_starve() -> None:
    oracle = Oracle(demand([30.0, 30.0], [8, 8]))
    assert oracle.serve([0, 1]) is None
    with pytest.raises(AdapterTwinError, match="starve"):
        oracle.place([[0, 1]])


def test_an_slo_and_a_margin_only_take_from_what_a_gpu_serves() -> None:
    loose = demand([1.0] * 40, [8] * 40)
    most = Oracle(loose).most_alone(8)
    assert Oracle(loose, margin=0.08).most_alone(8) < most
    assert Oracle(replace(loose, slo=SLO)).most_alone(8) < most
    verdict = Oracle(replace(loose, slo=SLO)).serve(range(5))
    assert verdict is not None
    assert verdict.mean_itl_ms + 1e3 * verdict.slot_wait_s <= 2000
    assert Oracle(replace(loose, slots=(4,))).serve(range(5)).engine.max_loras == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([], "replicas: must not be empty; give at least 1"),
        ([((0, 1), (1.0, 1.0))], "a2: has requests, but no GPU"),
        ([((0, 1, 2), (1.0, 1.0, 0.5))], "a2: shares sum to 0.5"),
        ([((0, 1, 2, 3), (1.0, 1.0, 1.0, 1.0))], r"replicas\[0\].engine.max_lora_rank: a3"),
        ([((0, 1, 9), (1.0, 1.0, 1.0))], "9 is not one of the 4"),
        ([((0,), (1.5,))], r"shares\[0\]: must be at most 1, got 1.5"),
        ([((0, 0), (0.5, 0.5))], "twice"),
        ([((0, 1), (1.0,))], "1 for 2 adapters"),
        ([((), ())], "adapters: must not be empty; give at least 1"),
    ],
)
def test_placements_that_leave_requests_unserved_are_refused(plans: Any, message: str) -> None:
    asked = demand([1.0, 1.0, 1.0, 0.0], [8, 16, 8, 64])
    with pytest.raises(AdapterTwinError, match=message):
        Placement(tuple(ReplicaPlan(ENGINE, *plan) for plan in plans)).check(asked)
    Placement((ReplicaPlan(ENGINE, (0, 1, 2), (1.0,) * 3),)).check(asked)
    with pytest.raises(AdapterTwinError, match="model"):
        Placement((ReplicaPlan(replace(ENGINE, model="x"), (0, 1, 2), (1.0,) * 3),)).check(asked)


@settings(max_examples=100, deadline=None)
@given(
    rate=st.floats(1e-4, 20.0),
    residence_s=st.floats(1.0, 30.0),
    wait_s=st.floats(0.5, 288.0),
    factor=st.floats(1.01, 3.0),
)
def test_adapters_are_less_active_with_longer_waits_shorter_residence_and_lower_rates(
    rate: float, residence_s: float, wait_s: float, factor: float
) -> None:
    def active(rate: float, residence_s: float, wait_s: float) -> float:
        return float(active_share(np.array([rate]), np.array([residence_s]), wait_s)[0])

    reference = active(rate, residence_s, wait_s) * (1 + 1e-6) + 1e-9
    assert active(rate, residence_s, factor * wait_s) <= reference
    assert active(rate, residence_s / factor, wait_s) <= reference
    assert active(rate / factor, residence_s, wait_s) <= reference


def test_scenarios_are_the_same_every_time_and_of_all_kinds() -> None:
    first, second = list(scenarios(seed=3)), list(scenarios(seed=3))
    assert first == second
    assert first != list(scenarios(seed=4))
    assert len(first) == SCENARIOS >= 30
    assert {scenario.ranks for scenario in first} == set(RANK_MIXES)
    assert any(scenario.skewed for scenario in first)
    assert {scenario.demand.slo is None for scenario in first} == {True, False}


def test_placing_is_deterministic() -> None:
    asked = drawn(50, 3.0, 0.9, "narrow", SLO)
    first, second = (oracle.place(best_greedy(oracle)) for oracle in (Oracle(asked), Oracle(asked)))
    assert first == second
