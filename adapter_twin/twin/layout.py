"""The layout of a run: its arrays before the first step, and what cannot be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.twin.block_pool import new_pool
from adapter_twin.twin.block_scheduler import BY_BLOCK
from adapter_twin.twin.clock import CLOCK, PAUSES, STEPS, FrontEnd, StepLaw
from adapter_twin.twin.closed_loop import new_closed_loop
from adapter_twin.twin.policy import VLLM, Policy
from adapter_twin.twin.session import Session, table
from adapter_twin.twin.state import (
    CHOSEN,
    COUNTERS,
    MEMBERS,
    NOT_RUNNING,
    PROGRESS,
    Blocks,
    Limits,
    Requests,
    State,
)
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import Trace

LABEL_TABLE = 1 << 19
"""Places for distinct label sets; past half of them, new ones are counted but not remembered."""


def _record(dtype: Any) -> Any:
    return table(1, dtype)[0]


def _notes(first: Mapping[str, float], size: int) -> Any:
    """Return what a policy notes, as it begins."""
    dtype = [(name, np.dtype(type(value))) for name, value in first.items()]
    notes = table(size, dtype or [("nothing", np.bool_)])
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
    priorities: NDArray[np.int64] | None = None,
    reserves_prompts: bool = False,
    max_model_len: int | None = None,
    preloaded: bool = False,
    overhead_s: NDArray[np.float64] | None = None,
) -> Session:
    """Lay out a run.

    Parameters
    ----------
    trace : Trace
        `output_tokens` are those that the engine will emit.
    engine : EngineConfig
        Prefix caching and asynchronous scheduling, if left out, are off.
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
    priorities : int, shape (adapters,), optional
        Of the adapters' requests; left out, all are 0, that of the base model.
    reserves_prompts : bool
        Admit a prompt when KV blocks for all of it are free, not for its first chunk.
    max_model_len : int, optional
        Longer requests are refused as they arrive.
    preloaded : bool
        The adapters were loaded before, one after the other: as many as fit are still there.
    overhead_s : float64, shape (2,), optional
        Time of an answer in the front end, as for `adapter_twin.twin.records.make_records`; left
        out, none. It counts where requests wait for answers.

    Raises
    ------
    AdapterTwinError
        A request is longer than the KV cache or, unchunked, than a step; more adapters are pinned
        than there are slots; or a policy does not know what the engine does.
    """
    n_adapters = len(load_s)
    priorities = np.zeros(n_adapters, np.int64) if priorities is None else priorities
    places = np.arange(n_adapters) if places is None else places
    pinned = np.zeros(n_adapters, np.bool_) if pinned is None else pinned
    _check_policy(policy, law, engine, pinned, pooled=adapter_blocks is not None)
    if adapter_blocks is None:
        adapter_blocks = np.zeros(n_adapters, np.int64)
    scheduling = _scheduling(engine, policy, priorities)
    blocks = np.append(adapter_blocks, 0)  # the base model takes none
    max_model_len = max_model_len or np.iinfo(np.int32).max
    check_lengths(trace, engine, kv_cache_tokens, blocks, max_model_len)
    limits = Limits(
        max_loras=engine.max_loras,
        gpu_slots=engine.max_loras if policy.reserves_slots else n_adapters,
        max_cpu_loras=engine.max_cpu_loras,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
        reserves_prompts=reserves_prompts,
        chunks_prompts=engine.enable_chunked_prefill,
        caches_prefixes=bool(engine.enable_prefix_caching),
        by_priority=engine.scheduling_policy == "priority",
        is_async=bool(engine.async_scheduling),
        long_prefill_token_threshold=engine.long_prefill_token_threshold,
        max_model_len=max_model_len,
        base_model=n_adapters,
        horizon=int(np.max(trace.output_tokens, initial=1)) + 1,
    )
    duration_s, in_flight_cap, *seconds = front_end
    observed = np.isfinite(front_end.scrape_period_s)
    scrapes = int(duration_s / front_end.scrape_period_s) + 2 if observed else 0
    clock = _record(CLOCK)
    clock.next_scrape_s = front_end.scrape_period_s
    state = _new_state(limits, len(trace), (load_s, read_s, blocks, places, pinned), policy)
    if preloaded:
        _preload(limits, state, slots=policy.reserves_slots)
    state.count.free_blocks = free = kv_blocks(kv_cache_tokens, engine.block_size)
    if scheduling == BY_BLOCK:
        state = state._replace(blocks=_new_blocks(limits, trace, priorities, free))
    requests = new_requests(trace, n_adapters)
    if trace.waits:
        requests = Requests._make(column.copy() for column in requests)  # laid out once more
    return Session(
        limits=limits,
        requests=requests,
        state=state,
        clock=clock,
        law=law,
        front_end=FrontEnd(float(duration_s), int(in_flight_cap), *map(float, seconds)),
        closed_loop=new_closed_loop(
            trace, requests, state.blocks, np.zeros(2) if overhead_s is None else overhead_s
        ),
        steps=table(1 << 16, STEPS),
        pauses=table(n_adapters + 1 + scrapes, PAUSES),
        seen=np.zeros(LABEL_TABLE if observed else 0, np.uint64),
        used=np.arange(n_adapters + 1) == n_adapters,  # the base model is there from the start
        policy=scheduling,
    )


def _preload(limits: Limits, state: State, *, slots: bool) -> None:
    """Let the last adapters that were loaded be where they fit; the first of them go first."""
    count, free = state.count, np.flatnonzero(~state.pinned)
    for room, present, following, preceding in (
        (limits.max_cpu_loras, state.on_host, state.host_next, state.host_previous),
        (limits.gpu_slots if slots else 0, state.on_gpu, state.gpu_next, state.gpu_previous),
    ):
        left = min(max(room - int(state.pinned.sum()), 0), len(free))
        loaded = free[len(free) - left :]
        present[loaded] = True
        ring = np.concatenate(([limits.base_model + 1], loaded, [limits.base_model + 1]))
        following[ring[:-1]], preceding[ring[1:]] = ring[1:], ring[:-1]
    count.host_adapters, count.gpu_adapters = state.on_host.sum(), state.on_gpu[:-1].sum()


def _check_policy(
    policy: Policy, law: StepLaw, engine: EngineConfig, pinned: NDArray[np.bool_], *, pooled: bool
) -> None:
    """Refuse a run that lacks what its policy asks for, or pins what cannot be."""
    name = type(policy).__name__
    remedy = "leave them out" if pooled else "give them"
    require(pooled != policy.reserves_slots, f"adapter_blocks: {remedy} for {name}")
    require(not pinned.any() or policy.heeds_pins, f"pinned: {name} cannot; leave `pinned` out")
    require(
        pinned.sum() <= engine.max_loras,
        f"pinned: {pinned.sum()} adapters exceed the max_loras = {engine.max_loras} slots; "
        "pin fewer or raise max_loras",
    )
    two_laws = len(law.coefficients) == 2 * (len(law.token_breaks) + 1)
    require(two_laws or not policy.merges, f"law: {name} needs that of a merged adapter")


def _new_blocks(limits: Limits, trace: Trace, priorities: NDArray[Any], blocks: int) -> Blocks:
    longest = int(np.max(trace.prompt_tokens + trace.output_tokens, initial=1))
    blocks *= limits.caches_prefixes  # else they are only counted
    return Blocks(
        progress=table(len(trace), PROGRESS),
        chosen=table(2, CHOSEN),
        members=np.zeros((2, limits.max_num_seqs), MEMBERS).view(np.recarray),
        priority=_typed(np.append(priorities, 0), np.int32),
        pool=new_pool(
            trace, blocks, limits.max_num_seqs, min(blocks, -(-longest // limits.block_size))
        ),
    )


def _scheduling(engine: EngineConfig, policy: Policy, priorities: NDArray[Any]) -> Policy:
    """Return the policy, or the one that knows all that the engine does."""
    by_priority = engine.scheduling_policy == "priority"
    require(
        by_priority or not priorities.any(),
        "priority: counts with scheduling_policy: priority only; set that, or leave it out",
    )
    features = {
        "enable_prefix_caching": engine.enable_prefix_caching,
        "scheduling_policy": by_priority,
        "long_prefill_token_threshold": engine.long_prefill_token_threshold > 0,
        "async_scheduling": engine.async_scheduling,
    }
    for name, is_on in features.items():
        if is_on:
            require(policy == VLLM, f"{name}: {type(policy).__name__} cannot; leave it out")
            return BY_BLOCK
    return policy


def check_lengths(
    trace: Trace,
    engine: EngineConfig,
    kv_cache_tokens: int,
    blocks: NDArray[np.int64] | None = None,
    max_model_len: int = np.iinfo(np.int32).max,
) -> None:
    """Refuse a trace with a request that does not fit into the KV cache even alone.

    Parameters
    ----------
    trace : Trace
    engine : EngineConfig
    kv_cache_tokens : int
        As vLLM reports it.
    blocks : int64, shape (adapters + 1,), optional
        KV blocks that each adapter takes, the base model last.
    max_model_len : int
        Longer requests are refused one by one.

    Raises
    ------
    AdapterTwinError
    """
    tokens, what = trace.prompt_tokens + trace.output_tokens, "request"
    taken = tokens <= max_model_len
    if blocks is not None and blocks.any():  # -1, the base model, is the last one
        tokens, what = tokens + engine.block_size * blocks[trace.adapter], "request and its adapter"
    longest = int(np.max(tokens, where=taken, initial=1))
    if longest > engine.block_size * kv_blocks(kv_cache_tokens, engine.block_size):
        raise AdapterTwinError(
            f"lengths: a {what} of {longest} tokens exceeds the KV cache of {kv_cache_tokens}; "
            "lower max_loras or max_lora_rank, or shorten the requests"
        )
    longest = int(np.max(trace.prompt_tokens + trace.output_tokens, where=taken, initial=1))
    require(
        engine.enable_chunked_prefill or longest <= engine.max_num_batched_tokens,
        f"max_num_batched_tokens: a request of {longest} tokens exceeds a step of "
        f"{engine.max_num_batched_tokens}; raise it, or leave enable_chunked_prefill on",
    )


def kv_blocks(kv_cache_tokens: int, block_size: int) -> int:
    """Return the KV blocks that requests can have: all but vLLM's null block."""
    return kv_cache_tokens // block_size - 1


