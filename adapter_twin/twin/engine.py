"""Set up the arrays of a run."""

from __future__ import annotations

import numpy as np

from adapter_twin.twin.clock import CLOCK
from adapter_twin.twin.scheduler import COUNTERS, NOT_RUNNING, Limits, Requests, State


def empty_record(dtype):
    """One zeroed record with attribute access, in compiled code and out of it."""
    return np.zeros(1, dtype).view(np.recarray)[0]


def new_requests(arrival_s, adapter, prompt_tokens, output_tokens) -> Requests:
    n = len(arrival_s)
    return Requests(
        arrival_s,
        adapter,
        prompt_tokens,
        output_tokens,
        ready_s=np.full(n, np.nan),
        scheduled_s=np.full(n, np.nan),
        first_token_s=np.full(n, np.nan),
        end_s=np.full(n, np.nan),
        load_wait_s=np.zeros(n),
        preemptions=np.zeros(n, np.int32),
        stalled_s=np.zeros(n),
        rejected=np.zeros(n, np.bool_),
        first_step=np.full(n, NOT_RUNNING),
    )


def new_state(limits: Limits, n_requests: int, kv_blocks: int, load_s, read_s, preloaded, rng) -> State:
    n_adapters = limits.base_model  # the base model is one more
    count = empty_record(COUNTERS)
    count.free_blocks, count.chunked = kv_blocks, NOT_RUNNING
    nodes = np.arange(n_requests + n_adapters + 1 + limits.horizon, dtype=np.int32)
    idle = np.arange(n_adapters + 2, dtype=np.int32)
    state = State(
        count,
        next=nodes,
        previous=nodes.copy(),
        order=np.zeros(n_requests, np.int64),
        emitted=np.zeros(n_requests, np.int32),
        base_tokens=np.zeros(n_requests, np.int64),
        base_step=np.zeros(n_requests, np.int64),
        stack_index=np.full(n_requests, NOT_RUNNING),
        running_by_adapter=np.zeros(n_adapters + 1, np.int32),
        waiting_by_adapter=np.zeros(n_adapters + 1, np.int32),
        load_s=load_s,
        read_s=read_s,
        on_gpu=np.zeros(n_adapters, np.bool_),
        on_host=np.zeros(n_adapters, np.bool_),
        active_list=np.zeros(n_adapters, np.int32),
        active_index=np.zeros(n_adapters, np.int32),
        waiting_list=np.zeros(n_adapters + 1, np.int32),
        waiting_index=np.zeros(n_adapters + 1, np.int32),
        running_label=rng.integers(1, 2**63, n_adapters, dtype=np.uint64),
        waiting_label=rng.integers(1, 2**63, n_adapters + 1, dtype=np.uint64),
        gpu_next=idle,
        gpu_previous=idle.copy(),
        host_next=idle.copy(),
        host_previous=idle.copy(),
        stack=np.zeros(2 * limits.max_num_seqs, np.int32),
        opens_block=np.zeros(limits.block_size, np.int64),
        prefilled=np.zeros(limits.max_num_batched_tokens + 1, np.int32),
    )
    return state
