"""Requests that wait for answers, beside a client that keeps plain lists."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_twin.capacity.traffic_mix import Traffic
from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.cluster import simulate_cluster
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.routers import RoundRobin
from adapter_twin.laws import load_calibration
from adapter_twin.service.metrics import service_of
from adapter_twin.twin.records import Simulation, make_records
from adapter_twin.twin.session import Session
from adapter_twin.twin.simulate import draw_requests, run_in_simpy, simulate
from adapter_twin.twin.wiring import begin
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import Contents, Trace, generators
from adapter_twin.workload.traffic import Arrivals, Lengths, Sessions, Workload
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
                self.engine.add(request)

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


def test_a_follower_does_not_come_before_its_own_time() -> None:
    case = Case(1, 1, 4, 32, 4, 100, 1000, 1 << 20, [(0, 0, 3, 2), (9, 0, 3, 2)], [*range(8)])
    for ticks in (9, 50_000):
        trace = replace(
            case.trace,
            arrival_s=TICK_S * np.array([0, ticks]),
            after=np.array([-1, 0], np.int32),
            think_s=TICK_S * np.array([0, 700]),
        )
        session = case.session(trace)
        session.run()
        expected_s = max(ticks * TICK_S, session.requests.end_s[0] + 700 * TICK_S)
        assert session.requests.arrival_s[1] == expected_s


# As `simulate` tells it


def simulated(sessions: Sessions | None = None, engine: Any = None, **arrivals: Any) -> Simulation:
    workload = Workload(
        adapters=deal_adapters(4, [0.5], [8]),
        duration_s=600,
        lengths=Lengths(mean_input_tokens=100, mean_output_tokens=50, distribution="lognormal"),
        arrivals=Arrivals(**arrivals),
        sessions=sessions,
    )
    return simulate(workload, replace(ENGINE, **(engine or {})), load_calibration("auto", MODEL))


MODEL = "llama-3.1-8b-instruct"
ENGINE = EngineConfig(model=MODEL, max_loras=4, max_lora_rank=8)
extrapolates = pytest.mark.filterwarnings("ignore:.* is an extrapolation", "ignore:engine.m")


@extrapolates
def test_with_one_place_requests_are_strictly_one_after_the_other() -> None:
    run = simulated(max_concurrency=1, num_prompts=100)
    records = run.records
    assert records.arrival_s[0] == 0
    assert (records.arrival_s[1:] == records.end_s[:-1]).all()
    assert run.duration_s == records.end_s[-1]
    assert (run.steps.running <= 1).all()


@extrapolates
@pytest.mark.parametrize("places", [2, 16])
def test_littles_law_holds_for_the_places_of_a_closed_loop(places: int) -> None:
    run = simulated(max_concurrency=places, num_prompts=400)
    records, last_s = run.records, run.records.arrival_s.max()
    waits_s = np.minimum(records.end_s, last_s) - records.arrival_s
    assert waits_s.sum() / last_s == pytest.approx(places)  # all are taken up to the last prompt
    told = service_of(run)
    assert (told["arrived_requests"], told["unsent_requests"]) == (400, 0)
    assert told["request_throughput"] == pytest.approx(400 / records.end_s.max())


@extrapolates
def test_users_that_think_obey_the_interactive_response_time_law() -> None:
    users, think_s = 20, 5.0
    run = simulated(Sessions(turns=200, mean_think_s=think_s), num_prompts=users)
    told, records = service_of(run), run.records
    done = np.isfinite(records.end_s)
    response_s = (records.end_s - records.arrival_s)[done].mean()
    expected = users / (response_s + think_s)  # N = X (R + Z)
    assert told["request_throughput"] == pytest.approx(expected, rel=0.04)
    assert told["unsent_requests"] == 200 * users - told["arrived_requests"] > 0


@extrapolates
def test_a_closed_loop_never_starves_so_that_is_not_told() -> None:
    told = service_of(simulated(Sessions(turns=3)))
    assert told["starved"] is None
    assert told["offered_tokens_per_s"] >= told["total_throughput"] > 0
    run = simulated()
    assert run.unsent_requests is None
    assert service_of(run)["starved"] is False
    assert "unsent_requests" not in service_of(run)


@extrapolates
def test_a_session_ends_with_a_turn_that_is_refused_and_a_closed_loop_goes_on() -> None:
    limit = {"max_model_len": 400}
    run = simulated(Sessions(turns=50), engine=limit, num_prompts=10)
    assert run.records.refused.sum() == 10  # each grows until it is too long
    assert run.unsent_requests == 500 - len(run.records) > 0
    one_place = simulated(engine=limit, max_concurrency=1, num_prompts=300)
    assert one_place.records.refused.any()
    assert one_place.unsent_requests == 0
    answered = np.isfinite(one_place.records.end_s) | one_place.records.refused
    assert answered.all()


@extrapolates
def test_a_turn_finds_in_the_cache_what_was_computed_of_those_before() -> None:
    lengths = Lengths(mean_input_tokens=100, mean_output_tokens=21, distribution="fixed")
    workload = Workload(
        adapters=deal_adapters(2, [1.0, 0.0], [8]),
        duration_s=100,
        lengths=lengths,
        arrivals=Arrivals(num_prompts=1),
        sessions=Sessions(turns=3),
    )
    calibration = deepcopy(load_calibration("auto", MODEL))
    calibration.early_stop.probability_ = 0.0
    chain = replace(workload, sessions=Sessions(turns=3, chain=["adapter-0", "adapter-1"]))
    stays, goes = (simulate(w, ENGINE, calibration).records for w in (workload, chain))
    # the last token of an output is not computed: 120 of 121 are seven blocks of 16, 241 are 15
    assert stays.prompt_tokens.tolist() == [100, 221, 342]
    assert stays.cached_tokens.tolist() == [0, 112, 240]
    # the third turn is back at the first adapter, which has never seen the second's output
    assert goes.cached_tokens.tolist() == [0, 0, 112]


@extrapolates
def test_what_a_waiting_client_sends_is_served_as_if_it_came_by_itself() -> None:
    """Sent by itself, in another order than that of the trace, each request keeps its pieces."""
    workload = Workload(
        adapters=deal_adapters(4, [0.3], [8]),
        duration_s=60,
        lengths=Lengths(mean_input_tokens=100, mean_output_tokens=50, shared_prefix_tokens=40),
        arrivals=Arrivals(max_concurrency=20),
        sessions=Sessions(turns=4, distribution="geometric", mean_think_s=2),
    )
    calibration = load_calibration("auto", MODEL)
    trace = draw_requests(workload, calibration)
    waiting = simulate(workload, ENGINE, calibration, trace=trace)
    session = begin(trace, ENGINE, calibration, workload.adapters, generators(0)[2], duration_s=60)
    session.run()
    assert session.closed_loop is not None
    sent = session.closed_loop.sent[: len(waiting.records)]
    assert (np.diff(sent) < 0).any()
    assert trace.contents is not None
    first, last = trace.contents.first[sent], trace.contents.first[sent + 1]
    place = np.concatenate([np.arange(*ends) for ends in zip(first, last, strict=True)])
    contents = Contents(
        np.concatenate(([0], np.cumsum(last - first))),
        trace.contents.piece[place],
        trace.contents.end[place],
    )
    columns = (trace.adapter[sent], trace.prompt_tokens[sent], trace.output_tokens[sent])
    same = Trace(waiting.records.arrival_s, *columns, contents)
    alone = simulate(workload, ENGINE, calibration, trace=same)
    assert alone.records.to_frame().equals(waiting.records.to_frame())
    assert (waiting.records.cached_tokens > 100).any()


@extrapolates
def test_clients_that_wait_are_refused_where_nobody_knows_them() -> None:
    closed_loop = Arrivals(max_concurrency=2)
    workload = Workload(
        adapters=deal_adapters(4, [0.5], [8]),
        duration_s=10,
        lengths=Lengths(mean_input_tokens=100, mean_output_tokens=50),
        arrivals=closed_loop,
    )
    calibration = load_calibration("auto", MODEL)
    placement = Placement((ReplicaPlan(ENGINE, tuple(range(4)), (1.0,) * 4),))
    for asked in (
        workload,
        replace(workload, arrivals=Arrivals(), sessions=Sessions(turns=2)),
        replace(workload, arrivals=Arrivals(), samples=2),
        replace(workload, arrivals=Arrivals(num_prompts=5)),
    ):
        with pytest.raises(AdapterTwinError, match=r"^sessions, samples, num_prompts, max_conc"):
            simulate_cluster(asked, placement, calibration, RoundRobin())
    with pytest.raises(AdapterTwinError, match=r"^observer: "):
        simulate(workload, ENGINE, calibration, observer=True)
    with pytest.raises(AdapterTwinError, match=r"^workload: its requests do not come one by one"):
        Traffic.of(workload)
    chat = replace(workload, arrivals=Arrivals(), sessions=Sessions(turns=2))
    with pytest.raises(AdapterTwinError, match=r"^observer: "):
        simulate(chat, ENGINE, calibration, observer=True)
