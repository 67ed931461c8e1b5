"""The engine's rules on runs small enough to work out by hand; every step takes one second."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.twin.clock import FrontEnd, StepLaw
from adapter_twin.twin.layout import new_session
from adapter_twin.twin.records import make_gaps, make_records
from adapter_twin.twin.session import Session
from adapter_twin.twin.simulate import run_in_simpy
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import BASE_MODEL, COLUMNS, Trace, generate
from adapter_twin.workload.traffic import Arrivals, Lengths, Workload

LOAD_S, READ_S = 0.25, 0.5
NO_OVERHEAD_S = np.zeros(2)


def lay_out(
    requests: Sequence[tuple[float, int, int, int]],
    *,
    kv_cache_tokens: int = 1000,
    duration_s: float = 1000.0,
    load_s: float = 0.0,
    read_s: float = 0.0,
    in_flight_cap: int = 1000,
    per_arrival_s: float = 0.0,
    first_use_s: float = 0.0,
    scrape_period_s: float = np.inf,
    scrape_s: float = 0.0,
    scrape_s_per_label: float = 0.0,
    scrape_pause_share: float = 1.0,
    pinned: Sequence[int] = (),
    **engine: int,
) -> Session:
    """Requests are (arrival, adapter, prompt, output); vLLM's null block comes on top of the KV."""
    arrival_s, *columns = (np.array(column) for column in zip(*requests, strict=True))
    flags = {"max_loras": 4, "max_cpu_loras": 8, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    flags |= {"block_size": 1, **engine}
    pauses = (
        first_use_s,
        scrape_period_s,
        scrape_s,
        scrape_s_per_label,
        0.0,
        0.0,
        scrape_pause_share,
    )
    return new_session(
        Trace(arrival_s.astype(float), *(column.astype(np.int32) for column in columns)),
        EngineConfig(model="any", max_lora_rank=8, **flags),
        StepLaw(np.empty(0), np.eye(1, 8), per_arrival_s, np.zeros(3)),
        FrontEnd(duration_s, in_flight_cap, *pauses),
        kv_cache_tokens + flags["block_size"],
        np.full(8, load_s),
        np.full(8, read_s),
        pinned=np.isin(np.arange(8), pinned),
    )


def play(requests: Sequence[tuple[float, int, int, int]], **settings: float) -> Session:
    session = lay_out(requests, **settings)  # type: ignore[arg-type]
    session.run()
    session.steps = session.steps[: session.clock.steps]
    return session


def test_a_long_prompt_takes_several_steps_and_shares_the_last_with_others() -> None:
    run = play([(0, 0, 10, 2), (0.5, 0, 3, 1)], max_num_seqs=4, max_num_batched_tokens=4)
    assert run.steps.tokens.tolist() == [4, 4, 4, 2]  # 4 | 4 | 2 + 2 | decode + 1
    assert run.steps.decodes.tolist() == [0, 0, 0, 1]
    assert run.requests.scheduled_s.tolist() == [0, 2]
    assert run.requests.first_token_s.tolist() == [3, 4]
    assert run.requests.end_s.tolist() == [4, 4]


def test_the_last_running_request_is_preempted_and_computes_its_tokens_again() -> None:
    run = play([(0, 0, 2, 6), (0, 0, 2, 6)], kv_cache_tokens=8)
    # Both hold 4 tokens after three steps; the second one leaves with 3 tokens emitted, and comes
    # back, to compute 5, when the first one has ended.
    assert run.steps.tokens.tolist() == [4, 2, 2, 1, 1, 1, 5, 1, 1]
    assert run.steps.free_blocks.tolist() == [4, 2, 0, 3, 2, 1, 3, 2, 1]
    assert run.requests.preemptions.tolist() == [0, 1]
    assert run.requests.first_token_s.tolist() == [1, 1]
    assert run.requests.end_s.tolist() == [6, 9]
    assert run.requests.scheduled_s.tolist() == [0, 0]
    gaps = make_gaps(run)
    assert sorted(np.repeat(gaps.gap_s, gaps.count).tolist()) == [1] * 9 + [4]


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    run = play([(0, 0, 2, 6), (0, 0, 2, 6), (2.5, 0, 1, 1)], kv_cache_tokens=8)
    assert run.steps.waiting.tolist()[3] == 2  # room for one token, but not in this step
    assert run.requests.scheduled_s[2] == 6  # behind the preempted one, which does not fit


def test_an_arrival_costs_the_next_step_and_no_other() -> None:
    # two at once, then one, and one that is refused
    requests = [(0, 0, 1, 4), (0, 1, 1, 4), (1.5, 0, 1, 1), (1.5, 0, 1, 1)]
    run = play(requests, per_arrival_s=0.25, in_flight_cap=3)
    assert run.steps.end_s.tolist() == [1.5, 2.75, 3.75, 4.75]
    run = play([(0, 0, 2, 6), (0, 0, 2, 6)], per_arrival_s=0.25, kv_cache_tokens=8)
    assert run.requests.preemptions.tolist() == [0, 1]  # and comes back, which is no arrival
    assert np.diff(run.steps.end_s, prepend=0).tolist() == [1.5] + [1] * 8


def test_requests_of_resident_adapters_overtake_one_that_finds_no_slot() -> None:
    run = play([(0, 0, 1, 3), (0, 1, 1, 1), (0, 0, 1, 1), (1.5, 0, 1, 4)], max_loras=1)
    assert run.requests.scheduled_s.tolist() == [0, 6, 0, 2]
    assert run.steps.adapters.tolist() == [1] * 7


def test_a_gated_adapter_stays_gated_where_fewer_adapters_wait_than_run() -> None:
    running = [(0, adapter, 1, 5) for adapter in range(3)]
    run = play([*running, (0.25, 3, 1, 1), (0.5, 0, 1, 1)], max_loras=3)
    assert run.requests.scheduled_s.tolist() == [0, 0, 0, 5, 1]


def test_requests_to_the_base_model_need_no_slot() -> None:
    run = play([(0, 0, 1, 3), (0, 1, 1, 1), (0, BASE_MODEL, 1, 2)], max_loras=1, load_s=LOAD_S)
    assert run.requests.scheduled_s.tolist() == [0, 3.25, 0]
    assert run.requests.load_wait_s.tolist() == [LOAD_S, LOAD_S, 0]
    assert run.steps.adapters.tolist() == [1, 1, 1, 1]
    assert make_records(run, NO_OVERHEAD_S).adapter.tolist() == [0, 1, BASE_MODEL]


def one_at_a_time(*adapters: int) -> list[tuple[float, int, int, int]]:
    return [(10.0 * i, adapter, 1, 1) for i, adapter in enumerate(adapters)]


def test_the_least_recently_used_adapter_leaves_its_slot() -> None:
    run = play(one_at_a_time(0, 1, 0, 2, 0, 1), max_loras=2, load_s=LOAD_S)
    assert run.steps.loads.tolist() == [1, 1, 0, 1, 0, 1]
    assert (run.requests.load_wait_s == LOAD_S * run.steps.loads).all()
    assert (run.requests.end_s == run.requests.arrival_s + 1 + LOAD_S * run.steps.loads).all()


def test_an_adapter_outside_the_host_cache_is_read_from_disk() -> None:
    slow = LOAD_S + READ_S
    order = one_at_a_time(0, 1, 0, 2, 0, 1)
    run = play(order, max_loras=1, max_cpu_loras=2, load_s=LOAD_S, read_s=READ_S)
    assert run.requests.load_wait_s.tolist() == [slow, slow, LOAD_S, slow, LOAD_S, slow]


def test_leaving_the_host_cache_an_adapter_leaves_its_slot_too() -> None:
    order = one_at_a_time(0, 1, 2, 0)
    run = play(order, max_loras=2, max_cpu_loras=2, load_s=LOAD_S, read_s=READ_S)
    assert (run.requests.load_wait_s == LOAD_S + READ_S).all()
    assert run.state.on_gpu[[0, 1, 2]].tolist() == [True, False, True]


def two_in_a_row(new: int) -> list[tuple[float, int, int, int]]:
    """Adapters 1, 2 and 4 run on, 3 ends with the second step, and `new` joins in the third."""
    running = [(0.0, adapter, 1, 2 if adapter == 3 else 9) for adapter in (1, 2, 3, 4)]
    return [*running, (1.5, new, 1, 9)]


def test_a_new_adapter_evicts_one_that_the_step_needs_and_that_one_the_next() -> None:
    # 0 comes first and 3, which has left, was touched after 1 and 2: 0 takes the slot of 1, that
    # one the slot of 2, and 2 the slot of 3.
    run = play(two_in_a_row(0), max_loras=4, load_s=LOAD_S)
    assert run.steps.loads[:4].tolist() == [4, 0, 3, 0]
    assert run.steps.load_s[2] == 3 * LOAD_S
    assert run.requests.load_wait_s.tolist() == [LOAD_S] * 5  # for its own adapter's first copy


def test_there_is_no_chain_where_the_new_adapter_comes_after_the_one_that_left() -> None:
    run = play(two_in_a_row(5), max_loras=4, load_s=LOAD_S)
    assert run.steps.loads[:4].tolist() == [4, 0, 1, 0]


def test_there_is_no_chain_where_a_step_lies_between_leaving_and_joining() -> None:
    *running, (_, new, prompt, output) = two_in_a_row(0)
    run = play([*running, (2.5 + 4 * LOAD_S, new, prompt, output)], max_loras=4, load_s=LOAD_S)
    assert run.steps.loads[:5].tolist() == [4, 0, 0, 1, 0]


def test_the_chain_reads_from_disk_where_the_host_cache_is_no_larger_than_the_slots() -> None:
    for max_cpu_loras, reads in ((4, 3), (5, 1)):
        run = play(two_in_a_row(0), max_loras=4, max_cpu_loras=max_cpu_loras, read_s=READ_S)
        assert run.steps.loads[2] == 3
        assert run.steps.load_s[2] == reads * READ_S


def test_the_chain_passes_over_pinned_adapters() -> None:
    run = play(two_in_a_row(0), max_loras=4, load_s=LOAD_S, pinned=[2])
    assert run.steps.loads[:4].tolist() == [3, 0, 2, 0]


def test_a_pinned_adapter_is_there_from_the_start_and_stays() -> None:
    run = play(one_at_a_time(1, 2, 3, 0), max_loras=2, load_s=LOAD_S, read_s=READ_S, pinned=[0])
    assert run.requests.load_wait_s.tolist() == [LOAD_S + READ_S] * 3 + [0.0]


def test_the_engine_stops_where_only_pinned_adapters_could_leave() -> None:
    both = [(0, 1, 1, 4), (0, 2, 1, 4)]
    with pytest.raises(AdapterTwinError, match=r"pinned: .* vLLM stops"):
        play(both, max_loras=2, pinned=[0])
    with pytest.raises(AdapterTwinError, match=r"pinned: .* vLLM stops"):
        run_in_simpy(lay_out(both, max_loras=2, pinned=[0]))
    with pytest.raises(AdapterTwinError, match="pinned: 3 adapters exceed the max_loras = 2"):
        lay_out(both, max_loras=2, pinned=[0, 1, 2])


def test_no_more_requests_run_than_max_num_seqs() -> None:
    run = play([(0, 0, 1, 2)] * 5, max_num_seqs=2)
    assert run.steps.running.tolist() == [2, 2, 2, 2, 1, 1]


def test_what_does_not_end_in_the_window_is_lost() -> None:
    run = play([(0, 0, 1, 2), (0, 0, 1, 9), (2.5, 0, 1, 1)], duration_s=3)
    records = make_records(run, NO_OVERHEAD_S)
    np.testing.assert_array_equal(records.first_token_s, [1, 1, np.nan])
    np.testing.assert_array_equal(records.end_s, [2, np.nan, np.nan])
    gaps = make_gaps(run)
    assert np.repeat(gaps.gap_s, gaps.count).tolist() == [1]


def test_a_client_at_its_cap_sends_nothing() -> None:
    run = play([(0, 0, 1, 3), (1.5, 0, 1, 1), (3.5, 0, 1, 1)], in_flight_cap=1)
    assert run.requests.rejected.tolist() == [False, True, False]
    np.testing.assert_array_equal(run.requests.end_s, [3, np.nan, 4.5])


def test_the_first_use_of_an_adapter_holds_up_the_front_end() -> None:
    run = play([(0, 0, 1, 1), (1, 0, 1, 1), (20, 0, 1, 1), (21, BASE_MODEL, 1, 1)], first_use_s=5)
    assert run.requests.scheduled_s.tolist() == [5, 5, 20, 21]
    assert [tuple(pause)[:2] for pause in run.pauses[: run.clock.pauses]] == [(0, 5)]


def test_a_scrape_holds_up_tokens_and_arrivals() -> None:
    run = play([(0, 0, 1, 4), (2.25, 0, 1, 1)], scrape_period_s=2, scrape_s=0.5, duration_s=5)
    assert [tuple(pause)[:2] for pause in run.pauses[: run.clock.pauses]] == [(2, 2.5)]
    assert run.requests.ready_s.tolist() == [0, 2.5]
    gaps = make_gaps(run)  # tokens leave the engine at 1, 2, 3, 4 and the front end at 1, 2.5, 3, 4
    assert np.repeat(gaps.gap_s, gaps.count).tolist() == [1.5, 0.5, 1]
    delay_s = np.array([0.125, 0.0625])  # the second request's first step has two running
    records = make_records(run, delay_s)
    assert records.first_token_s.tolist() == [1.1875, 4.25]
    assert records.end_s.tolist() == [4.1875, 4.25]


def test_tokens_that_pile_up_in_a_pause_reach_the_client_as_one_chunk() -> None:
    run = play([(0, 0, 1, 6)], scrape_period_s=2, scrape_s=2.5, duration_s=6.25)
    gaps = make_gaps(run)  # 1, then 2, 3 and 4 together at 4.5, 5, 6
    assert np.repeat(gaps.gap_s, gaps.count).tolist() == [3.5, 0.5, 1]


def test_every_pair_of_sets_of_running_and_waiting_adapters_is_one_label() -> None:
    order = [*one_at_a_time(0, 1, 0, 1, 0), (50.0, 0, 1, 3), (60.0, 0, 1, 3), (60.0, 1, 1, 3)]
    run = play(order, scrape_period_s=500, scrape_s_per_label=1)
    # After each step: nothing, 0, 0 1
    assert run.clock.labels == 3
    assert run.clock.label_names == 3
    run = play([*order, (70.0, 1, 1, 3), (70.0, 0, 1, 3)], scrape_period_s=500)
    assert run.clock.labels == 3  # 1 0 is no other set than 0 1
    run = play([(0, 0, 1, 3), (0, 1, 1, 3)], max_loras=1, scrape_period_s=500)
    # 0 runs and 1 waits; 1 waits; 1 runs; nothing
    assert run.clock.labels == 4
    assert run.clock.label_names == 4
    run = play([(0, 0, 1, 1), (0.5, 1, 1, 1)], scrape_period_s=500)
    assert run.clock.labels == 2  # 1 waits; nothing


def test_first_tokens_beside_many_others_wait_in_the_label_sets_once_more() -> None:
    # 130 requests of adapter 0 decode; one of adapter 1 comes in the third step
    order = [*((0.0, 0, 1, 6) for _ in range(130)), (2.5, 1, 1, 2)]
    names = []
    for first in (0, 2, 3):
        run = play(order[first:], scrape_period_s=500, max_num_seqs=200, max_num_batched_tokens=200)
        names.append(int(run.clock.label_names))
    # 0 runs and was waiting; 0; 0, and 1 waits; 0 1, and 1 was waiting; nothing
    assert names[0] == 2 + 1 + 2 + 3 + 0
    # 0, for 128 are taken at once; 0, and 1 waits; 0 1, and 1 was waiting: there are 129; nothing
    assert names[1] == 1 + 2 + 3 + 0
    # with one less, 1 no longer counts as waiting
    assert names[2] == 1 + 2 + 2 + 0


def test_the_server_pauses_for_its_share_of_a_read() -> None:
    run = play([(0, 0, 1, 9)], scrape_period_s=2, scrape_s=1, scrape_pause_share=0.5, duration_s=9)
    pauses = [tuple(pause)[:2] for pause in run.pauses[: run.clock.pauses]]
    assert pauses == [(2, 2.5), (5, 5.5), (8, 8.5)]
    assert [pause.running for pause in run.pauses[: run.clock.pauses]] == [1, 1, 1]


def test_a_request_that_can_never_fit_is_refused() -> None:
    with pytest.raises(AdapterTwinError, match="request of 11 tokens exceeds the KV cache"):
        lay_out([(0, 0, 5, 6)], kv_cache_tokens=10)


def test_an_empty_trace_runs() -> None:
    empty = Trace(np.empty(0), *(np.empty(0, np.int32) for _ in range(3)))
    template = lay_out([(0, 0, 1, 1)])
    engine = EngineConfig(model="any", max_loras=1, max_cpu_loras=1, max_lora_rank=8)
    loads_s = np.zeros(1)
    run = new_session(empty, engine, template.law, template.front_end, 100, loads_s, loads_s)
    run.run()
    assert run.clock.steps == 0
    assert len(make_gaps(run).gap_s) == len(make_records(run, NO_OVERHEAD_S)) == 0


def busy_minute(seed: int) -> Session:
    workload = Workload(
        adapters=deal_adapters(6, [0.4, 0.2], [8]),
        duration_s=60.0,
        arrivals=Arrivals(process="gamma", cv=2.0),
        lengths=Lengths(distribution="lognormal", mean_input_tokens=20, mean_output_tokens=15),
        base_model_request_rate=0.2,
    )
    trace = generate(workload, np.random.default_rng(seed))
    columns = (getattr(trace, name).tolist() for name in COLUMNS)
    return lay_out(
        list(zip(*columns, strict=True)),
        duration_s=60.0,
        kv_cache_tokens=400,
        load_s=0.125,
        read_s=0.25,
        first_use_s=0.1,
        scrape_period_s=2.0,
        scrape_s=0.05,
        scrape_s_per_label=0.001,
        max_loras=2,
        max_cpu_loras=4,
        max_num_seqs=16,
    )


def records_of(session: Session) -> dict[str, list[float]]:
    session.run()
    records = make_records(session, np.array([0.01, 0.001]))
    return {column.name: getattr(records, column.name).tolist() for column in fields(records)}


def test_same_seed_same_records() -> None:
    first, again, other = (records_of(busy_minute(seed)) for seed in (1, 1, 2))
    assert repr(first) == repr(again)
    assert repr(first) != repr(other)


def test_a_full_step_table_grows_without_a_trace() -> None:
    small = busy_minute(1)
    small.steps = small.steps[:2].copy()
    assert repr(records_of(small)) == repr(records_of(busy_minute(1)))
    assert len(small.steps) > small.clock.steps


def test_plain_python_gives_the_same_records() -> None:
    """It is the same source, so a debugger can step through the policy."""
    script = (
        "import json, runpy; tests = runpy.run_path({!r}); "
        "print(json.dumps(tests['records_of'](tests['busy_minute'](1))))"
    )
    plain = subprocess.run(
        [sys.executable, "-c", script.format(__file__)],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        check=True,
        text=True,
    )
    assert repr(json.loads(plain.stdout)) == repr(records_of(busy_minute(1)))
