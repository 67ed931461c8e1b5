"""Policies beyond vLLM's: examples worked out by hand, and what must hold for each of them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.twin import hooks
from adapter_twin.twin.clock import FrontEnd, StepLaw
from adapter_twin.twin.hooks import type_of
from adapter_twin.twin.layout import new_session
from adapter_twin.twin.policies import CostAware, Drain, Merge, Policy, UnifiedPool
from adapter_twin.twin.session import Session
from adapter_twin.twin.simulate import run_in_simpy, simulate
from adapter_twin.twin.state import State
from adapter_twin.workload.adapters import zipf_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import BASE_MODEL, Trace
from adapter_twin.workload.traffic import Lengths, Workload

Requests = Sequence[tuple[float, int, int, int]]
ADAPTERS = 8


def lay_out(
    requests: Requests,
    policy: Policy | None,
    *,
    kv_cache_tokens: int = 1000,
    load_s: float | Sequence[float] = 0.0,
    read_s: float | Sequence[float] = 0.0,
    adapter_blocks: Sequence[int] = (4,) * ADAPTERS,
    **engine: int,
) -> Session:
    """Lay out requests (arrival, adapter, prompt, output); steps take 1 s, or 0.5 s merged.

    vLLM's null block comes on top of `kv_cache_tokens`.
    """
    arrival_s, *columns = (np.array(column) for column in zip(*requests, strict=True))
    flags = {"max_loras": 4, "max_cpu_loras": 8, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    flags |= {"block_size": 1, **engine}
    step_s = np.zeros((2, 8))
    step_s[:, 0] = 1.0, 0.5
    policy = policy or Policy()
    return new_session(
        Trace(arrival_s.astype(float), *(column.astype(np.int32) for column in columns)),
        EngineConfig(model="any", max_lora_rank=8, **flags),
        StepLaw(np.empty(0), step_s if policy.merges else step_s[:1], 0.0, np.zeros(3)),
        FrontEnd(1e6, 10**6),
        kv_cache_tokens + flags["block_size"],
        np.broadcast_to(load_s, ADAPTERS),
        np.broadcast_to(read_s, ADAPTERS),
        policy,
        None if policy.reserves_slots else np.array(adapter_blocks),
    )


def play(requests: Requests, policy: Policy | None, **settings: Any) -> Session:
    session = lay_out(requests, policy, **settings)
    session.run()
    session.steps = session.steps[: session.clock.steps]
    return session


def one_at_a_time(*adapters: int) -> Requests:
    return [(10.0 * i, adapter, 1, 1) for i, adapter in enumerate(adapters)]


def starving(last_output: int) -> Requests:
    """Adapter 1 finds the only slot taken; adapter 0 keeps getting requests."""
    return [(0, 0, 1, 4), (0.5, 1, 1, 1), (1.5, 0, 1, 4), (3.5, 0, 1, last_output)]


def test_vllm_lets_an_adapter_starve_that_finds_no_slot() -> None:
    assert play(starving(4), None, max_loras=1).requests.scheduled_s.tolist() == [0, 8, 2, 4]


def test_a_drained_adapter_admits_nothing_until_its_slot_is_free() -> None:
    run = play(starving(4), Drain(max_wait_s=2.0, tolerance=0.0), max_loras=1)
    # Drained from 3 on, when adapter 1 has waited 2.5 s; the request of 1.5 ends at 6.
    assert run.requests.scheduled_s.tolist() == [0, 6, 2, 7]


def test_a_drained_adapter_admits_what_ends_with_it() -> None:
    # At 4 the longest running request has 2 tokens left: 2 more are within 1.2 times, 4 are not.
    short, long = (
        play(starving(output), Drain(max_wait_s=2.0), max_loras=1).requests for output in (2, 4)
    )
    assert short.scheduled_s.tolist() == [0, 6, 2, 4]
    assert long.scheduled_s.tolist() == [0, 6, 2, 7]


def test_a_request_that_may_pass_overtakes_one_of_its_adapter_that_may_not() -> None:
    run = play([*starving(4), (3.5, 0, 1, 2)], Drain(max_wait_s=2.0), max_loras=1)
    assert run.requests.scheduled_s.tolist() == [0, 6, 2, 7, 4]


def test_the_adapter_with_the_fewest_tokens_left_is_drained() -> None:
    requests = [(0, 0, 1, 20), (0, 1, 1, 6), (0.5, 2, 1, 1), (3.5, 0, 1, 9), (3.5, 1, 1, 9)]
    run = play(requests, Drain(max_wait_s=2.0, tolerance=0.0), max_loras=2)
    assert run.requests.scheduled_s.tolist() == [0, 0, 6, 4, 7]


def test_each_starving_adapter_has_one_drained() -> None:
    running = [(0, adapter, 1, 5 + adapter) for adapter in range(3)]
    waiting = [(0.5, 3, 1, 1), (0.5, 4, 1, 1), *((3.5, adapter, 1, 9) for adapter in range(3))]
    run = play([*running, *waiting], Drain(max_wait_s=2.0, tolerance=0.0), max_loras=3)
    # Adapters 0 and 1 are drained, for 3 and 4; 2 goes on.
    assert run.requests.scheduled_s.tolist()[3:] == [5, 6, 6, 7, 4]


def test_where_no_adapter_starves_drain_is_vllms_policy() -> None:
    expected = play(starving(4), None, max_loras=1)
    assert (play(starving(4), Drain(max_wait_s=100.0), max_loras=1).steps == expected.steps).all()


@pytest.mark.parametrize(
    ("policy", "loads"),
    [
        (None, [1, 0, 0, 1, 1, 1]),
        (CostAware(frequency=1, recency=0, cost=0), [1, 0, 0, 1, 1, 0]),
        (CostAware(frequency=0, recency=1, cost=0), [1, 0, 0, 1, 1, 1]),
    ],
)
def test_the_adapter_with_fewer_uses_leaves_its_slot(policy: Policy, loads: list[int]) -> None:
    run = play(one_at_a_time(0, 0, 0, 1, 2, 0), policy, max_loras=2)
    assert run.steps.loads.tolist() == loads


def test_uses_fade_with_their_age() -> None:
    requests = [*one_at_a_time(0, 0, 0), (1000, 1, 1, 1), (1010, 1, 1, 1), (1020, 2, 1, 1)]
    for window_s, left in ((1e9, [0]), (10.0, [1])):
        policy = CostAware(frequency=1, recency=0, cost=0, window_s=window_s)
        run = play(requests, policy, max_loras=2)
        assert np.flatnonzero(run.state.on_gpu[:2]).tolist() == left


def test_an_adapter_that_is_slow_to_read_stays_in_host_memory() -> None:
    read_s = [4.0] + [0.5] * (ADAPTERS - 1)
    waits = {}
    for cost in (0, 1):
        policy = CostAware(frequency=0, recency=1 - cost, cost=cost)
        run = play(one_at_a_time(0, 1, 2, 0), policy, max_loras=1, max_cpu_loras=2, read_s=read_s)
        waits[cost] = run.requests.load_wait_s.tolist()
    assert waits == {0: [4, 0.5, 0.5, 4], 1: [4, 0.5, 0.5, 0]}


def test_the_score_weighs_uses_recency_and_cost() -> None:
    """At 100 s: adapter 0 was used 3 times, last at 21; adapter 1 once, until 31; window 10 s."""
    requests = [*one_at_a_time(0, 0, 0, 1), (100.0, 2, 1, 1)]
    fresh = [10 / (10 + 79), 10 / (10 + 69)]
    # A use at 0 and the end of its step at 1, at 10 and 11, at 20 and 21, fade in between.
    uses = 0.0
    for age_s in (0, 9, 9):
        uses = (1 + uses * 10 / (10 + age_s)) * 10 / 11
    used = np.array([uses * fresh[0], 10 / 11 * fresh[1]])
    for frequency in (0.05, 0.06, 0.08, 0.2):
        scores = frequency * used / used.max() + (1 - frequency) * np.array(fresh)
        policy = CostAware(frequency=frequency, recency=1 - frequency, cost=0, window_s=10.0)
        run = play(requests, policy, max_loras=2)
        assert not run.state.on_gpu[np.argmin(scores)]


def test_adapters_take_blocks_of_the_pool_while_they_are_on_the_gpu() -> None:
    requests = [(0, 0, 3, 2), (10, 1, 3, 2), (20, 2, 10, 2)]
    run = play(requests, UnifiedPool(), kv_cache_tokens=20, adapter_blocks=[4] * 8)
    # The last one needs 14 of 12 blocks, so adapter 0, used least recently, gives back its 4.
    assert run.steps.free_blocks.tolist() == [13, 12, 9, 8, 2, 1]
    assert np.flatnonzero(run.state.on_gpu).tolist() == [1, 2, ADAPTERS]
    assert run.state.count.free_blocks == 12


def test_idle_adapters_give_their_blocks_to_decodes_before_anybody_is_preempted() -> None:
    requests = [(0, 0, 3, 1), (10, 1, 3, 8)]
    run = play(requests, UnifiedPool(), kv_cache_tokens=15, adapter_blocks=[4] * 8)
    assert run.steps.free_blocks.tolist() == [8, 4, 3, 2, 1, 0, 3, 2, 1]
    assert run.requests.preemptions.sum() == 0
    assert not run.state.on_gpu[0]


def test_a_pool_holds_more_adapters_than_a_batch() -> None:
    run = play(one_at_a_time(0, 1, 2, 0, 1, 2), UnifiedPool(), max_loras=1)
    assert run.steps.loads.tolist() == [1, 1, 1, 0, 0, 0]
    assert (run.steps.adapters == 1).all()


def test_a_request_that_does_not_fit_beside_its_adapter_is_refused() -> None:
    lay_out([(0, 0, 5, 1)], UnifiedPool(), kv_cache_tokens=10)
    with pytest.raises(AdapterTwinError, match="request and its adapter of 11 tokens"):
        lay_out([(0, 0, 5, 2)], UnifiedPool(), kv_cache_tokens=10)


@pytest.mark.parametrize(("load_s", "rest_s"), [(0.5, 0.0), (2.5, 0.5)])
def test_a_prefetched_adapter_is_copied_while_the_model_runs(load_s: float, rest_s: float) -> None:
    requests = [(0, 0, 1, 3), (0.25, 1, 1, 1)]
    run = play(requests, UnifiedPool(prefetch=True), max_loras=1, load_s=load_s)
    # The copy begins with the second step, and two steps later the slot is free.
    assert run.requests.scheduled_s.tolist() == [0, load_s + 3]
    assert run.requests.load_wait_s.tolist() == [load_s, rest_s]
    assert run.steps.loads.tolist() == [1, 1, 0, 0]


def test_a_merged_adapter_runs_faster_and_alone() -> None:
    requests = [(0, 0, 1, 3), (1.0, 1, 1, 1), (1.0, BASE_MODEL, 1, 1)]
    run = play(requests, Merge(merge_share=0.8, unmerge_share=0.3, switch_s=0.25))
    # Merged at 0; at 1.25 it still has a third of the load. At 1.75 it has none, the others half
    # each: the engine unmerges, and runs both.
    assert run.steps.end_s.tolist() == [0.75, 1.25, 1.75, 3.0]
    assert run.requests.scheduled_s.tolist() == [0, 1.75, 1.75]


def test_others_end_before_an_adapter_is_merged_and_then_wait() -> None:
    requests = [(0, 1, 1, 3), *[(0.5, 0, 1, 4)] * 5, (2.5, 1, 1, 1)]
    run = play(requests, Merge(merge_share=0.8, unmerge_share=0.5, switch_s=0.25))
    # Adapter 1 is merged while it is alone, until 0.75. Then adapter 0 has 5 of 6 requests, but is
    # merged only at 3, when the running one of adapter 1 has ended, and until 4.25.
    assert run.steps.end_s.tolist() == [0.75, 2, 3, 3.75, 4.25, 5.5]
    assert run.requests.scheduled_s.tolist() == [0, *[0.75] * 5, 4.25]


def test_a_merge_ends_when_it_has_overtaken_others_by_too_much() -> None:
    requests = [(0, 0, 1, 9), (0.8, 1, 1, 2), (0.8, 0, 1, 2)]
    policy = Merge(merge_share=0.6, unmerge_share=0.1, switch_s=0.25, max_lead_s=1.0)
    run = play(requests, policy)
    # At 2.25 adapter 1 has waited 1.45 s and adapter 0 not at all: unmerged. At 3.5 both have half
    # of the load; from 4.5 on adapter 0 is alone.
    assert run.requests.scheduled_s.tolist() == [0, 2.25, 1.25]
    assert run.steps.end_s.tolist() == [0.75, 1.25, 1.75, 2.25, 3.5, 4.5, 5.25, 5.75, 6.25]


def test_below_its_share_no_adapter_is_merged() -> None:
    requests = [(0, adapter, 1, 5) for adapter in (0, 0, 1)]
    assert (play(requests, Merge(merge_share=0.7)).steps == play(requests, None).steps).all()


def test_merging_needs_the_law_of_a_merged_adapter() -> None:
    session = lay_out(one_at_a_time(0), None)
    engine = EngineConfig(model="any", max_loras=1, max_cpu_loras=1, max_lora_rank=8)
    trace = Trace(np.zeros(1), *(np.ones(1, np.int32) for _ in range(3)))
    with pytest.raises(AdapterTwinError, match="Merge needs"):
        new_session(
            replace(trace, adapter=np.zeros(1, np.int32)),
            *(engine, session.law, session.front_end, 100, np.zeros(1), np.zeros(1), Merge()),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Drain(max_wait_s=-1.0), "max_wait_s"),
        (lambda: Drain(max_wait_s=1.0, tolerance=np.nan), "tolerance"),
        (lambda: CostAware(frequency=0, recency=0, cost=0), "one weight must be above 0"),
        (lambda: CostAware(window_s=0), "window_s"),
        (lambda: Merge(merge_share=1.5), "merge_share"),
        (lambda: Merge(merge_share=0.5, unmerge_share=0.6), "unmerge_share"),
        (lambda: Merge(switch_s=-0.1), "switch_s"),
        (lambda: Merge(max_lead_s=np.nan), "max_lead_s"),
    ],
)
def test_parameters_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(AdapterTwinError, match=message):
        make()


@dataclass(frozen=True)
class LongestFirst(Policy):
    """Admit the request with the longest prompt, and of an adapter's equals the oldest."""

    def priority(self, requests: Any, state: State, request: int) -> float:
        return -float(requests.prompt_tokens[request])


