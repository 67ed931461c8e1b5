"""Who waits and who runs."""

from __future__ import annotations

import numpy as np

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.eviction_chain import join_batch, leave_batch
from adapter_twin.twin.lists import add_member, append, drop_member
from adapter_twin.twin.policies.cost_aware import note_use
from adapter_twin.twin.policies.drain import first_to_pass, is_drained
from adapter_twin.twin.policies.merge import is_excluded
from adapter_twin.twin.residency import become_idle, make_resident
from adapter_twin.twin.state import (
    COST_AWARE,
    DRAIN,
    MERGE,
    NOT_RUNNING,
    Limits,
    Requests,
    Rules,
    State,
)


@helper
def blocks_for(tokens: int, block_size: int) -> int:
    """Return the KV blocks that hold so many tokens."""
    return (tokens + block_size - 1) // block_size


@helper
def enqueue(limits: Limits, requests: Requests, state: State, request: int) -> None:
    """Let an arrived request wait, behind all others of its adapter."""
    count = state.count
    count.arrivals += 1
    state.order[request] = count.arrivals
    adapter = requests.adapter[request]
    append(state.next, state.previous, request, len(requests.adapter) + adapter)
    count_waiting(limits, state, adapter, 1)


@helper
def count_waiting(limits: Limits, state: State, adapter: int, change: int) -> None:
    """Note that an adapter has one waiting request more or less."""
    count = state.count
    before = state.waiting_by_adapter[adapter]
    state.waiting_by_adapter[adapter] = before + change
    count.waiting += change
    if adapter == limits.base_model or state.running_by_adapter[adapter] > 0:
        count.eligible_waiting += change
    if before == 0:
        add_member(state.waiting_list, state.waiting_index, count.waiting_adapters, adapter)
        count.waiting_adapters += 1
        count.label_hash ^= state.waiting_label[adapter]
    elif before + change == 0:
        drop_member(state.waiting_list, state.waiting_index, count.waiting_adapters, adapter)
        count.waiting_adapters -= 1
        count.label_hash ^= state.waiting_label[adapter]


@helper
def _candidate(requests: Requests, state: State, rules: Rules | None, adapter: int) -> int:
    """Return the request that an adapter would be the next to admit; -1 if a policy forbids any."""
    if rules is not None and rules.code == DRAIN and is_drained(state, adapter):
        return first_to_pass(requests, state, rules, adapter)
    if rules is not None and rules.code == MERGE and is_excluded(state, adapter):
        return -1
    return int(state.next[len(requests.adapter) + adapter])


@helper
def next_waiting(limits: Limits, requests: Requests, state: State, rules: Rules | None) -> int:
    """Return the oldest waiting request whose adapter may join the batch, or -1."""
    count = state.count
    slot_left = count.active < limits.max_loras
    if count.waiting == 0 or (count.eligible_waiting == 0 and not slot_left):
        return -1
    # With a free slot every adapter may join; else those in the batch, and the base model.
    candidates, n = state.active_list, count.active
    if slot_left or count.waiting_adapters < n:
        candidates, n = state.waiting_list, count.waiting_adapters
    best, best_order = -1, np.iinfo(np.int64).max
    for i in range(n):
        adapter = candidates[i]
        if state.waiting_by_adapter[adapter] > 0 and (
            slot_left or state.running_by_adapter[adapter] > 0
        ):
            request = _candidate(requests, state, rules, adapter)
            if request >= 0 and state.order[request] < best_order:
                best, best_order = request, state.order[request]
    if state.waiting_by_adapter[limits.base_model] > 0:
        request = _candidate(requests, state, rules, limits.base_model)
        if request >= 0 and state.order[request] < best_order:
            best = request
    return best


@helper
def start_running(
    limits: Limits,
    requests: Requests,
    state: State,
    rules: Rules | None,
    request: int,
    now_s: float,
) -> tuple[int, int, float]:
    """Put a request at the end of the running ones; returns as `make_resident`.

    vLLM makes the adapters of a batch resident together, once it is complete (`bring_batch`).
    """
    count = state.count
    if count.stack_top == len(state.stack):
        _compact_stack(state)
    state.stack[count.stack_top] = request
    state.stack_index[request] = count.stack_top
    count.stack_top += 1
    count.running += 1
    adapter = requests.adapter[request]
    state.running_by_adapter[adapter] += 1
    if rules is not None and rules.code == COST_AWARE:
        note_use(state, rules, adapter, 1, now_s)
    if adapter == limits.base_model or state.running_by_adapter[adapter] > 1:
        return 0, 0, 0.0
    add_member(state.active_list, state.active_index, count.active, adapter)
    count.active += 1
    count.eligible_waiting += state.waiting_by_adapter[adapter]
    count.label_hash ^= state.running_label[adapter]
    if rules is None:
        join_batch(state, adapter, request)
        return 0, 0, 0.0
    return make_resident(limits, state, rules, adapter, now_s)


@helper
def stop_running(
    limits: Limits,
    requests: Requests,
    state: State,
    rules: Rules | None,
    request: int,
    now_s: float,
) -> None:
    """Take a request out of the running ones; its adapter, if now idle, becomes evictable."""
    count = state.count
    state.stack_index[request] = NOT_RUNNING
    count.running -= 1
    adapter = requests.adapter[request]
    state.running_by_adapter[adapter] -= 1
    if adapter == limits.base_model or state.running_by_adapter[adapter] > 0:
        return
    drop_member(state.active_list, state.active_index, count.active, adapter)
    count.active -= 1
    count.eligible_waiting -= state.waiting_by_adapter[adapter]
    count.label_hash ^= state.running_label[adapter]
    if rules is not None and rules.code == DRAIN:
        state.drained_for[adapter] = NOT_RUNNING
    if rules is not None and rules.code == COST_AWARE:
        note_use(state, rules, adapter, 0, now_s)
    if rules is None:
        leave_batch(limits, state, adapter)
    else:
        become_idle(limits, state, adapter)


@helper
def _compact_stack(state: State) -> None:
    """Close the holes that ended requests left."""
    count = state.count
    top = 0
    for i in range(count.stack_top):
        request = state.stack[i]
        if state.stack_index[request] == i:
            state.stack[top] = request
            state.stack_index[request] = top
            top += 1
    count.stack_top = top


@helper
def last_running(state: State) -> int:
    """Return the running request that was admitted last."""
    count = state.count
    while state.stack_index[state.stack[count.stack_top - 1]] != count.stack_top - 1:
        count.stack_top -= 1
    return int(state.stack[count.stack_top - 1])
