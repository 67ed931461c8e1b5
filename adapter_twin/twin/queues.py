"""Who waits, who runs, and which adapters are where."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.state import NOT_RUNNING, Limits, Requests, State

Links = NDArray[np.int32]


@helper
def append(following: Links, preceding: Links, node: int, sentinel: int) -> None:
    """Put `node` at the end of the list of `sentinel`, or before it if that is a member."""
    last = preceding[sentinel]
    following[last], preceding[node] = node, last
    following[node], preceding[sentinel] = sentinel, node


@helper
def remove(following: Links, preceding: Links, node: int) -> None:
    """Take `node` out of its list."""
    before, after = preceding[node], following[node]
    following[before], preceding[after] = after, before


@helper
def _add_member(members: Links, index: Links, n: int, item: int) -> None:
    """Add to an unordered list of `n` members."""
    members[n], index[item] = item, n


@helper
def _drop_member(members: Links, index: Links, n: int, item: int) -> None:
    """Remove from an unordered list of `n` members."""
    last = members[n - 1]
    members[index[item]], index[last] = last, index[item]


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
        _add_member(state.waiting_list, state.waiting_index, count.waiting_adapters, adapter)
        count.waiting_adapters += 1
        count.label_hash ^= state.waiting_label[adapter]
    elif before + change == 0:
        _drop_member(state.waiting_list, state.waiting_index, count.waiting_adapters, adapter)
        count.waiting_adapters -= 1
        count.label_hash ^= state.waiting_label[adapter]


@helper
def next_waiting(limits: Limits, requests: Requests, state: State) -> int:
    """Return the oldest waiting request whose adapter may join the batch, or -1."""
    count = state.count
    slot_left = count.active < limits.max_loras
    if count.waiting == 0 or (count.eligible_waiting == 0 and not slot_left):
        return -1
    # With a free slot every adapter may join; else those in the batch, and the base model.
    candidates, n = state.active_list, count.active
    if slot_left or count.waiting_adapters < n:
        candidates, n = state.waiting_list, count.waiting_adapters
    first_sentinel = len(requests.adapter)
    best, best_order = -1, np.iinfo(np.int64).max
    for i in range(n):
        adapter = candidates[i]
        if state.waiting_by_adapter[adapter] > 0 and (
            slot_left or state.running_by_adapter[adapter] > 0
        ):
            head = state.next[first_sentinel + adapter]
            if state.order[head] < best_order:
                best, best_order = head, state.order[head]
    if state.waiting_by_adapter[limits.base_model] > 0:
        head = state.next[first_sentinel + limits.base_model]
        if state.order[head] < best_order:
            best = head
    return best


@helper
def _make_resident(limits: Limits, state: State, adapter: int) -> tuple[int, int, float]:
    """Bring an adapter into a slot; return (loads from host, reads from disk, seconds)."""
    count = state.count
    gpu_list, host_list = limits.base_model + 1, limits.base_model + 1  # the sentinels
    if state.on_gpu[adapter]:
        remove(state.gpu_next, state.gpu_previous, adapter)
        remove(state.host_next, state.host_previous, adapter)
        return 0, 0, 0.0
    seconds, reads = state.load_s[adapter], 0
    if state.on_host[adapter]:
        remove(state.host_next, state.host_previous, adapter)
    else:
        seconds, reads = seconds + state.read_s[adapter], 1
        if count.host_adapters == limits.max_cpu_loras:
            oldest = state.host_next[host_list]
            remove(state.host_next, state.host_previous, oldest)
            state.on_host[oldest] = False
            if state.on_gpu[oldest]:
                remove(state.gpu_next, state.gpu_previous, oldest)
                state.on_gpu[oldest] = False
                count.gpu_adapters -= 1
        else:
            count.host_adapters += 1
        state.on_host[adapter] = True
    if count.gpu_adapters == limits.max_loras:
        oldest = state.gpu_next[gpu_list]
        remove(state.gpu_next, state.gpu_previous, oldest)
        state.on_gpu[oldest] = False
    else:
        count.gpu_adapters += 1
    state.on_gpu[adapter] = True
    return 1, reads, seconds


@helper
def start_running(
    limits: Limits, requests: Requests, state: State, request: int
) -> tuple[int, int, float]:
    """Put a request at the end of the running ones; returns as `_make_resident`."""
    count = state.count
    if count.stack_top == len(state.stack):
        _compact_stack(state)
    state.stack[count.stack_top] = request
    state.stack_index[request] = count.stack_top
    count.stack_top += 1
    count.running += 1
    adapter = requests.adapter[request]
    state.running_by_adapter[adapter] += 1
    if adapter == limits.base_model or state.running_by_adapter[adapter] > 1:
        return 0, 0, 0.0
    _add_member(state.active_list, state.active_index, count.active, adapter)
    count.active += 1
    count.eligible_waiting += state.waiting_by_adapter[adapter]
    count.label_hash ^= state.running_label[adapter]
    return _make_resident(limits, state, adapter)


@helper
def stop_running(limits: Limits, requests: Requests, state: State, request: int) -> None:
    """Take a request out of the running ones; its adapter, if now idle, becomes evictable."""
    count = state.count
    state.stack_index[request] = NOT_RUNNING
    count.running -= 1
    adapter = requests.adapter[request]
    state.running_by_adapter[adapter] -= 1
    if adapter == limits.base_model or state.running_by_adapter[adapter] > 0:
        return
    _drop_member(state.active_list, state.active_index, count.active, adapter)
    count.active -= 1
    count.eligible_waiting -= state.waiting_by_adapter[adapter]
    count.label_hash ^= state.running_label[adapter]
    append(state.gpu_next, state.gpu_previous, adapter, limits.base_model + 1)
    append(state.host_next, state.host_previous, adapter, limits.base_model + 1)


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
