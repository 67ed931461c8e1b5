"""The policy interface: vLLM's own decisions, each a method that others may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from adapter_twin.twin import scheduler
from adapter_twin.twin.eviction_chain import bring_batch, join_batch, leave_batch
from adapter_twin.twin.hooks import Hooks
from adapter_twin.twin.state import Batch, Limits, Requests, State
from adapter_twin.workload.strict import CONFIG


@dataclass(frozen=True)
class Policy(Hooks, new_hooks=True):
    """vLLM's own policy; others inherit from it and override what they decide otherwise.

    Its methods are called by the scheduler, which numba compiles: they work on the arrays of
    `adapter_twin.twin.state`, in which `adapter` and `request` are indices, and may call functions
    decorated with `adapter_twin.twin.compiled.helper`, but not ``super()``. The time of a step's
    start, or of the end of what left the batch, is `now_s`, in seconds.

    Attributes
    ----------
    adapter_notes, notes : mapping
        What the policy notes of each adapter (the base model last), and of the run: names and first
        values. It finds them in ``state.adapter_notes[adapter]`` and ``state.notes``.
    reserves_slots : bool
        Adapters have slots; else they take KV blocks, as many as their rank asks for.
    merges : bool
        The step law must tell what a step of a merged adapter takes.
    heeds_pins : bool
        Pinned adapters are never evicted.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CONFIG  # for `read`
    adapter_notes: ClassVar[Mapping[str, float]] = {}
    notes: ClassVar[Mapping[str, float]] = {}
    reserves_slots: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    heeds_pins: ClassVar[bool] = True

    def schedule(self, limits: Limits, requests: Requests, state: State, now_s: float) -> Batch:
        """Choose the batch of the step that begins, by `adapter_twin.twin.scheduler`."""
        return scheduler.schedule(limits, requests, state, self, now_s)

    def complete_step(self, limits: Limits, requests: Requests, state: State, end_s: float) -> int:
        """Emit the tokens of the batch that ran; return how many requests that completes."""
        return scheduler.complete_step(limits, requests, state, self, end_s)

    def begin_step(self, limits: Limits, requests: Requests, state: State, now_s: float) -> float:
        """Decide what holds for a step, at its start; return the seconds that this adds to it."""
        return 0.0

    def priority(self, requests: Requests, state: State, request: int) -> float:
        """Return the priority of a waiting request: the lowest goes first, of equals the oldest.

        Preempted requests go before all others. Those of one adapter must keep their order as long
        as they wait.
        """
        return 0.0

    def candidate(self, requests: Requests, state: State, adapter: int) -> int:
        """Return the request that an adapter is the next to admit, or -1 for none.

        Asked for adapters with a waiting request that may join the batch. They stand in the list
        of the sentinel ``len(requests.adapter) + adapter``, see `State`.
        """
        return int(state.next[len(requests.adapter) + adapter])

    def blocks_to_load(self, state: State, adapter: int) -> int:
        """Return the KV blocks that an adapter takes as one of its requests is admitted."""
        return 0

    def make_room(self, limits: Limits, state: State, blocks: int, kept: int) -> bool:
        """Free KV blocks, not those of the adapter `kept`; return whether there are `blocks`."""
        return False

    def admit(self, state: State, adapter: int, now_s: float) -> None:
        """Note that a request of an adapter is admitted."""

    def join(
        self, limits: Limits, state: State, adapter: int, request: int, now_s: float
    ) -> tuple[int, float]:
        """Take an adapter into the batch for its first request; return as `complete_batch`."""
        join_batch(state, adapter, request)
        return 0, 0.0

    def leave(self, limits: Limits, state: State, adapter: int, now_s: float) -> None:
        """Take an adapter out of the batch: its last request there has ended or is preempted."""
        leave_batch(limits, state, adapter)

    def complete_batch(
        self, limits: Limits, requests: Requests, state: State, continuing: int, now_s: float
    ) -> tuple[int, float]:
        """End the scheduling of a step, in whose batch `continuing` adapters were already.

        Returns
        -------
        loads : int
            Copies of adapters into slots.
        seconds : float
            That these take before the model runs, reads from disk included.
        """
        if state.count.active == continuing:
            return 0, 0.0
        return bring_batch(limits, requests, state, continuing)

    def is_merged(self, state: State) -> bool:
        """Return whether the weights of the batch's one adapter are merged into the model's."""
        return False


VLLM = Policy()
"""What is in force where no other policy is named."""
