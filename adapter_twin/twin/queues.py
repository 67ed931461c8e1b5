"""Queues of the engine: the waiting requests, and the running ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.state import (
    NOT_RUNNING,
    Limits,
    Requests,
    State,
    add_member,
    append,
    drop_member,
)

if TYPE_CHECKING:
    from adapter_twin.twin.policy import Policy


@helper
def blocks_for(tokens: int, block_size: int) -> int:
    """Return the KV blocks that hold n tokens."""
    return (tokens + block_size - 1) // block_size


@helper
def enqueue(limits: Limits, requests: Requests, state: State, policy: Policy, request: int) -> None:
    """Let an arrived request wait, behind those of its adapter that go before it."""
    count = state.count
    count.arrivals += 1
    state.order[request] = count.arrivals
    adapter = requests.adapter[request]
    behind = sentinel = len(requests.adapter) + adapter
    before = state.previous[behind]
    priority = policy.priority(requests, state, request)
    while (
        before != sentinel
        and state.order[before] > 0  # not preempted
        and priority < policy.priority(requests, state, before)
    ):
        behind, before = before, state.previous[before]
    append(state.next, state.previous, request, behind)
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
def _goes_before(
    requests: Requests, state: State, policy: Policy, request: int, best: int, best_order: int
) -> bool:
    """Return whether a waiting request goes before the best one: those preempted last go first."""
    order = state.order[request]
    if order > 0 and best >= 0 and best_order > 0:  # neither was preempted
        priority = policy.priority(requests, state, request)
        lowest = policy.priority(requests, state, best)
        if priority != lowest:
            return bool(priority < lowest)
    return bool(order < best_order)


@helper
def next_waiting(limits: Limits, requests: Requests, state: State, policy: Policy) -> int:
    """Return the first waiting request whose adapter may join the batch, or -1."""
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
            request = policy.candidate(requests, state, adapter)
            if request >= 0 and _goes_before(requests, state, policy, request, best, best_order):
                best, best_order = request, state.order[request]
    if state.waiting_by_adapter[limits.base_model] > 0:
        request = policy.candidate(requests, state, limits.base_model)
        if request >= 0 and _goes_before(requests, state, policy, request, best, best_order):
            best = request
    return best


@helper
def start_running(
    limits: Limits, requests: Requests, state: State, policy: Policy, request: int, now_s: float
) -> tuple[int, float]:
    """Put a request at the end of the running ones; returns as `Policy.join`."""
    add_running(state, request)
    return enter_batch(limits, requests, state, policy, request, now_s)


@helper
def add_running(state: State, request: int) -> None:
    """Put a request at the end of the running ones."""
    count = state.count
    if count.stack_top == len(state.stack):
        _compact_stack(state)
    state.stack[count.stack_top] = request
    state.stack_index[request] = count.stack_top
    count.stack_top += 1
    count.running += 1


@helper
def enter_batch(
    limits: Limits, requests: Requests, state: State, policy: Policy, request: int, now_s: float
) -> tuple[int, float]:
    """Count a request of the batch with its adapter; returns as `Policy.join`."""
    count = state.count
    adapter = requests.adapter[request]
    state.running_by_adapter[adapter] += 1
    policy.admit(state, adapter, now_s)
    if adapter == limits.base_model or state.running_by_adapter[adapter] > 1:
        return 0, 0.0
    add_member(state.active_list, state.active_index, count.active, adapter)
    count.active += 1
    count.eligible_waiting += state.waiting_by_adapter[adapter]
    count.label_hash ^= state.running_label[adapter]
    return policy.join(limits, state, adapter, request, now_s)


@helper
def stop_running(
    limits: Limits, requests: Requests, state: State, policy: Policy, request: int, now_s: float
) -> None:
    """Take a request out of the running ones; its adapter, if now idle, becomes evictable."""
    drop_running(state, request)
    exit_batch(limits, requests, state, policy, request, now_s)


@helper
def drop_running(state: State, request: int) -> None:
    """Take a request out of the running ones."""
    state.stack_index[request] = NOT_RUNNING
    state.count.running -= 1


@helper
def exit_batch(
    limits: Limits, requests: Requests, state: State, policy: Policy, request: int, now_s: float
) -> None:
    """Count a request of the batch no more; its adapter, if now idle, becomes evictable."""
    count = state.count
    adapter = requests.adapter[request]
    state.running_by_adapter[adapter] -= 1
    if adapter == limits.base_model or state.running_by_adapter[adapter] > 0:
        return
    drop_member(state.active_list, state.active_index, count.active, adapter)
    count.active -= 1
    count.eligible_waiting -= state.waiting_by_adapter[adapter]
    count.label_hash ^= state.running_label[adapter]
    policy.leave(limits, state, adapter, now_s)


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
