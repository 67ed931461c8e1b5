"""The engine's scheduling policy: the one copy, compiled by numba, readable as plain Python.

It follows vLLM's V1 scheduler with LoRA, step by step:

1. `schedule` first serves the running requests (a decode each, and the rest of at most one chunked
   prompt), preempting the last ones while KV blocks lack; then it admits waiting requests in order,
   skipping those whose adapter would need one slot too many.
2. The caller decides how long the step takes (see `adapter_twin.twin.clock`).
3. `complete_step` emits the tokens: first tokens, and the requests that end with this step.

No loop runs over the decoding requests. A request that decodes gets one token in every step, so the
step in which it ends is known when its prompt is done (``finish`` lists), and so are the steps in
which it opens a new KV block (``opens_block``, counted by step modulo the block size). That holds
because vLLM demands ``max_num_batched_tokens >= max_num_seqs``: decodes always fit the budget, and
only the last running request can be in the middle of its prompt.

Waiting requests stand in one first-in-first-out list per adapter. The engine's single list with
skipping and these lists admit the same requests in the same order: the next one is the oldest head
among the adapters that may run.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray


NOT_RUNNING = -1

COUNTERS = np.dtype(
    [
        ("step", np.int64),  # number of the current step
        ("free_blocks", np.int64),
        ("running", np.int64),  # requests that hold KV blocks
        ("decoding", np.int64),  # of these, the ones whose prompt is done
        ("waiting", np.int64),
        ("eligible_waiting", np.int64),  # of these, the ones whose adapter is in the batch
        ("active", np.int64),  # distinct adapters of the running requests
        ("context_tokens", np.int64),  # KV tokens held by the decoding requests
        ("chunked", np.int64),  # the request in the middle of its prompt, or -1
        ("prefilled", np.int64),  # requests whose prompt ends with the current step
        ("stack_top", np.int64),
        ("arrivals", np.int64),  # orders the waiting requests
        ("preemptions", np.int64),  # orders the preempted ones, ahead of all others
        ("gpu_adapters", np.int64),  # adapters in GPU slots
        ("host_adapters", np.int64),  # adapters in the host-memory cache
        ("waiting_adapters", np.int64),  # adapters with a waiting request
        ("label_hash", np.uint64),  # identifies the sets of running and waiting adapters
    ]
)


class Limits(NamedTuple):
    """What the engine's configuration fixes for a run."""

    max_loras: int
    max_cpu_loras: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    base_model: int  # index of the pseudo-adapter that needs no slot
    horizon: int  # length of the ring of `finish` lists, in steps


class Batch(NamedTuple):
    """What one step runs."""

    tokens: int  # prompt and decode tokens
    decodes: int  # requests that get a token after their first one
    prompts: int  # requests that are given prompt tokens
    context_tokens: int  # KV tokens that attention reads
    adapters: int  # distinct adapters
    host_loads: int  # adapters copied from host memory into a slot
    disk_loads: int  # adapters read from disk before that
    load_s: float
    scanned: int  # waiting requests looked at


class Requests(NamedTuple):
    """The trace, and what becomes of each request (one entry per request)."""

    arrival_s: NDArray[np.float64]
    adapter: NDArray[np.int32]  # the base model is the last index
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    ready_s: NDArray[np.float64]  # handed to the engine
    scheduled_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    load_wait_s: NDArray[np.float64]
    preemptions: NDArray[np.int32]
    stalled_s: NDArray[np.float64]  # from preemption to the next token, summed
    rejected: NDArray[np.bool_]
    first_step: NDArray[np.int64]  # step that emitted the first token