def test_a_request_of_lower_priority_is_overtaken_in_its_queue_and_by_other_adapters() -> None:
    requests = [(0, 0, 1, 4), (1, 0, 3, 1), (1, 0, 5, 1), (1, 1, 4, 1), (1, BASE_MODEL, 3, 1)]
    run = play(requests, LongestFirst(), max_num_seqs=1)
    assert run.requests.scheduled_s.tolist() == [0, 6, 4, 5, 7]


def test_a_method_that_nobody_would_call_is_refused() -> None:
    with pytest.raises(AdapterTwinError, match=r"prioritise: no hook .* did you mean 'priority'"):
        type("Misspelt", (Policy,), {"prioritise": lambda self, requests, state, request: 0.0})
    with pytest.raises(AdapterTwinError, match=r"takes \(self, requests, state, request\), not"):
        type("Shorter", (Policy,), {"priority": lambda self, request: 0.0})
    with pytest.raises(AdapterTwinError, match="victim: no hook"):  # of vLLM's own caches
        type("Evicts", (Policy,), {"victim": lambda self: 0})


def test_a_parameter_that_is_no_number_is_refused() -> None:
    @dataclass(frozen=True)
    class Worded(Policy):
        word: str = "a"

    with pytest.raises(AdapterTwinError, match="word: a parameter is annotated int, float or bool"):
        type_of(Worded)


