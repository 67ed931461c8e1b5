"""The arrays of one run, and the compiled clock that drives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import AdapterTwinError
from adapter_twin.twin import clock as engine_clock
from adapter_twin.twin.clock import CLOCK, PAUSES, STEPS, FrontEnd
from adapter_twin.twin.compiled import for_arguments
from adapter_twin.twin.policy import VLLM, Policy
from adapter_twin.twin.state import COUNTERS, NOT_RUNNING, Limits, Requests, State
from adapter_twin.twin.step_law import StepLaw
from adapter_twin.workload.scenario import EngineConfig
from adapter_twin.workload.strict import require
from adapter_twin.workload.trace import Trace

LABEL_TABLE = 1 << 19
"""Places for distinct label sets; past half of them, new ones are counted but not remembered."""


@dataclass
class Session:
    """One run of the twin: the arguments of `adapter_twin.twin.clock.run`, in that order."""

    limits: Limits
    requests: Requests
    state: State
    policy: Policy
    clock: Any  # one record of CLOCK
    law: StepLaw
    front_end: FrontEnd
    steps: Any  # recarray of STEPS, grown as needed
    pauses: Any  # recarray of PAUSES
    seen: NDArray[np.uint64]
    used: NDArray[np.bool_]

    loop: ClassVar[Callable[..., bool]] = staticmethod(engine_clock.run)

    def run(self) -> None:
        """Run to the end of the window in the compiled loop."""
        while not self.loop(*arguments(self)):
            self._grow()
        self._check_slots()

    def turn(self) -> float:
        """Turn the engine loop once; see `adapter_twin.twin.clock.turn`."""
        # fields by name: attributes of a record take ten times as long
        if self.clock["steps"] + 1 >= len(self.steps):
            self._grow()
        event_s = self._turn(*arguments(self))
        self._check_slots()
        return event_s

    @cached_property
    def _turn(self) -> Callable[..., float]:
        return for_arguments(engine_clock.turn, arguments(self))

    def _check_slots(self) -> None:
        require(
            not self.state.count["out_of_slots"],
            "pinned: a batch needs the slot of a pinned adapter that is not in it, at which vLLM "
            "stops; pin fewer adapters or raise max_loras",
        )

    def _grow(self) -> None:
        """Make room for as many steps again."""
        self.steps = np.concatenate((self.steps, _table(len(self.steps), STEPS))).view(np.recarray)


arguments = attrgetter(*(column.name for column in fields(Session)))
"""Take a session apart, into what the compiled loop is called with."""


def _table(size: int, dtype: Any) -> Any:
    return np.zeros(size, dtype).view(np.recarray)


def _record(dtype: Any) -> Any:
    """One zeroed record with attribute access, in compiled code and out of it."""
    return _table(1, dtype)[0]


def _notes(first: Mapping[str, float], size: int) -> Any:
    """Return what a policy notes, as it begins."""
    dtype = [(name, np.dtype(type(value))) for name, value in first.items()]
    notes = _table(size, dtype or [("nothing", np.bool_)])
    for name, value in first.items():
        notes[name] = value
    return notes


def new_session(
    trace: Trace,
    engine: EngineConfig,
    law: StepLaw,
    front_end: FrontEnd,
    kv_cache_tokens: int,
    load_s: NDArray[np.float64],
    read_s: NDArray[np.float64],
    policy: Policy = VLLM,
    adapter_blocks: NDArray[np.int64] | None = None,
    *,
    places: NDArray[np.int64] | None = None,
    pinned: NDArray[np.bool_] | None = None,
    reserves_prompts: bool = False,
) -> Session:
    """Lay out a run.

    Parameters
    ----------
    trace : Trace
        `output_tokens` are those that the engine will emit.
    engine : EngineConfig
    law : StepLaw
    front_end : FrontEnd
    kv_cache_tokens : int
        As vLLM reports it: it keeps one block of them to itself.
    load_s, read_s : float64, shape (adapters,)
        Seconds to copy each adapter into a slot, and to read it from disk before that.
    policy : Policy
    adapter_blocks : int64, shape (adapters,), optional
        KV blocks that each adapter takes on the GPU, where it has no slot.
    places : int, shape (adapters,), optional
        Place of each adapter in the order in which a step touches its own (a permutation, vLLM's
        own caches only); left out, that of their indices.
    pinned : bool, shape (adapters,), optional
        Adapters that are never evicted, in a slot from the start.
    reserves_prompts : bool
        Admit a prompt when KV blocks for all of it are free, not for its first chunk.

    Raises
    ------
    AdapterTwinError
        A request is longer than the KV cache, or more adapters are pinned than there are slots.
    """
    n_adapters, n = len(load_s), len(trace)
    pooled, name = not policy.reserves_slots, type(policy).__name__
    require(pooled == (adapter_blocks is not None), f"adapter_blocks: {name} takes none, or needs")
    if adapter_blocks is None:
        adapter_blocks = np.zeros(n_adapters, np.int64)
    blocks = np.append(adapter_blocks, 0)  # the base model takes none
    check_lengths(trace, engine, kv_cache_tokens, blocks)
    places = np.arange(n_adapters) if places is None else places
    pinned = np.zeros(n_adapters, np.bool_) if pinned is None else pinned
    require(not pinned.any() or policy.heeds_pins, f"pinned: {name} cannot; leave `pinned` out")
    require(
        pinned.sum() <= engine.max_loras,
        f"pinned: {pinned.sum()} adapters exceed the max_loras = {engine.max_loras} slots; "
        "pin fewer or raise max_loras",
    )
    if policy.merges:
        regimes = len(law.token_breaks) + 1
        require(len(law.coefficients) == 2 * regimes, f"law: {name} needs that of a merged adapter")
    limits = Limits(
        max_loras=engine.max_loras,
        gpu_slots=n_adapters if pooled else engine.max_loras,
        max_cpu_loras=engine.max_cpu_loras,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
        reserves_prompts=reserves_prompts,
        base_model=n_adapters,
        horizon=int(np.max(trace.output_tokens, initial=1)) + 1,
    )
    observed = np.isfinite(front_end.scrape_period_s)
    scrapes = int(front_end.duration_s / front_end.scrape_period_s) + 2 if observed else 0
    used = np.zeros(n_adapters + 1, np.bool_)
    used[n_adapters] = True  # the base model is there from the start
    clock = _record(CLOCK)
    clock.next_scrape_s = front_end.scrape_period_s
    return Session(
        limits=limits,
        requests=_new_requests(trace, n_adapters),
        state=_new_state(
            limits,
            n,
            kv_blocks(kv_cache_tokens, engine.block_size),
            (load_s, read_s, blocks, places, pinned),
            policy,
        ),
        policy=policy,
        clock=clock,
        law=_typed_law(law),
        front_end=_typed_front_end(front_end),
        steps=_table(1 << 16, STEPS),
        pauses=_table(n_adapters + 1 + scrapes, PAUSES),
        seen=np.zeros(LABEL_TABLE if observed else 0, np.uint64),
        used=used,
    )


def check_lengths(
    trace: Trace,
    engine: EngineConfig,
    kv_cache_tokens: int,
    blocks: NDArray[np.int64] | None = None,
) -> None:
    """Raise `AdapterTwinError` for a request that does not fit even alone, with adapter blocks."""
    tokens, what = trace.prompt_tokens + trace.output_tokens, "request"
    if blocks is not None and blocks.any():  # -1, the base model, is the last one
        tokens, what = tokens + engine.block_size * blocks[trace.adapter], "request and its adapter"
    longest = int(np.max(tokens, initial=1))
    if longest > engine.block_size * kv_blocks(kv_cache_tokens, engine.block_size):
        raise AdapterTwinError(
            f"lengths: a {what} of {longest} tokens exceeds the KV cache of {kv_cache_tokens}; "
            "lower max_loras or max_lora_rank, or shorten the requests"
        )


def kv_blocks(kv_cache_tokens: int, block_size: int) -> int:
    """Return the KV blocks that requests can have: all but vLLM's null block."""
    return kv_cache_tokens // block_size - 1


