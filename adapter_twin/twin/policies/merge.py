"""Merged execution: the weights of the one adapter that has nearly all of the load.

As dLoRA (Wu et al., OSDI 2024): while one adapter's weights are merged into the model's, a step
costs what it does without adapters, and only that adapter's requests can run. dLoRA merges when one
adapter's share of the queued requests passes a threshold, unmerges below a lower one (its speed
unmerged over merged to begin with, 0.55), and takes 0.02 s for a switch of a Llama-7B
(vllm/core/scheduler.py of github.com/LLMServe/dLoRA-artifact at commit 72ba0ba).

Simpler than dLoRA in three points. The thresholds are fixed, where dLoRA adapts them to the
throughput. dLoRA suspends the running requests of others; here they end first, and nobody else
joins meanwhile. dLoRA moves credits from the merged adapter to those whose requests it overtakes,
and lets them run past a threshold; here the lead over them is limited.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from adapter_twin.errors import require
from adapter_twin.twin.compiled import helper
from adapter_twin.twin.residency import LoadsAtAdmission
from adapter_twin.twin.state import NOT_RUNNING, Limits, Requests, State
from adapter_twin.workload.adapters import Share
from adapter_twin.workload.strict import NotNegative, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge(LoadsAtAdmission):
    """Merge an adapter that has nearly all of the load into the model's weights.

    Parameters
    ----------
    merge_share : float
        Share of the running and waiting requests from which an adapter is merged.
    unmerge_share : float
        Share below which it is merged no longer.
    switch_s : float
        Time in seconds that merging takes, and unmerging.
    max_lead_s : float
        Nothing is merged that has overtaken another adapter's request by more: by how many seconds
        that arrived before the merged adapter's oldest waiting one, or before now if none waits.
    """

    merge_share: Share = 0.9
    unmerge_share: Share = 0.5
    switch_s: NotNegative = 0.02
    max_lead_s: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 60.0

    notes: ClassVar[Mapping[str, float]] = {
        "merging": NOT_RUNNING,  # the only adapter that admits requests
        "merged": False,  # its weights are merged
    }
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        low, high = self.unmerge_share, self.merge_share
        require(low <= high, f"unmerge_share: must be at most merge_share = {high}, got {low}")

    def begin_step(self, limits: Limits, requests: Requests, state: State, now_s: float) -> float:
        """Decide what is merged; return the seconds that switching takes."""
        count, note = state.count, state.notes
        total = count.running + count.waiting
        seconds = 0.0
        merging, share = note.merging, self.unmerge_share
        if merging == NOT_RUNNING:
            merging, share = _busiest(limits, state), self.merge_share
        if (
            merging != NOT_RUNNING
            and _load(state, merging) >= share * total
            and not _leads_too_far(requests, state, self.max_lead_s, merging, now_s)
        ):
            note.merging = merging
        else:
            if note.merged:
                seconds += self.switch_s
            note.merging, note.merged = NOT_RUNNING, False
        if (
            note.merging != NOT_RUNNING
            and not note.merged
            and count.running == state.running_by_adapter[note.merging]
        ):
            note.merged = True
            seconds += self.switch_s
        return seconds

    def candidate(self, requests: Requests, state: State, adapter: int) -> int:
        """Return an adapter's oldest request, or -1 while another is merged, or about to be."""
        if state.notes.merging != NOT_RUNNING and state.notes.merging != adapter:
            return -1
        return int(state.next[len(requests.adapter) + adapter])

    def is_merged(self, state: State) -> bool:
        """Return whether an adapter is merged."""
        return bool(state.notes.merged)


@helper
def _load(state: State, adapter: int) -> int:
    """Return the requests of an adapter, running and waiting."""
    return int(state.running_by_adapter[adapter] + state.waiting_by_adapter[adapter])


@helper
def _busiest(limits: Limits, state: State) -> int:
    """Return the adapter with the most requests; of equals, the first one."""
    count = state.count
    best, most = NOT_RUNNING, 0
    for i in range(count.active + count.waiting_adapters):
        j = i - count.active
        adapter = state.active_list[i] if j < 0 else state.waiting_list[j]
        load = _load(state, adapter)
        if adapter != limits.base_model and (load > most or (load == most and adapter < best)):
            best, most = adapter, load
    return int(best)


@helper
def _leads_too_far(
    requests: Requests, state: State, max_lead_s: float, adapter: int, now_s: float
) -> bool:
    """Return whether another adapter's (or the base model's) oldest request is overtaken by far."""
    lists = len(requests.adapter)
    next_s = now_s
    if state.waiting_by_adapter[adapter] > 0:
        next_s = requests.ready_s[state.next[lists + adapter]]
    for i in range(state.count.waiting_adapters):
        overtaken_s = requests.ready_s[state.next[lists + state.waiting_list[i]]]
        if next_s - overtaken_s > max_lead_s:
            return True
    return False
