"""vLLM's two adapter caches, and the chain of evictions in them.

vLLM keeps the adapters in slots, and those in host memory, in caches ordered by their last touch. A
step touches every adapter of its batch, one after the other in the order of a Python set, which is
arbitrary but the same in all steps of a process. One that is not there takes the place of the one
touched least recently, *also one that the same step needs and has not touched yet*; that one is
then loaded again in its turn and evicts the next. So one new adapter can cost a chain of copies, as
long as the batch where every slot is in use.

After a step the age of an adapter is (last step that used it, its place in the order). Adapters out
of the batch stand in lists by that age. Those of the batch that were in the last step's, too, are
all of its age and need no list: their places order them. An adapter that joins stays in its list
until the walk touches it, for until then it may be the oldest.

Sources: ``LRUCacheWorkerLoRAManager._apply_adapters`` in ``vllm/lora/worker_manager.py`` and
``LRUCacheLoRAModelManager.activate_adapter`` in ``vllm/lora/models.py`` (0.8.5), in
``vllm/lora/model_manager.py`` (0.32.0).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.state import NOT_RUNNING, Limits, Links, Requests, State, append, remove


@helper
def join_batch(state: State, adapter: int, request: int) -> None:
    """Note that an adapter is in the batch from this step on."""
    state.joined_step[adapter] = state.count.step
    state.brought_by[adapter] = request


@helper
def leave_batch(limits: Limits, state: State, adapter: int) -> None:
    """Let an adapter that no request uses stand among those that were last touched when it was."""
    state.left_step[adapter] = state.count.step - 1
    if not state.pinned[adapter]:
        sentinel = limits.base_model + 1
        _insert_by_age(state, state.gpu_next, state.gpu_previous, adapter, sentinel)
        _insert_by_age(state, state.host_next, state.host_previous, adapter, sentinel)


@helper
def _insert_by_age(
    state: State, following: Links, preceding: Links, adapter: int, sentinel: int
) -> None:
    """Put an adapter, last touched in the step before this one, into a list."""
    before = preceding[sentinel]
    while (
        before != sentinel
        and state.left_step[before] == state.left_step[adapter]
        and state.place[before] > state.place[adapter]
    ):
        before = preceding[before]
    append(following, preceding, adapter, following[before])


@helper
def bring_batch(
    limits: Limits, requests: Requests, state: State, continuing: int
) -> tuple[int, float]:
    """Make the adapters of a batch resident, in vLLM's way.

    Parameters
    ----------
    limits : Limits
    requests : Requests
        The wait for its adapter is added to the request that brought it into the batch.
    state : State
    continuing : int
        Adapters of the batch that were in the last one; those behind them in ``active_list`` join.

    Returns
    -------
    loads : int
        Copies into a slot.
    seconds : float
        That these take, reads from disk included.
    """
    count = state.count
    slots_short = count.gpu_adapters - limits.gpu_slots
    places_short = count.host_adapters - limits.max_cpu_loras
    for i in range(continuing, count.active):
        adapter = state.active_list[i]
        slots_short += not state.on_gpu[adapter]
        places_short += not state.on_host[adapter]
    first = continuing
    if slots_short > 0 or places_short > 0:
        _sort_batch(state)
        first = 0
    loads, seconds = 0, 0.0
    slot_victim = place_victim = 0  # how far the walk has got in looking for victims
    for i in range(first, count.active):
        adapter = state.active_list[i]
        _touch(state, adapter)
        load_s = 0.0
        if not state.on_host[adapter]:
            if count.host_adapters == limits.max_cpu_loras:
                place_victim = _evict(limits, state, True, i, place_victim)
            load_s += state.read_s[adapter]
            count.host_adapters += 1
            state.on_host[adapter] = True
        if not state.on_gpu[adapter]:
            if count.gpu_adapters == limits.gpu_slots:
                slot_victim = _evict(limits, state, False, i, slot_victim)
            load_s += state.load_s[adapter]
            loads += 1
            count.gpu_adapters += 1
            state.on_gpu[adapter] = True
        if state.joined_step[adapter] == count.step:
            requests.load_wait_s[state.brought_by[adapter]] += load_s
        seconds += load_s
    return loads, seconds


@helper
def _sort_batch(state: State) -> None:
    """Sort the adapters of the batch by place: by insertion, for they mostly are."""
    batch = state.active_list
    for i in range(1, state.count.active):
        adapter = batch[i]
        j = i
        while j > 0 and state.place[batch[j - 1]] > state.place[adapter]:
            batch[j] = batch[j - 1]
            state.active_index[batch[j]] = j
            j -= 1
        batch[j] = adapter
        state.active_index[adapter] = j


@helper
def _is_listed(state: State, adapter: int) -> bool:
    """Return whether an adapter stands in the list of each cache that it is in."""
    joins = state.joined_step[adapter] == state.count.step
    return bool((joins or state.running_by_adapter[adapter] == 0) and not state.pinned[adapter])


@helper
def _touch(state: State, adapter: int) -> None:
    """Make an adapter of the batch the youngest; one that joins leaves its lists."""
    if _is_listed(state, adapter):
        if state.on_gpu[adapter]:
            remove(state.gpu_next, state.gpu_previous, adapter)
        if state.on_host[adapter]:
            remove(state.host_next, state.host_previous, adapter)


@helper
def _evict(limits: Limits, state: State, is_host: bool, touched: int, looked_at: int) -> int:
    """Free a slot, or with `is_host` a place in host memory and the slot of what stood there.

    The adapter of the cache leaves that was touched least recently, and not in this walk.

    Parameters
    ----------
    limits : Limits
    state : State
        ``out_of_slots`` is set where all that is left is pinned.
    is_host : bool
    touched : int
        Place of the walk in the batch: up to there all are touched.
    looked_at : int
        Up to there the batch holds no victim, as this function has found before.

    Returns
    -------
    int
        The new `looked_at`.
    """
    count, sentinel = state.count, limits.base_model + 1
    following, present = state.gpu_next, state.on_gpu
    if is_host:
        following, present = state.host_next, state.on_host
    listed = following[sentinel]
    victim = listed if listed != sentinel else NOT_RUNNING
    if listed == sentinel or state.left_step[listed] >= count.step - 1:
        looked_at = max(looked_at, touched + 1)
        while looked_at < count.active:
            adapter = state.active_list[looked_at]
            joins = state.joined_step[adapter] == count.step
            if present[adapter] and not joins and not state.pinned[adapter]:
                if listed == sentinel or state.place[adapter] < state.place[listed]:
                    victim = adapter
                break
            looked_at += 1
    if victim == NOT_RUNNING:
        count.out_of_slots = True
        return looked_at
    if is_host:
        count.host_adapters -= 1
        _leave(state, state.host_next, state.host_previous, state.on_host, victim)
    if state.on_gpu[victim]:
        count.gpu_adapters -= 1
        _leave(state, state.gpu_next, state.gpu_previous, state.on_gpu, victim)
    return looked_at


@helper
def _leave(
    state: State, following: Links, preceding: Links, present: NDArray[np.bool_], adapter: int
) -> None:
    """Take an adapter out of a cache, and out of its list if it stands there."""
    if _is_listed(state, adapter):
        remove(following, preceding, adapter)
    present[adapter] = False