# numba compiles the kernel anew for every combination of argument types: let there be one.


def _typed(values: NDArray[Any], dtype: type) -> Any:
    return np.require(values, dtype, ["C_CONTIGUOUS", "WRITEABLE"])


def _typed_law(law: StepLaw) -> StepLaw:
    token_breaks, coefficients, tile, per_waiting, scheduling = law
    return StepLaw(
        _typed(token_breaks, np.float64),
        _typed(coefficients, np.float64),
        int(tile),
        float(per_waiting),
        _typed(scheduling, np.float64),
    )


def _typed_front_end(front_end: FrontEnd) -> FrontEnd:
    duration_s, in_flight_cap, *seconds = front_end
    return FrontEnd(float(duration_s), int(in_flight_cap), *map(float, seconds))


def _new_requests(trace: Trace, n_adapters: int) -> Requests:
    n = len(trace)
    return Requests(
        arrival_s=_typed(trace.arrival_s, np.float64),
        adapter=np.where(trace.adapter < 0, n_adapters, trace.adapter).astype(np.int32),
        prompt_tokens=_typed(trace.prompt_tokens, np.int32),
        output_tokens=_typed(trace.output_tokens, np.int32),
        ready_s=np.full(n, np.nan),
        scheduled_s=np.full(n, np.nan),
        first_token_s=np.full(n, np.nan),
        end_s=np.full(n, np.nan),
        load_wait_s=np.zeros(n),
        preemptions=np.zeros(n, np.int32),
        stalls=np.zeros(n, np.int32),
        stalled_s=np.zeros(n),
        rejected=np.zeros(n, np.bool_),
        first_step=np.full(n, NOT_RUNNING, np.int32),
    )