class State(NamedTuple):
    """Everything the scheduler remembers between two steps."""

    count: np.void  # one record of COUNTERS
    # Doubly linked lists over the requests, with a sentinel per list: one waiting list per adapter
    # (sentinels n_requests + adapter) and one list per step of the horizon of those that end then.
    next: NDArray[np.int32]
    previous: NDArray[np.int32]
    # per request
    order: NDArray[np.int64]  # position in the waiting order
    emitted: NDArray[np.int32]  # output tokens before the current prefill
    base_tokens: NDArray[np.int64]  # KV tokens at `base_step`; while in the prompt, those computed
    base_step: NDArray[np.int64]  # first decode step since the last prefill
    stack_index: NDArray[np.int64]
    # per adapter, the base model last
    running_by_adapter: NDArray[np.int32]
    waiting_by_adapter: NDArray[np.int32]
    load_s: NDArray[np.float64]  # host memory -> slot
    read_s: NDArray[np.float64]  # disk -> host memory
    on_gpu: NDArray[np.bool_]
    on_host: NDArray[np.bool_]
    active_list: NDArray[np.int32]
    active_index: NDArray[np.int32]
    waiting_list: NDArray[np.int32]
    waiting_index: NDArray[np.int32]
    running_label: NDArray[np.uint64]
    waiting_label: NDArray[np.uint64]
    # least recently used first: adapters in a slot, and in the host cache, that no request uses
    gpu_next: NDArray[np.int32]
    gpu_previous: NDArray[np.int32]
    host_next: NDArray[np.int32]
    host_previous: NDArray[np.int32]
    # others
    stack: NDArray[np.int32]  # running requests in order of admission, with holes
    opens_block: NDArray[np.int64]  # decodes that need a block, by step modulo block size
    prefilled: NDArray[np.int32]  # requests whose prompt ends with the current step


@njit(cache=True, error_model="numpy")
def _append(following, preceding, node, sentinel):
    last = preceding[sentinel]
    following[last], preceding[node] = node, last
    following[node], preceding[sentinel] = sentinel, node


@njit(cache=True, error_model="numpy")
def _remove(following, preceding, node):
    before, after = preceding[node], following[node]
    following[before], preceding[after] = after, before


@njit(cache=True, error_model="numpy")
def _add_member(members, index, n, item):
    members[n], index[item] = item, n


@njit(cache=True, error_model="numpy")
def _drop_member(members, index, n, item):
    """Remove from an unordered list of `n` members."""
    last = members[n - 1]
    members[index[item]], index[last] = last, index[item]


@njit(cache=True, error_model="numpy")
def _blocks(tokens, block_size):
    return (tokens + block_size - 1) // block_size


@njit(cache=True, error_model="numpy")
def enqueue(limits, requests, state, request):
    """Let an arrived request wait, behind all others of its adapter."""
    count = state.count
    count.arrivals += 1
    state.order[request] = count.arrivals
    adapter = requests.adapter[request]
    _append(state.next, state.previous, request, len(requests.adapter) + adapter)
    _count_waiting(limits, state, adapter, 1)


@njit(cache=True, error_model="numpy")
def _count_waiting(limits, state, adapter, change):
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


@njit(cache=True, error_model="numpy")
def _next_waiting(limits, requests, state):
    """The oldest waiting request whose adapter may join the batch, or -1."""
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


@njit(cache=True, error_model="numpy")
def _make_resident(limits, state, adapter):
    """Bring an adapter into a slot; return (loads from host, reads from disk, seconds)."""
    count = state.count
    gpu_list, host_list = limits.base_model + 1, limits.base_model + 1  # the sentinels
    if state.on_gpu[adapter]:
        _remove(state.gpu_next, state.gpu_previous, adapter)
        _remove(state.host_next, state.host_previous, adapter)
        return 0, 0, 0.0
    seconds, reads = state.load_s[adapter], 0
    if state.on_host[adapter]:
        _remove(state.host_next, state.host_previous, adapter)
    else:
        seconds, reads = seconds + state.read_s[adapter], 1
        if count.host_adapters == limits.max_cpu_loras:
            oldest = state.host_next[host_list]
            _remove(state.host_next, state.host_previous, oldest)
            state.on_host[oldest] = False
            if state.on_gpu[oldest]:
                _remove(state.gpu_next, state.gpu_previous, oldest)
                state.on_gpu[oldest] = False
                count.gpu_adapters -= 1
        else:
            count.host_adapters += 1
        state.on_host[adapter] = True
    if count.gpu_adapters == limits.max_loras:
        oldest = state.gpu_next[gpu_list]
        _remove(state.gpu_next, state.gpu_previous, oldest)
        state.on_gpu[oldest] = False
    else:
        count.gpu_adapters += 1
    state.on_gpu[adapter] = True
    return 1, reads, seconds