def test_a_change_of_the_scheduler_makes_the_type_of_a_policy_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scheduler.py").write_text("A")
    monkeypatch.setattr(hooks, "_SCHEDULER", tmp_path)
    before = type_of.__wrapped__(Drain)
    assert type_of.__wrapped__(Drain) == before
    (tmp_path / "scheduler.py").write_text("B")
    assert type_of.__wrapped__(Drain) != before


EVERY_POLICY = (
    Drain(max_wait_s=3.0),
    CostAware(window_s=20.0),
    UnifiedPool(prefetch=True),
    Merge(merge_share=0.6, unmerge_share=0.4),
    LongestFirst(),
)


WEIGHT = st.sampled_from([0.0, 0.1, 1.0])
POLICIES = st.one_of(
    st.sampled_from([Policy(), LongestFirst()]),
    st.builds(
        Drain,
        max_wait_s=st.sampled_from([0.0, 2.0, 9.0]),
        tolerance=st.sampled_from([0.0, 1.2, 9.0]),
    ),
    st.builds(
        CostAware,
        frequency=WEIGHT,
        recency=st.just(0.3),
        cost=WEIGHT,
        window_s=st.sampled_from([1.0, 100.0]),
    ),
    st.builds(UnifiedPool, prefetch=st.booleans()),
    st.builds(
        Merge,
        merge_share=st.sampled_from([0.5, 0.7, 1.0]),
        unmerge_share=st.sampled_from([0.1, 0.5]),
        switch_s=st.sampled_from([0.0, 0.5]),
        max_lead_s=st.sampled_from([0.0, 9.0, np.inf]),
    ),
)