def _new_state(
    limits: Limits,
    n_requests: int,
    free_blocks: int,
    adapters: tuple[NDArray[Any], ...],
    policy: Policy,
) -> State:
    n = limits.base_model
    load_s, read_s, adapter_blocks, places, pinned = adapters
    count = _record(COUNTERS)
    count.free_blocks, count.chunked = free_blocks, NOT_RUNNING
    count.gpu_adapters = count.host_adapters = pinned.sum()
    # A list that is empty points to its own sentinel.
    nodes = np.arange(n_requests + n + 1 + limits.horizon, dtype=np.int32)
    idle = np.arange(n + 2, dtype=np.int32)
    # Only to tell sets of adapters apart; the base model is in none of vLLM's label sets.
    labels = np.random.default_rng(0).integers(1, 2**63, (2, n + 1), dtype=np.uint64)
    count.label_hash = labels[0, n]  # both sets empty
    labels[:, n] = 0
    base_model = np.zeros(1)
    return State(
        count=count,
        next=nodes,
        previous=nodes.copy(),
        order=np.zeros(n_requests, np.int32),
        emitted=np.zeros(n_requests, np.int32),
        base_tokens=np.zeros(n_requests, np.int32),
        base_step=np.zeros(n_requests, np.int32),
        stack_index=np.full(n_requests, NOT_RUNNING, np.int32),
        running_by_adapter=np.zeros(n + 1, np.int32),
        waiting_by_adapter=np.zeros(n + 1, np.int32),
        load_s=np.concatenate((load_s, base_model)),
        read_s=np.concatenate((read_s, base_model)),
        adapter_blocks=_typed(adapter_blocks, np.int64),
        on_gpu=np.append(pinned, True),
        on_host=_typed(pinned.copy(), np.bool_),
        pinned=_typed(pinned, np.bool_),
        place=_typed(places, np.int32),
        joined_step=np.full(n, NOT_RUNNING, np.int32),
        left_step=np.full(n, NOT_RUNNING, np.int32),
        brought_by=np.full(n, NOT_RUNNING, np.int32),
        active_list=np.zeros(n + 1, np.int32),
        active_index=np.zeros(n + 1, np.int32),
        waiting_list=np.zeros(n + 1, np.int32),
        waiting_index=np.zeros(n + 1, np.int32),
        running_label=labels[0],
        waiting_label=labels[1],
        adapter_notes=_notes(policy.adapter_notes, n + 1),
        gpu_next=idle,
        gpu_previous=idle.copy(),
        host_next=idle.copy(),
        host_previous=idle.copy(),
        notes=_notes(policy.notes, 1)[0],
        stack=np.zeros(2 * limits.max_num_seqs, np.int32),
        opens_block=np.zeros(limits.block_size, np.int64),
        prefilled=np.zeros(limits.max_num_batched_tokens + 1, np.int32),
    )
