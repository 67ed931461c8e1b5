"""Requests that wait for answers, beside a client that keeps plain lists."""

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_twin.twin.records import make_records
from adapter_twin.twin.session import Session
from adapter_twin.twin.simulate import run_in_simpy
from adapter_twin.workload.trace import Trace
from study.plain_engine import PlainEngine, PlainRequest, PlainStep
from tests.twin.test_list_based_engine import TICK_S, Case, cases, contended

NEVER = np.inf


@dataclass
class Closed:
    """An engine, its requests, and what each of them waits for."""

    case: Case
    after: list[int]
    think_ticks: list[int]
    max_concurrency: int | None
    overhead_ticks: tuple[int, int]
    max_model_len: int

    @property
    def trace(self) -> Trace:
        return replace(
            self.case.trace,
            after=np.array(self.after, np.int32),
            think_s=TICK_S * np.array(self.think_ticks),
            max_concurrency=self.max_concurrency,
        )

    @property
    def overhead_s(self) -> np.ndarray:
        return TICK_S * np.array(self.overhead_ticks, float)

    def session(self) -> Session:
        return self.case.session(
            self.trace, overhead_s=self.overhead_s, max_model_len=self.max_model_len
        )


@st.composite
def closed(draw: st.DrawFn) -> Closed:
    case = replace(draw(cases() | contended()), in_flight_cap=1000)
    n = len(case.requests)
    return Closed(
        case,
        [draw(st.integers(-1, i - 1)) for i in range(n)],
        draw(st.lists(st.integers(0, draw(st.sampled_from([0, 2000]))), min_size=n, max_size=n)),
        draw(st.sampled_from([None, 1, 2, 5])),
        draw(st.tuples(st.integers(0, 100), st.integers(0, 3))),
        draw(st.sampled_from([30, 1000])),
    )


class PlainClient:
    """It looks through all that waits for a place, and all places, whenever time has passed."""

    def __init__(self, asked: Closed) -> None:
        self.asked, self.engine = asked, asked.case.plain_engine()
        self.requests = [PlainRequest(t * TICK_S, *rest) for t, *rest in asked.case.requests]
        roots = [i for i, after in enumerate(asked.after) if after < 0]
        self.ready = [(self.requests[i].arrival_s, i) for i in roots]
        self.places = [0.0] * (asked.max_concurrency or len(self.requests))
        self.sent: list[int] = []
        self.first_step: dict[int, PlainStep] = {}

    def next_s(self) -> float:
        return max(min(self.ready)[0], min(self.places)) if self.ready and self.places else NEVER

    def send(self, until_s: float) -> None:
        while (now_s := self.next_s()) <= until_s:
            index = min(self.ready)[1]
            self.ready.remove(min(self.ready))
            request = self.requests[index]
            request.arrival_s = now_s
            self.sent.append(index)
            if request.prompt_tokens + request.output_tokens > self.asked.max_model_len:
                request.rejected = True
            else:
                self.places.remove(min(self.places))
                self.engine.waiting.append(request)

    def note(self, request: PlainRequest, now_s: float) -> None:
        self.engine.running.remove(request)
        self.engine.release(request)
        index = self.requests.index(request)
        constant_s, per_running_s = self.asked.overhead_s
        told_s = now_s + constant_s + per_running_s * self.first_step[index].running
        self.places.append(told_s)
        for follower, after in enumerate(self.asked.after):
            if after == index:
                think_s = TICK_S * self.asked.think_ticks[follower]
                earliest_s = self.requests[follower].arrival_s
                self.ready.append((max(earliest_s, told_s + think_s), follower))

    def run(self, duration_s: float) -> PlainEngine:
        now_s, engine = 0.0, self.engine
        while True:
            self.send(now_s)
            if not engine.running and not engine.waiting:
                now_s = self.next_s()
                if now_s > duration_s:
                    return engine
                continue
            now_s, emitting = engine.step(now_s)
            if now_s > duration_s:
                engine.steps.pop()
                self.send(duration_s)
                return engine
            self.send(now_s)  # what was due before the answers of this step
            for request in emitting:
                request.token_s.append(now_s)
                request.decoding = True
                self.first_step.setdefault(self.requests.index(request), engine.steps[-1])
                if len(request.token_s) == request.output_tokens:
                    self.note(request, now_s)


@settings(max_examples=200, deadline=None)
@given(closed())
def test_every_request_is_sent_when_a_client_with_plain_lists_sends_it(asked: Closed) -> None:
    session, client = asked.session(), PlainClient(asked)
    session.run()
    engine = client.run(session.front_end.duration_s)
    loop, n = session.closed_loop, len(client.sent)
    assert loop is not None
    assert loop.sent[: loop.count.sent].tolist() == client.sent
    plain = [client.requests[i] for i in client.sent]
    completed = [len(r.token_s) == r.output_tokens for r in plain]
    for name, values in {
        "arrival_s": [r.arrival_s for r in plain],
        "scheduled_s": [r.scheduled_s for r in plain],
        "end_s": [r.token_s[-1] if c else np.nan for r, c in zip(plain, completed, strict=True)],
        "adapter": [r.adapter % (asked.case.adapters + 1) for r in plain],
        "prompt_tokens": [r.prompt_tokens for r in plain],
    }.items():
        ours = getattr(session.requests, name)[:n]
        np.testing.assert_array_equal(ours, np.array(values, ours.dtype), err_msg=name)
    accepted = session.clock.accepted
    assert session.requests.rejected[:accepted].tolist() == [r.rejected for r in plain][:accepted]
    steps = session.steps[: session.clock.steps]
    names = ("end_s", "tokens", "running", "waiting")
    theirs = [tuple(getattr(step, name) for name in names) for step in engine.steps]
    assert steps[list(names)].tolist() == theirs


@settings(max_examples=30, deadline=None)
@given(closed())
def test_both_clocks_leave_the_same_records_bit_for_bit(asked: Closed) -> None:
    compiled, stepped = asked.session(), asked.session()
    compiled.run()
    run_in_simpy(stepped)
    for name, column in compiled.requests._asdict().items():
        np.testing.assert_array_equal(getattr(stepped.requests, name), column, err_msg=name)
    assert (stepped.closed_loop.sent == compiled.closed_loop.sent).all()
    assert (stepped.steps == compiled.steps).all()


@settings(max_examples=100, deadline=None)
@given(closed())
def test_a_follower_comes_its_think_time_after_the_recorded_answer(asked: Closed) -> None:
    constant, per_running = asked.overhead_ticks
    asked.overhead_ticks = constant + 1, per_running  # else it may come as the answer leaves
    session = asked.session()
    session.front_end = session.front_end._replace(first_use_s=700 * TICK_S)  # pauses answers, too
    session.run()
    records, sent = make_records(session, asked.overhead_s), session.closed_loop.sent
    told_s = dict(zip(sent[: len(records)].tolist(), records.end_s.tolist(), strict=True))
    assert (np.diff(records.arrival_s) >= 0).all()
    for index, arrival_s in zip(sent, records.arrival_s, strict=False):
        after, think_s = asked.after[index], TICK_S * asked.think_ticks[index]
        if after >= 0:
            earliest_s = max(asked.trace.arrival_s[index], told_s[after] + think_s)
            assert arrival_s == earliest_s or (asked.max_concurrency and arrival_s > earliest_s)