@st.composite
def cases(
    draw: st.DrawFn,
    sizes: Sequence[int] = (1, 5, 20, 60),
    spare_blocks: Sequence[int] = (0, 3, 100),
) -> dict[str, Any]:
    """Draw a small engine, and requests that come in a burst or spread out."""
    max_loras = draw(st.integers(1, 4))
    max_num_seqs = draw(st.integers(1, 8))
    block_size = draw(st.integers(1, 5))
    request = st.tuples(
        st.floats(0, draw(st.sampled_from([1.0, 30.0, 300.0]))),
        st.integers(BASE_MODEL, draw(st.integers(0, ADAPTERS - 1))),
        st.integers(1, 30),
        st.integers(1, 20),
    )
    size = draw(st.sampled_from(sizes))
    requests = sorted(draw(st.lists(request, min_size=size, max_size=size)), key=lambda r: r[0])
    adapter_blocks = draw(st.lists(st.integers(0, 6), min_size=ADAPTERS, max_size=ADAPTERS))
    longest = max(prompt + output for _, _, prompt, output in requests)
    kv_blocks = -(-longest // block_size) + max(adapter_blocks)
    kv_blocks += draw(st.sampled_from(spare_blocks))
    return {
        "requests": requests,
        "max_loras": max_loras,
        "max_cpu_loras": draw(st.integers(max_loras, ADAPTERS)),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + draw(st.integers(0, 30)),
        "block_size": block_size,
        "kv_cache_tokens": kv_blocks * block_size,
        "adapter_blocks": adapter_blocks,
        "load_s": draw(st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=8, max_size=8)),
        "read_s": 1.0,
    }


