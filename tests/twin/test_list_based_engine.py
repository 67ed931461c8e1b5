"""The compiled scheduler against a naive one that holds plain lists, as vLLM V1 does."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_twin.twin.clock import FrontEnd, StepLaw
from adapter_twin.twin.layout import new_session
from adapter_twin.twin.records import make_gaps
from adapter_twin.twin.session import Session
from adapter_twin.twin.simulate import run_in_simpy
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import BASE_MODEL, Trace
from study.plain_engine import PlainEngine, PlainRequest, PlainStep, serve

# Sums of powers of two: no sum of times is ever rounded, so the comparison is exact.
TICK_S = 2.0**-20
LAW = StepLaw(
    token_breaks=np.array([8.0]),
    coefficients=TICK_S * np.array([[64.0, 8, 4, 1, 16, 2, 0, 2], [128.0, 4, 2, 1, 8, 1, 64, 0]]),
    per_arrival=32 * TICK_S,
    scheduling=TICK_S * np.array([8.0, 2, 1]),
)
LOAD_S = 512 * TICK_S * np.arange(1, 17)  # so that a sum tells which adapters were copied
READ_S = 8 * LOAD_S
NULL_BLOCK = 1  # that vLLM keeps to itself


@dataclass
class Case:
    """A small engine and its requests: (tick of arrival, adapter, prompt, output tokens)."""

    max_loras: int
    max_cpu_loras: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_blocks: int
    in_flight_cap: int
    duration_ticks: int
    requests: list[tuple[int, int, int, int]]
    places: list[int]
    reserves_prompts: bool = False
    by_block: bool = False

    @property
    def adapters(self) -> int:
        return 1 + max(adapter for _, adapter, _, _ in [*self.requests, (0, 0, 1, 1)])

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(
            model="any",
            max_loras=self.max_loras,
            max_cpu_loras=self.max_cpu_loras,
            max_lora_rank=8,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            # no prompt is as long, but the scheduler by blocks looks at all that are
            long_prefill_token_threshold=1000 * self.by_block,
        )

    @property
    def trace(self) -> Trace:
        ticks, adapter, prompt, output = (np.array(c) for c in zip(*self.requests, strict=True))
        return Trace(ticks * TICK_S, *(c.astype(np.int32) for c in (adapter, prompt, output)))

    def session(self, trace: Trace | None = None, **how: Any) -> Session:
        return new_session(
            trace or self.trace,
            self.config,
            LAW,
            FrontEnd(self.duration_ticks * TICK_S, self.in_flight_cap),
            (self.kv_blocks + NULL_BLOCK) * self.block_size,
            LOAD_S[: self.adapters],
            READ_S[: self.adapters],
            places=np.argsort(np.argsort(self.places[: self.adapters])),
            reserves_prompts=self.reserves_prompts,
            **how,
        )

    def plain_engine(self) -> PlainEngine:
        return PlainEngine(
            config=self.config,
            kv_blocks=self.kv_blocks,
            law=LAW,
            load_s=LOAD_S,
            read_s=READ_S,
            places=np.array(self.places),
            reserves_prompts=self.reserves_prompts,
        )


def run_plainly(case: Case) -> tuple[PlainEngine, list[PlainRequest]]:
    engine = case.plain_engine()
    requests = [PlainRequest(tick * TICK_S, *rest) for tick, *rest in case.requests]
    serve(engine, requests, case.duration_ticks * TICK_S, case.in_flight_cap)
    return engine, requests


@st.composite
def cases(draw: st.DrawFn) -> Case:
    max_loras = draw(st.integers(1, 5))
    max_num_seqs = draw(st.integers(1, 8))
    adapters = draw(st.integers(1, 8))
    block_size = draw(st.integers(1, 5))
    request = st.tuples(
        st.integers(0, draw(st.sampled_from([1, 300, 3000]))),  # a burst, or spread out
        st.integers(BASE_MODEL, adapters - 1),
        st.integers(1, 30),
        st.integers(1, 20),
    )
    size = draw(st.sampled_from([1, 5, 20, 40]))
    requests = sorted(draw(st.lists(request, min_size=size, max_size=size)), key=lambda r: r[0])
    longest = max(prompt + output for _, _, prompt, output in requests)
    return Case(
        max_loras=max_loras,
        max_cpu_loras=draw(st.integers(max_loras, 8)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 30)),
        block_size=block_size,
        kv_blocks=-(-longest // block_size) + draw(st.sampled_from([0, 3, 10, 100])),
        in_flight_cap=draw(st.sampled_from([3, 1000])),
        duration_ticks=draw(st.sampled_from([5_000, 10_000_000])),
        requests=requests,
        places=draw(st.permutations(range(8))),
        reserves_prompts=draw(st.booleans()),
        by_block=draw(st.booleans()),
    )


@st.composite
def contended(draw: st.DrawFn) -> Case:
    """Slots that bind, and short outputs: adapters join, leave and come back in most steps."""
    max_loras = draw(st.integers(2, 8))
    request = st.tuples(
        st.integers(0, draw(st.sampled_from([1, 3000]))),
        st.integers(0, 15),
        st.integers(1, 4),
        st.integers(1, 4),
    )
    requests = sorted(draw(st.lists(request, min_size=60, max_size=60)), key=lambda r: r[0])
    return Case(
        max_loras=max_loras,
        max_cpu_loras=max_loras + draw(st.sampled_from([0, 1, 8])),
        max_num_seqs=16,
        max_num_batched_tokens=64,
        block_size=4,
        kv_blocks=draw(st.sampled_from([6, 1000])),
        in_flight_cap=1000,
        duration_ticks=10_000_000,
        requests=requests,
        places=draw(st.permutations(range(16))),
        by_block=draw(st.booleans()),
    )


@settings(max_examples=400, deadline=None)
@given(cases() | contended())
def test_every_step_is_the_one_a_plain_list_scheduler_takes(case: Case) -> None:
    session = case.session()
    session.run()
    engine, requests = run_plainly(case)

    steps = session.steps[: session.clock.steps]
    ours = np.array([steps[name].astype(float) for name in PlainStep._fields]).T
    theirs = np.array(engine.steps, float).reshape(-1, len(PlainStep._fields))
    theirs[:, 9:] = theirs[:, 9:].astype(np.float32)  # as the twin keeps load and scheduling time
    np.testing.assert_array_equal(ours, theirs)

    tokens = [r.token_s for r in requests]
    expected = {
        "scheduled_s": [r.scheduled_s for r in requests],
        "first_token_s": [times[0] if times else np.nan for times in tokens],
        "end_s": [r.token_s[-1] if len(r.token_s) == r.output_tokens else np.nan for r in requests],
        "load_wait_s": [r.load_wait_s for r in requests],
        "preemptions": [r.preemptions for r in requests],
        "rejected": [r.rejected for r in requests],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(session.requests, name), values, err_msg=name)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_gaps_are_those_between_the_tokens_of_completed_requests(case: Case) -> None:
    session = case.session()
    session.run()
    gaps = make_gaps(session)
    _, requests = run_plainly(case)
    completed = [r for r in requests if len(r.token_s) == r.output_tokens]
    if any(r.preemptions for r in requests if r not in completed):
        return  # the gaps of a preempted request that never ends are left in
    assert gaps.count.sum() == sum(r.output_tokens - 1 for r in completed)
    if not any(r.preemptions for r in requests):
        expected = np.sort(np.concatenate([np.diff(r.token_s) for r in completed] or [[]]))
        np.testing.assert_array_equal(np.sort(np.repeat(gaps.gap_s, gaps.count)), expected)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_both_clocks_leave_the_same_records_bit_for_bit(case: Case) -> None:
    compiled, stepped = case.session(), case.session()
    compiled.run()
    run_in_simpy(stepped)
    for name, column in compiled.requests._asdict().items():
        np.testing.assert_array_equal(getattr(stepped.requests, name), column, err_msg=name)
    assert stepped.clock.steps == compiled.clock.steps
    assert (stepped.steps == compiled.steps).all()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_no_step_exceeds_a_limit_of_the_engine(case: Case) -> None:
    session = case.session()
    session.run()
    steps = session.steps[: session.clock.steps]
    assert (steps.free_blocks >= 0).all()
    assert (steps.adapters <= case.max_loras).all()
    assert (steps.tokens <= case.max_num_batched_tokens).all()
    assert (steps.running <= case.max_num_seqs).all()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_no_request_no_token_and_no_block_is_lost(case: Case) -> None:
    session = case.session()
    session.run()
    requests, count = session.requests, session.state.count
    completed = np.isfinite(requests.end_s)
    in_engine = count.running + count.waiting
    underway = len(completed) - session.clock.delivered
    assert completed.sum() + requests.rejected.sum() + in_engine + underway == len(completed)
    if in_engine + underway == 0:
        emitted = session.steps.decodes.sum() + completed.sum() + requests.stalls.sum()
        assert emitted == requests.output_tokens[completed].sum()
        assert count.free_blocks == case.kv_blocks
        assert count.active == count.context_tokens == count.decoding == 0


@settings(max_examples=100, deadline=None)
@given(cases())
def test_requests_of_one_adapter_are_scheduled_first_come_first_served(case: Case) -> None:
    session = case.session()
    session.run()
    requests = session.requests
    if requests.preemptions.any():
        return  # a preempted request runs again before others, but was first scheduled long ago
    for adapter in np.unique(requests.adapter):
        scheduled_s = requests.scheduled_s[(requests.adapter == adapter) & ~requests.rejected]
        started = np.isfinite(scheduled_s)
        assert (np.diff(scheduled_s[started]) >= 0).all()
        assert (np.diff(started.astype(int)) <= 0).all()  # the ones left over came last


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_more_slots_never_gate_more_requests_of_a_burst(adapters: list[int]) -> None:
    """Nothing but slots is short, so whoever waits after the first step waits for a slot."""
    gated = []
    for max_loras in range(1, 6):
        requests = [(0, adapter, 3, 2) for adapter in adapters]
        session = Case(
            max_loras, 5, 64, 512, 4, 1000, 1000, 1 << 20, requests, [*range(5)]
        ).session()
        session.run()
        gated.append(session.steps.waiting[0])
    assert gated == sorted(gated, reverse=True)
    assert all((w == 0) == (g >= len(set(adapters))) for g, w in enumerate(gated, start=1))
