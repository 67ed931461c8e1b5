"""Adapters in host memory and on the GPU under policies beyond vLLM's.

An adapter is made resident as its first request is admitted, and only idle ones are evicted. What
vLLM itself does is in `adapter_twin.twin.eviction_chain`.
"""

from __future__ import annotations

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.lists import Links, append, remove
from adapter_twin.twin.policies.cost_aware import least_valuable
from adapter_twin.twin.policies.unified_pool import (
    give_back,
    next_to_prefetch,
    rest_of_prefetch_s,
)
from adapter_twin.twin.state import COST_AWARE, Limits, Requests, Rules, State


@helper
def _victim(
    limits: Limits, state: State, rules: Rules, following: Links, is_host: bool, now_s: float
) -> int:
    """Return the idle adapter of a cache that leaves it: mostly the least recently used one."""
    sentinel = limits.base_model + 1
    if rules.code == COST_AWARE:
        return least_valuable(state, rules, following, sentinel, is_host, now_s)
    return int(following[sentinel])


@helper
def make_resident(
    limits: Limits, state: State, rules: Rules, adapter: int, now_s: float
) -> tuple[int, int, float]:
    """Bring an adapter to the GPU; return (loads from host, reads from disk, seconds)."""
    count = state.count
    if state.on_gpu[adapter]:
        remove(state.gpu_next, state.gpu_previous, adapter)
        remove(state.host_next, state.host_previous, adapter)
        rest_s = 0.0
        if rules.prefetch:
            rest_s = rest_of_prefetch_s(state, adapter, now_s)
        return 0, 0, rest_s
    seconds, reads = state.load_s[adapter], 0
    if state.on_host[adapter]:
        remove(state.host_next, state.host_previous, adapter)
    else:
        seconds, reads = seconds + state.read_s[adapter], 1
        if count.host_adapters == limits.max_cpu_loras:
            leaving = _victim(limits, state, rules, state.host_next, True, now_s)
            remove(state.host_next, state.host_previous, leaving)
            state.on_host[leaving] = False
            if state.on_gpu[leaving]:
                give_back(state, leaving)
        else:
            count.host_adapters += 1
        state.on_host[adapter] = True
    if count.gpu_adapters == limits.gpu_slots:
        give_back(state, _victim(limits, state, rules, state.gpu_next, False, now_s))
    count.gpu_adapters += 1
    count.free_blocks -= state.adapter_blocks[adapter]
    state.on_gpu[adapter] = True
    return 1, reads, seconds


@helper
def become_idle(limits: Limits, state: State, adapter: int) -> None:
    """Let an adapter that no request uses be evicted, after all those that are idle already."""
    append(state.gpu_next, state.gpu_previous, adapter, limits.base_model + 1)
    append(state.host_next, state.host_previous, adapter, limits.base_model + 1)


@helper
def prefetch(
    limits: Limits, requests: Requests, state: State, rules: Rules, now_s: float
) -> tuple[int, int]:
    """Begin to copy the adapter of a waiting request; return (loads from host, reads from disk)."""
    adapter = next_to_prefetch(limits, requests, state, now_s)
    if adapter < 0:
        return 0, 0
    loads, reads, seconds = make_resident(limits, state, rules, adapter, now_s)
    become_idle(limits, state, adapter)
    state.count.prefetching = adapter
    state.count.prefetched_s = now_s + seconds
    return loads, reads