@settings(max_examples=300, deadline=None)
@given(cases(), POLICIES)
def test_nothing_is_lost_and_no_limit_is_exceeded(case: dict[str, Any], policy: Policy) -> None:
    keeps_to_its_limits(play(policy=policy, **case), case)


def keeps_to_its_limits(run: Session, case: dict[str, Any]) -> None:
    """Check a run to the end of the requests of a case."""
    requests, steps, state, count = run.requests, run.steps, run.state, run.state.count
    assert np.isfinite(requests.end_s).all()
    assert (requests.end_s >= requests.first_token_s).all()
    assert (requests.first_token_s > requests.scheduled_s).all()
    assert (requests.scheduled_s >= requests.arrival_s).all()
    assert (np.diff(steps.end_s) > 0).all()
    emitted = steps.decodes.sum() + len(requests.end_s) + requests.stalls.sum()
    assert emitted == requests.output_tokens.sum()

    kv_blocks = case["kv_cache_tokens"] // case["block_size"]
    assert (steps.free_blocks >= 0).all()
    assert (steps.free_blocks <= kv_blocks).all()
    assert count.free_blocks + state.adapter_blocks[state.on_gpu].sum() == kv_blocks
    assert (steps.adapters <= case["max_loras"]).all()
    assert (steps.tokens <= case["max_num_batched_tokens"]).all()
    assert (steps.running <= case["max_num_seqs"]).all()

    on_gpu, on_host = state.on_gpu[:-1], state.on_host
    assert count.gpu_adapters == on_gpu.sum() <= run.limits.gpu_slots
    assert count.host_adapters == on_host.sum() <= case["max_cpu_loras"]
    assert (on_host >= on_gpu).all()
    assert count.active == count.context_tokens == count.decoding == count.waiting == 0


