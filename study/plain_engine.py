"""vLLM's scheduler over plain lists, to read and to check the twin's against.

It does what `adapter_twin.twin.scheduler` does on arrays, without buckets, queues per adapter or
compiled code: slow, and short enough to be compared with vLLM's own by eye.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapter_twin.twin.clock import StepLaw
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import BASE_MODEL


class PlainStep(NamedTuple):
    """One step, as the twin records it."""

    end_s: float
    tokens: int
    decodes: int
    running: int
    waiting: int
    adapters: int
    loads: int
    free_blocks: int
    context_tokens: int
    load_s: float
    scheduling_s: float


@dataclass(eq=False)
class PlainRequest:
    """A request, and how far it is."""

    arrival_s: float
    adapter: int
    prompt_tokens: int
    output_tokens: int
    computed: int = 0
    blocks: int = 0
    preemptions: int = 0
    load_wait_s: float = 0.0
    scheduled_s: float = np.nan
    token_s: list[float] = field(default_factory=list)
    decoding: bool = False
    rejected: bool = False

    @property
    def tokens(self) -> int:
        """What must be in the KV cache before the next token."""
        return self.prompt_tokens + len(self.token_s)


@dataclass(kw_only=True)
class PlainEngine:
    """vLLM V1's scheduler and adapter caches, step by step.

    Attributes
    ----------
    config : EngineConfig
    kv_blocks : int
        Without the null block that vLLM keeps to itself.
    law : StepLaw
        How long a step takes.
    load_s, read_s : array
        Seconds in which each adapter is copied into a slot, and read from disk before.
    places : array of int
        Each adapter's place in the order in which a step touches its adapters.
    reserves_prompts : bool
        Whether a prompt is admitted only when blocks for all of it are free.
    """

    config: EngineConfig
    kv_blocks: int
    law: StepLaw
    load_s: NDArray[np.float64]
    read_s: NDArray[np.float64]
    places: NDArray[np.int64]
    reserves_prompts: bool = False

    def __post_init__(self) -> None:
        self.free = self.kv_blocks
        self.running: list[PlainRequest] = []
        self.waiting: deque[PlainRequest] = deque()
        self.joining: dict[int, PlainRequest] = {}
        # least recently touched first
        self.in_slots: OrderedDict[int, None] = OrderedDict()
        self.in_host_memory: OrderedDict[int, None] = OrderedDict()
        self.scanned = self.arrived = 0
        self.steps: list[PlainStep] = []

    def add(self, request: PlainRequest) -> None:
        """Take a request in, which waits then."""
        self.waiting.append(request)
        self.arrived += 1

    def blocks(self, tokens: int) -> int:
        """Return how many KV blocks hold that many tokens."""
        return -(-tokens // self.config.block_size)

    def allocate(self, request: PlainRequest, new_tokens: int) -> bool:
        """Give a request the blocks for its next tokens, if there are enough."""
        needed = self.blocks(request.computed + new_tokens) - request.blocks
        if needed > self.free:
            return False
        self.free -= needed
        request.blocks += needed
        return True

    def release(self, request: PlainRequest) -> None:
        """Take all blocks from a request: it has ended, or starts again."""
        self.free += request.blocks
        request.blocks = request.computed = 0
        request.decoding = False

    def schedule(self, now_s: float) -> dict[PlainRequest, int]:
        """Return how many tokens of which request the next step computes."""
        scheduled: dict[PlainRequest, int] = {}
        budget, preempted = self.config.max_num_batched_tokens, False
        position = 0
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            new_tokens = min(request.tokens - request.computed, budget)
            while not (fits := self.allocate(request, new_tokens)):
                victim = self.running.pop()
                self.release(victim)
                victim.preemptions += 1
                self.waiting.appendleft(victim)
                preempted = True
                if victim is request:
                    break
            if not fits:
                break
            scheduled[request] = new_tokens
            budget -= new_tokens
            position += 1

        adapters = adapters_of(scheduled)
        self.joining = {}
        skipped: deque[PlainRequest] = deque()
        while self.waiting and budget > 0 and not preempted:
            if len(self.running) == self.config.max_num_seqs:
                break
            request = self.waiting[0]
            is_new = request.adapter not in adapters and request.adapter != BASE_MODEL
            if is_new and len(adapters) == self.config.max_loras:
                skipped.appendleft(self.waiting.popleft())
                continue
            new_tokens = min(request.tokens, budget)
            reserved = request.tokens if self.reserves_prompts else new_tokens
            if self.blocks(reserved) > self.free or not self.allocate(request, new_tokens):
                break
            if is_new:
                self.joining[request.adapter] = request
            self.running.append(self.waiting.popleft())
            adapters |= {request.adapter} - {BASE_MODEL}
            scheduled[request] = new_tokens
            budget -= new_tokens
            if np.isnan(request.scheduled_s):
                request.scheduled_s = now_s
        scanned_all = not self.waiting and budget > 0 and not preempted
        scanned_all &= len(self.running) < self.config.max_num_seqs
        self.scanned = len(skipped) if scanned_all else 0
        self.waiting.extendleft(skipped)
        return scheduled

    def make_resident(self, scheduled: dict[PlainRequest, int]) -> tuple[float, int]:
        """Touch the step's adapters in order; return the seconds and the copies it takes.

        The order of ``LRUCacheWorkerLoRAManager``: the one least recently touched goes, even if
        this very step needs it.
        """
        total_s, loads = 0.0, 0
        for adapter in sorted(adapters_of(scheduled), key=self.places.__getitem__):
            load_s = 0.0
            if adapter not in self.in_host_memory:
                load_s += self.read_s[adapter]
                if len(self.in_host_memory) == self.config.max_cpu_loras:
                    evicted, _ = self.in_host_memory.popitem(last=False)
                    self.in_slots.pop(evicted, None)
                self.in_host_memory[adapter] = None
            self.in_host_memory.move_to_end(adapter)
            if adapter not in self.in_slots:
                load_s += self.load_s[adapter]
                if len(self.in_slots) == self.config.max_loras:
                    self.in_slots.popitem(last=False)
                self.in_slots[adapter] = None
                loads += 1
            self.in_slots.move_to_end(adapter)
            if adapter in self.joining:
                self.joining[adapter].load_wait_s += load_s
            total_s += load_s
        return total_s, loads

    def step(self, now_s: float) -> tuple[float, list[PlainRequest]]:
        """Run one step; return its end, and the requests that then get a token."""
        scheduled = self.schedule(now_s)
        load_s, loads = self.make_resident(scheduled)
        adapters = len(adapters_of(scheduled))
        decodes = sum(request.decoding for request in scheduled)
        for request, new_tokens in scheduled.items():
            request.computed += new_tokens
        tokens = sum(scheduled.values())
        context = sum(request.computed - request.decoding for request in scheduled)
        model_s = self.model_s(tokens, decodes, context, adapters)
        model_s += self.law.per_arrival * self.arrived
        self.arrived = 0
        scheduling_s = float(self.law.scheduling @ [1, len(self.running), self.scanned])
        end_s = now_s + model_s + scheduling_s + load_s
        queues = len(self.running), len(self.waiting), adapters
        times = load_s, scheduling_s
        self.steps.append(
            PlainStep(end_s, tokens, decodes, *queues, loads, self.free, context, *times)
        )
        return end_s, [request for request in scheduled if request.computed == request.tokens]

    def model_s(self, tokens: int, decodes: int, context: int, adapters: int) -> float:
        """Return how long the model takes for a batch, in s."""
        c = self.law.coefficients[int(np.searchsorted(self.law.token_breaks, tokens))]
        adapted = adapters > 0
        work = [1, tokens, decodes, context, adapters, adapters * tokens]
        return float(c @ [*work, adapted, adapted * tokens])


def adapters_of(scheduled: dict[PlainRequest, int]) -> set[int]:
    """Return the adapters of a step's requests."""
    return {request.adapter for request in scheduled} - {BASE_MODEL}


def serve(
    engine: PlainEngine,
    requests: Sequence[PlainRequest],
    duration_s: float,
    in_flight_cap: float = np.inf,
) -> None:
    """Serve requests, ordered by arrival, to the end of a window.

    Parameters
    ----------
    engine : PlainEngine
    requests : sequence of PlainRequest
    duration_s : float
    in_flight_cap : float
        Further requests are rejected.
    """
    coming = deque(requests)
    now_s, in_flight = 0.0, 0
    while True:
        while coming and coming[0].arrival_s <= now_s:
            request = coming.popleft()
            request.rejected = in_flight >= in_flight_cap
            if not request.rejected:
                in_flight += 1
                engine.add(request)
        if not engine.running and not engine.waiting:
            if not coming or coming[0].arrival_s > duration_s:
                return
            now_s = coming[0].arrival_s
            continue
        now_s, emitting = engine.step(now_s)
        if now_s > duration_s:
            engine.steps.pop()
            return
        for request in emitting:
            request.token_s.append(now_s)
            request.decoding = True
            if len(request.token_s) == request.output_tokens:
                engine.running.remove(request)
                engine.release(request)
                in_flight -= 1
