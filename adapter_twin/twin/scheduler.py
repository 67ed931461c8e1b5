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

What other policies may decide otherwise is asked of `adapter_twin.twin.policy.Policy`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.queues import (
    blocks_for,
    count_waiting,
    last_running,
    next_waiting,
    start_running,
    stop_running,
)
from adapter_twin.twin.state import Batch, Limits, Requests, State, append, remove

if TYPE_CHECKING:
    from adapter_twin.twin.policy import Policy


@helper
def _context_tokens(state: State, request: int) -> int:
    """Return the KV tokens of a decoding request before the current step's token."""
    return int(state.base_tokens[request] + state.count.step - state.base_step[request])


@helper
def _block_phase(limits: Limits, state: State, request: int) -> int:
    """Return the step, modulo the block size, in which a decoding request opens a block."""
    return int(state.base_step[request] - state.base_tokens[request]) % limits.block_size


@helper
def _stop_decoding(limits: Limits, state: State, request: int) -> None:
    count = state.count
    count.decoding -= 1
    state.opens_block[_block_phase(limits, state, request)] -= 1
    remove(state.next, state.previous, request)


@helper
def _preempt(
    limits: Limits, requests: Requests, state: State, policy: Policy, request: int, now_s: float
) -> None:
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
    count.free_blocks += blocks_for(tokens, limits.block_size)
    count.stack_top -= 1
    stop_running(limits, requests, state, policy, request, now_s)
    requests.preemptions[request] += 1
    count.preemptions += 1
    state.order[request] = -count.preemptions
    head = state.next[len(requests.adapter) + requests.adapter[request]]
    append(state.next, state.previous, request, head)
    count_waiting(limits, state, requests.adapter[request], 1)


@helper
def _have_room(limits: Limits, state: State, policy: Policy, blocks: int, adapter: int) -> bool:
    """Return whether KV blocks are free, if need be those of idle adapters but this one."""
    if blocks <= state.count.free_blocks:
        return True
    return policy.make_room(limits, state, blocks, adapter)


@helper
def _serve_running(
    limits: Limits, requests: Requests, state: State, policy: Policy, now_s: float
) -> tuple[int, int, bool]:
    """Give the running requests a decode each, and one of them more of its prompt.

    Returns
    -------
    chunk, context : int
        Tokens of the prompt, and KV tokens that attention reads for them.
    preempted : bool
        KV blocks lacked, so that the last requests were preempted.
    """
    count, size = state.count, limits.block_size
    left = chunk = chunk_blocks = context = 0
    if count.chunked >= 0:
        request = count.chunked
        done = state.base_tokens[request]
        left = requests.prompt_tokens[request] + state.emitted[request] - done
        chunk = min(left, limits.max_num_batched_tokens - count.decoding)
        chunk_blocks = blocks_for(done + chunk, size) - blocks_for(done, size)
    preempted = False
    opened = count.step % size
    while not _have_room(limits, state, policy, state.opens_block[opened] + chunk_blocks, -1):
        request = last_running(state)
        if request == count.chunked:
            chunk = chunk_blocks = 0
        _preempt(limits, requests, state, policy, request, now_s)
        preempted = True
    count.free_blocks -= state.opens_block[opened] + chunk_blocks
    if chunk > 0:
        request = count.chunked
        state.base_tokens[request] += chunk
        context += state.base_tokens[request]
        if chunk == left:
            state.prefilled[0] = request
            count.prefilled, count.chunked = 1, -1
    return chunk, context, preempted


@helper
def schedule(
    limits: Limits, requests: Requests, state: State, policy: Policy, now_s: float
) -> Batch:
    """Choose the batch of the next step and allocate its KV blocks and slots.

    Parameters
    ----------
    limits : Limits
    requests : Requests
    state : State
        Changed in place, as are the records of the requests admitted.
    policy : Policy
    now_s : float
        Start of the step.

    Returns
    -------
    Batch
        Empty (``tokens == 0``) when no request can run.
    """
    count, size = state.count, limits.block_size
    count.prefilled = 0
    load_s = policy.begin_step(limits, requests, state, now_s)
    chunk, context, preempted = _serve_running(limits, requests, state, policy, now_s)
    tokens = count.decoding + chunk
    loads = scanned = 0
    continuing = count.active
    budget = limits.max_num_batched_tokens
    while not preempted and tokens < budget and count.running < limits.max_num_seqs:
        request = next_waiting(limits, requests, state, policy)
        if request < 0:
            scanned = count.waiting
            break
        needed = requests.prompt_tokens[request] + state.emitted[request]
        if not limits.chunks_prompts and needed > budget - tokens:
            break
        chunk = min(needed, budget - tokens)
        adapter = requests.adapter[request]
        needed_blocks = blocks_for(needed if limits.reserves_prompts else chunk, size)
        needed_blocks += policy.blocks_to_load(state, adapter)
        if not _have_room(limits, state, policy, needed_blocks, adapter):
            break
        count.free_blocks -= blocks_for(chunk, size)
        remove(state.next, state.previous, request)
        copies, seconds = start_running(limits, requests, state, policy, request, now_s)
        count_waiting(limits, state, adapter, -1)
        loads, load_s = loads + copies, load_s + seconds
        requests.load_wait_s[request] += seconds
        if np.isnan(requests.scheduled_s[request]):
            requests.scheduled_s[request] = now_s
        state.base_tokens[request] = chunk
        if chunk == needed:
            state.prefilled[count.prefilled] = request
            count.prefilled += 1
        else:
            count.chunked = request
        tokens, context = tokens + chunk, context + chunk
    copies, seconds = policy.complete_batch(limits, requests, state, continuing, now_s)
    return Batch(
        tokens=tokens,
        decodes=count.decoding,
        context_tokens=count.context_tokens + context,
        adapters=count.active,
        host_loads=loads + copies,
        load_s=load_s + seconds,
        scanned=scanned,
        merged=policy.is_merged(state),
    )


@helper
def complete_step(
    limits: Limits, requests: Requests, state: State, policy: Policy, end_s: float
) -> int:
    """Emit the tokens of the scheduled batch at time `end_s`, and end what is complete.

    Parameters
    ----------
    limits : Limits
    requests : Requests
        ``first_token_s`` and ``end_s`` are set for the requests concerned.
    state : State
        Changed in place; moves on to the next step.
    policy : Policy
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
            requests.stalls[request] += 1
            requests.stalled_s[request] += end_s
        state.base_step[request] = count.step + 1
        count.decoding += 1
        count.context_tokens += state.base_tokens[request]
        state.opens_block[_block_phase(limits, state, request)] += 1
        left = requests.output_tokens[request] - state.emitted[request] - 1
        append(state.next, state.previous, request, ring + (count.step + left) % limits.horizon)

    count.step += 1
    ended = ring + (count.step - 1) % limits.horizon
    completed = 0
    while state.next[ended] != ended:
        request = state.next[ended]
        tokens = _context_tokens(state, request)
        _stop_decoding(limits, state, request)
        count.context_tokens -= tokens
        count.free_blocks += blocks_for(tokens, limits.block_size)
        stop_running(limits, requests, state, policy, request, end_s)
        requests.end_s[request] = end_s
        state.completed[completed] = request
        completed += 1
    return completed
