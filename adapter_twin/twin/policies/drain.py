"""Drain before switch: an adapter in the batch makes room for one that has waited too long.

As SGLang's LoRADrainer (``--lora-drain-wait-threshold``, python/sglang/srt/lora/lora_drainer.py at
commit 0f194e5; pull request 17913): when all slots are in the batch, every adapter without one
whose oldest request has waited longer than the threshold, the longest wait first, has one adapter
of the batch drained: the one whose running requests have the fewest tokens left to emit. A drained
adapter admits only requests that emit at most `tolerance` times what its longest running one has
left, until that batch has ended. The slot is not reserved: it goes to the oldest waiting request.

It differs from SGLang in two points. SGLang counts ``max_new_tokens``; here it is the output tokens
that will be emitted. SGLang also drains for an adapter in the batch whose requests wait for memory;
here only for one without a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.residency import LoadsAtAdmission, become_idle
from adapter_twin.twin.state import Limits, Requests, State
from adapter_twin.workload.strict import NotNegative, dataclass

NOBODY = -1
"""This number stands where there is no adapter or request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain(LoadsAtAdmission):
    """Drain an adapter of the batch for one without a slot that has waited too long.

    Parameters
    ----------
    max_wait_s : float
        The wait in seconds from which an adapter without a slot starves.
    tolerance : float
        Longest output that a drained adapter still admits, over what its longest running request
        has left; SGLang's is 1.2, and 0 admits nothing.
    """

    max_wait_s: NotNegative
    tolerance: NotNegative = 1.2

    adapter_notes: ClassVar[Mapping[str, float]] = {
        "drained_for": NOBODY,  # the adapter that it makes room for
        "drained_by": NOBODY,  # the adapter last drained for it
        "remaining": 0,  # tokens that its longest running request has yet to emit
    }

    def begin_step(self, limits: Limits, requests: Requests, state: State, now_s: float) -> float:
        """Choose the adapters to drain."""
        _measure_remaining(requests, state)
        starving = _most_starving(limits, requests, state, self.max_wait_s, now_s)
        while starving != NOBODY and state.count.active == limits.max_loras:
            drained = _nearest_to_its_end(state)
            if drained == NOBODY:
                break
            state.adapter_notes[drained].drained_for = starving
            state.adapter_notes[starving].drained_by = drained
            starving = _most_starving(limits, requests, state, self.max_wait_s, now_s)
        return 0.0

    def candidate(self, requests: Requests, state: State, adapter: int) -> int:
        """Return the oldest waiting request that a drained adapter still admits, or -1."""
        note, sentinel = state.adapter_notes[adapter], len(requests.adapter) + adapter
        request = state.next[sentinel]
        if note.drained_for == NOBODY:
            return int(request)
        longest = self.tolerance * note.remaining
        while request != sentinel and requests.output_tokens[request] > longest:
            request = state.next[request]
        return int(request) if request != sentinel else NOBODY

    def leave(self, limits: Limits, state: State, adapter: int, now_s: float) -> None:
        """End the drain with the batch."""
        state.adapter_notes[adapter].drained_for = NOBODY
        become_idle(limits, state, adapter)


@helper
def _nearest_to_its_end(state: State) -> int:
    """Return the adapter of the batch with the fewest tokens left that is not drained, or -1."""
    notes, best = state.adapter_notes, NOBODY
    for i in range(state.count.active):
        adapter = state.active_list[i]
        if notes[adapter].drained_for == NOBODY and (
            best == NOBODY or notes[adapter].remaining < notes[best].remaining
        ):
            best = adapter
    return int(best)


@helper
def _most_starving(
    limits: Limits, requests: Requests, state: State, max_wait_s: float, now_s: float
) -> int:
    """Return the starving adapter that has waited longest and that none is drained for, or -1."""
    best, best_order = NOBODY, np.iinfo(np.int64).max
    for i in range(state.count.waiting_adapters):
        adapter = state.waiting_list[i]
        if adapter == limits.base_model or state.running_by_adapter[adapter] > 0:
            continue
        head = state.next[len(requests.adapter) + adapter]
        drained = state.adapter_notes[adapter].drained_by
        if (
            now_s - requests.ready_s[head] > max_wait_s
            and (drained == NOBODY or state.adapter_notes[drained].drained_for != adapter)
            and state.order[head] < best_order
        ):
            best, best_order = adapter, state.order[head]
    return best


@helper
def _measure_remaining(requests: Requests, state: State) -> None:
    """Note for each adapter of the batch the tokens that its longest request has yet to emit."""
    count = state.count
    for i in range(count.active):
        state.adapter_notes[state.active_list[i]].remaining = 0
    for i in range(count.stack_top):
        request = state.stack[i]
        if state.stack_index[request] == i:
            left = requests.output_tokens[request] - state.emitted[request]
            if request != count.chunked:  # its prefill and every step since emitted a token
                left -= 1 + count.step - state.base_step[request]
            note = state.adapter_notes[requests.adapter[request]]
            note.remaining = max(note.remaining, left)
