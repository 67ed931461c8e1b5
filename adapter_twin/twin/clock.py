"""What one turn of the engine loop does, and the compiled loop over turns.

`turn` is the only way in which time passes in the twin: the compiled loop `run` calls it back to
back, the SimPy server (`adapter_twin.twin.in_simpy`) waits in between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapter_twin.twin.compiled import entry, helper
from adapter_twin.twin.policy import Policy
from adapter_twin.twin.queues import enqueue
from adapter_twin.twin.scheduler import complete_step, schedule
from adapter_twin.twin.state import Limits, Requests, State
from adapter_twin.twin.step_law import StepLaw, step_seconds

STEPS = np.dtype(
    [
        ("end_s", np.float64),
        ("tokens", np.int32),
        ("decodes", np.int32),
        ("running", np.int32),
        ("waiting", np.int32),
        ("adapters", np.int32),
        ("loads", np.int32),
        ("free_blocks", np.int64),
        ("context_tokens", np.int64),
        ("load_s", np.float32),
        ("scheduling_s", np.float32),
    ]
)

# When the front end (HTTP server, tokenizer, metrics) could not serve anything else.
PAUSES = np.dtype(
    [
        ("start_s", np.float64),
        ("end_s", np.float64),
        ("labels", np.int64),  # as in CLOCK, at that time
        ("names", np.int64),
    ]
)

CLOCK = np.dtype(
    [
        ("now_s", np.float64),
        ("accepted", np.int64),  # requests that the front end has taken
        ("delivered", np.int64),  # of these, the ones that the engine has got
        ("in_flight", np.int64),
        ("front_end_free_s", np.float64),
        ("next_scrape_s", np.float64),
        ("steps", np.int64),
        ("pauses", np.int64),
        ("labels", np.int64),  # distinct label sets that the metrics endpoint holds
        ("label_names", np.int64),  # adapter names in them, in total
        ("last_label", np.uint64),
    ]
)


class FrontEnd(NamedTuple):
    """The window, the load generator and the server's front end."""

    duration_s: float
    in_flight_cap: int
    first_use_s: float  # it stops to load what it keeps per adapter (0.8.5: a tokenizer)
    scrape_period_s: float  # infinite: nobody reads the metrics
    scrape_s: float
    scrape_s_per_label: float
    scrape_s_per_name: float


@helper
def _pause(clock: Any, pauses: Any, start_s: float, seconds: float) -> None:
    row = pauses[clock.pauses]
    row.start_s, row.end_s = start_s, start_s + seconds
    row.labels, row.names = clock.labels, clock.label_names
    clock.pauses += 1
    clock.front_end_free_s = row.end_s


@helper
def _scrape(clock: Any, front_end: FrontEnd, pauses: Any) -> None:
    seconds = (
        front_end.scrape_s
        + front_end.scrape_s_per_label * clock.labels
        + front_end.scrape_s_per_name * clock.label_names
    )
    _pause(clock, pauses, max(clock.next_scrape_s, clock.front_end_free_s), seconds)
    clock.next_scrape_s = clock.front_end_free_s + front_end.scrape_period_s


@helper
def _accept(
    requests: Requests, clock: Any, front_end: FrontEnd, pauses: Any, used: NDArray[np.bool_]
) -> None:
    """Let the front end take the next request, once it is free."""
    request = clock.accepted
    clock.accepted += 1
    ready_s = max(requests.arrival_s[request], clock.front_end_free_s)
    adapter = requests.adapter[request]
    if not used[adapter]:
        used[adapter] = True
        if front_end.first_use_s > 0.0:
            _pause(clock, pauses, ready_s, front_end.first_use_s)
            ready_s = clock.front_end_free_s
    requests.ready_s[request] = ready_s


@helper
def _deliver_arrivals(
    limits: Limits,
    requests: Requests,
    state: State,
    policy: Policy,
    clock: Any,
    front_end: FrontEnd,
    pauses: Any,
    used: NDArray[np.bool_],
) -> None:
    """Hand the engine every request that has reached it by ``clock.now_s``."""
    n = len(requests.arrival_s)
    while True:
        arrival_s = requests.arrival_s[clock.accepted] if clock.accepted < n else np.inf
        if min(arrival_s, clock.next_scrape_s) > clock.now_s:
            break
        if clock.next_scrape_s <= arrival_s:
            _scrape(clock, front_end, pauses)
        elif clock.in_flight >= front_end.in_flight_cap:
            requests.rejected[clock.accepted] = True
            requests.ready_s[clock.accepted] = max(arrival_s, clock.front_end_free_s)
            clock.accepted += 1
        else:
            clock.in_flight += 1
            _accept(requests, clock, front_end, pauses, used)
    while clock.delivered < clock.accepted and requests.ready_s[clock.delivered] <= clock.now_s:
        if not requests.rejected[clock.delivered]:
            enqueue(limits, requests, state, policy, clock.delivered)
        clock.delivered += 1