def _typed(values: NDArray[Any], dtype: type) -> Any:
    """Return values of one type: numba compiles the loop anew for every other one."""
    return np.require(values, dtype, ["C_CONTIGUOUS", "WRITEABLE"])


def new_requests(trace: Trace, n_adapters: int) -> Requests:
    """Lay out the requests of a trace, to none of which anything has happened."""
    n = len(trace)
    times = ("ready_s", "scheduled_s", "first_token_s", "end_s")
    return Requests(
        arrival_s=_typed(trace.arrival_s, np.float64),
        adapter=np.where(trace.adapter < 0, n_adapters, trace.adapter).astype(np.int32),
        prompt_tokens=_typed(trace.prompt_tokens, np.int32),
        output_tokens=_typed(trace.output_tokens, np.int32),
        load_wait_s=np.zeros(n),
        preemptions=np.zeros(n, np.int32),
        stalls=np.zeros(n, np.int32),
        stalled_s=np.zeros(n),
        rejected=np.zeros(n, np.bool_),
        first_step=np.full(n, NOT_RUNNING, np.int32),
        cached_tokens=np.full(n, -1, np.int32),
        **{name: np.full(n, np.nan) for name in times},
    )


def state_of_requests(n: int) -> dict[str, Any]:
    """Return the columns of a `State` that have an entry per request, as they begin."""
    zeroed = ("order", "emitted", "base_tokens", "base_step")
    columns = {name: np.zeros(n, np.int32) for name in zeroed}
    return {**columns, "stack_index": np.full(n, NOT_RUNNING, np.int32)}