def blocks_held(session: Session) -> int:
    """Count the KV blocks of the running requests, and of the adapters in the pool."""
    state, count = session.state, session.state.count
    running = np.flatnonzero(state.stack_index >= 0)
    in_prompt = np.isin(running, [*state.prefilled[: count.prefilled], count.chunked])
    decoded = np.where(in_prompt, 0, count.step - state.base_step[running] + 1)
    tokens = state.base_tokens[running] + decoded
    of_requests = -(-tokens // session.limits.block_size)
    return int(of_requests.sum() + state.adapter_blocks[state.on_gpu].sum())


@settings(max_examples=60, deadline=None)
@given(cases(), POLICIES)
def test_every_block_is_held_or_free_in_every_step(case: dict[str, Any], policy: Policy) -> None:
    session = lay_out(policy=policy, **case)
    count, limits = session.state.count, session.limits
    while (event_s := session.turn()) < np.inf:
        session.clock.now_s = event_s
        held = blocks_held(session)
        assert count.free_blocks + held == case["kv_cache_tokens"] // limits.block_size
        assert count.gpu_adapters == session.state.on_gpu[:-1].sum() <= limits.gpu_slots
        assert count.host_adapters == session.state.on_host.sum() <= limits.max_cpu_loras
    assert np.isfinite(session.requests.end_s).all()


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda policy: type(policy).__name__)
@settings(max_examples=60, deadline=None)
@given(case=cases(sizes=(20, 60), spare_blocks=(0,)))
def test_preempted_requests_go_first(case: dict[str, Any], policy: Policy) -> None:
    session = lay_out(policy=policy, **case)
    state, adapter = session.state, session.requests.adapter
    order, ended, running = state.order, np.zeros(len(adapter), bool), np.zeros(len(adapter), bool)
    while (event_s := session.turn()) < np.inf:
        session.clock.now_s = event_s
        admitted = (state.stack_index >= 0) & ~running & ~ended
        running = state.stack_index >= 0
        ended = np.isfinite(session.requests.end_s)
        in_batch = (state.running_by_adapter[adapter] > 0) | (adapter == session.limits.base_model)
        for left in np.flatnonzero((order < 0) & ~running & ~ended & in_batch):
            if policy.candidate(session.requests, state, adapter[left]) == left:
                assert not (admitted & (order > order[left])).any()


@settings(max_examples=60, deadline=None)
@given(cases(), POLICIES)
def test_both_clocks_leave_the_same_records(case: dict[str, Any], policy: Policy) -> None:
    is_equal_on_both_clocks(policy, case)