@njit(cache=True, error_model="numpy")
def _start_running(limits, requests, state, request):
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


@njit(cache=True, error_model="numpy")
def _stop_running(limits, requests, state, request):
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
    _append(state.gpu_next, state.gpu_previous, adapter, limits.base_model + 1)
    _append(state.host_next, state.host_previous, adapter, limits.base_model + 1)


@njit(cache=True, error_model="numpy")
def _compact_stack(state):
    count = state.count
    top = 0
    for i in range(count.stack_top):
        request = state.stack[i]
        if state.stack_index[request] == i:
            state.stack[top] = request
            state.stack_index[request] = top
            top += 1
    count.stack_top = top


@njit(cache=True, error_model="numpy")
def _last_running(state):
    count = state.count
    while state.stack_index[state.stack[count.stack_top - 1]] != count.stack_top - 1:
        count.stack_top -= 1
    return state.stack[count.stack_top - 1]


@njit(cache=True, error_model="numpy")
def _context_tokens(state, request):
    """KV tokens of a decoding request before the current step's token."""
    return state.base_tokens[request] + state.count.step - state.base_step[request]


@njit(cache=True, error_model="numpy")
def _block_phase(limits, state, request):
    """The step, modulo the block size, in which a decoding request opens a block."""
    return (state.base_step[request] - state.base_tokens[request]) % limits.block_size


@njit(cache=True, error_model="numpy")
def _stop_decoding(limits, state, request):
    count = state.count
    count.decoding -= 1
    state.opens_block[_block_phase(limits, state, request)] -= 1
    _remove(state.next, state.previous, request)


@njit(cache=True, error_model="numpy")
def _preempt(limits, requests, state, request, now_s):
    """Send the last running request back to the head of the queue, to start from scratch."""
    count = state.count
    if request == count.chunked:
        count.chunked = -1
        tokens = state.base_tokens[request]
    else:
        tokens = _context_tokens(state, request)
        _stop_decoding(limits, state, request)
        count.context_tokens -= tokens
        # Every step since the prefill emitted a token, and so did the prefill itself.
        state.emitted[request] += 1 + count.step - state.base_step[request]
        requests.stalled_s[request] -= now_s
    count.free_blocks += _blocks(tokens, limits.block_size)
    count.stack_top -= 1
    _stop_running(limits, requests, state, request)
    requests.preemptions[request] += 1
    count.preemptions += 1
    state.order[request] = -count.preemptions
    head = state.next[len(requests.adapter) + requests.adapter[request]]
    _append(state.next, state.previous, request, head)
    _count_waiting(limits, state, requests.adapter[request], 1)


