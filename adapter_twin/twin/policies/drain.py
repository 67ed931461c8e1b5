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

from dataclasses import dataclass

import numpy as np

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.state import DRAIN, Limits, Requests, Rules, State
from adapter_twin.workload.strict import require_rate

NOBODY = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Drain an adapter of the batch for one without a slot that has waited too long.

    Parameters
    ----------
    max_wait_s : float
        The wait in seconds from which an adapter without a slot starves.
    tolerance : float
        Longest output that a drained adapter still admits, over what its longest running request
        has left; SGLang's is 1.2, and 0 admits nothing.
    """

    max_wait_s: float
    tolerance: float = 1.2

    def __post_init__(self) -> None:
        require_rate(self, "max_wait_s")
        require_rate(self, "tolerance")

    def rules(self) -> Rules:
        """Return the compiled form."""
        return Rules(code=DRAIN, max_wait_s=float(self.max_wait_s), tolerance=float(self.tolerance))


@helper
def is_drained(state: State, adapter: int) -> bool:
    """Return whether an adapter of the batch is being drained."""
    return bool(state.drained_for[adapter] != NOBODY)


@helper
def first_to_pass(requests: Requests, state: State, rules: Rules, adapter: int) -> int:
    """Return the oldest waiting request that a drained adapter still admits, or -1."""
    longest = rules.tolerance * state.remaining[adapter]
    sentinel = len(requests.adapter) + adapter
    request = state.next[sentinel]
    while request != sentinel and requests.output_tokens[request] > longest:
        request = state.next[request]
    return int(request) if request != sentinel else NOBODY


@helper
def drain_for_starving(
    limits: Limits, requests: Requests, state: State, rules: Rules, now_s: float
) -> None:
    """Choose the adapters to drain, at the start of a step."""
    count = state.count
    _measure_remaining(requests, state)
    starving = _most_starving(limits, requests, state, rules, now_s)
    while starving != NOBODY and count.active == limits.max_loras:
        drained = NOBODY
        for i in range(count.active):
            adapter = state.active_list[i]
            if not is_drained(state, adapter) and (
                drained == NOBODY or state.remaining[adapter] < state.remaining[drained]
            ):
                drained = adapter
        if drained == NOBODY:
            return
        state.drained_for[drained] = starving
        state.drained_by[starving] = drained
        starving = _most_starving(limits, requests, state, rules, now_s)


@helper
def _most_starving(
    limits: Limits, requests: Requests, state: State, rules: Rules, now_s: float
) -> int:
    """Return the starving adapter that has waited longest and that none is drained for, or -1."""
    best, best_order = NOBODY, np.iinfo(np.int64).max
    for i in range(state.count.waiting_adapters):
        adapter = state.waiting_list[i]
        if adapter == limits.base_model or state.running_by_adapter[adapter] > 0:
            continue
        head = state.next[len(requests.adapter) + adapter]
        drained = state.drained_by[adapter]
        if (
            now_s - requests.ready_s[head] > rules.max_wait_s
            and (drained == NOBODY or state.drained_for[drained] != adapter)
            and state.order[head] < best_order
        ):
            best, best_order = adapter, state.order[head]
    return best


@helper
def _measure_remaining(requests: Requests, state: State) -> None:
    """Note for each adapter of the batch the tokens that its longest request has yet to emit."""
    count = state.count
    for i in range(count.active):
        state.remaining[state.active_list[i]] = 0
    for i in range(count.stack_top):
        request = state.stack[i]
        if state.stack_index[request] == i:
            left = requests.output_tokens[request] - state.emitted[request]
            if request != count.chunked:  # its prefill and every step since emitted a token
                left -= 1 + count.step - state.base_step[request]
            adapter = requests.adapter[request]
            state.remaining[adapter] = max(state.remaining[adapter], left)
