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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.residency import (
    LoadsAtAdmission,
    become_idle,
    leave_gpu,
    make_resident,
)
from adapter_twin.twin.state import NOT_RUNNING, Limits, Requests, State


@dataclass(frozen=True, slots=True, kw_only=True)
class UnifiedPool(LoadsAtAdmission):
    """Let adapters and KV cache share the GPU's memory.

    Parameters
    ----------
    prefetch : bool
        Copy adapters of waiting requests while the model runs.
    """

    prefetch: bool = False

    reserves_slots: ClassVar[bool] = False
    notes: ClassVar[Mapping[str, float]] = {
        "prefetching": NOT_RUNNING,  # the adapter being copied while the model runs
        "prefetched_s": 0.0,  # when that is done
    }

    def blocks_to_load(self, state: State, adapter: int) -> int:
        """Return the blocks that bringing an adapter to the GPU takes: none if it is there."""
        return 0 if state.on_gpu[adapter] else int(state.adapter_blocks[adapter])

    def make_room(self, limits: Limits, state: State, blocks: int, kept: int) -> bool:
        """Have idle adapters but `kept` give blocks back until `blocks` are free, if they can."""
        count, sentinel = state.count, limits.base_model + 1
        available = count.free_blocks
        adapter = state.gpu_next[sentinel]
        while adapter != sentinel and available < blocks:
            if adapter != kept:
                available += state.adapter_blocks[adapter]
            adapter = state.gpu_next[adapter]
        if available < blocks:
            return False
        adapter = state.gpu_next[sentinel]
        while count.free_blocks < blocks:
            following = state.gpu_next[adapter]
            if adapter != kept:
                leave_gpu(self, state, adapter)
            adapter = following
        return True

    def complete_batch(
        self, limits: Limits, requests: Requests, state: State, continuing: int, now_s: float
    ) -> tuple[int, float]:
        """Begin to copy the adapter of a waiting request."""
        adapter = _next_to_prefetch(limits, requests, state, now_s) if self.prefetch else -1
        if adapter < 0:
            return 0, 0.0
        loads, seconds = make_resident(self, limits, state, adapter, now_s)
        become_idle(limits, state, adapter)
        state.notes.prefetching = adapter
        state.notes.prefetched_s = now_s + seconds
        return loads, 0.0

    def arrive(self, state: State, adapter: int, now_s: float) -> float:
        """Return how long a request has yet to wait for its adapter's prefetch, and end that."""
        if adapter != state.notes.prefetching:
            return 0.0
        state.notes.prefetching = NOT_RUNNING
        return float(max(state.notes.prefetched_s - now_s, 0.0))

    def evict(self, state: State, adapter: int) -> None:
        """End the prefetch of an adapter that leaves the GPU."""
        if adapter == state.notes.prefetching:
            state.notes.prefetching = NOT_RUNNING


@helper
def _next_to_prefetch(limits: Limits, requests: Requests, state: State, now_s: float) -> int:
    """Return the adapter whose copy is to begin now, or -1."""
    count = state.count
    if state.notes.prefetching != NOT_RUNNING and now_s < state.notes.prefetched_s:
        return NOT_RUNNING
    state.notes.prefetching = NOT_RUNNING
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