@njit(cache=True, error_model="numpy")
def schedule(limits, requests, state, now_s):
    """Choose the batch of the next step and allocate its KV blocks and slots.

    Parameters
    ----------
    limits : Limits
    requests : Requests
    state : State
        Changed in place, as are the records of the requests admitted.
    now_s : float
        Start of the step.

    Returns
    -------
    Batch
        Empty (``tokens == 0``) when no request can run.
    """
    count = state.count
    size, budget = limits.block_size, limits.max_num_batched_tokens
    prompts = left = chunk = chunk_blocks = context = 0
    count.prefilled = 0
    if count.chunked >= 0:
        request = count.chunked
        done = state.base_tokens[request]
        left = requests.prompt_tokens[request] + state.emitted[request] - done
        chunk = min(left, budget - count.decoding)
        chunk_blocks = _blocks(done + chunk, size) - _blocks(done, size)

    preempted = 0
    while state.opens_block[count.step % size] + chunk_blocks > count.free_blocks:
        request = _last_running(state)
        if request == count.chunked:
            chunk = chunk_blocks = 0
        _preempt(limits, requests, state, request, now_s)
        preempted += 1
    count.free_blocks -= state.opens_block[count.step % size] + chunk_blocks

    tokens = count.decoding + chunk
    if chunk > 0:
        prompts = 1
        request = count.chunked
        state.base_tokens[request] += chunk
        context += state.base_tokens[request]
        if chunk == left:
            state.prefilled[0] = request
            count.prefilled, count.chunked = 1, -1

    loads = reads = scanned = 0
    load_s = 0.0
    while preempted == 0 and tokens < budget and count.running < limits.max_num_seqs:
        request = _next_waiting(limits, requests, state)
        if request < 0:
            scanned = count.waiting
            break
        needed = requests.prompt_tokens[request] + state.emitted[request]
        chunk = min(needed, budget - tokens)
        if _blocks(chunk, size) > count.free_blocks:
            break
        count.free_blocks -= _blocks(chunk, size)
        _remove(state.next, state.previous, request)
        _count_waiting(limits, state, requests.adapter[request], -1)
        new_loads, new_reads, seconds = _start_running(limits, requests, state, request)
        loads, reads, load_s = loads + new_loads, reads + new_reads, load_s + seconds
        requests.load_wait_s[request] += seconds
        if np.isnan(requests.scheduled_s[request]):
            requests.scheduled_s[request] = now_s
        state.base_tokens[request] = chunk
        if chunk == needed:
            state.prefilled[count.prefilled] = request
            count.prefilled += 1
        else:
            count.chunked = request
        tokens, prompts, context = tokens + chunk, prompts + 1, context + chunk

    return Batch(
        tokens,
        count.decoding,
        prompts,
        count.context_tokens + context,
        count.active,
        loads,
        reads,
        load_s,
        scanned,
    )


@njit(cache=True, error_model="numpy")
def complete_step(limits, requests, state, end_s):
    """Emit the tokens of the scheduled batch at time `end_s`, and end what is complete.

    Parameters
    ----------
    limits : Limits
    requests : Requests
        ``first_token_s`` and ``end_s`` are set for the requests concerned.
    state : State
        Changed in place; moves on to the next step.
    end_s : float

    Returns
    -------
    int
        Requests completed.
    """
    count = state.count
    count.context_tokens += count.decoding
    ring = len(requests.adapter) + limits.base_model + 1  # the first sentinel of the ring
    for i in range(count.prefilled):
        request = state.prefilled[i]
        if state.emitted[request] == 0:
            requests.first_token_s[request] = end_s
            requests.first_step[request] = count.step
        else:
            requests.stalled_s[request] += end_s
        state.base_step[request] = count.step + 1
        count.decoding += 1
        count.context_tokens += state.base_tokens[request]
        state.opens_block[_block_phase(limits, state, request)] += 1
        left = requests.output_tokens[request] - state.emitted[request] - 1
        _append(
            state.next, state.previous, request, ring + (count.step + left) % limits.horizon
        )

    count.step += 1
    ended = ring + (count.step - 1) % limits.horizon
    completed = 0
    while state.next[ended] != ended:
        request = state.next[ended]
        tokens = _context_tokens(state, request)
        _stop_decoding(limits, state, request)
        count.context_tokens -= tokens
        count.free_blocks += _blocks(tokens, limits.block_size)
        _stop_running(limits, requests, state, request)
        requests.end_s[request] = end_s
        completed += 1
    return completed
