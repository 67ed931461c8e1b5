"""Policies beyond vLLM's that load an adapter as its first request is admitted.

Only idle adapters are evicted. What vLLM itself does is in `adapter_twin.twin.eviction_chain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.policy import Policy
from adapter_twin.twin.state import Limits, Links, Requests, State, append, remove


@dataclass(frozen=True)
class LoadsAtAdmission(Policy, new_hooks=True):
    """vLLM's policy but for its caches: the idle adapter that was used least recently leaves."""

    heeds_pins: ClassVar[bool] = False

    def join(
        self, limits: Limits, state: State, adapter: int, request: int, now_s: float
    ) -> tuple[int, float]:
        """Bring an adapter to the GPU."""
        return make_resident(self, limits, state, adapter, now_s)

    def leave(self, limits: Limits, state: State, adapter: int, now_s: float) -> None:
        """Let an adapter be evicted."""
        become_idle(limits, state, adapter)

    def complete_batch(
        self, limits: Limits, requests: Requests, state: State, continuing: int, now_s: float
    ) -> tuple[int, float]:
        """Do nothing: all adapters of the batch are on the GPU."""
        return 0, 0.0

    def victim(
        self, limits: Limits, state: State, following: Links, is_host: bool, now_s: float
    ) -> int:
        """Return the idle adapter that leaves a cache, of the host memory or of the GPU."""
        return int(following[limits.base_model + 1])

    def arrive(self, state: State, adapter: int, now_s: float) -> float:
        """Return how many seconds an adapter that has a slot is yet to be waited for."""
        return 0.0

    def evict(self, state: State, adapter: int) -> None:
        """Note that an idle adapter leaves the GPU."""


@helper
def make_resident(
    policy: LoadsAtAdmission, limits: Limits, state: State, adapter: int, now_s: float
) -> tuple[int, float]:
    """Bring an adapter to the GPU; return copies and seconds, reads from disk included."""
    count = state.count
    if state.on_gpu[adapter]:
        remove(state.gpu_next, state.gpu_previous, adapter)
        remove(state.host_next, state.host_previous, adapter)
        return 0, policy.arrive(state, adapter, now_s)
    seconds = state.load_s[adapter]
    if state.on_host[adapter]:
        remove(state.host_next, state.host_previous, adapter)
    else:
        seconds += state.read_s[adapter]
        if count.host_adapters == limits.max_cpu_loras:
            leaving = policy.victim(limits, state, state.host_next, True, now_s)
            remove(state.host_next, state.host_previous, leaving)
            state.on_host[leaving] = False
            if state.on_gpu[leaving]:
                leave_gpu(policy, state, leaving)
        else:
            count.host_adapters += 1
        state.on_host[adapter] = True
    if count.gpu_adapters == limits.gpu_slots:
        leave_gpu(policy, state, policy.victim(limits, state, state.gpu_next, False, now_s))
    count.gpu_adapters += 1
    count.free_blocks -= state.adapter_blocks[adapter]
    state.on_gpu[adapter] = True
    return 1, seconds


@helper
def become_idle(limits: Limits, state: State, adapter: int) -> None:
    """Let an adapter that no request uses be evicted, after all those that are idle already."""
    append(state.gpu_next, state.gpu_previous, adapter, limits.base_model + 1)
    append(state.host_next, state.host_previous, adapter, limits.base_model + 1)


@helper
def leave_gpu(policy: LoadsAtAdmission, state: State, adapter: int) -> None:
    """Let an idle adapter leave the GPU: its slot is free, and its KV blocks if it has any."""
    count = state.count
    remove(state.gpu_next, state.gpu_previous, adapter)
    state.on_gpu[adapter] = False
    count.gpu_adapters -= 1
    count.free_blocks += state.adapter_blocks[adapter]
    policy.evict(state, adapter)
