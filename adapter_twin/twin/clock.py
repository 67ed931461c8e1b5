"""The engine loop: how long a step takes, one turn of the loop, and the compiled loop over turns.

`turn` is the only way in which time passes in the twin: the compiled loop `run_to_end` calls it
back to back, the SimPy processes (`adapter_twin.twin.simulate`, the servers of a cluster) wait in
between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapter_twin.twin.closed_loop import ClosedLoop, next_sent_s, note_answers, send_due
from adapter_twin.twin.compiled import entry, helper
from adapter_twin.twin.policy import Policy
from adapter_twin.twin.queues import enqueue
from adapter_twin.twin.state import Batch, Limits, Requests, State

OUTPUT_SLICE = 128
"""vLLM's front end takes at most this many tokens of a step at once."""

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
"""A row tells of one engine step."""

PAUSES = np.dtype(
    [
        ("start_s", np.float64),
        ("end_s", np.float64),
        ("labels", np.int64),  # as in CLOCK, at that time
        ("names", np.int64),
        ("running", np.int64),  # requests that held KV blocks
    ]
)
"""In a pause the front end (HTTP server, tokenizer, metrics) could not serve anything else."""

CLOCK = np.dtype(
    [
        ("now_s", np.float64),
        ("accepted", np.int64),  # requests that the front end has taken
        ("delivered", np.int64),  # of these, the ones that the engine has got
        ("arrived", np.int64),  # requests that the engine has got since it last began a step
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
"""The one record of a clock holds the time and what is counted besides the scheduler."""


class StepLaw(NamedTuple):
    """Step and scheduling time of one engine configuration, in seconds."""

    token_breaks: NDArray[np.float64]  # the regime changes past these batch sizes
    # regimes x (1, tokens, decodes, context tokens, adapters, adapters x tokens; with adapters in
    # the batch: 1, tokens); where a policy merges, the regimes again without adapters
    coefficients: NDArray[np.float64]
    per_arrival: float  # what each request that has come since the last step costs the process
    scheduling: NDArray[np.float64]  # (1, running, waiting requests scanned)


class FrontEnd(NamedTuple):
    """The window, the load generator and the server's front end."""

    duration_s: float
    in_flight_cap: int
    first_use_s: float = 0.0  # it stops to load what it keeps per adapter (0.8.5: a tokenizer)
    scrape_period_s: float = np.inf  # infinite: nobody reads the metrics
    scrape_s: float = 0.0
    scrape_s_per_label: float = 0.0
    scrape_s_per_name: float = 0.0
    scrape_s_per_label_running: float = 0.0  # per label set and running request
    scrape_pause_share: float = 1.0  # of a read; the rest of it is the client's own


class Run(NamedTuple):
    """All that the loop works on, but for the policy."""

    limits: Limits
    requests: Requests
    state: State
    clock: Any  # one record of CLOCK
    law: StepLaw
    front_end: FrontEnd
    closed_loop: ClosedLoop | None  # None: the client waits for nothing
    steps: Any  # recarray of STEPS
    pauses: Any  # recarray of PAUSES
    seen: NDArray[np.uint64]  # hash table of label sets, empty where nobody reads the metrics
    used: NDArray[np.bool_]  # adapters that the front end knows, the base model last


@helper
def step_seconds(law: StepLaw, batch: Batch, running: int, arrived: int) -> tuple[float, float]:
    """Return the durations (model and arrivals, scheduling) of a step in seconds.

    Parameters
    ----------
    law : StepLaw
    batch : Batch
    running : int
        Requests, once the batch is chosen.
    arrived : int
        Requests since the step before.
    """
    regime = 0
    while regime < len(law.token_breaks) and batch.tokens > law.token_breaks[regime]:
        regime += 1
    adapters = batch.adapters
    if batch.merged:
        adapters = 0
        regime += len(law.token_breaks) + 1
    c = law.coefficients[regime]
    model = (
        c[0]
        + c[1] * batch.tokens
        + c[2] * batch.decodes
        + c[3] * batch.context_tokens
        + (c[4] + c[5] * batch.tokens) * adapters
        + law.per_arrival * arrived
    )
    if adapters > 0:
        model += c[6] + c[7] * batch.tokens
    s = law.scheduling
    return model, s[0] + s[1] * running + s[2] * batch.scanned


@helper
def _pause(run: Run, start_s: float, seconds: float) -> None:
    clock = run.clock
    row = run.pauses[clock.pauses]
    row.start_s, row.end_s = start_s, start_s + seconds
    row.labels, row.names = clock.labels, clock.label_names
    row.running = run.state.count.running
    clock.pauses += 1
    clock.front_end_free_s = row.end_s


@helper
def _scrape(run: Run) -> None:
    clock, front_end = run.clock, run.front_end
    per_label_s = (
        front_end.scrape_s_per_label
        + front_end.scrape_s_per_label_running * run.state.count.running
    )
    read_s = (
        front_end.scrape_s
        + per_label_s * clock.labels
        + front_end.scrape_s_per_name * clock.label_names
    )
    start_s = max(clock.next_scrape_s, clock.front_end_free_s)
    _pause(run, start_s, front_end.scrape_pause_share * read_s)
    clock.next_scrape_s = start_s + read_s + front_end.scrape_period_s


@helper
def _accept(run: Run) -> None:
    """Let the front end take the next request, once it is free."""
    clock, requests = run.clock, run.requests
    request = clock.accepted
    clock.accepted += 1
    ready_s = max(requests.arrival_s[request], clock.front_end_free_s)
    adapter = requests.adapter[request]
    if not run.used[adapter]:
        run.used[adapter] = True
        if run.front_end.first_use_s > 0.0:
            _pause(run, ready_s, run.front_end.first_use_s)
            ready_s = clock.front_end_free_s
    requests.ready_s[request] = ready_s


@helper
def _is_too_long(run: Run, request: int) -> bool:
    """Return whether the server answers a request with an error at once."""
    tokens = run.requests.prompt_tokens[request] + run.requests.output_tokens[request]
    return bool(tokens > run.limits.max_model_len)


@helper
def _deliver_arrivals(run: Run, policy: Policy) -> None:
    """Hand the engine every request that has reached it by ``clock.now_s``."""
    clock, requests = run.clock, run.requests
    n = len(requests.arrival_s)
    while True:
        arrival_s = requests.arrival_s[clock.accepted] if clock.accepted < n else np.inf
        if min(arrival_s, clock.next_scrape_s) > clock.now_s:
            break
        if clock.next_scrape_s <= arrival_s:
            _scrape(run)
        elif clock.in_flight >= run.front_end.in_flight_cap or _is_too_long(run, clock.accepted):
            requests.rejected[clock.accepted] = True
            requests.ready_s[clock.accepted] = max(arrival_s, clock.front_end_free_s)
            clock.accepted += 1
        else:
            clock.in_flight += 1
            _accept(run)
    while clock.delivered < clock.accepted and requests.ready_s[clock.delivered] <= clock.now_s:
        if not requests.rejected[clock.delivered]:
            enqueue(run.limits, requests, run.state, policy, clock.delivered)
            clock.arrived += 1
        clock.delivered += 1


@helper
def _deliver_followers(run: Run, policy: Policy, loop: ClosedLoop | None, completed: int) -> None:
    """Hand the engine what waited for the answers that this step completes, if it is due."""
    if loop is not None:
        note_answers(run, loop, completed)
        send_due(run, loop, run.clock.now_s)
        _deliver_arrivals(run, policy)


@helper
def _next_delivery_s(requests: Requests, clock: Any) -> float:
    """Return when an idle engine has something to look at again."""
    if clock.delivered < clock.accepted:
        return float(requests.ready_s[clock.delivered])
    if clock.accepted < len(requests.arrival_s):
        return float(requests.arrival_s[clock.accepted])
    return np.inf


@helper
def _note_label(run: Run) -> None:
    """Count the label set (running adapters, waiting adapters) if it is a new one.

    The front end takes the tokens of a step in slices, the newest requests last, and notes who
    waits after each of them: where there are several, those with a first token count once more.
    """
    state, clock, seen = run.state, run.clock, run.seen
    count = state.count
    label, names = count.label_hash, count.active + count.waiting_adapters
    if count.decoding > OUTPUT_SLICE:
        for i in range(count.prefilled):
            adapter = run.requests.adapter[state.prefilled[i]]
            is_new = state.waiting_by_adapter[adapter] == 0 and adapter != run.limits.base_model
            for j in range(i):
                is_new &= run.requests.adapter[state.prefilled[j]] != adapter
            if is_new:
                label ^= state.waiting_label[adapter]
                names += 1
    if label == clock.last_label:
        return
    clock.last_label = label
    # `seen` is an open-addressing hash table; 0 marks a free place.
    mask = np.uint64(len(seen) - 1)
    place = label & mask
    while seen[place] != np.uint64(0):
        if seen[place] == label:
            return
        place = (place + np.uint64(1)) & mask
    if 2 * clock.labels < len(seen):
        seen[place] = label
    clock.labels += 1
    clock.label_names += names


@helper
def _begin_step(run: Run, policy: Policy) -> float:
    """Schedule a batch, note it, and return the step's duration in seconds."""
    clock, count = run.clock, run.state.count
    batch = policy.schedule(run.limits, run.requests, run.state, clock.now_s)
    model_s, scheduling_s = step_seconds(run.law, batch, count.running, clock.arrived)
    clock.arrived = 0
    row = run.steps[clock.steps]
    row.tokens = batch.tokens
    row.decodes = batch.decodes
    row.running = count.running
    row.waiting = count.waiting
    row.adapters = batch.adapters
    row.loads = batch.host_loads
    row.free_blocks = count.free_blocks
    row.context_tokens = batch.context_tokens
    row.load_s = batch.load_s
    row.scheduling_s = scheduling_s
    if run.limits.is_async:  # the next step is scheduled while the model runs
        return max(model_s + batch.load_s, scheduling_s)
    return model_s + scheduling_s + batch.load_s


@entry
def turn(run: Run, policy: Policy) -> float:
    """Turn the engine loop once, at ``clock.now_s``.

    End the step that ends now, take what has arrived, begin the next step.

    Returns
    -------
    float
        When to call again, in seconds: the end of the new step; with no work, the next arrival.
    """
    clock, state, loop = run.clock, run.state, run.closed_loop
    in_step, completed = state.count.running > 0, 0
    if in_step:
        run.steps[clock.steps].end_s = clock.now_s
        clock.steps += 1
        completed = policy.complete_step(run.limits, run.requests, state, clock.now_s)
        clock.in_flight -= completed
    send_due(run, loop, clock.now_s)
    _deliver_arrivals(run, policy)
    _deliver_followers(run, policy, loop, completed)
    if in_step and len(run.seen) > 0:  # what arrived in the step waits when its metrics are written
        _note_label(run)
    if state.count.waiting + state.count.running == 0:
        return min(_next_delivery_s(run.requests, clock), next_sent_s(loop))
    event_s = clock.now_s + _begin_step(run, policy)
    if event_s > run.front_end.duration_s:
        send_due(run, loop, run.front_end.duration_s)
    return float(event_s)


@entry
def run_to_end(run: Run, policy: Policy) -> bool:
    """Turn the engine loop until the window ends (True) or ``run.steps`` is full (False)."""
    clock = run.clock
    while clock.steps + 1 < len(run.steps):
        event_s = turn(run, policy)
        if event_s > run.front_end.duration_s or run.state.count.out_of_slots:
            return True
        clock.now_s = event_s
    return False
