"""The engine's scheduling policy once more, request by request and KV block by block.

`adapter_twin.twin.scheduler` counts decoding requests in bulk. It can, because each of them gets
one token in every step and holds blocks that nobody else wants. Here is what breaks that: prefix
caching, priorities, a threshold for long prompts and asynchronous scheduling. The queues, the
adapters' caches and the records are the same.

1. `choose_batch` first gives the running requests what they lack of their known tokens, preempting
   while KV blocks lack. Then it admits waiting requests, which may find blocks of their prompt in
   the pool (`adapter_twin.twin.block_pool`).
2. `ByBlock.schedule` returns the batch of the step that begins. With asynchronous scheduling it
   also chooses that of the step after, not knowing what this one will bring: a request that ends
   with this one is left out, but keeps its seat and its blocks; one that is preempted still gets
   the token under way, and waits at least until then. An empty choice is made anew as the step
   ends.
3. `ByBlock.complete_step` emits the tokens of the batch that ran.

Sources: ``vllm/v1/core/sched/scheduler.py`` and ``async_scheduler.py`` (0.32.0). The V1 engine of
0.8.5 has no priorities and no asynchronous scheduling, chunks prompts in any case, holds a prompt
that is alone to the threshold, too, and takes blocks in which nothing can be found no sooner than
others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapter_twin.twin import block_pool
from adapter_twin.twin.compiled import helper
from adapter_twin.twin.policy import Policy
from adapter_twin.twin.queues import (
    add_running,
    blocks_for,
    count_waiting,
    drop_running,
    enter_batch,
    exit_batch,
    last_running,
)
from adapter_twin.twin.state import NOT_RUNNING, Batch, Limits, Requests, State, append, remove


@helper
def _known_tokens(requests: Requests, state: State, request: int) -> int:
    """Return prompt and output tokens of a request so far."""
    return int(requests.prompt_tokens[request] + state.emitted[request])


@helper
def _goes_before(requests: Requests, state: State, request: int, other: int) -> bool:
    """Return whether a request goes before another one of any adapter."""
    priority = state.blocks.priority[requests.adapter[request]]
    others = state.blocks.priority[requests.adapter[other]]
    if priority != others:
        return bool(priority < others)
    return bool(state.order[request] < state.order[other])


@helper
def _is_running(state: State, place: int) -> bool:
    """Return whether the request at a place of the stack runs: else it has left a hole there."""
    return bool(state.stack_index[state.stack[place]] == place)


@helper
def _next_waiting(limits: Limits, requests: Requests, state: State) -> int:
    """Return the first waiting request that may join the batch, or -1."""
    count, n = state.count, len(requests.adapter)
    slot_left = count.active < limits.max_loras
    best = NOT_RUNNING
    if count.eligible_waiting == 0 and not slot_left:
        return best
    for i in range(count.waiting_adapters):
        adapter = state.waiting_list[i]
        in_batch = adapter == limits.base_model or state.running_by_adapter[adapter] > 0
        if slot_left or in_batch:
            request = state.next[n + adapter]
            while request < n and state.blocks.progress[request].stale > 0:
                request = state.next[request]
            if request < n and (best < 0 or _goes_before(requests, state, request, best)):
                best = request
    return int(best)


@helper
def _victim(limits: Limits, requests: Requests, state: State) -> int:
    """Return the running request that is preempted next."""
    last = last_running(state)
    if limits.by_priority:
        for i in range(state.count.stack_top):
            if _is_running(state, i) and _goes_before(requests, state, last, state.stack[i]):
                last = int(state.stack[i])
    return last


@helper
def _free_blocks(limits: Limits, state: State, request: int) -> None:
    """Give back the seat and all blocks of a request that runs no more."""
    progress, count = state.blocks.progress[request], state.count
    if limits.caches_prefixes:
        count.free_blocks += block_pool.give_back(state.blocks.pool, progress.seat, progress.held)
    else:
        count.free_blocks += progress.held
    state.blocks.pool.seats[count.running] = progress.seat
    progress.held = progress.findable = 0


@helper
def _stop_running(
    limits: Limits, requests: Requests, state: State, policy: Policy, request: int, now_s: float
) -> None:
    drop_running(state, request)
    if state.blocks.progress[request].in_batch:
        state.blocks.progress[request].in_batch = False
        exit_batch(limits, requests, state, policy, request, now_s)
    _free_blocks(limits, state, request)


@helper
def _preempt(
    limits: Limits, requests: Requests, state: State, policy: Policy, request: int, now_s: float
) -> None:
    """Send a running request back to the queue, to start from scratch."""
    count, progress = state.count, state.blocks.progress[request]
    _stop_running(limits, requests, state, policy, request, now_s)
    state.base_tokens[request] = 0
    progress.tokens = progress.placeholders = 0
    progress.stale = progress.in_flight
    requests.preemptions[request] += 1
    count.preemptions += 1
    if not limits.by_priority:
        state.order[request] = -count.preemptions
    sentinel = len(requests.adapter) + requests.adapter[request]
    behind = state.next[sentinel]
    while behind != sentinel and state.order[behind] < state.order[request]:
        behind = state.next[behind]
    append(state.next, state.previous, request, behind)
    count_waiting(limits, state, requests.adapter[request], 1)


@helper
def _make_findable(limits: Limits, requests: Requests, state: State, request: int, n: int) -> None:
    """Let the blocks that the first n tokens of a request fill be found by others."""
    progress, full = state.blocks.progress[request], n // limits.block_size
    if limits.caches_prefixes and full > progress.findable:
        block_pool.make_findable(
            limits, state.blocks.pool, request, progress.seat, progress.findable, full
        )
        progress.findable = full


@helper
def _hold_blocks(
    limits: Limits, requests: Requests, state: State, request: int, tokens: int
) -> bool:
    """Take the blocks that a request needs to compute more tokens; return False if they lack."""
    progress, count = state.blocks.progress[request], state.count
    end = state.base_tokens[request] + tokens
    wanted = blocks_for(end, limits.block_size)
    if wanted - progress.held > count.free_blocks:
        return False
    if wanted > progress.held:
        if limits.caches_prefixes:
            block_pool.take_free(state.blocks.pool, progress.seat, progress.held, wanted)
        count.free_blocks -= wanted - progress.held
        progress.held = wanted
    known = _known_tokens(requests, state, request)
    _make_findable(limits, requests, state, request, min(end, known))
    return True


@helper
def _serve_running(
    limits: Limits, requests: Requests, state: State, policy: Policy, threshold: int, now_s: float
) -> tuple[int, bool]:
    """Give the running requests what they lack; return what is left of the budget.

    Also returns whether KV blocks lacked, so that requests were preempted: with priorities also
    such as had their tokens of this step already.
    """
    budget, preempted, place = limits.max_num_batched_tokens, False, 0
    for i in range(state.count.stack_top):
        state.blocks.progress[state.stack[i]].tokens = 0
    while place < state.count.stack_top and budget > 0:
        request = state.stack[place]
        place += 1
        if not _is_running(state, place - 1):
            continue
        placeholders = state.blocks.progress[request].placeholders
        computed = state.base_tokens[request]
        longest = requests.prompt_tokens[request] + requests.output_tokens[request]
        if placeholders > 0 and computed + 2 - placeholders >= longest:
            continue  # it ends with the step that runs
        tokens = _known_tokens(requests, state, request) + placeholders - computed
        if 0 < threshold < tokens:
            tokens = threshold
        tokens = min(tokens, budget)
        while not _hold_blocks(limits, requests, state, request, tokens):
            victim = _victim(limits, requests, state)
            budget += state.blocks.progress[victim].tokens
            _preempt(limits, requests, state, policy, victim, now_s)
            preempted = True
            if victim == request:
                return budget, preempted
        state.blocks.progress[request].tokens = tokens
        budget -= tokens
    return budget, preempted


@helper
def _settle_batch(
    limits: Limits, requests: Requests, state: State, policy: Policy, row: int, now_s: float
) -> int:
    """Put the running requests that have tokens into the batch, and take the others out of it.

    Returns
    -------
    int
        Adapters that were in the batch before and still are.
    """
    count = state.count
    for i in range(count.stack_top):
        request = state.stack[i]
        progress = state.blocks.progress[request]
        if _is_running(state, i) and progress.tokens == 0 and progress.in_batch:
            progress.in_batch = False
            exit_batch(limits, requests, state, policy, request, now_s)
    continuing = int(count.active)
    for i in range(count.stack_top):
        request = state.stack[i]
        if _is_running(state, i) and state.blocks.progress[request].tokens > 0:
            _add_to_batch(limits, requests, state, policy, row, request, now_s)
    return continuing


@helper
def _add_to_batch(
    limits: Limits,
    requests: Requests,
    state: State,
    policy: Policy,
    row: int,
    request: int,
    now_s: float,
) -> None:
    batch, progress = state.blocks.chosen[row], state.blocks.progress[request]
    state.blocks.members[row, batch.requests].request = request
    batch.requests += 1
    if not progress.in_batch:
        progress.in_batch = True
        enter_batch(limits, requests, state, policy, request, now_s)


@helper
def _admit(limits: Limits, requests: Requests, state: State, request: int, found: int) -> None:
    """Put a waiting request on the next free seat, with the blocks found for it."""
    count, progress = state.count, state.blocks.progress[request]
    remove(state.next, state.previous, request)
    count_waiting(limits, state, requests.adapter[request], -1)
    progress.seat = state.blocks.pool.seats[count.running]
    progress.held = progress.findable = found
    state.base_tokens[request] = found * limits.block_size
    add_running(state, request)


@helper
def choose_batch(
    limits: Limits, requests: Requests, state: State, policy: Policy, now_s: float
) -> bool:
    """Choose the batch of the next step, and allocate its KV blocks and slots.

    Returns
    -------
    bool
        The batch is not empty.
    """
    count, size, pool = state.count, limits.block_size, state.blocks.pool
    row = count.step % 2
    batch = state.blocks.chosen[row]
    batch.requests = batch.scanned = 0
    # a request that is alone keeps no other from the budget
    threshold = limits.long_prefill_token_threshold if count.running + count.waiting > 1 else 0
    budget, preempted = _serve_running(limits, requests, state, policy, threshold, now_s)
    continuing = _settle_batch(limits, requests, state, policy, row, now_s)
    while not preempted and budget > 0 and count.running < limits.max_num_seqs:
        request = _next_waiting(limits, requests, state)
        if request < 0:
            batch.scanned = count.waiting
            break
        needed = _known_tokens(requests, state, request)
        found = free_found = 0
        if limits.caches_prefixes:
            # its last token is computed in any case, for what comes after it
            most, seat = (needed - 1) // size, pool.seats[count.running]
            found = block_pool.find_prefix(limits, pool, request, seat, most)
            free_found = block_pool.count_free(pool, seat, found)
        tokens = needed - found * size
        if 0 < threshold < tokens:
            tokens = threshold
        if not limits.chunks_prompts and tokens > budget:
            break
        tokens = min(tokens, budget)
        end = needed if limits.reserves_prompts else found * size + tokens
        if blocks_for(end, size) - found + free_found > count.free_blocks:
            break
        _admit(limits, requests, state, request, found)
        if limits.caches_prefixes:
            block_pool.hold_found(pool, seat, found)
            count.free_blocks -= free_found
        _hold_blocks(limits, requests, state, request, tokens)
        state.blocks.progress[request].tokens = tokens
        _add_to_batch(limits, requests, state, policy, row, request, now_s)
        budget -= tokens
        if np.isnan(requests.scheduled_s[request]):
            requests.scheduled_s[request] = now_s
            if limits.caches_prefixes:
                requests.cached_tokens[request] = found * size
    loads, load_s = policy.complete_batch(limits, requests, state, continuing, now_s)
    batch.adapters, batch.host_loads, batch.load_s = count.active, loads, load_s
    batch.tokens = limits.max_num_batched_tokens - budget
    _count_batch(requests, state, row)
    count.step += batch.tokens > 0
    return bool(batch.tokens > 0)


@helper
def _count_batch(requests: Requests, state: State, row: int) -> None:
    """Count the tokens of a batch as computed, and what its requests will get for them."""
    batch = state.blocks.chosen[row]
    batch.decodes = batch.context_tokens = 0
    for i in range(batch.requests):
        member = state.blocks.members[row, i]
        request = member.request
        progress = state.blocks.progress[request]
        known = _known_tokens(requests, state, request) + progress.placeholders
        decodes = progress.placeholders > 0 or (
            state.emitted[request] > 0 and progress.next_step == state.count.step
        )
        state.base_tokens[request] += progress.tokens
        member.tokens = progress.tokens
        member.emits = state.base_tokens[request] >= known
        progress.in_flight += 1
        progress.placeholders += member.emits
        batch.decodes += decodes
        batch.context_tokens += state.base_tokens[request] - decodes


@helper
def _emit(
    limits: Limits, requests: Requests, state: State, policy: Policy, request: int, end_s: float
) -> bool:
    """Emit one token of a request, and return whether it was its last one."""
    count, progress = state.count, state.blocks.progress[request]
    if state.emitted[request] == 0:
        requests.first_token_s[request] = end_s
        requests.first_step[request] = count.ended
    elif progress.next_step < count.ended:
        requests.stalls[request] += 1
        requests.stalled_s[request] += end_s - progress.last_token_s
    progress.last_token_s, progress.next_step = end_s, count.ended + 1
    state.emitted[request] += 1
    runs = state.stack_index[request] != NOT_RUNNING
    if runs:
        known = state.base_tokens[request] - progress.placeholders
        _make_findable(limits, requests, state, request, known)
    if state.emitted[request] < requests.output_tokens[request]:
        return False
    requests.end_s[request] = end_s
    if runs:
        _stop_running(limits, requests, state, policy, request, end_s)
    else:
        remove(state.next, state.previous, request)
        count_waiting(limits, state, requests.adapter[request], -1)
    return True


@dataclass(frozen=True)
class ByBlock(Policy):
    """vLLM's own policy, by blocks."""

    def schedule(self, limits: Limits, requests: Requests, state: State, now_s: float) -> Batch:
        """Return the batch of the step that begins; where there is one to come, choose it, too."""
        count = state.count
        chosen_at_once = 2 if limits.is_async else 1
        while count.step - count.ended < chosen_at_once:
            is_empty = not choose_batch(limits, requests, state, self, now_s)
            # where nothing runs, an empty choice is made anew: it preempted all that could have run
            if is_empty and (count.step > count.ended or count.running == 0):
                break
        batch = state.blocks.chosen[count.ended % 2]
        return Batch(
            tokens=batch.tokens,
            decodes=batch.decodes,
            context_tokens=batch.context_tokens,
            adapters=batch.adapters,
            host_loads=batch.host_loads,
            load_s=batch.load_s,
            scanned=batch.scanned,
            merged=False,
        )

    def complete_step(self, limits: Limits, requests: Requests, state: State, end_s: float) -> int:
        """Emit the tokens of the batch that ran; return how many requests that completes."""
        count, completed = state.count, 0
        row = count.ended % 2
        for i in range(state.blocks.chosen[row].requests):
            member = state.blocks.members[row, i]
            progress = state.blocks.progress[member.request]
            is_stale = progress.stale > 0
            progress.in_flight -= 1
            progress.stale -= is_stale
            if member.emits:
                progress.placeholders -= not is_stale
                if _emit(limits, requests, state, self, member.request, end_s):
                    state.completed[completed] = member.request
                    completed += 1
        count.ended += 1
        return completed


BY_BLOCK = ByBlock()
"""What stands in for `adapter_twin.twin.policy.VLLM` where its scheduler does not suffice."""
