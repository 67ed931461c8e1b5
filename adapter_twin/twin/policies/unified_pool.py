"""One pool of GPU memory for KV cache and adapters, paged on demand.

As S-LoRA (Sheng et al., MLSys 2024, arXiv 2311.03285): no slots are reserved. An adapter takes KV
blocks in proportion to its own rank while it is on the GPU, and stays there while nothing else
needs them; where KV blocks lack, for a decode or for a prompt, the idle adapter that was used least
recently gives its blocks back, before anybody is preempted. ``max_loras`` still limits the distinct
adapters of a batch; as many as there are adapters is no limit.

With `prefetch`, the adapter of the oldest waiting request that lacks its own is copied while the
model runs, one at a time, into blocks that are free. It never evicts.

The step time stays the one measured on vLLM's kernels at ``max_loras``: S-LoRA's own kernels, which
follow the ranks of the batch, are not calibrated. An adapter is copied at its own rank, so as fast
as one that fills its slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.lists import remove
from adapter_twin.twin.state import NOT_RUNNING, UNIFIED_POOL, Limits, Requests, Rules, State


@dataclass(frozen=True, slots=True, kw_only=True)
class UnifiedPool:
    """Let adapters and KV cache share the GPU's memory.

    Parameters
    ----------
    prefetch : bool
        Copy adapters of waiting requests while the model runs.
    """

    prefetch: bool = False

    def rules(self) -> Rules:
        """Return the compiled form."""
        return Rules(code=UNIFIED_POOL, prefetch=bool(self.prefetch))


@helper
def give_back(state: State, adapter: int) -> None:
    """Let an idle adapter leave the GPU: its slot is free, and its KV blocks if it has any."""
    count = state.count
    remove(state.gpu_next, state.gpu_previous, adapter)
    state.on_gpu[adapter] = False
    count.gpu_adapters -= 1
    count.free_blocks += state.adapter_blocks[adapter]
    if adapter == count.prefetching:
        count.prefetching = NOT_RUNNING


@helper
def blocks_to_load(state: State, adapter: int) -> int:
    """Return the blocks that bringing an adapter to the GPU takes: none if it is there."""
    return 0 if state.on_gpu[adapter] else int(state.adapter_blocks[adapter])


@helper
def make_room(limits: Limits, state: State, needed: int, kept: int) -> bool:
    """Have idle adapters but `kept` give blocks back until `needed` are free, if they suffice."""
    count, sentinel = state.count, limits.base_model + 1
    available = count.free_blocks
    adapter = state.gpu_next[sentinel]
    while adapter != sentinel and available < needed:
        if adapter != kept:
            available += state.adapter_blocks[adapter]
        adapter = state.gpu_next[adapter]
    if available < needed:
        return False
    adapter = state.gpu_next[sentinel]
    while count.free_blocks < needed:
        following = state.gpu_next[adapter]
        if adapter != kept:
            give_back(state, adapter)
        adapter = following
    return True


@helper
def next_to_prefetch(limits: Limits, requests: Requests, state: State, now_s: float) -> int:
    """Return the adapter whose copy is to begin now, or -1."""
    count = state.count
    if count.prefetching != NOT_RUNNING and now_s < count.prefetched_s:
        return NOT_RUNNING
    count.prefetching = NOT_RUNNING
    best, best_order = NOT_RUNNING, np.iinfo(np.int64).max
    for i in range(count.waiting_adapters):
        adapter = state.waiting_list[i]
        head = state.next[len(requests.adapter) + adapter]
        if not state.on_gpu[adapter] and state.order[head] < best_order:
            best, best_order = adapter, state.order[head]
    if best == NOT_RUNNING or state.adapter_blocks[best] > count.free_blocks:
        return NOT_RUNNING
    if not state.on_host[best] and count.host_adapters == limits.max_cpu_loras:
        return NOT_RUNNING
    return int(best)


@helper
def rest_of_prefetch_s(state: State, adapter: int, now_s: float) -> float:
    """Return how long a request has yet to wait for its adapter's prefetch, and end that."""
    count = state.count
    if adapter != count.prefetching:
        return 0.0
    count.prefetching = NOT_RUNNING
    return float(max(count.prefetched_s - now_s, 0.0))
