"""Prefix caching, priorities, long prompts and asynchronous scheduling on cases of a few steps.

All decisions of random cases are held to vLLM's own in `test_conformance.py`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_twin.capacity.analytic import analyse
from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.cluster import simulate_cluster
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.routers import RoundRobin
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.measure.campaign import Serving, ServingRun
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.recommend import recommend
from adapter_twin.service.metrics import service_of
from adapter_twin.twin.block_pool import pieces
from adapter_twin.twin.block_scheduler import BY_BLOCK
from adapter_twin.twin.feed import Feed
from adapter_twin.twin.policies import Drain
from adapter_twin.twin.policy import VLLM
from adapter_twin.twin.session import Session
from adapter_twin.twin.simulate import run_in_simpy, simulate
from adapter_twin.twin.wiring import with_defaults
from adapter_twin.workload.adapters import Adapter, deal_adapters
from adapter_twin.workload.engine_config import EngineConfig, ServeFlags
from adapter_twin.workload.trace import Trace, generate, generators
from adapter_twin.workload.traffic import Arrivals, Lengths, Workload
from study.conformance import Case, Step, feature_cases, twin_steps

Requests = Sequence[tuple[int, int, int, int]]
CACHED: dict[str, Any] = {"enable_prefix_caching": True}


def of_version(calibration: Calibration, version: str) -> Calibration:
    """Return laws that hold for another version of the engine."""
    memory = copy(calibration.memory)
    memory.version = version
    return replace(calibration, memory=memory)


def case(requests: Requests, **engine: Any) -> Case:
    flags = {"max_loras": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 4}
    flags |= {"kv_blocks": 100, **engine}
    return Case(requests=list(requests), kind="by hand", **flags)


def steps(requests: Requests, **engine: Any) -> list[Step]:
    return list(twin_steps(case(requests, **engine)))


def batches(requests: Requests, **engine: Any) -> list[dict[int, int]]:
    return [step.batch for step in steps(requests, **engine)]


def prompts(requests: Requests, **engine: Any) -> list[int]:
    """Return the tokens computed for each request in the step that admits it first."""
    told: dict[int, int] = {}
    for batch in batches(requests, **engine):
        told = batch | told
    return [told[request] for request in range(len(requests))]


def play(requests: Requests, **engine: Any) -> Session:
    return to_end(case(requests, **engine))


def to_end(drawn: Case, scheduling_s: float = 0.0) -> Session:
    session = ending(drawn)
    session.law.scheduling[0] = scheduling_s
    session.run()
    return session


def ending(drawn: Case) -> Session:
    session = drawn.session()
    session.front_end = session.front_end._replace(duration_s=1e6)
    return session


# Prefix caching


def test_full_blocks_of_a_prompt_that_another_has_computed_are_found() -> None:
    shared = [[(7, 10)]] * 3  # ten tokens: two blocks and a half
    assert prompts([(0, 0, 12, 2)] * 3, pieces=shared, **CACHED) == [12, 4, 4]
    assert prompts([(0, 0, 12, 2)] * 3, pieces=shared) == [12, 12, 12]


def test_the_last_token_of_a_prompt_is_computed_and_so_is_its_block() -> None:
    shared = [[(7, 100)]] * 2
    assert prompts([(0, 0, 12, 2), (9, 0, 12, 2)], pieces=shared, **CACHED) == [12, 4]
    assert prompts([(0, 0, 12, 2), (9, 0, 13, 2)], pieces=shared, **CACHED) == [12, 1]


def test_what_one_adapter_has_computed_is_of_no_use_to_another() -> None:
    requests = [(0, 0, 12, 2), (9, 1, 12, 2), (18, -1, 12, 2), (27, -1, 12, 2)]
    assert prompts(requests, pieces=[[(7, 8)]] * 4, **CACHED) == [12, 12, 12, 4]


def test_equal_pieces_after_different_ones_are_different() -> None:
    pieces = [[(1, 4), (7, 12)], [(2, 4), (7, 12)], [(1, 4), (7, 12)]]
    assert prompts([(9 * k, 0, 16, 2) for k in range(3)], pieces=pieces, **CACHED) == [16, 16, 4]


def test_the_next_turn_of_a_conversation_finds_prompt_and_output_of_the_one_before() -> None:
    first, second = (0, 0, 9, 8), (20, 0, 30, 2)
    pieces = [[(0, 9), (1, 17)], [(0, 9), (1, 17), (2, 30)]]
    # of 17 tokens the last one was emitted and never computed; so are four blocks
    assert prompts([first, second], pieces=pieces, **CACHED) == [9, 14]


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    requests = [(0, 0, 16, 32), (0, 1, 20, 20)]
    short: dict[str, Any] = {"block_size": 16, "kv_blocks": 4}
    for flags, again in (({}, 33), (CACHED, 17)):
        run = steps(requests, **short, **flags)
        assert [step.running for step in run if step.admitted] == [{0: 16, 1: 20}, {1: again}]


def test_blocks_are_kept_until_they_are_taken_for_something_else() -> None:
    shared = [(7, 12)]
    for others, computed in ((8, 4), (12, 8), (15, 12)):
        requests = [(0, 0, 12, 2), (10, 0, others, 1), (20, 0, 12, 2)]
        told = prompts(requests, pieces=[shared, [], shared], kv_blocks=4, **CACHED)
        assert told == [12, others, computed]


def test_attention_reads_what_is_not_computed() -> None:
    requests = [(0, 0, 12, 2), (9, 0, 12, 2)]
    run = play(requests, pieces=[[(7, 8)]] * 2, **CACHED)
    assert run.steps.tokens[:4].tolist() == [12, 1, 4, 1]
    assert run.steps.context_tokens[:4].tolist() == [12, 12, 12, 12]
    assert run.requests.cached_tokens.tolist() == [0, 8]
    assert play(requests).requests.cached_tokens.tolist() == [-1, -1]


# Priorities, long prompts


def test_the_lowest_priority_goes_first_and_the_highest_is_preempted() -> None:
    requests = [(0, 0, 8, 9), (0, 1, 8, 9), (0, 2, 8, 9)]
    seats = {"max_num_seqs": 1, "priorities": [1, 0, -1]}
    assert [step.admitted for step in steps(requests, **seats) if step.admitted] == [[2], [1], [0]]
    short = steps(requests, kv_blocks=6, priorities=[1, 0, -1])
    assert next(step.preempted for step in short if step.preempted) == [0]
    fcfs = steps(requests, kv_blocks=6)
    assert next(step.preempted for step in fcfs if step.preempted) == [2]


def test_a_victim_gives_the_tokens_back_that_it_already_had_in_the_step() -> None:
    requests = [(0, 0, 8, 9), (1, 1, 8, 9)]
    run = steps(requests, kv_blocks=5, max_num_batched_tokens=8, priorities=[1, 0])
    at = next(step for step in run if step.preempted)
    assert (at.preempted, at.batch) == ([0], {1: 1})


def test_long_prompts_advance_together() -> None:
    requests = [(0, 0, 12, 1), (0, 0, 12, 1), (0, 0, 3, 1)]
    assert batches(requests, long_prefill_token_threshold=5) == [
        {0: 5, 1: 5, 2: 3},
        {0: 5, 1: 5},
        {0: 2, 1: 2},
    ]
    assert batches(requests[:1], long_prefill_token_threshold=5) == [{0: 12}]  # alone


def test_a_prompt_that_is_not_to_be_chunked_waits_and_so_do_those_behind_it() -> None:
    requests = [(0, 0, 12, 1), (0, 0, 12, 1), (0, 0, 3, 1)]
    flags = {"max_num_batched_tokens": 16, "enable_chunked_prefill": False}
    for threshold in (0, 100):  # in both schedulers
        told = batches(requests, long_prefill_token_threshold=threshold, **flags)
        assert told == [{0: 12}, {1: 12, 2: 3}]
    with pytest.raises(AdapterTwinError, match=r"^max_num_batched_tokens: a request of 17 tokens"):
        case([(0, 0, 12, 5)], **flags).session()


# Asynchronous scheduling


def test_who_comes_in_the_middle_of_a_step_waits_for_one_more() -> None:
    requests = [(0, 0, 4, 9), (2, 1, 4, 2)]
    for is_async in (False, True):
        run = play(requests, async_scheduling=is_async)
        assert run.requests.first_token_s.tolist() == [1, 3 + is_async]
        assert run.requests.end_s.tolist() == [9, 4 + is_async]


def test_who_ends_keeps_seat_and_blocks_to_the_end_of_the_step() -> None:
    requests = [(0, 0, 4, 3), (0, 1, 4, 9), (0, 2, 4, 3)]
    for is_async in (False, True):
        run = play(requests, max_num_seqs=2, async_scheduling=is_async)
        assert run.requests.first_token_s.tolist() == [1, 1, 4 + is_async]


def test_an_idle_engine_schedules_two_steps_at_once() -> None:
    (first, *_) = steps([(0, 0, 4, 2), (1, 0, 4, 2)], async_scheduling=True)
    assert (first.batch, first.running) == ({0: 4}, {0: 1})


def test_scheduling_takes_no_time_while_the_model_takes_longer() -> None:
    drawn = case([(0, 0, 4, 3)], async_scheduling=True)
    assert to_end(drawn, scheduling_s=0.5).requests.end_s.tolist() == [3]
    assert to_end(drawn, scheduling_s=1.5).requests.end_s.tolist() == [4.5]


# All together


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_no_token_and_no_block_is_lost(seed: int) -> None:
    (drawn,) = feature_cases(seed, 1)
    session = to_end(drawn)
    requests, count = session.requests, session.state.count
    assert np.isfinite(requests.end_s).all()
    told = session.steps[: session.clock.steps]
    assert (told.tokens > 0).all()
    assert (told.adapters <= drawn.max_loras).all()
    assert (told.running <= drawn.max_num_seqs).all()
    emitted = told.decodes.sum() + len(requests.end_s) + requests.stalls.sum()
    assert emitted == requests.output_tokens.sum()
    assert count.free_blocks == drawn.kv_blocks
    assert count.active == count.running == count.waiting == 0
    if session.policy == BY_BLOCK:
        pool = session.state.blocks.pool
        assert not pool.references.any()
        assert sorted(pool.seats) == list(range(drawn.max_num_seqs))


def ends_s() -> list[list[float]]:
    return [to_end(drawn).requests.end_s.tolist() for drawn in feature_cases(3, 12)]


def test_plain_python_gives_the_same_records() -> None:
    script = f"import json, runpy; print(json.dumps(runpy.run_path({__file__!r})['ends_s']()))"
    plain = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(plain.stdout) == ends_s()


def test_both_clocks_leave_the_same_records() -> None:
    for drawn in feature_cases(4, 20):
        compiled, stepped = ending(drawn), ending(drawn)
        compiled.run()
        run_in_simpy(stepped)
        for name, column in compiled.requests._asdict().items():
            np.testing.assert_array_equal(getattr(stepped.requests, name), column, err_msg=name)


# By a calibration

extrapolates = pytest.mark.filterwarnings("ignore:.*is an extrapolation")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return load_calibration("auto", model="llama-3.1-8b-instruct")


ENGINE = EngineConfig(model="llama-3.1-8b-instruct", max_loras=8, max_cpu_loras=8, max_lora_rank=8)


def workload(shared_prefix_tokens: int) -> Workload:
    return Workload(
        adapters=deal_adapters(8, [1.0], [8]),
        duration_s=60.0,
        lengths=Lengths(
            distribution="fixed",
            mean_input_tokens=200,
            mean_output_tokens=100,
            shared_prefix_tokens=shared_prefix_tokens,
        ),
    )


@extrapolates
def test_system_prompts_are_found_unless_the_cache_is_off(calibration: Calibration) -> None:
    run = simulate(workload(1000), ENGINE, calibration)
    assert (run.records.prompt_tokens == 1200).all()
    # 62 full blocks of 16 tokens, but for the first request of each of eight adapters
    found = 62 * 16 * (len(run.records) - 8) / (1200 * len(run.records))
    assert service_of(run)["prefix_hit_rate"] == pytest.approx(found, rel=0.01)
    off = simulate(workload(1000), replace(ENGINE, enable_prefix_caching=False), calibration)
    assert "prefix_hit_rate" not in service_of(off)
    assert service_of(run)["median_ttft_ms"] < 0.7 * service_of(off)["median_ttft_ms"]
    assert workload(1000).offered_tokens_per_s == 8 * 1300
    assert off.steps.tokens.sum() > 2 * run.steps.tokens.sum()


def test_what_is_left_out_is_on_where_requests_share_what_they_begin_with(
    calibration: Calibration,
) -> None:
    own, shared = (generate(workload(n), generators(0)[0]) for n in (0, 100))
    assert (with_defaults(ENGINE, own, calibration).enable_prefix_caching) is False
    assert (with_defaults(ENGINE, shared, calibration).enable_prefix_caching) is True
    off = replace(ENGINE, enable_prefix_caching=False, async_scheduling=True)
    assert with_defaults(off, shared, calibration) == off
    assert with_defaults(ENGINE, shared, calibration).async_scheduling is False


@extrapolates
@pytest.mark.parametrize(
    "flags",
    [
        {"enable_prefix_caching": True},
        {"scheduling_policy": "priority"},
        {"long_prefill_token_threshold": 100},
        {"async_scheduling": True},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_policies_beyond_vllms_refuse_what_they_do_not_know(
    calibration: Calibration, flags: dict[str, Any]
) -> None:
    engine, name = replace(ENGINE, **flags), next(iter(flags))
    calibration = of_version(calibration, "0.32.0")  # which has all these flags
    with pytest.raises(AdapterTwinError, match=f"^{name}: Drain cannot; leave it out$"):
        simulate(workload(0), engine, calibration, policy=Drain(max_wait_s=1.0))
    run = simulate(workload(0), engine, calibration)
    assert run.policy == VLLM
    assert np.isfinite(run.records.end_s).mean() > 0.9


@extrapolates
def test_priorities_need_the_policy_that_heeds_them(calibration: Calibration) -> None:
    adapters = (
        Adapter(name="first", rank=8, request_rate=8.0, priority=-1),
        Adapter(name="second", rank=8, request_rate=8.0),
    )
    asked = replace(workload(0), adapters=adapters)
    with pytest.raises(AdapterTwinError, match=r"^priority: counts with scheduling_policy"):
        simulate(asked, ENGINE, calibration)
    engine = replace(ENGINE, scheduling_policy="priority", max_num_seqs=16)
    run = simulate(asked, engine, calibration).records
    waits_s = run.scheduled_s - run.arrival_s
    first_s, second_s = (np.nanmean(waits_s[run.adapter == k]) for k in (0, 1))
    assert first_s < 0.1 * second_s


def test_traffic_that_cannot_be_is_refused(calibration: Calibration) -> None:
    adapters, asked = deal_adapters(8, [1.0], [8]), workload(100)
    run = ServingRun(served_adapters=8, adapter_slots=8, rates=(1.0,), ranks=(8,), max_lora_rank=8)
    with pytest.raises(AdapterTwinError, match=r"^lengths.shared_prefix_tokens: a campaign's"):
        Serving(duration_s=60.0, lengths=asked.lengths, runs=(run,))
    urgent = tuple(replace(adapter, priority=1) for adapter in adapters)
    with pytest.raises(AdapterTwinError, match=r"^adapters: 'adapter-0' has a priority"):
        Demand(model=ENGINE.model, adapters=urgent, lengths=workload(0).lengths)
    with pytest.raises(AdapterTwinError, match=r"^shared_prefix_tokens: a replayed trace"):
        replace(asked, arrivals=Arrivals(process="trace", path="trace.csv"))
    placement = Placement((ReplicaPlan(ENGINE, tuple(range(8)), (1.0,) * 8),))
    with pytest.raises(AdapterTwinError, match=r"^enable_prefix_caching: Drain cannot"):
        simulate_cluster(asked, placement, calibration, RoundRobin(), policy=Drain(max_wait_s=1.0))


@extrapolates
@pytest.mark.parametrize("flags", [{}, {"async_scheduling": True}])
def test_a_cluster_of_one_server_that_caches_gives_the_records_of_simulate(
    calibration: Calibration, flags: dict[str, Any]
) -> None:
    calibration = of_version(calibration, "0.32.0")
    asked, engine = workload(100), replace(ENGINE, **flags)
    adapters = range(len(asked.adapters))
    placement = Placement((ReplicaPlan(engine, tuple(adapters), (1.0,) * len(adapters)),))
    alone = simulate(asked, engine, calibration).records
    cluster = simulate_cluster(asked, placement, calibration, RoundRobin()).records
    assert alone.cached_tokens.max() == 96
    for column in fields(alone):
        assert np.array_equal(
            getattr(alone, column.name), getattr(cluster, column.name), equal_nan=True
        ), column.name


@extrapolates
def test_servers_of_a_cluster_keep_what_their_own_requests_share(calibration: Calibration) -> None:
    asked = workload(100)
    adapters = tuple(range(len(asked.adapters)))
    shares = (0.5,) * len(adapters)
    placement = Placement((ReplicaPlan(ENGINE, adapters, shares),) * 2)
    run = simulate_cluster(asked, placement, calibration, RoundRobin())
    for replica in range(2):
        own = run.records[run.replica == replica]
        first = [own.cached_tokens[own.adapter == adapter][0] for adapter in adapters]
        assert not any(first), "each server computes each adapter's prompt itself, once"
        assert own.cached_tokens.max() == 96


@extrapolates
def test_recommend_plans_for_the_cache_that_it_asks_for(calibration: Calibration) -> None:
    lengths = Lengths(mean_input_tokens=223, mean_output_tokens=198, shared_prefix_tokens=1500)
    demand = Demand(model=ENGINE.model, adapters=deal_adapters(8, [0.5], [8]), lengths=lengths)
    off = replace(demand, engine=ServeFlags(enable_prefix_caching=False))
    cached, computed = recommend(demand), recommend(off)
    assert "--enable-prefix-caching" in cached["vllm_args"]
    assert "--no-enable-prefix-caching" in computed["vllm_args"]
    ttft_ms = (answer["expected"]["mean_ttft_ms"]["value"] for answer in (cached, computed))
    assert next(ttft_ms) < 0.6 * next(ttft_ms)
    assert cached["utilisation"] < 0.6 * computed["utilisation"]


@extrapolates
def test_the_analytic_model_knows_what_caching_saves(calibration: Calibration) -> None:
    lengths = Lengths(mean_input_tokens=223, mean_output_tokens=198, shared_prefix_tokens=1500)
    asked = Workload(adapters=deal_adapters(32, [0.2], [8]), duration_s=900, lengths=lengths)
    engines = [
        replace(ENGINE, max_loras=32, max_cpu_loras=32, max_num_seqs=512, enable_prefix_caching=on)
        for on in (True, False)
    ]
    table = analyse(asked, engines, calibration)
    for row, engine in zip(table.itertuples(), engines, strict=True):
        twin = service_of(simulate(asked, engine, calibration), warm_up_s=100.0)
        assert row.mean_itl_ms == pytest.approx(twin["mean_itl_ms"], rel=0.1)
        assert row.offered_tokens_per_s == pytest.approx(twin["offered_tokens_per_s"], rel=0.05)
        assert row.total_throughput == pytest.approx(twin["total_throughput"], rel=0.05)


@extrapolates
def test_the_servers_of_a_cluster_take_what_they_are_given(calibration: Calibration) -> None:
    calibration = of_version(calibration, "0.32.0")
    engine = replace(ENGINE, async_scheduling=True)
    trace = Trace(
        np.arange(9.0), np.arange(9, dtype=np.int32) % 8, *np.full((2, 9), [[50], [10]], np.int32)
    )
    adapters, order = deal_adapters(8, [1.0], [8]), generators(0)[2]
    known = pieces(trace)
    feed = Feed(engine, calibration, adapters, trace, known, duration_s=1e3, order=order, room=2)
    for request in range(9):
        feed.push(request, float(request))
    feed.session.run()
    assert feed.session.policy == BY_BLOCK
    assert np.isfinite(feed.session.requests.end_s[:9]).all()
    assert all(a < b for a, b in pairwise(feed.session.requests.end_s[:9].tolist()))