def is_equal_on_both_clocks(policy: Policy, case: dict[str, Any]) -> None:
    compiled, stepped = lay_out(policy=policy, **case), lay_out(policy=policy, **case)
    compiled.run()
    run_in_simpy(stepped)
    for name, column in compiled.requests._asdict().items():
        np.testing.assert_array_equal(getattr(stepped.requests, name), column, err_msg=name)
    assert (stepped.steps == compiled.steps).all()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_eviction_by_recency_alone_schedules_as_vllm_does(case: dict[str, Any]) -> None:
    case |= {"load_s": 0.0, "read_s": 0.0}
    expected = play(policy=None, **case)
    run = play(policy=CostAware(frequency=0, recency=1, cost=0, window_s=30.0), **case)
    for name in ("end_s", "tokens", "running", "waiting", "adapters", "free_blocks"):
        np.testing.assert_array_equal(run.steps[name], expected.steps[name], err_msg=name)


def test_eviction_by_recency_alone_has_no_chain() -> None:
    running = [(0.0, adapter, 1, 2 if adapter == 3 else 9) for adapter in (1, 2, 3, 4)]
    joins = (1.5, 0, 1, 9)
    policy = CostAware(frequency=0, recency=1, cost=0)
    for rule, loads in ((None, [4, 0, 3, 0]), (policy, [4, 0, 1, 0])):
        assert play([*running, joins], rule, max_loras=4).steps.loads[:4].tolist() == loads


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_pool_of_adapters_without_size_or_load_time_is_vllm(case: dict[str, Any]) -> None:
    case |= {"adapter_blocks": [0] * ADAPTERS, "load_s": 0.0, "read_s": 0.0}
    expected, run = play(policy=None, **case), play(policy=UnifiedPool(), **case)
    np.testing.assert_array_equal(run.requests.end_s, expected.requests.end_s)


def busy(policy: Policy | None) -> Session:
    """Play three hundred requests to adapters of unequal popularity, short of slots and blocks."""
    rng = np.random.default_rng(0)
    arrival_s = np.sort(rng.uniform(0, 300, 300))
    adapter = np.minimum(rng.geometric(0.4, 300) - 2, ADAPTERS - 1)
    lengths = rng.integers(1, 20, (2, 300))
    requests = list(zip(arrival_s, adapter, *lengths, strict=True))
    flags = {"max_loras": 2, "max_cpu_loras": 4, "kv_cache_tokens": 80}
    return play(requests, policy, load_s=0.125, read_s=0.25, **flags)


def ends_s() -> list[list[float]]:
    return [busy(policy).requests.end_s.tolist() for policy in EVERY_POLICY]


def test_each_policy_changes_something() -> None:
    assert len({tuple(column) for column in [*ends_s(), busy(None).requests.end_s.tolist()]}) == 6


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


@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
@pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda policy: type(policy).__name__)
def test_simulate_takes_a_policy(policy: Policy) -> None:
    calibration = load_calibration("auto", model="llama-3.1-8b-instruct")
    workload = Workload(
        adapters=zipf_adapters(count=8, total_request_rate=4.0, zipf_exponent=2.0, ranks=[8, 16]),
        duration_s=60.0,
        lengths=Lengths(mean_input_tokens=223, mean_output_tokens=198),
    )
    engine = EngineConfig(model=calibration.model, max_loras=4, max_cpu_loras=8, max_lora_rank=16)
    run = simulate(workload, engine, calibration, policy=policy)
    assert run.policy == policy
    assert run.provenance["policy"] == repr(policy)
    assert np.isfinite(run.records.end_s).mean() > 0.8
    usual = simulate(workload, engine, calibration)
    assert "policy" not in usual.provenance
    if isinstance(policy, UnifiedPool):  # the memory of the slots
        assert run.steps.free_blocks[0] > usual.steps.free_blocks[0]
    if isinstance(policy, Merge):
        assert (run.records.end_s != usual.records.end_s).any()


def test_an_adapter_takes_blocks_in_proportion_to_its_rank() -> None:
    memory = load_calibration("auto", model="llama-3.1-8b-instruct").memory
    # 2 x 81,920 weights of 32 layers per rank in blocks of 16 tokens of 128 KiB
    engine = EngineConfig(model="llama-3.1-8b-instruct", max_loras=1)
    assert memory.adapter_blocks(np.array([8, 16, 32]), engine).tolist() == [20, 40, 80]
