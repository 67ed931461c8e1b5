"""State of a run: limits, requests, what the scheduler remembers, and the lists in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapter_twin.twin.compiled import helper

Links = NDArray[np.int32]

NOT_RUNNING = -1
"""This number stands where there is no request, adapter or step to point to."""

COUNTERS = np.dtype(
    [
        ("step", np.int64),  # number of the current step; by block, of the next one to schedule
        ("ended", np.int64),  # by block: steps that have ended
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
        ("out_of_slots", np.bool_),  # pinned adapters leave too few slots for the batch
    ]
)
"""The one record of these holds what the scheduler counts."""

PROGRESS = np.dtype(
    [
        ("tokens", np.int32),  # in the batch scheduled last
        ("in_flight", np.int32),  # scheduled steps that have not ended
        ("placeholders", np.int32),  # of these, the ones that will bring it a token
        ("stale", np.int32),  # of these, the ones from before a preemption
        ("next_step", np.int32),  # the step after the one that brought its last token
        ("seat", np.int32),  # row of the block table
        ("held", np.int32),  # KV blocks
        ("findable", np.int32),  # of these, the first ones, whose content is known
        ("in_batch", np.bool_),
        ("last_token_s", np.float64),
    ]
)
"""A record of these tells of one request what the scheduler by blocks remembers besides."""

CHOSEN = np.dtype(
    [
        ("requests", np.int64),
        ("tokens", np.int64),
        ("decodes", np.int64),
        ("context_tokens", np.int64),
        ("adapters", np.int64),
        ("host_loads", np.int64),
        ("load_s", np.float64),
        ("scanned", np.int64),
    ]
)
"""A record of these is a scheduled batch, as in `Batch`."""

MEMBERS = np.dtype([("request", np.int32), ("tokens", np.int32), ("emits", np.bool_)])
"""A record of these is a request of a scheduled batch; `emits`: it will get a token."""


class Limits(NamedTuple):
    """What the engine's configuration fixes for a run."""

    max_loras: int  # adapters in a batch
    gpu_slots: int  # adapters on the GPU: as many, but in a unified pool
    max_cpu_loras: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    reserves_prompts: bool  # a prompt is admitted when KV blocks for all of it are free
    chunks_prompts: bool
    # what follows counts in `adapter_twin.twin.block_scheduler` only
    caches_prefixes: bool
    by_priority: bool
    is_async: bool
    long_prefill_token_threshold: int
    # and in both again
    max_model_len: int  # longer requests are refused
    base_model: int  # index of the pseudo-adapter that needs no slot
    horizon: int  # length of the ring of `finish` lists, in steps


class Batch(NamedTuple):
    """What one step runs."""

    tokens: int  # prompt and decode tokens
    decodes: int  # requests that get a token after their first one
    context_tokens: int  # KV tokens that attention reads
    adapters: int  # distinct adapters
    host_loads: int  # adapters copied from host memory into a slot
    load_s: float  # before the model runs: copies and reads, and switches of a merged adapter
    scanned: int  # waiting requests looked at
    merged: bool  # its one adapter costs nothing


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
    stalls: NDArray[np.int32]  # preemptions between two tokens
    stalled_s: NDArray[np.float64]  # from preemption to the next token, summed over `stalls`
    rejected: NDArray[np.bool_]
    first_step: NDArray[np.int32]  # step that emitted the first token
    cached_tokens: NDArray[np.int32]  # of the prompt, as in `adapter_twin.twin.records.Records`


class Pool(NamedTuple):
    """The KV blocks one by one, and what the requests put into them (see `block_pool`)."""

    references: NDArray[np.int32]  # requests that hold a block
    contents: NDArray[np.int64]  # what can be found in it, or NOTHING
    free_next: Links  # free blocks in the order in which they are taken
    free_previous: Links
    alike_next: Links  # blocks whose contents share a hash bucket, oldest first
    alike_previous: Links
    table: NDArray[np.int32]  # blocks of the running requests, a row per seat
    seats: NDArray[np.int32]  # from place `running` on those that are free
    # what the sequence of a request consists of: its pieces from the first to the last
    first_piece: NDArray[np.int64]
    last_piece: NDArray[np.int64]
    piece_end: NDArray[np.int32]
    piece_content: NDArray[np.int64]  # of it and all before it, for blocks that end in it


class Blocks(NamedTuple):
    """What the scheduler by blocks remembers besides; the batch of step k is in row k modulo 2."""

    progress: Any  # a record of PROGRESS per request
    chosen: Any  # two records of CHOSEN
    members: Any  # 2 x requests records of MEMBERS
    priority: NDArray[np.int32]  # of each adapter, the base model last: the lowest goes first
    pool: Pool


class State(NamedTuple):
    """Everything the scheduler remembers between two steps."""

    count: Any  # one record of COUNTERS
    # Doubly linked lists over the requests, with a sentinel per list: one waiting list per adapter
    # (sentinels n_requests + adapter) and one list per step of the horizon of those that end then.
    next: Links
    previous: Links
    # per request
    order: NDArray[np.int32]  # position in the waiting order
    emitted: NDArray[np.int32]  # output tokens before the current prefill; by block, all so far
    # KV tokens at `base_step`; while in the prompt, and by block, those computed or scheduled
    base_tokens: NDArray[np.int32]
    base_step: NDArray[np.int32]  # first decode step since the last prefill
    stack_index: NDArray[np.int32]
    # per adapter, the base model last
    running_by_adapter: NDArray[np.int32]
    waiting_by_adapter: NDArray[np.int32]
    load_s: NDArray[np.float64]  # host memory -> slot
    read_s: NDArray[np.float64]  # disk -> host memory
    adapter_blocks: NDArray[np.int64]  # that it takes on the GPU: none where it has a slot
    on_gpu: NDArray[np.bool_]  # the base model always is
    on_host: NDArray[np.bool_]
    pinned: NDArray[np.bool_]  # never evicted
    place: NDArray[np.int32]  # in the order in which a step touches its adapters
    joined_step: NDArray[np.int32]  # in which it last joined the batch
    left_step: NDArray[np.int32]  # the last one that used it, where it is out of the batch
    brought_by: NDArray[np.int32]  # the request with which it joined
    active_list: NDArray[np.int32]
    active_index: NDArray[np.int32]
    waiting_list: NDArray[np.int32]
    waiting_index: NDArray[np.int32]
    running_label: NDArray[np.uint64]
    waiting_label: NDArray[np.uint64]
    adapter_notes: Any  # a record each, of what the policy notes
    # least recently used first: adapters in a slot, and in the host cache, that no step has used
    # since they left the batch
    gpu_next: Links
    gpu_previous: Links
    host_next: Links
    host_previous: Links
    # others
    notes: Any  # one record, of what the policy notes of the run
    stack: NDArray[np.int32]  # running requests in order of admission, with holes
    opens_block: NDArray[np.int64]  # decodes that need a block, by step modulo block size
    prefilled: NDArray[np.int32]  # requests whose prompt ends with the current step
    completed: NDArray[np.int32]  # requests that ended with the last step
    blocks: Any  # `Blocks` for the scheduler by blocks, else None


# Lists over arrays: linked ones, and unordered ones with an index.


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
def add_member(members: Links, index: Links, n: int, item: int) -> None:
    """Add to an unordered list of `n` members."""
    members[n], index[item] = item, n


@helper
def drop_member(members: Links, index: Links, n: int, item: int) -> None:
    """Remove from an unordered list of `n` members."""
    last = members[n - 1]
    members[index[item]], index[last] = last, index[item]