def _new_state(
    limits: Limits, n_requests: int, adapters: tuple[NDArray[Any], ...], policy: Policy
) -> State:
    n = limits.base_model
    load_s, read_s, adapter_blocks, places, pinned = adapters
    count = _record(COUNTERS)
    count.chunked = NOT_RUNNING
    count.gpu_adapters = count.host_adapters = pinned.sum()
    # A list that is empty points to its own sentinel.
    nodes = np.arange(n_requests + n + 1 + limits.horizon, dtype=np.int32)
    idle = ("gpu_next", "gpu_previous", "host_next", "host_previous")
    # Only to tell sets of adapters apart; the base model is in none of vLLM's label sets.
    labels = np.random.default_rng(0).integers(1, 2**63, (2, n + 1), dtype=np.uint64)
    count.label_hash = labels[0, n]  # both sets empty
    labels[:, n] = 0
    counted = ("running_by_adapter", "waiting_by_adapter")
    members = ("active_list", "active_index", "waiting_list", "waiting_index")
    steps = ("joined_step", "left_step", "brought_by")
    return State(
        count=count,
        next=nodes,
        previous=nodes.copy(),
        load_s=np.append(load_s, 0.0),
        read_s=np.append(read_s, 0.0),
        adapter_blocks=_typed(adapter_blocks, np.int64),
        on_gpu=np.append(pinned, True),
        on_host=_typed(pinned.copy(), np.bool_),
        pinned=_typed(pinned, np.bool_),
        place=_typed(places, np.int32),
        running_label=labels[0],
        waiting_label=labels[1],
        adapter_notes=_notes(policy.adapter_notes, n + 1),
        notes=_notes(policy.notes, 1)[0],
        stack=np.zeros(2 * limits.max_num_seqs, np.int32),
        opens_block=np.zeros(limits.block_size, np.int64),
        prefilled=np.zeros(limits.max_num_batched_tokens + 1, np.int32),
        completed=np.zeros(limits.max_num_seqs, np.int32),
        blocks=None,
        **state_of_requests(n_requests),
        **{name: np.zeros(n + 1, np.int32) for name in counted + members},
        **{name: np.full(n, NOT_RUNNING, np.int32) for name in steps},
        **{name: np.arange(n + 2, dtype=np.int32) for name in idle},
    )