@helper
def _next_delivery_s(requests: Requests, clock: Any) -> float:
    """Return when an idle engine has something to look at again."""
    if clock.delivered < clock.accepted:
        return float(requests.ready_s[clock.delivered])
    if clock.accepted < len(requests.arrival_s):
        return float(requests.arrival_s[clock.accepted])
    return np.inf


@helper
def _note_label(state: State, clock: Any, seen: NDArray[np.uint64]) -> None:
    """Count the label set (running adapters, waiting adapters) if it is a new one.

    `seen` is an open-addressing hash table; 0 marks a free place.
    """
    label = state.count.label_hash
    if label == clock.last_label:
        return
    clock.last_label = label
    mask = np.uint64(len(seen) - 1)
    place = label & mask
    while seen[place] != np.uint64(0):
        if seen[place] == label:
            return
        place = (place + np.uint64(1)) & mask
    if 2 * clock.labels < len(seen):
        seen[place] = label
    clock.labels += 1
    clock.label_names += state.count.active + state.count.waiting_adapters


@helper
def _begin_step(
    limits: Limits,
    requests: Requests,
    state: State,
    policy: Policy,
    clock: Any,
    law: StepLaw,
    steps: Any,
) -> float:
    """Schedule a batch, note it, and return the step's duration in seconds."""
    batch = schedule(limits, requests, state, policy, clock.now_s)
    model_s, scheduling_s = step_seconds(law, batch, state.count.running, state.count.waiting)
    row = steps[clock.steps]
    row.tokens = batch.tokens
    row.decodes = batch.decodes
    row.running = state.count.running
    row.waiting = state.count.waiting
    row.adapters = batch.adapters
    row.loads = batch.host_loads
    row.free_blocks = state.count.free_blocks
    row.context_tokens = batch.context_tokens
    row.load_s = batch.load_s
    row.scheduling_s = scheduling_s
    return model_s + scheduling_s + batch.load_s


@helper
def _end_step(
    limits: Limits,
    requests: Requests,
    state: State,
    policy: Policy,
    clock: Any,
    steps: Any,
) -> None:
    """Emit the tokens of the current step at ``clock.now_s``."""
    steps[clock.steps].end_s = clock.now_s
    clock.steps += 1
    clock.in_flight -= complete_step(limits, requests, state, policy, clock.now_s)


@entry
def turn(
    limits: Limits,
    requests: Requests,
    state: State,
    policy: Policy,
    clock: Any,
    law: StepLaw,
    front_end: FrontEnd,
    steps: Any,
    pauses: Any,
    seen: NDArray[np.uint64],
    used: NDArray[np.bool_],
) -> float:
    """Turn the engine loop once, at ``clock.now_s``.

    End the step that ends now, take what has arrived, begin the next step.

    Returns
    -------
    float
        When to call again, in seconds: the end of the new step; with no work, the next arrival.
    """
    in_step = state.count.running > 0
    if in_step:
        _end_step(limits, requests, state, policy, clock, steps)
    _deliver_arrivals(limits, requests, state, policy, clock, front_end, pauses, used)
    if in_step and len(seen) > 0:  # what arrived in the step waits when its metrics are written
        _note_label(state, clock, seen)
    if state.count.waiting + state.count.running == 0:
        return _next_delivery_s(requests, clock)
    step_s = _begin_step(limits, requests, state, policy, clock, law, steps)
    return float(clock.now_s + step_s)


@entry
def run(
    limits: Limits,
    requests: Requests,
    state: State,
    policy: Policy,
    clock: Any,
    law: StepLaw,
    front_end: FrontEnd,
    steps: Any,
    pauses: Any,
    seen: NDArray[np.uint64],
    used: NDArray[np.bool_],
) -> bool:
    """Turn the engine loop until the window ends (True) or `steps` is full (False)."""
    while clock.steps + 1 < len(steps):
        event_s = turn(
            limits, requests, state, policy, clock, law, front_end, steps, pauses, seen, used
        )
        if event_s > front_end.duration_s or state.count.out_of_slots:
            return True
        clock.now_s = event_s
    return False
